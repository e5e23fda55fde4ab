//! Text to token ids and back, from every file a checkpoint keeps its vocabulary in, and which tokens begin, end and stop a
//! sequence.
//!
//! Read are `tokenizer.json`, Llama 3's base64 ranks, SentencePiece models and `vocab.json` with its merges, told apart by
//! content; all become one `tokenizers` pipeline. [`Format`] is how messages become tokens; [`crate::data`] writes them.
//! `encode` never runs the post-processor: whoever puts a sequence together adds BOS and EOS.
//!
//! The spelling of a special token is that token where a template or a config writes it, which has no other way to say
//! `<|im_start|>`, and text where data has it ([`SpecialTokens`]). So transformers and torchtune do not: there a row can forge
//! a turn. Under the Llama and Mistral formats it is text wherever it stands, as in torchtune.

mod chat_template;
mod files;
mod marks;
mod sentencepiece;
mod side_files;
mod tiktoken;

#[cfg(test)]
pub mod tests;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::config::plan::{MessageFormat, TokenizerPlan, Truncation};
use crate::data::template::Role;
use crate::error::{Error, Result};

pub use chat_template::{ChatMessage, ChatTemplate, ToolCall, python_json};
pub use files::Kind;
pub use marks::{SpecialTokens, unmarked};

#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Those whose spelling is not text wherever it stands.
    special_tokens: SpecialTokens,
    /// The same, but that every spelling is text; made for the first row that needs it.
    literal: OnceLock<Box<tokenizers::Tokenizer>>,
    path: PathBuf,
    bos: Option<u32>,
    /// Before a text that is no message; a chat template writes its own, a text has none.
    text_bos: Option<u32>,
    eos: u32,
    pad: u32,
    stop_tokens: Vec<u32>,
    vocab_size: usize,
    digest: String,
    /// Long texts are encoded in torchtune's pieces.
    in_pieces: bool,
    format: Format,
    turn_texts: Vec<(Role, [String; 2])>,
    truncation: Truncation,
}

/// How messages become tokens, with the tokens that takes.
#[derive(Debug)]
pub enum Format {
    /// BOS, the messages' texts, EOS.
    Plain,
    /// A header with the role before a message and an end of turn after it. Not every Llama 3 has the tokens of tool calls.
    Llama3 { start_header: u32, end_header: u32, eot: u32, eom: Option<u32>, python_tag: Option<u32> },
    /// Llama 2 and Mistral: BOS before each turn and EOS after each answer. A turn goes on without the space that
    /// SentencePiece puts before a text: it is encoded after a line break of this many tokens, which are then dropped.
    Turns { line_break: usize },
    /// `<|im_start|>role`, the text, `<|im_end|>`; Qwen 2.5 and 3 wrap tool calls and results too.
    ChatMl { start: u32, end: u32, tool_call: Option<(u32, u32)> },
    /// The checkpoint's own Jinja template.
    ChatTemplate(Box<ChatTemplate>),
}

/// What is wrong with a vocabulary file, and where.
#[derive(Debug)]
struct Fault {
    line: Option<usize>,
    what: String,
}

impl Fault {
    fn new(what: String) -> Self {
        Self { line: None, what }
    }

    fn library(error: impl std::fmt::Display) -> Self {
        Self::new(error.to_string())
    }

    fn into_error(self, path: &Path, kind: &str) -> Error {
        let error = Error::config(format!("`{}` is damaged, or not a {kind} this version reads", path.display()));
        let error = if self.line.is_some() { error.at(path, self.line, None) } else { error };
        error.cause(self.what).hint("take the file from the model's folder again")
    }
}

