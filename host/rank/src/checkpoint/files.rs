//! Single files: JSON and safetensors, synced to disk.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use host::error::IoContext;
use host::{Error, Result};
use safetensors::{Dtype, View};
use serde::Serialize;
use tch::{Kind, Tensor};

/// Writes `value` as indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| {
        Error::bug(format!("cannot write `{}` as JSON", path.display())).cause(error).hint(Error::REPORT)
    })?;
    text.push('\n');
    write_bytes(path, text.as_bytes())
}

pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).path_context("create", path)?;
    file.write_all(bytes).path_context("write", path)?;
    file.sync_all().path_context("write", path)
}

/// Writes named tensors as one safetensors file.
pub fn write_tensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let views = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let shape = tensor.size().iter().map(|size| *size as usize).collect();
            let view =
                LazyTensor { dtype: dtype(tensor.kind())?, shape, produce: Box::new(move || tensor.shallow_clone()) };
            Ok((name, view))
        })
        .collect::<Result<Vec<_>>>()?;
    write_lazy(path, views)
}

/// A tensor that is made when its turn to be written comes, so that one at a time is in memory.
pub struct LazyTensor<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub produce: Box<dyn Fn() -> Tensor + 'a>,
}

/// Writes tensors one after another; each is produced when it is written.
pub fn write_lazy(path: &Path, tensors: Vec<(String, LazyTensor)>) -> Result<()> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| Error::run(format!("cannot write `{}`", path.display())).cause(error))?;
    sync(path)
}

/// Waits until `path`, a file or a folder, is on disk.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).path_context("sync", path)
}

impl View for LazyTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor = (self.produce)().to_device(tch::Device::Cpu).contiguous();
        let mut bytes = vec![0u8; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// The safetensors name of a tensor's kind.
pub fn dtype(kind: Kind) -> Result<Dtype> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::BFloat16 => Ok(Dtype::BF16),
        Kind::Half => Ok(Dtype::F16),
        other => Err(Error::bug(format!("no file format for tensors of kind {other:?}")).hint(Error::REPORT)),
    }
}
