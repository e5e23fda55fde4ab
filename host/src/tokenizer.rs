//! A Hugging Face tokenizer folder: text to token ids and back, and which tokens begin, end and stop a sequence.
//!
//! Owns reading `tokenizer.json` and the small files beside it. Refuses to know messages, masks or templates: those are
//! [`crate::data`]. `encode` never runs the post-processor: whoever puts a sequence together adds BOS and EOS. Whether
//! there is a BOS to add follows the files: `add_bos_token` of tokenizer_config.json where it is given, else whether the
//! post-processor of tokenizer.json puts BOS first (Llama 3's does, SmolLM2 has none).
//!
//! To be questioned: the spelling of a special token in a text becomes that token, in data as in templates. So do
//! transformers and torchtune, whose recorded tokens have it, and a template has no other way to write `<|im_start|>`;
//! but a row of data can forge an end of sequence by it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    bos: Option<u32>,
    eos: u32,
    pad: Option<u32>,
    stop_tokens: Vec<u32>,
    adds_bos: bool,
    vocab_size: usize,
    digest: String,
}

impl Tokenizer {
    /// Opens a `tokenizer.json` and the files beside it. EOS has to be found; BOS and PAD need not be.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| {
            Error::config(format!("cannot read the tokenizer `{}`", path.display()))
                .cause(error)
                .hint("`tokenizer.path` must name a Hugging Face `tokenizer.json`")
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            Error::config(format!("`{}` is not a tokenizer this version reads", path.display()))
                .cause(error)
                .hint("`tokenizer.path` must name a Hugging Face `tokenizer.json`")
        })?;
        // Some published files still carry the truncation and padding of whoever saved them.
        inner.with_truncation(None).map_err(|error| Error::bug(format!("cannot switch truncation off: {error}")))?;
        inner.with_padding(None);

        let files = SideFiles::read(path)?;
        let bos = files.token(&inner, "bos")?;
        let pad = files.token(&inner, "pad")?;
        let eos = files.token(&inner, "eos")?.ok_or_else(|| {
            Error::config(format!("no end-of-sequence token is named beside `{}`", path.display())).hint(
                "give `eos_token` in tokenizer_config.json, or `eos_token_id` in config.json, in the tokenizer's folder",
            )
        })?;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let mut stop_tokens = BTreeSet::from([eos]);
        stop_tokens.extend(files.ids("eos"));
        stop_tokens.retain(|&id| (id as usize) < vocab_size);
        let adds_bos = match (bos, files.add_bos_token()) {
            (None, _) => false,
            (Some(_), Some(said)) => said,
            (Some(bos), None) => post_processor_adds(&inner, bos)?,
        };

        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        hasher.update(format!("\0{bos:?} {eos} {pad:?} {adds_bos}").as_bytes());
        Ok(Self {
            inner,
            path: path.to_owned(),
            bos,
            eos,
            pad,
            stop_tokens: stop_tokens.into_iter().collect(),
            adds_bos,
            vocab_size,
            digest: hasher.finalize().to_hex().to_string(),
        })
    }

    /// Token ids of `text`; none is added before or after it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(Error::run(format!("the tokenizer `{}` cannot encode a text", self.path.display()))
                .cause(error)
                .cause(format!("the text begins with `{}`", text.chars().take(60).collect::<String>().escape_debug()))),
        }
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| self.decode_error(error))
    }

    /// Decodes one token at a time, for text that is shown while it is made.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, ids: vec![], prefix: String::new(), prefix_index: 0 }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The token put before the first message, when the files say that sequences begin with one.
    pub fn bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The padding token; EOS where the files name none, which is harmless because padding carries no label.
    pub fn pad(&self) -> u32 {
        self.pad.unwrap_or(self.eos)
    }

    /// Tokens that end a generated text: EOS and every `eos_token_id` of the files, ascending.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// One more than the highest token id, which is what a model's embedding has to cover.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Hex digest of everything that decides the ids of a text: the file and the chosen special tokens.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    fn decode_error(&self, error: impl std::fmt::Display) -> Error {
        Error::run(format!("the tokenizer `{}` cannot decode these tokens", self.path.display())).cause(error)
    }
}

/// Whole characters come out as soon as they are complete; a character split over tokens waits for its last byte.
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
}

impl StreamDecoder<'_> {
    /// The text that `id` completes, if it completes any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Self { tokenizer, ids, prefix, prefix_index } = self;
        tokenizers::tokenizer::step_decode_stream(&tokenizer.inner, vec![id], true, ids, prefix, prefix_index)
            .map_err(|error| tokenizer.decode_error(error))
    }

    /// What is left at the end, an incomplete character as U+FFFD.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(text.strip_prefix(self.prefix.as_str()).unwrap_or_default().to_owned())
    }
}

/// Asks the post-processor itself instead of reading its description: whatever its type, it shows what it adds.
fn post_processor_adds(tokenizer: &tokenizers::Tokenizer, bos: u32) -> Result<bool> {
    let encoding = tokenizer
        .encode_fast("", true)
        .map_err(|error| Error::config("the tokenizer's post-processor fails on an empty text").cause(error))?;
    Ok(encoding.get_ids().first() == Some(&bos))
}

