//! The files a vocabulary is kept in.
//!
//! Whether there is a BOS to add follows the files: `add_bos_token` of tokenizer_config.json where it is given, else whether
//! the post-processor of tokenizer.json puts BOS first (Llama 3's does, SmolLM2 has none); the `.model` formats have one.

use std::io::Read;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::normalizers::NFC;

use super::side_files::{SideFiles, read_json};
use super::{Fault, sentencepiece, tiktoken};
use crate::config::plan::{MessageFormat, TokenizerPlan};
use crate::error::{Error, Result};
use crate::panics;

/// The formats, told apart by content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Hugging Face's `tokenizer.json`.
    Json,
    /// `vocab.json`, which needs `merges_file`.
    Vocab,
    /// Llama 3's ranks.
    Tiktoken,
    SentencePiece,
}

impl Kind {
    /// Looks at the first bytes of a file.
    pub fn of(path: &Path) -> Result<Self> {
        let mut start = vec![];
        let read = std::fs::File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start));
        read.map_err(|error| cannot_read(path, error))?;
        let fail = |what: &str| {
            let error = Error::config(format!("`{}` {what}", path.display()));
            Err(error.hint("read are tokenizer.json, Llama 3's and SentencePiece's tokenizer.model, and vocab.json with `merges_file`"))
        };
        let text = start.trim_ascii_start();
        if text.is_empty() {
            return fail("is empty");
        }
        if text.starts_with(b"version https://git-lfs") {
            return fail("is a pointer of Git LFS, not the file itself");
        }
        let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
        let line = start.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii_end();
        if let Some(space) = line.iter().position(|byte| *byte == b' ')
            && space > 0
            && line[..space].iter().all(is_base64)
            && line[space + 1..].iter().all(u8::is_ascii_digit)
        {
            return Ok(Self::Tiktoken);
        }
        if text.first() == Some(&b'{') {
            // A vocabulary is a map of texts to numbers; everything in tokenizer.json is a map, a list, a text or null.
            let value = text.windows(2).position(|pair| pair == b"\":").map(|at| text[at + 2..].trim_ascii_start());
            let is_number = value.and_then(<[u8]>::first).is_some_and(u8::is_ascii_digit);
            return Ok(if is_number { Self::Vocab } else { Self::Json });
        }
        // Field 1, a message: what a SentencePiece model begins with.
        if start.first() == Some(&0x0A)
            && !start.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
        {
            return Ok(Self::SentencePiece);
        }
        fail("is not a tokenizer this version reads")
    }
}

/// What the files say, before a message format is chosen.
pub struct Vocabulary {
    pub inner: tokenizers::Tokenizer,
    /// Only where sequences begin with it.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    pub stop_tokens: Vec<u32>,
    pub digest: blake3::Hasher,
    pub kind: Kind,
}

pub fn read(plan: &TokenizerPlan) -> Result<Vocabulary> {
    let path = &plan.path;
    let kind = Kind::of(path)?;
    let bytes = std::fs::read(path).map_err(|error| cannot_read(path, error))?;
    let mut digest = blake3::Hasher::new();
    digest.update(&bytes);
    let has_its_own = |what: &str, key: &str| {
        let error = Error::config(format!("`{}` has its {what} itself", path.display()));
        Err(error.hint(format!("leave `tokenizer.{key}` out")))
    };
    if plan.merges_file.is_some() && kind != Kind::Vocab {
        return has_its_own("merges", "merges_file");
    }
    if plan.special_tokens_path.is_some() && matches!(kind, Kind::Json | Kind::SentencePiece) {
        return has_its_own("special tokens", "special_tokens_path");
    }
    match kind {
        Kind::Json => read_tokenizer_json(plan, &bytes, digest),
        Kind::Vocab => read_vocab(plan, &bytes, digest),
        Kind::Tiktoken => read_tiktoken(plan, &bytes, digest),
        Kind::SentencePiece => {
            let read = sentencepiece::read(&bytes).map_err(|fault| fault.into_error(path, "SentencePiece model"))?;
            let sentencepiece::Read { tokenizer: inner, bos, eos } = read;
            // The format has a place for a padding token, which none of its models fills; torchtune takes 0.
            Ok(Vocabulary { inner, bos, eos, pad: Some(0), stop_tokens: vec![], digest, kind })
        }
    }
}

