//! A GGUF's byte-level BPE vocabulary as `tokenizer.json`.
//!
//! The file has tokens, merges and token types, and names how text is cut into words before merging
//! (`tokenizer.ggml.pre`). The result cuts and merges as transformers' `gguf_file=` loader does, which the interop check
//! compares. SentencePiece vocabularies (`tokenizer.ggml.model: llama`) have no merges and are refused.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::Gguf;
use crate::error::{Error, Result};

/// The words Llama 3 is trained on: contractions, letters, up to three digits, punctuation, spaces.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's token types that matter here.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

enum Words {
    /// GPT-2's own pattern, which `ByteLevel` has built in.
    Gpt2,
    Llama3,
}

/// What the tokenizer files are written from.
pub struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<(String, String)>,
    words: Words,
    /// Ids of tokens that are found whole in text; true: special (skipped in decoding).
    added: Vec<(usize, bool)>,
    pub bos: Option<usize>,
    pub eos: Option<usize>,
    pub pad: Option<usize>,
    pub unk: Option<usize>,
    add_bos: bool,
    add_eos: bool,
    chat_template: Option<String>,
}

impl Vocabulary {
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let file = gguf.path().display();
        match gguf.required("tokenizer.ggml.model", gguf.string("tokenizer.ggml.model"))? {
            "gpt2" => {}
            "llama" => {
                return Err(Error::config(format!("`{file}` has a SentencePiece vocabulary, which is not read yet"))
                    .hint(
                        "take a model with a byte-level BPE vocabulary (SmolLM2, Llama 3), or its Hugging Face folder",
                    ));
            }
            other => {
                return Err(Error::config(format!("`{file}` has a vocabulary of type `{other}`; `gpt2` is read")));
            }
        }
        let words = match gguf.string("tokenizer.ggml.pre")?.unwrap_or("default") {
            "smollm" | "gpt-2" | "gpt2" | "default" => Words::Gpt2,
            "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" | "dbrx" => Words::Llama3,
            other => {
                return Err(Error::config(format!("`{file}` cuts text into words by `{other}`, which is not read"))
                    .cause(
                        "these values of `tokenizer.ggml.pre` are: smollm, gpt-2, default, llama-bpe, smaug-bpe, dbrx",
                    ));
            }
        };
        let tokens = gguf.required("tokenizer.ggml.tokens", gguf.strings("tokenizer.ggml.tokens"))?;
        let types = gguf.ints("tokenizer.ggml.token_type")?.unwrap_or(&[]);
        if !types.is_empty() && types.len() != tokens.len() {
            let (types, tokens) = (types.len(), tokens.len());
            return Err(Error::config(format!("`{file}` has {tokens} tokens but {types} token types")));
        }
        let id = |key: &str| match gguf.int(key)? {
            Some(id) if id >= tokens.len() => {
                Err(Error::config(format!("`{key}` of `{file}` is {id}, the vocabulary has {} tokens", tokens.len())))
            }
            id => Ok(id),
        };
        Self {
            added: added_tokens(tokens, types),
            tokens: spell(tokens),
            merges: read_merges(gguf)?,
            words,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            pad: id("tokenizer.ggml.padding_token_id")?,
            unk: id("tokenizer.ggml.unknown_token_id")?,
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            chat_template: gguf.string("tokenizer.chat_template")?.map(str::to_owned),
        }
        .checked(gguf)
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Two tokens of one spelling, or a merge of unknown pieces, would give ids that nobody meant.
    fn checked(self, gguf: &Gguf) -> Result<Self> {
        let file = gguf.path().display();
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token, id) {
                return Err(Error::config(format!("tokens {first} and {id} of `{file}` are both `{token}`")));
            }
        }
        for (left, right) in &self.merges {
            if [left.as_str(), right, &format!("{left}{right}")].iter().any(|piece| !ids.contains_key(piece)) {
                return Err(Error::config(format!(
                    "the merge `{left} {right}` of `{file}` has pieces that are no tokens"
                )));
            }
        }
        Ok(self)
    }

    pub fn tokenizer_json(&self) -> Json {
        let vocab: Map<String, Json> = self.tokens.iter().enumerate().map(|(id, t)| (t.clone(), id.into())).collect();
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let pre_tokenizer = match self.words {
            Words::Gpt2 => byte_level(true),
            Words::Llama3 => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]}),
        };
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(|&added| self.added_token(added, true)).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                // Llama 3's own tokenizer takes a word that is a token whole, without going through its merges.
                "ignore_merges": matches!(self.words, Words::Llama3),
                "vocab": vocab,
                "merges": self.merges,
            },
        })
    }

    pub fn tokenizer_config(&self, max_position_embeddings: usize) -> Json {
        let decoder: Map<String, Json> =
            self.added.iter().map(|&added| (added.0.to_string(), self.added_token(added, false))).collect();
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "clean_up_tokenization_spaces": false,
            "model_max_length": max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        let Json::Object(map) = &mut config else { unreachable!("built as an object above") };
        map.extend(self.named_tokens().map(|(name, token)| (name.to_owned(), token.into())));
        map.extend(self.chat_template.iter().map(|template| ("chat_template".to_owned(), template.as_str().into())));
        map.sort_keys();
        config
    }

    pub fn special_tokens_map(&self) -> Json {
        self.named_tokens().map(|(name, token)| (name.to_owned(), Json::from(token))).collect::<Map<_, _>>().into()
    }

    fn named_tokens(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [("bos_token", self.bos), ("eos_token", self.eos), ("pad_token", self.pad), ("unk_token", self.unk)]
            .into_iter()
            .filter_map(|(name, id)| Some((name, self.tokens[id?].as_str())))
    }

    fn added_token(&self, (id, special): (usize, bool), with_id: bool) -> Json {
        let mut token = if with_id { json!({"id": id}) } else { json!({}) };
        let Json::Object(map) = &mut token else { unreachable!("built as an object above") };
        map.insert("content".into(), self.tokens[id].as_str().into());
        for (flag, value) in
            [("single_word", false), ("lstrip", false), ("rstrip", false), ("normalized", false), ("special", special)]
        {
            map.insert(flag.into(), value.into());
        }
        token
    }

    /// BOS and EOS around a text, where the file asks for them.
    fn post_processor(&self) -> Json {
        let bos = self.bos.filter(|_| self.add_bos).map(|id| (id, &self.tokens[id]));
        let eos = self.eos.filter(|_| self.add_eos).map(|id| (id, &self.tokens[id]));
        let side = |name: &str, type_id: usize| {
            let special = |(_, token): (usize, &String)| json!({"SpecialToken": {"id": token, "type_id": type_id}});
            let text = json!({"Sequence": {"id": name, "type_id": type_id}});
            bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect::<Vec<_>>()
        };
        let specials: Map<String, Json> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(id, token)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        let pair = [side("A", 0), side("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": side("A", 0), "pair": pair, "special_tokens": specials})
    }
}

