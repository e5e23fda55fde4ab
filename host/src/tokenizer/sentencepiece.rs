//! SentencePiece's `tokenizer.model` (Llama 2, Mistral): a Protocol Buffers message of pieces with scores.
//!
//! BPE with byte fallback only, over text that is not normalised beyond `▁` for a space and one before the text: what these
//! families use. Of two neighbours that make a piece, those with the best score merge first. Anything else the format can
//! say (Unigram, a table of normalised characters) is refused by name, since ids would differ in silence.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{self, Prepend, Replace};
use tokenizers::{AddedToken, decoders};

use super::Fault;

const SPACE: &str = "▁";

/// The pairs of a piece are as many as its characters; the longest of Llama 2 has 16.
const MAX_PIECE_BYTES: usize = 512;

/// `ModelProto.SentencePiece.Type`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// `TrainerSpec.ModelType`.
const BPE_MODEL: u64 = 2;

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// A tokenizer and the ids its trainer gave to the tokens that begin and end a sequence.
pub struct Read {
    pub tokenizer: tokenizers::Tokenizer,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// What the file says, with the format's defaults for what it leaves out.
struct Model {
    pieces: Vec<Piece>,
    is_trained: bool,
    model_type: u64,
    byte_fallback: bool,
    space_is_suffix: bool,
    unk: i64,
    bos: i64,
    eos: i64,
    has_character_table: bool,
    add_dummy_prefix: bool,
    remove_extra_spaces: bool,
    escape_spaces: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            pieces: vec![],
            is_trained: false,
            model_type: 1,
            byte_fallback: false,
            space_is_suffix: false,
            unk: 0,
            bos: 1,
            eos: 2,
            has_character_table: false,
            add_dummy_prefix: true,
            remove_extra_spaces: true,
            escape_spaces: true,
        }
    }
}

pub fn read(bytes: &[u8]) -> Result<Read, Fault> {
    let model = Model::parse(bytes)?;
    model.check()?;
    let Model { pieces, add_dummy_prefix, .. } = &model;
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(pieces.len());
    for (id, piece) in (0..).zip(pieces) {
        if let Some(first) = ids.insert(&piece.text, id) {
            return Err(Fault::new(format!("pieces {first} and {id} are both `{}`", piece.text.escape_debug())));
        }
    }

    let normal = |text: &str| ids.get(text).copied().filter(|id| pieces[*id as usize].kind == NORMAL);
    let mut merges = vec![];
    for piece in pieces.iter().filter(|piece| piece.kind == NORMAL) {
        let pairs = piece.text.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = piece.text.split_at(at);
            Some((normal(left)?, normal(right)?, left, right))
        });
        let mut pairs: Vec<_> = pairs.collect();
        pairs.sort();
        merges.extend(pairs.into_iter().map(|(_, _, left, right)| (piece.score, left.to_owned(), right.to_owned())));
    }
    // Stable: pairs of one piece stay in order.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));

    let bpe = BPE::builder()
        .vocab_and_merges(
            ids.iter().map(|(text, id)| ((*text).to_owned(), *id)).collect::<tokenizers::models::bpe::Vocab>(),
            merges.into_iter().map(|(_, left, right)| (left, right)).collect(),
        )
        .unk_token(pieces[model.unk as usize].text.clone())
        .fuse_unk(true)
        .byte_fallback(model.byte_fallback);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.build().map_err(Fault::library)?);
    let spaces = Replace::new(" ", SPACE).map_err(Fault::library)?;
    let mut normalizers = vec![spaces.into()];
    let mut decoders: Vec<tokenizers::DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(Fault::library)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if *add_dummy_prefix {
        normalizers.insert(0, Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(normalizers))).map_err(Fault::library)?;
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    let added = |kind: u64, special: bool| {
        let of_kind = pieces.iter().filter(move |piece| piece.kind == kind);
        of_kind.map(move |piece| AddedToken::from(piece.text.clone(), special).normalized(false)).collect::<Vec<_>>()
    };
    for (kind, special) in [(UNKNOWN, true), (CONTROL, true), (USER_DEFINED, false)] {
        tokenizer.add_tokens(added(kind, special)).map_err(Fault::library)?;
    }
    let id = |id: i64| u32::try_from(id).ok().filter(|id| (*id as usize) < pieces.len());
    Ok(Read { tokenizer, bos: id(model.bos), eos: id(model.eos) })
}