fn read_tokenizer_json(plan: &TokenizerPlan, bytes: &[u8], digest: blake3::Hasher) -> Result<Vocabulary> {
    let path = &plan.path;
    // The library trusts what it reads: a merge of pieces that are no token ends in a panic of its own.
    let read = panics::caught(|| tokenizers::Tokenizer::from_bytes(bytes));
    let read = read.unwrap_or_else(|panic| Err(panic.into()));
    let mut inner = read.map_err(|error| {
        Error::config(format!("`{}` is not a tokenizer this version reads", path.display()))
            .cause(error)
            .hint("`tokenizer.path` must name a Hugging Face `tokenizer.json`")
    })?;
    // Some published files still carry the truncation and padding of whoever saved them.
    inner.with_truncation(None).map_err(|error| Error::bug(format!("cannot switch truncation off: {error}")))?;
    inner.with_padding(None);

    let files = SideFiles::read(plan)?;
    let bos = files.token(&inner, "bos")?;
    let pad = files.token(&inner, "pad")?;
    let eos = files.token(&inner, "eos")?;
    let adds_bos = match (bos, files.add_bos_token()) {
        (None, _) => false,
        (Some(_), Some(said)) => said,
        (Some(bos), None) => post_processor_adds(&inner, bos)?,
    };
    // The formats that always begin with BOS take it whatever the files add.
    let bos = bos.filter(|_| adds_bos || plan.format == MessageFormat::Turns);
    let stop_tokens = files.ids("eos");
    Ok(Vocabulary { inner, bos, eos, pad, stop_tokens, digest, kind: Kind::Json })
}

fn read_tiktoken(plan: &TokenizerPlan, bytes: &[u8], mut digest: blake3::Hasher) -> Result<Vocabulary> {
    let path = &plan.path;
    let mut inner = tiktoken::read(bytes).map_err(|fault| fault.into_error(path, "list of base64 ranks"))?;
    let num_ranks = inner.get_vocab_size(false);
    let special = match &plan.special_tokens_path {
        Some(path) => special_tokens(path, num_ranks, &mut digest)?,
        None if num_ranks == tiktoken::LLAMA3_RANKS => tiktoken::llama3_special_tokens(),
        None => {
            let message =
                format!("`{}` has {num_ranks} tokens, Llama 3's has {}", path.display(), tiktoken::LLAMA3_RANKS);
            return Err(Error::config(message).hint(
                "take the whole file from the model's folder; for another vocabulary name its special tokens with `tokenizer.special_tokens_path`",
            ));
        }
    };
    add(&mut inner, special)?;
    let id = |name: &str| inner.token_to_id(name);
    let (bos, eos, pad) = (id("<|begin_of_text|>"), id("<|end_of_text|>"), id("<|finetune_right_pad_id|>"));
    let stop_tokens = ["<|eot_id|>", "<|eom_id|>"].into_iter().filter_map(id).collect();
    Ok(Vocabulary { bos, eos, pad, stop_tokens, inner, digest, kind: Kind::Tiktoken })
}

