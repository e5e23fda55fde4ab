//! Ids of texts, for `cargo xtask interop`: `tokenize VOCABULARY TEXTS.json IDS.json`, a list of texts and a list of lists.
//!
//! The vocabulary is a tokenizer.json, or Llama's tokenizer.model of either kind, which is read as its message format
//! reads it: no spelling in a text is a special token.

use std::error::Error;
use std::path::PathBuf;

use host::config::plan::{MessageFormat, TokenizerPlan};
use host::tokenizer::{Kind, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vocabulary, texts, ids] = arguments.as_slice() else {
        return Err("tokenize VOCABULARY TEXTS.json IDS.json".into());
    };
    let format = match Kind::of(vocabulary)? {
        Kind::Tiktoken => MessageFormat::Llama3,
        Kind::SentencePiece => MessageFormat::Turns,
        _ => MessageFormat::Plain,
    };
    let tokenizer = Tokenizer::of(&TokenizerPlan { format, ..TokenizerPlan::plain(vocabulary.clone()) })?;
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let all = texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<Vec<_>, _>>()?;
    // What was encoded can be read again, but for what a format says in another way.
    for (text, ids) in texts.iter().zip(&all) {
        let spelled = if format == MessageFormat::Turns { text.replace('▁', " ") } else { text.clone() };
        if tokenizer.decode(ids)? != spelled {
            return Err(format!("{text:?} is another text after encoding and decoding").into());
        }
    }
    std::fs::write(ids, serde_json::to_vec(&all)?)?;
    Ok(())
}
