//! A checkpoint's tensors, mapped and converted straight to the dtype and device they are used in.

use host::hf::{TensorEntry, WeightIndex};
use host::{Error, Result};
use host_ffi::mmap::{self, MappedFile};
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::torch::TorchContext;

/// Open weight files of one model folder.
pub struct Weights {
    pub index: WeightIndex,
    files: Vec<MappedFile>,
}

impl Weights {
    pub fn open(index: WeightIndex) -> Result<Self> {
        let files = index
            .files
            .iter()
            .map(|path| MappedFile::open(path).torch(format!("map `{}`", path.display())))
            .collect::<Result<_>>()?;
        Ok(Self { index, files })
    }

    /// Checks that every tensor is of a type that is read, those that a model does not ask for included: all of them are
    /// written out again when the adapter is merged.
    pub fn check_types(&self) -> Result<()> {
        self.index.tensors.iter().try_for_each(|(name, entry)| self.kind(name, entry).map(drop))
    }

    fn kind(&self, name: &str, entry: &TensorEntry) -> Result<Kind> {
        match entry.dtype {
            Dtype::BF16 => Ok(Kind::BFloat16),
            Dtype::F16 => Ok(Kind::Half),
            Dtype::F32 => Ok(Kind::Float),
            other => Err(Error::config(format!("the tensor `{name}` is of type {other:?}"))
                .at_file(&self.index.files[entry.file])
                .hint("types read: BF16, F16, F32")),
        }
    }

    /// The tensor called `name`, which must have `shape`.
    pub fn load(&self, name: &str, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.index.get(name)?;
        let found: Vec<i64> = entry.shape.iter().map(|size| *size as i64).collect();
        if found != shape {
            let file = &self.index.files[entry.file];
            return Err(Error::config(format!("cannot load `{name}` from `{}`", file.display()))
                .cause(format!("the file has shape {found:?}, `config.json` makes it {shape:?}"))
                .hint("check that `config.json` and the weights are of the same model"));
        }
        self.load_any(name, kind, device)
    }

    /// The tensor called `name`, in whatever shape the file says.
    pub fn load_any(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.index.get(name)?;
        let shape: Vec<i64> = entry.shape.iter().map(|size| *size as i64).collect();
        let source = self.kind(name, entry)?;
        let bytes = &self.files[entry.file][entry.start..entry.end];
        let tensor = mmap::tensor_from_bytes(source, &shape, bytes, kind).torch(format!("read `{name}`"))?;
        Ok(tensor.to_device(device))
    }
}