impl Model {
    /// `ModelProto`: pieces (1), trainer_spec (2), normalizer_spec (3).
    fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let mut model = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Value::Bytes(trainer)) => {
                    model.is_trained = true;
                    for field in Fields(trainer) {
                        match field? {
                            (3, Value::Int(value)) => model.model_type = value,
                            (24, Value::Int(value)) => model.space_is_suffix = value != 0,
                            (35, Value::Int(value)) => model.byte_fallback = value != 0,
                            (40, Value::Int(value)) => model.unk = value as i32 as i64,
                            (41, Value::Int(value)) => model.bos = value as i32 as i64,
                            (42, Value::Int(value)) => model.eos = value as i32 as i64,
                            _ => {}
                        }
                    }
                }
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field? {
                            (2, Value::Bytes(table)) => model.has_character_table = !table.is_empty(),
                            (3, Value::Int(value)) => model.add_dummy_prefix = value != 0,
                            (4, Value::Int(value)) => model.remove_extra_spaces = value != 0,
                            (5, Value::Int(value)) => model.escape_spaces = value != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(model)
    }

    fn check(&self) -> Result<(), Fault> {
        let fail = |what: &str| Err(Fault::new(what.to_owned()));
        if !self.is_trained {
            return fail("it has no trainer settings, so it is not a whole SentencePiece model");
        }
        if self.model_type != BPE_MODEL {
            return fail("it is a SentencePiece model of another type than BPE, which is not read");
        }
        if self.has_character_table || self.remove_extra_spaces || !self.escape_spaces || self.space_is_suffix {
            return fail("it normalises text before it cuts it (characters or spaces), which is not read");
        }
        let unk = usize::try_from(self.unk).ok().and_then(|id| self.pieces.get(id));
        if unk.is_none_or(|piece| piece.kind != UNKNOWN) {
            return fail("its unknown token is not among its pieces");
        }
        let has_byte =
            |byte: u8| self.pieces.iter().any(|piece| piece.kind == BYTE && piece.text == format!("<0x{byte:02X}>"));
        if self.byte_fallback && !(0..=u8::MAX).all(has_byte) {
            return fail("it writes unknown characters in bytes, and not every byte has a piece");
        }
        match self.pieces.iter().find(|piece| ![NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE].contains(&piece.kind)) {
            Some(piece) => {
                fail(&format!("the piece `{}` is marked unused, which is not read", piece.text.escape_debug()))
            }
            None => Ok(()),
        }
    }
}

impl Piece {
    /// `SentencePiece`: piece (1), score (2), type (3).
    fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: NORMAL };
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(text)) => match std::str::from_utf8(text) {
                    Ok(text) => piece.text = text.to_owned(),
                    Err(_) => return Err(Fault::new("a piece is not UTF-8".to_owned())),
                },
                (2, Value::Fixed(bytes)) => piece.score = f32::from_le_bytes(bytes),
                (3, Value::Int(value)) => piece.kind = value,
                _ => {}
            }
        }
        match piece.text.len() {
            0 => Err(Fault::new("a piece is empty".to_owned())),
            1..=MAX_PIECE_BYTES => Ok(piece),
            length => Err(Fault::new(format!("a piece of {length} bytes; at most {MAX_PIECE_BYTES} are read"))),
        }
    }
}

/// The fields of a Protocol Buffers message, by their numbers.
struct Fields<'a>(&'a [u8]);

enum Value<'a> {
    Int(u64),
    Fixed([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field().ok_or_else(|| Fault::new("a field of it ends beyond its message".to_owned()));
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Int(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some((key >> 3, value))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}
