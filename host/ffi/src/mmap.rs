//! Files as memory, and tensors out of bytes without a detour.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use tch::{Kind, Tensor};

use crate::{FfiError, Result, new_tensor, scalar_type, sys};

/// A file mapped read-only into memory.
///
/// The file must not be truncated by another process meanwhile: reading past its new end would end this one (SIGBUS).
/// That is the price of not copying model weights; nothing here writes to a mapped file.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole file. Fails as [`File::open`] does; an empty file gives an empty slice.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this value; that nobody truncates the file is the documented
        // condition, kept by the user who hands it to us.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        Ok(Self { map })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Returns a new CPU tensor of dtype `target` holding `bytes`, which are little-endian elements of dtype `source`.
///
/// Bytes are converted in one parallel pass straight into the result. Fails when a dimension is negative, or when
/// `bytes` is not exactly as long as `shape` needs. Bool bytes other than 0 and 1 are refused.
pub fn tensor_from_bytes(source: Kind, shape: &[i64], bytes: &[u8], target: Kind) -> Result<Tensor> {
    let needed = shape
        .iter()
        .try_fold(source.elt_size_in_bytes(), |total, &dim| total.checked_mul(usize::try_from(dim).ok()?))
        .filter(|&total| isize::try_from(total).is_ok());
    if needed != Some(bytes.len()) {
        let needed = needed.map_or("more than memory can hold".to_owned(), |n| format!("{n} bytes"));
        return Err(FfiError::new(format!(
            "a {source:?} tensor of shape {shape:?} needs {needed}, got {} bytes",
            bytes.len()
        )));
    }
    if source == Kind::Bool && bytes.iter().any(|&b| b > 1) {
        return Err(FfiError::new("a Bool tensor holds a byte other than 0 and 1"));
    }
    let (from, to) = (scalar_type(source)?, scalar_type(target)?);
    // SAFETY: `bytes` holds exactly the elements the shape describes (checked above) and is only read during the call;
    // the result owns its storage.
    new_tensor(|out| unsafe {
        sys::host_tensor_from_bytes(bytes.as_ptr().cast(), from, shape.as_ptr(), shape.len(), to, out)
    })
}