/// The JSON files beside `tokenizer.json` that name special tokens. A missing file is fine, a broken one is an error.
struct SideFiles {
    tokenizer_config: Option<Value>,
    special_tokens_map: Option<Value>,
    generation_config: Option<Value>,
    config: Option<Value>,
    folder: PathBuf,
}

impl SideFiles {
    fn read(tokenizer_path: &Path) -> Result<Self> {
        let folder = tokenizer_path.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self {
            tokenizer_config: read_json(&folder.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&folder.join("special_tokens_map.json"))?,
            generation_config: read_json(&folder.join("generation_config.json"))?,
            config: read_json(&folder.join("config.json"))?,
            folder,
        })
    }

    /// The id of the `bos`, `eos` or `pad` token: by its spelling where one is given, else by its id.
    fn token(&self, tokenizer: &tokenizers::Tokenizer, name: &str) -> Result<Option<u32>> {
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
    fn ids(&self, name: &str) -> Vec<u32> {
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

    fn add_bos_token(&self) -> Option<bool> {
        self.tokenizer_config.as_ref()?.get("add_bos_token")?.as_bool()
    }
}

fn read_json(path: &Path) -> Result<Option<Value>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-llama")
    }

    /// The tiny tokenizer in a folder of its own, with `edit` applied to tokenizer.json and the given files beside it.
    fn variant(edit: impl FnOnce(&mut Value), files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(fixture().join("tokenizer.json")).unwrap()).unwrap();
        edit(&mut json);
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn reads_the_tiny_tokenizer() {
        let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.bos(), Some(4088));
        assert_eq!((tokenizer.eos(), tokenizer.pad()), (4089, 4090));
        assert_eq!(tokenizer.stop_tokens(), [4089]);
        assert_eq!(tokenizer.vocab_size(), 4096);
        assert_eq!(tokenizer.encode("").unwrap(), [0u32; 0]);
    }

    #[test]
    fn special_tokens_are_read_by_their_spelling_and_left_out_of_text() {
        let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
        let ids = tokenizer.encode("a<|end_of_text|>b").unwrap();
        assert_eq!(ids, [64, 4089, 65]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "ab");
    }

    #[test]
    fn whether_bos_is_added_follows_the_files() {
        let chat_ml =
            r#"{"bos_token": "<|start_header_id|>", "eos_token": {"content": "<|eot_id|>"}, "pad_token": null}"#;
        let no_processor = |json: &mut Value| json["post_processor"] = Value::Null;

        let (_folder, path) = variant(no_processor, &[("tokenizer_config.json", chat_ml)]);
        let tokenizer = Tokenizer::open(&path).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (None, 4094, 4094));

        let says = chat_ml.replace('}', r#", "add_bos_token": true}"#).replacen(r#", "add_bos_token": true}"#, "}", 1);
        let (_folder, path) = variant(no_processor, &[("tokenizer_config.json", &says)]);
        assert_eq!(Tokenizer::open(&path).unwrap().bos(), Some(4091));

        let says = r#"{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "add_bos_token": false}"#;
        let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", says)]);
        assert_eq!(Tokenizer::open(&path).unwrap().bos(), None);
    }

    #[test]
    fn falls_back_to_ids_and_takes_every_stop_token() {
        let (_folder, path) = variant(
            |_| (),
            &[
                ("generation_config.json", r#"{"eos_token_id": [4089, 4094, 999999]}"#),
                ("config.json", r#"{"bos_token_id": 4088, "eos_token_id": 4093}"#),
            ],
        );
        let tokenizer = Tokenizer::open(&path).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(4088), 4089));
        assert_eq!(tokenizer.stop_tokens(), [4089, 4093, 4094]);
    }

    #[test]
    fn mistakes_are_named() {
        let (_folder, path) = variant(|_| (), &[]);
        let error = Tokenizer::open(&path).unwrap_err().to_string();
        assert!(error.contains("no end-of-sequence token is named beside"), "{error}");

        let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)]);
        let error = Tokenizer::open(&path).unwrap_err().to_string();
        assert!(error.contains("`eos_token` is `</s>`"), "{error}");

        let (_folder, path) = variant(|_| (), &[("tokenizer_config.json", "{\n  nonsense")]);
        let error = Tokenizer::open(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json:2:3"), "{error}");

        std::fs::write(&path, "{}").unwrap();
        let error = Tokenizer::open(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
    }

    #[test]
    fn streaming_gives_the_same_text_in_whole_characters() {
        let tokenizer = Tokenizer::open(&fixture().join("tokenizer.json")).unwrap();
        let text = "naïve 日本語 🙂 done";
        let mut stream = tokenizer.stream();
        let mut shown = String::new();
        for id in tokenizer.encode(text).unwrap() {
            let piece = stream.push(id).unwrap().unwrap_or_default();
            assert!(!piece.contains('\u{fffd}'), "{piece:?}");
            shown += &piece;
        }
        shown += &stream.finish().unwrap();
        assert_eq!(shown, text);

        // Cut inside a character: nothing is shown for it until the end.
        let ids = tokenizer.encode("a🙂").unwrap();
        let mut stream = tokenizer.stream();
        let shown: String = ids[..ids.len() - 1].iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(shown, "a");
        assert!(stream.finish().unwrap().contains('\u{fffd}'));
    }
}
