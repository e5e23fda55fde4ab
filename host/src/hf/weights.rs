//! Which tensor lies where: the headers of a model folder's weight files, checked against the files' sizes.
//!
//! The header is read and validated here; the data is mapped by the worker. A file shorter or longer than its header
//! says, a name in two files, or an index that names a missing file is an error before anything is allocated.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::{names, torch_file};
use crate::error::{Error, IoContext, Result};

/// Longest safetensors header accepted: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a model folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Index into [`WeightIndex::files`].
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Byte range in the file.
    pub start: usize,
    pub end: usize,
    /// The rows of each head are stored as Meta does, the two halves of a rotary pair side by side; the Hugging Face layout
    /// has all first halves, then all second ones.
    pub paired_rows: bool,
}

/// Every tensor of a model folder by checkpoint name.
#[derive(Clone, Debug)]
pub struct WeightIndex {
    pub files: Vec<PathBuf>,
    pub tensors: BTreeMap<String, TensorEntry>,
}

impl WeightIndex {
    /// Reads the headers of `files` in `dir`; with no names given, of the files the folder's own index lists, else of its
    /// single weight file.
    pub fn open(dir: &Path, files: &[String]) -> Result<Self> {
        let names = if files.is_empty() { listed_files(dir)? } else { files.to_vec() };
        let mut index = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            index.add_file(dir.join(name))?;
        }
        names::rename(&mut index.tensors);
        Ok(index)
    }

    /// An adapter under PEFT's names: PEFT's folder, or a file such as torchtune's `adapter_model.pt`. `is_paired` says
    /// whether torchtune's model has Meta's order of rows ([`ModelConfig::is_paired_in_torchtune`]).
    ///
    /// [`ModelConfig::is_paired_in_torchtune`]: super::ModelConfig::is_paired_in_torchtune
    pub fn open_adapter(path: &Path, is_paired: bool) -> Result<Self> {
        let path = if path.is_dir() { path.join("adapter_model.safetensors") } else { path.to_owned() };
        let mut index = Self { files: Vec::new(), tensors: BTreeMap::new() };
        index.add_file(path)?;
        names::rename_adapter(&mut index.tensors, is_paired);
        Ok(index)
    }

    fn add_file(&mut self, path: PathBuf) -> Result<()> {
        if torch_file::is_torch(&path) { self.add_torch(path) } else { self.add_safetensors(path) }
    }

    fn add_torch(&mut self, path: PathBuf) -> Result<()> {
        let file = self.files.len();
        for tensor in torch_file::tensors(&path)? {
            let torch_file::Stored { name, dtype, shape, start, end } = tensor;
            self.insert(name, TensorEntry { file, dtype, shape, start, end, paired_rows: false }, &path)?;
        }
        self.files.push(path);
        Ok(())
    }

    fn insert(&mut self, name: String, entry: TensorEntry, path: &Path) -> Result<()> {
        let Some(other) = self.tensors.insert(name.clone(), entry) else { return Ok(()) };
        let first = self.files.get(other.file).map_or(path, PathBuf::as_path);
        Err(Error::config(format!("the tensor `{name}` is in two files")).at_file(first).at_file(path))
    }

    fn add_safetensors(&mut self, path: PathBuf) -> Result<()> {
        let (metadata, data_start) = read_header(&path)?;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let entry = TensorEntry {
                file,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + start,
                end: data_start + end,
                paired_rows: false,
            };
            self.insert(name, entry, &path)?;
        }
        self.files.push(path);
        Ok(())
    }

    /// The entry called `name`, which must have `shape`.
    pub fn get_shaped(&self, name: &str, shape: &[i64]) -> Result<&TensorEntry> {
        let entry = self.get(name)?;
        let found: Vec<i64> = entry.shape.iter().map(|size| *size as i64).collect();
        if found == shape {
            return Ok(entry);
        }
        let file = &self.files[entry.file];
        Err(Error::config(format!("cannot load `{name}` from `{}`", file.display()))
            .cause(format!("the file has shape {found:?}, `config.json` makes it {shape:?}"))
            .hint("check that `config.json` and the weights are of the same model"))
    }

    /// The entry called `name`, or an error that says which files were searched.
    pub fn get(&self, name: &str) -> Result<&TensorEntry> {
        self.tensors.get(name).ok_or_else(|| {
            let mut error = Error::config(format!("the checkpoint has no tensor `{name}`"));
            for file in &self.files {
                error = error.at_file(file);
            }
            error.hint("name every weight file under `checkpointer.checkpoint_files`, or leave the key out")
        })
    }
}