/// Python's `str.isspace`, which knows four control characters more than Rust's.
pub fn is_blank(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

impl Tokenizer {
    /// Opens a tokenizer file and the files beside it, for texts without a message format.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(&TokenizerPlan::plain(path.to_owned()))
    }

    /// Opens what a config's tokenizer section names. EOS has to be found; BOS and PAD need not be.
    pub fn of(plan: &TokenizerPlan) -> Result<Self> {
        let files::Vocabulary { mut inner, bos, eos, pad, stop_tokens, mut digest, kind } = files::read(plan)?;
        let path = &plan.path;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let needed = |name: &str| {
            inner.token_to_id(name).ok_or_else(|| {
                Error::config(format!("`{}` has no token `{name}`, which the message format needs", path.display()))
                    .hint("`_component_: hf_tokenizer` needs no such token; `HuggingFaceModelTokenizer` takes the model's own chat template")
            })
        };
        let no_eos = || {
            Error::config(format!("no end-of-sequence token is named beside `{}`", path.display())).hint(
                "give `eos_token` in tokenizer_config.json, or `eos_token_id` in config.json, in the tokenizer's folder",
            )
        };
        let of_files = bos;
        let (format, bos, eos, pad, mut stop_tokens) = match plan.format {
            MessageFormat::Plain => (Format::Plain, bos, eos.ok_or_else(no_eos)?, pad, stop_tokens),
            MessageFormat::ChatTemplate => {
                let template = Box::new(ChatTemplate::read(plan)?);
                digest.update(template.source().as_bytes());
                (Format::ChatTemplate(template), None, eos.ok_or_else(no_eos)?, pad, stop_tokens)
            }
            MessageFormat::Llama3 => {
                let format = Format::Llama3 {
                    start_header: needed("<|start_header_id|>")?,
                    end_header: needed("<|end_header_id|>")?,
                    eot: needed("<|eot_id|>")?,
                    eom: inner.token_to_id("<|eom_id|>"),
                    python_tag: inner.token_to_id("<|python_tag|>"),
                };
                let (bos, eos) = (needed("<|begin_of_text|>")?, needed("<|end_of_text|>")?);
                let stops = ["<|eot_id|>", "<|eom_id|>"].into_iter().filter_map(|name| inner.token_to_id(name));
                let pad = inner.token_to_id("<|finetune_right_pad_id|>").or(pad);
                (format, Some(bos), eos, pad, stops.collect())
            }
            MessageFormat::Turns => {
                let bos = bos.or_else(|| inner.token_to_id("<s>")).map_or_else(|| needed("<s>"), Ok)?;
                let eos = eos.map_or_else(|| needed("</s>"), Ok)?;
                // Set below, where a line break can be encoded.
                (Format::Turns { line_break: 0 }, Some(bos), eos, Some(0), vec![])
            }
            MessageFormat::Qwen2 | MessageFormat::Qwen2_5 | MessageFormat::Qwen3 => {
                let end = needed("<|im_end|>")?;
                let tool_call = match plan.format {
                    MessageFormat::Qwen2 => None,
                    _ => Some((needed("<tool_call>")?, needed("</tool_call>")?)),
                };
                let pad = needed("<|endoftext|>")?;
                (Format::ChatMl { start: needed("<|im_start|>")?, end, tool_call }, None, end, Some(pad), vec![pad])
            }
        };
        // A row cannot forge the tokens that the format writes itself; see the module.
        let are_text = matches!(format, Format::Llama3 { .. } | Format::Turns { .. });
        inner.set_encode_special_tokens(are_text);
        let special_tokens = if are_text { SpecialTokens::default() } else { SpecialTokens::of(&inner) };
        stop_tokens.push(eos);
        stop_tokens.retain(|&id| (id as usize) < vocab_size);
        stop_tokens.sort_unstable();
        stop_tokens.dedup();

        // Without `..`, so that a new key of the section has to be thought of here; lengths are the caller's, files are
        // in the digest already.
        let TokenizerPlan {
            path,
            merges_file: _,
            special_tokens_path: _,
            tokenizer_config: _,
            generation_config: _,
            format: message_format,
            max_seq_len: _,
            truncation,
            prompt_template: _,
            turn_texts,
        } = plan;
        digest.update(
            format!("\0marked {bos:?} {of_files:?} {eos} {message_format:?} {truncation:?} {turn_texts:?}").as_bytes(),
        );
        let mut tokenizer = Self {
            inner,
            special_tokens,
            literal: OnceLock::new(),
            path: path.clone(),
            bos,
            text_bos: if plan.format == MessageFormat::ChatTemplate { of_files } else { bos },
            eos,
            pad: pad.unwrap_or(eos),
            stop_tokens,
            vocab_size,
            digest: digest.finalize().to_hex().to_string(),
            in_pieces: kind == Kind::Tiktoken,
            format,
            turn_texts: turn_texts.clone(),
            truncation: *truncation,
        };
        if matches!(tokenizer.format, Format::Turns { .. }) {
            tokenizer.format = Format::Turns { line_break: tokenizer.encode("\n")?.len() };
        }
        Ok(tokenizer)
    }

    /// The special tokens that data may spell, to be marked there.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// Token ids of `text`; none is added before or after it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if !marks::is_marked(text) {
            return self.encode_by(&self.inner, text);
        }
        let literal = self.literal.get_or_init(|| {
            let mut literal = Box::new(self.inner.clone());
            literal.set_encode_special_tokens(true);
            literal
        });
        let mut ids = vec![];
        for piece in self.special_tokens.pieces(text) {
            match piece {
                marks::Piece::Token(id) => ids.push(id),
                marks::Piece::Text(text) => ids.extend(self.encode_by(literal, &unmarked(text))?),
            }
        }
        Ok(ids)
    }

    fn encode_by(&self, inner: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
        let pieces = if self.in_pieces { tiktoken::pieces(text) } else { vec![text] };
        let mut ids = vec![];
        for piece in pieces {
            match inner.encode_fast(piece, false) {
                Ok(encoding) => ids.extend_from_slice(encoding.get_ids()),
                Err(error) => {
                    let start = text.chars().take(60).collect::<String>();
                    return Err(Error::run(format!("the tokenizer `{}` cannot encode a text", self.path.display()))
                        .cause(error)
                        .cause(format!("the text begins with `{}`", start.escape_debug())));
                }
            }
        }
        Ok(ids)
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| self.decode_error(error))
    }

    /// The text of `ids`, special tokens by their names.
    pub fn show(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|error| self.decode_error(error))
    }

    /// Decodes one token at a time, for text that is shown while it is made.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, ids: vec![], prefix: String::new(), prefix_index: 0 }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The token put before the first message, when the format or the files say that sequences begin with one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token put before a text without messages.
    pub fn text_bos(&self) -> Option<u32> {
        self.text_bos
    }

    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The padding token; EOS where the files name none, which is harmless because padding carries no label.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Tokens that end a generated text, ascending: EOS and the format's, or every `eos_token_id` of the files.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// One more than the highest token id, which is what a model's embedding has to cover.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn format(&self) -> &Format {
        &self.format
    }

    /// What the tokenizer section puts around the messages of a role.
    pub fn turn_texts(&self) -> &[(Role, [String; 2])] {
        &self.turn_texts
    }

    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// Hex digest of everything that decides the tokens of messages: the files, the special tokens, the format.
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
