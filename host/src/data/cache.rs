//! Tokenised rows on disk, so that only the first start of a run pays for them.
//!
//! One safetensors file a key: `tokens` U32, `trained` U8 and `offsets` U64, with the report and a BLAKE3 checksum in the
//! metadata. The key is a hash of everything that decides the tokens, so an entry is never stale, only unused; nothing
//! is ever evicted. Whatever cannot be read back whole is built again, with a warning. Nothing here fails a run.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::data::samples::{Samples, Tokenized};
use crate::error::{Error, IoContext, Result};

/// Raise it whenever the same key parts give other tokens (the rules, the tokenizers library) or the layout changes.
const CODE_VERSION: u32 = 3;

pub struct Cache {
    path: PathBuf,
}

/// A hash of `parts`, which must be everything that decides the tokens.
pub fn key(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&CODE_VERSION.to_le_bytes());
    for part in parts {
        // With lengths, so that moving a character from one part to the next is another key.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

impl Cache {
    pub fn new(cache_dir: &Path, key: &str) -> Self {
        Self { path: cache_dir.join(format!("tokens-{key}.safetensors")) }
    }

    /// Waits until no other process builds this entry; without a lock (a read-only folder, say) each builds its own.
    pub fn lock(&self) -> Option<File> {
        let folder = self.path.parent()?;
        std::fs::create_dir_all(folder).ok()?;
        let file = File::create(self.path.with_extension("lock")).ok()?;
        file.lock().ok()?;
        Some(file)
    }

    pub fn load(&self) -> Option<Tokenized> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!("cannot read the token cache `{}`: {error}", self.path.display());
                return None;
            }
        };
        match decode(&bytes) {
            Ok(mut found) => {
                found.from_cache = true;
                Some(found)
            }
            Err(why) => {
                tracing::warn!("the token cache `{}` is damaged ({why}); it is built again", self.path.display());
                None
            }
        }
    }

    pub fn store(&self, tokenized: &Tokenized) -> Result<()> {
        let bytes = encode(tokenized)?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).path_context("make the folder", folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).path_context("write in", folder)?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).path_context("write", &self.path)?;
        file.persist(&self.path).map_err(|error| error.error).path_context("write", &self.path)?;
        File::open(folder).and_then(|folder| folder.sync_all()).path_context("sync", folder)
    }
}

fn encode(tokenized: &Tokenized) -> Result<Vec<u8>> {
    let bug = |error: &dyn std::fmt::Display| Error::bug("cannot lay out the token cache").cause(error);
    let Samples { tokens, trained, offsets } = &tokenized.samples;
    let parts = [
        ("tokens", Dtype::U32, tokens.len(), tokens.iter().flat_map(|token| token.to_le_bytes()).collect()),
        ("trained", Dtype::U8, trained.len(), trained.iter().map(|&trained| u8::from(trained)).collect()),
        (
            "offsets",
            Dtype::U64,
            offsets.len(),
            offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect::<Vec<u8>>(),
        ),
    ];
    let report = serde_json::to_string(&tokenized.report).map_err(|error| bug(&error))?;
    let checksum = checksum(&report, tokenized.digest());
    let metadata = HashMap::from([("report".to_owned(), report), ("checksum".to_owned(), checksum)]);
    let views = parts.iter().map(|(name, dtype, len, bytes)| {
        TensorView::new(*dtype, vec![*len], bytes).map(|view| (*name, view)).map_err(|error| bug(&error))
    });
    safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata)).map_err(|error| bug(&error))
}

fn decode(bytes: &[u8]) -> Result<Tokenized, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let metadata = header.metadata().as_ref().ok_or("it has no metadata")?;
    let [report, expected] = ["report", "checksum"].map(|key| metadata.get(key).ok_or(format!("it has no {key}")));
    let (report, expected) = (report?, expected?);
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let data = |name: &str, dtype: Dtype| match tensors.tensor(name) {
        Ok(view) if view.dtype() == dtype => Ok(view.data()),
        Ok(view) => Err(format!("`{name}` is {:?}", view.dtype())),
        Err(error) => Err(error.to_string()),
    };
    let (tokens, trained, offsets) =
        (data("tokens", Dtype::U32)?, data("trained", Dtype::U8)?, data("offsets", Dtype::U64)?);
    let samples = Samples {
        tokens: tokens.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect(),
        trained: trained.iter().map(|&byte| byte != 0).collect(),
        offsets: offsets.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect(),
    };
    let is_whole = samples.offsets.first() == Some(&0)
        && samples.offsets.is_sorted()
        && samples.offsets.last() == Some(&(samples.tokens.len() as u64))
        && samples.trained.len() == samples.tokens.len();
    if !is_whole {
        return Err("its parts do not fit together".to_owned());
    }
    let tokenized = Tokenized::new(samples, serde_json::from_str(report).map_err(|error| error.to_string())?);
    if checksum(report, tokenized.digest()) != *expected {
        return Err("its checksum does not fit".to_owned());
    }
    Ok(tokenized)
}

fn checksum(report: &str, digest: &str) -> String {
    blake3::hash(format!("{digest} {report}").as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::samples::Report;

    fn example() -> Tokenized {
        let mut samples = Samples::default();
        samples.push(&[1, 2, 3], &[false, true, true]);
        samples.push(&[], &[]);
        samples.push(&[u32::MAX], &[true]);
        let report = Report { bad_rows: 2, first_bad_rows: vec!["a:1: b".to_owned()], ..Report::default() };
        Tokenized::new(samples, report)
    }

    #[test]
    fn comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(&folder.path().join("new/folder"), "k");
        assert_eq!(cache.load(), None);
        let example = example();
        cache.store(&example).unwrap();
        let found = cache.load().unwrap();
        assert!(found.from_cache);
        assert_eq!(Tokenized::new(found.samples, found.report), example);
    }

    /// Any cut is noticed, and any changed byte that changes what is read.
    #[test]
    fn damage_is_noticed() {
        let example = example();
        let bytes = encode(&example).unwrap();
        assert_eq!(decode(&bytes), Ok(example.clone()));
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length}");
        }
        let mut noticed = 0;
        for i in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[i] ^= 0x10;
            match decode(&bytes) {
                // A blank of the header's padding, say.
                Ok(found) => assert_eq!(found, example, "{i}"),
                Err(_) => noticed += 1,
            }
        }
        assert!(noticed > bytes.len() / 2);
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), "k");
        std::fs::write(&cache.path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(cache.load(), None);
    }

    #[test]
    fn keys_separate_their_parts() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["ab"]), key(&["ab", ""]));
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
    }
}
