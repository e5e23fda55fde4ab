//! A checkpoint's tensors, mapped and converted straight to the dtype and device they are used in.

use std::ops::Range;

use host::hf::{ModelConfig, TensorEntry, WeightIndex};
use host::{Error, Result};
use host_ffi::mmap::{self, MappedFile};
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::torch::TorchContext;

/// Open weight files of one model folder.
pub struct Weights {
    pub index: WeightIndex,
    files: Vec<MappedFile>,
    /// Of the model, where rows may be stored in pairs.
    head_dim: i64,
}

impl Weights {
    pub fn open(index: WeightIndex) -> Result<Self> {
        let files = index
            .files
            .iter()
            .map(|path| MappedFile::open(path).torch(format!("map `{}`", path.display())))
            .collect::<Result<_>>()?;
        Ok(Self { index, files, head_dim: 0 })
    }

    /// Opens a model's weights, in the Hugging Face layout whatever layout they are stored in.
    pub fn of_model(index: WeightIndex, config: &ModelConfig) -> Result<Self> {
        Ok(Self { head_dim: config.head_dim, ..Self::open(index)? })
    }

    /// Checks that every tensor is of a type that is read, those that a model does not ask for included: all of them are
    /// written out again when the adapter is merged.
    pub fn check_types(&self) -> Result<()> {
        self.index.tensors.iter().try_for_each(|(name, entry)| self.kind(name, entry).map(drop))
    }

    /// Tells models apart without reading all of them: a digest of every tensor's name, type, shape and first bytes.
    pub fn fingerprint(&self) -> String {
        const FIRST_BYTES: usize = 4096;
        let mut hasher = blake3::Hasher::new();
        for (name, entry) in &self.index.tensors {
            let bytes = &self.files[entry.file][entry.start..entry.end];
            hasher.update(format!("{name} {:?} {:?} ", entry.dtype, entry.shape).as_bytes());
            hasher.update(&bytes[..bytes.len().min(FIRST_BYTES)]);
        }
        hasher.finalize().to_hex().to_string()
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
        self.index.get_shaped(name, shape)?;
        self.load_any(name, kind, device)
    }

    /// The tensor called `name`, in whatever shape the file says.
    pub fn load_any(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.index.get(name)?;
        let shape: Vec<i64> = entry.shape.iter().map(|size| *size as i64).collect();
        let source = self.kind(name, entry)?;
        let bytes = &self.files[entry.file][entry.start..entry.end];
        let tensor = mmap::tensor_from_bytes(source, &shape, bytes, kind).torch(format!("read `{name}`"))?;
        let tensor = if entry.paired_rows { self.split_pairs(name, tensor)? } else { tensor };
        Ok(tensor.to_device(device))
    }

    /// Numbers `range` of the tensor called `name`, which must have `shape`, end to end: no others are read.
    pub fn load_range(&self, name: &str, shape: &[i64], range: Range<i64>, kind: Kind) -> Result<Tensor> {
        let entry = self.index.get_shaped(name, shape)?;
        if entry.paired_rows {
            let whole = self.load_any(name, kind, Device::Cpu)?.reshape([-1]);
            return Ok(whole.narrow(0, range.start, range.end - range.start));
        }
        let source = self.kind(name, entry)?;
        let at = |number: i64| entry.start + number as usize * source.elt_size_in_bytes();
        let bytes = &self.files[entry.file][at(range.start)..at(range.end)];
        mmap::tensor_from_bytes(source, &[range.end - range.start], bytes, kind).torch(format!("read `{name}`"))
    }

    /// Rows `(pair, half)` of each head to `(half, pair)`: Meta's layout to Hugging Face's (parity §3.4).
    fn split_pairs(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let size = tensor.size();
        match size[..] {
            [rows, columns] if self.head_dim > 0 && rows % self.head_dim == 0 => {
                let heads = tensor.view([rows / self.head_dim, self.head_dim / 2, 2, columns]);
                Ok(heads.transpose(1, 2).reshape([rows, columns]))
            }
            _ => Err(Error::config(format!(
                "`{name}` has shape {size:?}, no multiple of the head size {}",
                self.head_dim
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn open(dtype: Dtype, bytes: &[u8]) -> Weights {
        let dir = tempfile::tempdir().unwrap();
        let view = TensorView::new(dtype, vec![2], bytes).unwrap();
        safetensors::serialize_to_file([("a.weight", view)], None, &dir.path().join("model.safetensors")).unwrap();
        // Mapped: it stays readable when the folder is gone.
        Weights::open(WeightIndex::open(dir.path(), &[]).unwrap()).unwrap()
    }

    /// Half precision becomes the run's own type; whatever else is an error that names the tensor, before anything is built.
    #[test]
    fn types_are_converted_or_refused() {
        let half = open(Dtype::F16, &[0x00, 0x3c, 0x00, 0xc0]); // 1, -2
        half.check_types().unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let tensor = half.load("a.weight", &[2], kind, Device::Cpu).unwrap();
            assert_eq!(tensor.kind(), kind);
            assert_eq!(Vec::<f64>::try_from(tensor.to_kind(Kind::Double)).unwrap(), [1.0, -2.0]);
        }
        for dtype in [Dtype::F64, Dtype::I8, Dtype::U8, Dtype::I32, Dtype::F8_E4M3, Dtype::BOOL] {
            let weights = open(dtype, &vec![0; 2 * dtype.bitsize() / 8]);
            for error in [weights.check_types(), weights.load("a.weight", &[2], Kind::Float, Device::Cpu).map(drop)] {
                let error = error.unwrap_err();
                assert_eq!(error.message, format!("the tensor `a.weight` is of type {dtype:?}"));
                assert_eq!(error.hints, ["types read: BF16, F16, F32"]);
                assert!(error.locations[0].file.ends_with("model.safetensors"));
            }
        }
    }

    #[test]
    fn a_fingerprint_tells_types_and_numbers_apart() {
        let fingerprint = |dtype, bytes: &[u8]| open(dtype, bytes).fingerprint();
        let one = fingerprint(Dtype::F16, &[1, 2, 3, 4]);
        assert_eq!(one, fingerprint(Dtype::F16, &[1, 2, 3, 4]));
        assert_ne!(one, fingerprint(Dtype::F16, &[1, 2, 3, 5]));
        assert_ne!(one, fingerprint(Dtype::BF16, &[1, 2, 3, 4]));
    }
}