fn read_merges(gguf: &Gguf) -> Result<Vec<(String, String)>> {
    let merges = gguf.required("tokenizer.ggml.merges", gguf.strings("tokenizer.ggml.merges"))?;
    let pair = |merge: &String| match merge.split(' ').collect::<Vec<_>>()[..] {
        [left, right] => Ok((left.to_owned(), right.to_owned())),
        _ => Err(Error::config(format!("the merge `{merge}` of `{}` is not a pair", gguf.path().display()))),
    };
    merges.iter().map(pair).collect()
}

/// Control tokens are special; user-defined ones are found whole too. One whose spelling is not of the byte alphabet is
/// a mislabelled ordinary token, as every token of such a vocabulary is spelled in it.
fn added_tokens(tokens: &[String], types: &[i64]) -> Vec<(usize, bool)> {
    let alphabet: HashSet<char> = byte_alphabet().into_iter().collect();
    let kept = tokens.iter().zip(types).enumerate().filter(|(_, (token, kind))| {
        matches!(**kind, CONTROL | USER_DEFINED) && !token.is_empty() && token.chars().all(|c| alphabet.contains(&c))
    });
    kept.map(|(id, (_, kind))| (id, *kind == CONTROL)).collect()
}

/// Spells in the byte alphabet what is not yet.
fn spell(tokens: &[String]) -> Vec<String> {
    let letters = byte_alphabet();
    let alphabet: HashSet<char> = letters.into_iter().collect();
    let spelled = |token: &String| match token.chars().all(|c| alphabet.contains(&c)) {
        true => token.clone(),
        false => token.bytes().map(|byte| letters[byte as usize]).collect(),
    };
    tokens.iter().map(spelled).collect()
}

/// GPT-2's printable letter for each byte: itself where printable, the next from U+0100 on otherwise.
fn byte_alphabet() -> [char; 256] {
    let mut next = 0x100u32..;
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte as u8),
        _ => next.next().and_then(char::from_u32).unwrap_or('\u{FFFD}'),
    })
}
