//! The JSON files beside a tokenizer that name its special tokens.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::plan::TokenizerPlan;
use crate::error::{Error, Result};

/// A missing file is fine, a broken one is an error.
pub struct SideFiles {
    tokenizer_config: Option<Value>,
    special_tokens_map: Option<Value>,
    generation_config: Option<Value>,
    config: Option<Value>,
    folder: PathBuf,
}

impl SideFiles {
    pub fn read(plan: &TokenizerPlan) -> Result<Self> {
        let folder = plan.path.parent().unwrap_or(Path::new("")).to_owned();
        let named = |path: &Option<PathBuf>, name: &str| match path {
            Some(path) => match read_json(path)? {
                None => Err(Error::config(format!("the file `{}` is not there", path.display()))),
                found => Ok(found),
            },
            None => read_json(&folder.join(name)),
        };
        Ok(Self {
            tokenizer_config: named(&plan.tokenizer_config, "tokenizer_config.json")?,
            special_tokens_map: read_json(&folder.join("special_tokens_map.json"))?,
            generation_config: named(&plan.generation_config, "generation_config.json")?,
            config: read_json(&folder.join("config.json"))?,
            folder,
        })
    }

    /// The id of the `bos`, `eos` or `pad` token: by its spelling where one is given, else by its id.
    pub fn token(&self, tokenizer: &tokenizers::Tokenizer, name: &str) -> Result<Option<u32>> {
        let key = format!("{name}_token");
        for (file, value) in
            [("tokenizer_config.json", &self.tokenizer_config), ("special_tokens_map.json", &self.special_tokens_map)]
        {
            let Some(entry) = value.as_ref().and_then(|value| value.get(&key)) else { continue };
            // A string, or an object (`AddedToken`) with the string in `content`; null says nothing.
            let Some(text) = entry.as_str().or_else(|| entry.get("content")?.as_str()) else { continue };
            return match tokenizer.token_to_id(text) {
                Some(id) => Ok(Some(id)),
                None => Err(Error::config(format!("`{key}` is `{text}`, which the tokenizer does not have"))
                    .at_file(self.folder.join(file))
                    .hint("`tokenizer.json` and the files beside it have to come from the same model")),
            };
        }
        Ok(self.ids(name).first().copied())
    }

    /// `{name}_token_id` of generation_config.json and config.json: a number or a list of them.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let key = format!("{name}_token_id");
        let values = [&self.generation_config, &self.config];
        let entries = values.into_iter().flatten().filter_map(|value| value.get(&key));
        entries
            .flat_map(|entry| match entry {
                Value::Array(list) => list.iter().collect(),
                one => vec![one],
            })
            .filter_map(|id| u32::try_from(id.as_u64()?).ok())
            .collect()
    }

    pub fn add_bos_token(&self) -> Option<bool> {
        self.tokenizer_config.as_ref()?.get("add_bos_token")?.as_bool()
    }
}

pub fn read_json(path: &Path) -> Result<Option<Value>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::config(format!("cannot read `{}`", path.display())).cause(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Error::config(format!("`{}` is not JSON", path.display()))
            .at(path, Some(error.line()), Some(error.column()))
            .cause(error)
    })
}
