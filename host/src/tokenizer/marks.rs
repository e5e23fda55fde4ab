//! Special tokens that are spelled in data stay text.
//!
//! A template may write `<|im_start|>` and mean the token; a row with the same letters must not begin a turn by them. What a
//! template gives back does not show whose letters they are, so that a row's are marked before it sees them: a character that
//! stands for nothing goes in behind the first. A text that has the mark is encoded without it, and what was marked is no
//! token. Not noticed is a spelling that a template puts together out of pieces of rows.

use serde_json::Value;

/// A code point that Unicode keeps for a program's own use, and that no text has.
const MARK: char = '\u{fdd0}';

/// The special tokens of a tokenizer, as they are spelled.
#[derive(Debug, Default)]
pub struct SpecialTokens {
    /// Long ones first: one may begin with another.
    spellings: Vec<(String, u32)>,
    /// What they begin with.
    starts: Vec<char>,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'t> {
    Text(&'t str),
    Token(u32),
}

impl SpecialTokens {
    pub fn of(inner: &tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special && token.content.chars().nth(1).is_some());
        let mut spellings: Vec<_> = special.map(|(id, token)| (token.content, id)).collect();
        spellings.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        let mut starts: Vec<char> = spellings.iter().filter_map(|(spelling, _)| spelling.chars().next()).collect();
        starts.sort_unstable();
        starts.dedup();
        Self { spellings, starts }
    }

    /// Where the next spelling in `text` begins, and which it is.
    fn next(&self, text: &str) -> Option<(usize, &(String, u32))> {
        text.match_indices(&self.starts[..]).find_map(|(at, _)| {
            let found = self.spellings.iter().find(|(spelling, _)| text[at..].starts_with(spelling.as_str()));
            found.map(|found| (at, found))
        })
    }

    /// Marks the spellings in a text of a row.
    pub fn mark(&self, text: &mut String) {
        let mut from = 0;
        while let Some((at, (spelling, _))) = self.next(&text[from..]) {
            let behind = from + at + spelling.chars().next().map_or(0, char::len_utf8);
            text.insert(behind, MARK);
            from = behind;
        }
    }

    /// Marks the spellings in every text of a JSON value, names of fields among them.
    pub fn mark_json(&self, value: &mut Value) {
        match value {
            Value::String(text) => self.mark(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_json(item)),
            Value::Object(fields) => {
                let marked = std::mem::take(fields).into_iter().map(|(mut name, mut field)| {
                    self.mark(&mut name);
                    self.mark_json(&mut field);
                    (name, field)
                });
                *fields = marked.collect();
            }
            _ => {}
        }
    }

    /// The pieces of a text: the tokens that are spelled in it and not marked, and what is between them.
    pub fn pieces<'t>(&self, mut text: &'t str) -> Vec<Piece<'t>> {
        let mut pieces = vec![];
        while let Some((at, (spelling, id))) = self.next(text) {
            pieces.extend(Some(Piece::Text(&text[..at])).filter(|_| at > 0));
            pieces.push(Piece::Token(*id));
            text = &text[at + spelling.len()..];
        }
        pieces.extend(Some(Piece::Text(text)).filter(|_| !text.is_empty()));
        pieces
    }
}

/// Whether something in a text is marked.
pub fn is_marked(text: &str) -> bool {
    text.contains(MARK)
}

/// A text as it was before it was marked.
pub fn unmarked(text: &str) -> String {
    text.replace(MARK, "")
}