/// The files an index names, in order, or the single weight file; safetensors before PyTorch's own.
fn listed_files(dir: &Path) -> Result<Vec<String>> {
    const NAMES: [&str; 6] = [
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.bin",
    ];
    let found = NAMES.into_iter().find(|name| dir.join(name).exists());
    let index = found.filter(|name| name.ends_with(".json")).map(|name| dir.join(name));
    let Some(index) = index else {
        if let Some(name) = found {
            return Ok(vec![name.to_owned()]);
        }
        return Err(Error::config(format!("no weights in the model folder `{}`", dir.display())).hint(
            "it needs `model.safetensors`, or `model.safetensors.index.json` and the files that names; files under other \
             names are listed in `checkpointer.checkpoint_files`",
        ));
    };
    let text = std::fs::read_to_string(&index).path_context("read", &index)?;
    let bad = |cause: String| Error::config("the weight index cannot be used").at_file(&index).cause(cause);
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map = value.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| bad("no `weight_map`".into()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("`{tensor}` is not mapped to a file name")))?;
        // A name with a separator could leave the folder.
        if Path::new(file).file_name().is_none_or(|name| name != file) {
            return Err(bad(format!("`{file}` is not a plain file name")));
        }
        names.push(file.to_owned());
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// The header of one file and where its data starts.
fn read_header(path: &Path) -> Result<(Metadata, usize)> {
    let bad = |cause: String| {
        Error::config(format!("`{}` is not a whole safetensors file", path.display()))
            .cause(cause)
            .hint("copy or download the file again")
    };
    let mut file = File::open(path)
        .map_err(|error| Error::config(format!("cannot open the weight file `{}`", path.display())).cause(error))?;
    let size = file.metadata().path_context("read the size of", path)?.len();
    let mut prefix = [0u8; 8];
    file.read_exact(&mut prefix).map_err(|_| bad(format!("it has {size} bytes, a header alone has more")))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > size.saturating_sub(8) {
        return Err(bad(format!("its header claims {header_bytes} bytes of a file of {size}")));
    }
    let mut header = vec![0u8; header_bytes as usize];
    file.read_exact(&mut header).map_err(|error| bad(error.to_string()))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| bad(error.to_string()))?;
    let data_bytes = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
    let expected = 8 + header_bytes + data_bytes;
    if expected != size {
        return Err(bad(format!("its header describes {expected} bytes, the file has {size}")));
    }
    Ok((metadata, 8 + header_bytes as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    fn write(path: &Path, name: &str) {
        let data = [0u8; 8];
        let view = TensorView::new(Dtype::F32, vec![2], &data).unwrap();
        safetensors::serialize_to_file([(name, view)], None, path).unwrap();
    }

    #[test]
    fn finds_tensors_and_refuses_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write(&path, "a");
        let index = WeightIndex::open(dir.path(), &[]).unwrap();
        let entry = index.get("a").unwrap();
        assert_eq!((entry.shape.as_slice(), entry.end - entry.start), ([2usize].as_slice(), 8));
        assert!(index.get("b").unwrap_err().message.contains("no tensor `b`"));

        write(&dir.path().join("again.safetensors"), "a");
        let twice = WeightIndex::open(dir.path(), &["model.safetensors".into(), "again.safetensors".into()]);
        assert!(twice.unwrap_err().message.contains("in two files"));

        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(WeightIndex::open(dir.path(), &[]).is_err(), "cut at {cut}");
        }
        std::fs::write(&path, [&whole[..], b"tail"].concat()).unwrap();
        assert!(WeightIndex::open(dir.path(), &[]).is_err());
    }

    #[test]
    fn an_index_may_not_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "../x.safetensors"}}"#).unwrap();
        assert!(WeightIndex::open(dir.path(), &[]).unwrap_err().causes[0].contains("plain file name"));
    }
}
