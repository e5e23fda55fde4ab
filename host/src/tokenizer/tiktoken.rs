//! Llama 3's `original/tokenizer.model`: a line for each token, its bytes in base64 and its rank.
//!
//! The rank is both the token's id and the order of merging: of two neighbours that make a token together, those with the
//! lowest rank merge first. `tokenizers` orders pairs, not tokens, so a token becomes every pair that makes it, one after
//! the other. Where one text has two such pairs of the same token overlapping, the two could differ; no text was found
//! that does (`cargo xtask interop`).

use std::collections::HashMap;

use base64::Engine;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::Fault;

/// How Llama 3 cuts text into words; Qwen's differs in taking digits one at a time.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Llama 3's tokens before its special ones.
pub const LLAMA3_RANKS: usize = 128_000;

/// The pairs of a token are as many as its bytes; the longest of Llama 3 has 128.
const MAX_TOKEN_BYTES: usize = 512;

/// Longer runs of blanks, or of anything else, and longer texts are encoded in pieces, as torchtune does.
const MAX_RUN: usize = 25_000;
const MAX_TEXT: usize = 400_000;

/// Returns a tokenizer of the ranks in `bytes`, without special tokens.
pub fn read(bytes: &[u8]) -> Result<tokenizers::Tokenizer, Fault> {
    let ranks = parse(bytes)?;
    let mut tokens: Vec<&[u8]> = vec![&[]; ranks.len()];
    for (token, rank) in &ranks {
        tokens[*rank as usize] = token;
    }
    let mut merges = vec![];
    for token in &tokens {
        let mut pairs: Vec<_> = (1..token.len())
            .map(|at| token.split_at(at))
            .filter_map(|(left, right)| Some((ranks.get(left)?, ranks.get(right)?, left, right)))
            .collect();
        pairs.sort();
        merges.extend(pairs.into_iter().map(|(_, _, left, right)| (spell(left), spell(right))));
    }
    byte_level(ranks.iter().map(|(token, rank)| (spell(token), *rank)).collect(), merges, LLAMA3_WORDS)
}

/// A byte-level BPE over words that `pattern` cuts; a word that is a token is that token, however it merges.
pub fn byte_level(vocab: Vocab, merges: Merges, pattern: &str) -> Result<tokenizers::Tokenizer, Fault> {
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(true).build().map_err(Fault::library)?;
    let words = Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false);
    let bytes = ByteLevel::new(false, true, false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.map_err(Fault::library)?.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    Ok(tokenizer)
}

fn parse(bytes: &[u8]) -> Result<HashMap<Vec<u8>, u32>, Fault> {
    let mut ranks = HashMap::new();
    let lines = bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    for (index, line) in lines {
        let fail = |what: String| Fault { line: Some(index + 1), what };
        let line = std::str::from_utf8(line.trim_ascii_end()).map_err(|_| fail("the line is not text".to_owned()))?;
        let found = line.split_once(' ').and_then(|(token, rank)| {
            let token = base64::engine::general_purpose::STANDARD.decode(token).ok()?;
            Some((token, rank.parse::<u32>().ok()?))
        });
        let Some((token, rank)) = found.filter(|(token, _)| !token.is_empty()) else {
            let shown: String = line.chars().take(40).collect();
            return Err(fail(format!("`{}` is not a token in base64 and its rank", shown.escape_debug())));
        };
        if token.len() > MAX_TOKEN_BYTES {
            return Err(fail(format!("a token of {} bytes; at most {MAX_TOKEN_BYTES} are read", token.len())));
        }
        // Ranks count the lines in every file of this format; so a line that is missing or said twice is found.
        if rank as usize != ranks.len() {
            return Err(fail(format!("rank {rank} is on the line of rank {}", ranks.len())));
        }
        if ranks.insert(token, rank).is_some() {
            return Err(fail("a token that an earlier line has".to_owned()));
        }
    }
    match (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        Some(byte) => Err(Fault::new(format!("no token for the byte 0x{byte:02X}, so not every text has tokens"))),
        None => Ok(ranks),
    }
}

/// A token's bytes in the letters that byte-level vocabularies write them with: printable Latin-1 as it is, the rest
/// counted from U+0100.
fn spell(token: &[u8]) -> String {
    let letter = |byte: u8| -> char {
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap_or_default(),
            0x7F..=0xA0 => char::from_u32(0x121 + u32::from(byte - 0x7F)).unwrap_or_default(),
            0xAD => '\u{143}',
        }
    };
    token.iter().map(|byte| letter(*byte)).collect()
}

/// The special tokens of Llama 3 in the order of their ids.
///
/// torchtune's list, without `<|image|>` (128256), which no text model has an embedding for.
pub fn llama3_special_tokens() -> Vec<String> {
    let named = [
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "step_id",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "reserved_special_token_245",
        "video",
    ];
    let reserved = (2..245).map(|index| format!("reserved_special_token_{index}"));
    named.into_iter().map(str::to_owned).chain(reserved).map(|name| format!("<|{name}|>")).collect()
}

/// Cuts a text as torchtune does before it encodes: every [`MAX_TEXT`] characters, and runs of one class at [`MAX_RUN`].
pub fn pieces(text: &str) -> Vec<&str> {
    if text.len() <= MAX_RUN {
        return vec![text];
    }
    let (mut pieces, mut start, mut run, mut was_blank) = (vec![], 0, 0, None);
    for (count, (at, letter)) in text.char_indices().enumerate() {
        let is_blank = super::is_blank(letter);
        let begins = count % MAX_TEXT == 0;
        run = if begins || was_blank != Some(is_blank) { 1 } else { run + 1 };
        if run > MAX_RUN || (begins && count > 0) {
            pieces.push(&text[start..at]);
            (start, run) = (at, 1);
        }
        was_blank = Some(is_blank);
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_those_of_byte_level_vocabularies() {
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        let letters: std::collections::BTreeSet<char> = spell(&bytes).chars().collect();
        assert_eq!(letters, ByteLevel::alphabet().into_iter().collect());
        assert_eq!(spell(b" \n\x7f\xad"), "\u{120}\u{10a}\u{121}\u{143}");
        assert_eq!(spell("\u{a0}".as_bytes()), "\u{c2}\u{142}");
    }

    #[test]
    fn there_are_256_special_tokens() {
        let tokens = llama3_special_tokens();
        assert_eq!(tokens.len(), 256);
        assert_eq!((tokens[9].as_str(), tokens[12].as_str()), ("<|eot_id|>", "<|video|>"));
        assert_eq!(
            (tokens[13].as_str(), tokens[255].as_str()),
            ("<|reserved_special_token_2|>", "<|reserved_special_token_244|>")
        );
    }

    #[test]
    fn long_texts_are_cut_where_torchtune_cuts() {
        assert_eq!(pieces(""), [""]);
        let lengths = |text: &str| pieces(text).iter().map(|piece| piece.chars().count()).collect::<Vec<_>>();
        assert_eq!(lengths(&"a".repeat(60_000)), [25_000, 25_000, 10_000]);
        assert_eq!(lengths(&format!("{} {}", "é".repeat(25_000), "b".repeat(25_001))), [50_001, 1]);
        assert_eq!(lengths(&"ab ".repeat(200_000)), [400_000, 200_000]);
        assert_eq!(pieces(&" x".repeat(300_000)).concat(), " x".repeat(300_000));
    }
}