/// Qwen's `vocab.json` and `merges.txt`, whose special tokens are in neither.
fn read_vocab(plan: &TokenizerPlan, bytes: &[u8], mut digest: blake3::Hasher) -> Result<Vocabulary> {
    let path = &plan.path;
    let Some(merges_path) = &plan.merges_file else {
        return Err(Error::config(format!("`{}` is a vocabulary without merges", path.display()))
            .hint("give `tokenizer.merges_file` too, or the model's tokenizer.json as `tokenizer.path`"));
    };
    let fault = |fault: Fault| fault.into_error(path, "vocabulary");
    let vocab: std::collections::HashMap<String, u32> = serde_json::from_slice(bytes)
        .map_err(|error| fault(Fault { line: Some(error.line()), what: error.to_string() }))?;
    let mut ids: Vec<u32> = vocab.values().copied().collect();
    ids.sort_unstable();
    if ids.iter().zip(0..).any(|(id, expected)| *id != expected) {
        return Err(fault(Fault::new("its ids do not count from 0".to_owned())));
    }
    let text = std::fs::read(merges_path).map_err(|error| cannot_read(merges_path, error))?;
    digest.update(&text);
    let text = String::from_utf8_lossy(&text);
    let mut merges = vec![];
    for (index, line) in text.lines().enumerate() {
        if (index == 0 && line.starts_with("#version:")) || line.trim().is_empty() {
            continue;
        }
        let pair = line.trim_end().split_once(' ').filter(|(left, right)| {
            vocab.contains_key(*left) && vocab.contains_key(*right) && vocab.contains_key(&format!("{left}{right}"))
        });
        let Some((left, right)) = pair else {
            let shown: String = line.chars().take(40).collect();
            let what = format!("`{}` is not two tokens that make a third", shown.escape_debug());
            return Err(Fault { line: Some(index + 1), what }.into_error(merges_path, "list of merges"));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    let num_tokens = vocab.len();
    let mut inner = tiktoken::byte_level(vocab.into_iter().collect(), merges, tiktoken::QWEN_WORDS).map_err(fault)?;
    inner.with_normalizer(Some(NFC)).map_err(|error| fault(Fault::library(error)))?;
    let special = match &plan.special_tokens_path {
        Some(path) => special_tokens(path, num_tokens, &mut digest)?,
        None => qwen_special_tokens(plan.format),
    };
    add(&mut inner, special)?;
    let (eos, pad) = (inner.token_to_id("<|im_end|>"), inner.token_to_id("<|endoftext|>"));
    Ok(Vocabulary { inner, bos: None, eos, pad, stop_tokens: vec![], digest, kind: Kind::Vocab })
}

/// torchtune's lists, in the order of the ids.
fn qwen_special_tokens(format: MessageFormat) -> Vec<String> {
    const QWEN2: &[&str] = &["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    const QWEN2_5: &[&str] = &[
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ];
    const QWEN3: &[&str] = &["<tool_response>", "</tool_response>", "<think>", "</think>"];
    let lists: &[&[&str]] = match format {
        MessageFormat::Qwen2 => &[QWEN2],
        MessageFormat::Qwen3 => &[QWEN2, QWEN2_5, QWEN3],
        _ => &[QWEN2, QWEN2_5],
    };
    lists.iter().flat_map(|list| list.iter().map(|name| (*name).to_owned())).collect()
}

/// The `added_tokens` of a tokenizer.json, which have to follow the vocabulary's ids.
fn special_tokens(path: &Path, first: usize, digest: &mut blake3::Hasher) -> Result<Vec<String>> {
    let fail = |what: String| Error::config(format!("`{}` {what}", path.display()));
    let json = read_json(path)?.ok_or_else(|| fail("is not there".to_owned()))?;
    let list = json.get("added_tokens").and_then(Value::as_array);
    let list = list.ok_or_else(|| fail("has no list `added_tokens`".to_owned()))?;
    let entry = |token: &Value| Some((token.get("id")?.as_u64()?, token.get("content")?.as_str()?.to_owned()));
    let tokens: Option<Vec<(u64, String)>> = list.iter().map(entry).collect();
    let mut tokens = tokens.ok_or_else(|| fail("has an added token without `id` or `content`".to_owned()))?;
    tokens.sort();
    if let Some((id, (found, name))) = (first as u64..).zip(&tokens).find(|(id, (found, _))| id != found) {
        return Err(fail(format!("gives `{name}` the id {found}, where {id} is the next after the vocabulary's")));
    }
    digest.update(format!("{tokens:?}").as_bytes());
    Ok(tokens.into_iter().map(|(_, name)| name).collect())
}

/// Tokens in angle brackets with bars never show in generated text; `<tool_call>` and `<think>` do.
fn add(inner: &mut tokenizers::Tokenizer, names: Vec<String>) -> Result<()> {
    let tokens = names.into_iter().map(|name| {
        let special = !name.starts_with('<') || name.starts_with("<|");
        AddedToken::from(name, special).normalized(false)
    });
    let added = inner.add_tokens(tokens.collect::<Vec<_>>());
    added.map(|_| ()).map_err(|error| Error::config("the special tokens cannot be added").cause(error))
}

/// Asks the post-processor itself instead of reading its description: whatever its type, it shows what it adds.
fn post_processor_adds(tokenizer: &tokenizers::Tokenizer, bos: u32) -> Result<bool> {
    let encoding = tokenizer
        .encode_fast("", true)
        .map_err(|error| Error::config("the tokenizer's post-processor fails on an empty text").cause(error))?;
    Ok(encoding.get_ids().first() == Some(&bos))
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::config(format!("cannot read the tokenizer `{}`", path.display()))
        .cause(error)
        .hint("`tokenizer.path` names a tokenizer.json, a tokenizer.model, or the folder that holds one")
}
