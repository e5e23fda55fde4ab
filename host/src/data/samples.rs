//! Tokenised rows in memory: flat tokens, which of them carry loss, and where each sample begins.
//!
//! Labels are not stored: a token that carries loss is its own label, unshifted. Shifting belongs to
//! [`super::batches`], where the ends of documents are known.
//!
//! What a batch counts, an *element*, is a sample, or a pack of pieces of samples ([`Packs`]). A piece may end in the middle of
//! its sample; its last token still has the next one for a label, as torchtune's does, which shifts before it packs.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::plan::PackingPlan;

/// The label value of a token without loss, as PyTorch's cross-entropy has it.
pub const IGNORE_INDEX: i64 = -100;

/// How many bad rows are kept for the report.
pub(super) const SHOWN_BAD_ROWS: usize = 5;

/// One sample on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its place in the data set.
    pub id: u64,
    pub tokens: Vec<u32>,
    /// Unshifted: `labels[i]` is `tokens[i]` or [`IGNORE_INDEX`].
    pub labels: Vec<i32>,
}

/// One sample where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRef<'s> {
    pub tokens: &'s [u32],
    /// Which tokens carry loss, one flag a token.
    pub trained: &'s [bool],
}

/// Samples laid end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Samples {
    pub tokens: Vec<u32>,
    pub trained: Vec<bool>,
    /// Sample `i` is `offsets[i]..offsets[i + 1]`. Invariant: starts with 0, never falls, ends with `tokens.len()`.
    pub offsets: Vec<u64>,
}

/// What happened on the way from rows to samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Bad rows left out under `on_bad_row: skip`.
    pub bad_rows: u64,
    /// Where and why, for the first few of them.
    pub first_bad_rows: Vec<String>,
    /// Rows the template left out on purpose.
    pub left_out: u64,
    /// Samples cut to `max_seq_len`.
    pub cut: u64,
    /// Samples without any label, usually because the cut took them.
    pub without_labels: u64,
}

impl Report {
    pub(super) fn add(&mut self, other: &Report) {
        let Report { bad_rows, first_bad_rows, left_out, cut, without_labels } = other;
        self.bad_rows += bad_rows;
        self.left_out += left_out;
        self.cut += cut;
        self.without_labels += without_labels;
        let room = SHOWN_BAD_ROWS - self.first_bad_rows.len();
        self.first_bad_rows.extend(first_bad_rows.iter().take(room).cloned());
    }
}

/// What is worth telling a person, in one line; empty when every row became a whole sample.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bad_rows, first_bad_rows, left_out, cut, without_labels } = self;
        let places = format!("skipped ({})", first_bad_rows.join("; "));
        let counts = [
            (*bad_rows, "bad row", places.as_str()),
            (*left_out, "row", "left out by the template"),
            (*cut, "sample", "cut to `max_seq_len`"),
            (*without_labels, "sample", "without a token to learn"),
        ];
        let mut comma = "";
        for (count, what, became) in counts.into_iter().filter(|(count, ..)| *count > 0) {
            write!(f, "{comma}{count} {what}{} {became}", if count == 1 { "" } else { "s" })?;
            comma = ", ";
        }
        Ok(())
    }
}

/// A data set ready for training: its samples in the order of its rows, and what a batch counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenized {
    pub(super) samples: Samples,
    elements: Elements,
    pub report: Report,
    pub from_cache: bool,
    digest: String,
}

/// What a batch counts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Elements {
    Samples,
    Packs(Packs),
    /// Samples 2i and 2i + 1: the better and the worse answer.
    Pairs,
}

/// A part of a sample, from `start` up to `end` among its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub sample: u32,
    pub start: u32,
    pub end: u32,
}

/// Pieces laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Packs {
    pieces: Vec<Piece>,
    /// Pack `i` is `ends[i - 1]..ends[i]` of the pieces.
    ends: Vec<u32>,
}

impl Packs {
    /// torchtune's packing: samples in their order, each into the pack at hand while there is room. One that does not fit
    /// begins the next pack, or with `split` fills this one and goes on in the next.
    fn new(samples: &Samples, plan: &PackingPlan) -> Self {
        let room = plan.max_seq_len as u32;
        let mut packs = Self::default();
        let mut filled = 0;
        for sample in 0..samples.len() as u32 {
            let length = samples.length(sample as usize) as u32;
            let mut start = 0;
            if !plan.split_across_pack && filled > 0 && filled + length > room {
                packs.close();
                filled = 0;
            }
            while start < length {
                if filled == room {
                    packs.close();
                    filled = 0;
                }
                let end = if plan.split_across_pack { length.min(start + room - filled) } else { length };
                packs.pieces.push(Piece { sample, start, end });
                filled += end - start;
                start = end;
            }
        }
        if filled > 0 {
            packs.close();
        }
        packs
    }

    fn close(&mut self) {
        self.ends.push(self.pieces.len() as u32);
    }

    fn pack(&self, index: usize) -> &[Piece] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.pieces[start as usize..self.ends[index] as usize]
    }
}

impl Tokenized {
    pub(super) fn new(samples: Samples, report: Report) -> Self {
        let digest = samples.digest();
        Self { samples, elements: Elements::Samples, report, from_cache: false, digest }
    }

    /// A data set made of samples that exist already; they are numbered anew.
    pub fn from_samples(list: impl IntoIterator<Item = Sample>) -> Self {
        let (mut samples, mut report) = (Samples::default(), Report::default());
        for Sample { id: _, tokens, labels } in list {
            let trained: Vec<bool> = labels.iter().map(|&label| i64::from(label) != IGNORE_INDEX).collect();
            samples.push(&tokens, &trained);
            let last = samples.get(samples.len() - 1);
            report.without_labels += u64::from(!last.has_labels());
        }
        Self::new(samples, report)
    }

    /// The same samples in packs.
    pub fn packed(self, plan: &PackingPlan) -> Self {
        let packs = Packs::new(&self.samples, plan);
        let digest = blake3::hash(format!("{} {plan:?}", self.digest).as_bytes()).to_hex().to_string();
        Self { elements: Elements::Packs(packs), digest, ..self }
    }

    /// The same samples two by two, the better answer first.
    pub fn paired(self) -> Self {
        let digest = blake3::hash(format!("{} pairs", self.digest).as_bytes()).to_hex().to_string();
        Self { elements: Elements::Pairs, digest, ..self }
    }

    pub fn is_paired(&self) -> bool {
        self.elements == Elements::Pairs
    }

    /// Data sets, the elements of one after those of the other. All of them are packed, or paired, or neither.
    pub fn concatenated(parts: Vec<Tokenized>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut whole = parts.next()?;
        for part in parts {
            let first_sample = whole.samples.len() as u32;
            whole.samples.append(&part.samples);
            if let (Elements::Packs(packs), Elements::Packs(more)) = (&mut whole.elements, &part.elements) {
                let first_piece = packs.pieces.len() as u32;
                packs
                    .pieces
                    .extend(more.pieces.iter().map(|piece| Piece { sample: piece.sample + first_sample, ..*piece }));
                packs.ends.extend(more.ends.iter().map(|end| end + first_piece));
            }
            whole.report.add(&part.report);
            whole.from_cache &= part.from_cache;
            whole.digest = blake3::hash(format!("{} {}", whole.digest, part.digest).as_bytes()).to_hex().to_string();
        }
        Some(whole)
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match &self.elements {
            Elements::Samples => self.samples.len(),
            Elements::Packs(packs) => packs.ends.len(),
            Elements::Pairs => self.samples.len() / 2,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces of an element.
    pub fn element(&self, index: usize) -> Vec<Piece> {
        let whole = |sample: usize| Piece { sample: sample as u32, start: 0, end: self.samples.length(sample) as u32 };
        match &self.elements {
            Elements::Samples => vec![whole(index)],
            Elements::Packs(packs) => packs.pack(index).to_vec(),
            Elements::Pairs => vec![whole(2 * index), whole(2 * index + 1)],
        }
    }

    /// How many tokens element `index` has.
    pub fn length(&self, index: usize) -> usize {
        match &self.elements {
            Elements::Samples => self.samples.length(index),
            Elements::Packs(packs) => packs.pack(index).iter().map(|piece| (piece.end - piece.start) as usize).sum(),
            Elements::Pairs => self.samples.length(2 * index) + self.samples.length(2 * index + 1),
        }
    }

    pub fn num_samples(&self) -> usize {
        self.samples.len()
    }

    pub fn get(&self, sample: usize) -> SampleRef<'_> {
        self.samples.get(sample)
    }

    pub fn sample(&self, index: usize) -> Sample {
        let found = self.get(index);
        Sample { id: index as u64, tokens: found.tokens.to_vec(), labels: found.labels() }
    }

    /// How many tokens all samples have together.
    pub fn num_tokens(&self) -> usize {
        self.samples.tokens.len()
    }

    /// The highest token id, which the model's vocabulary has to cover.
    pub fn max_token(&self) -> Option<u32> {
        self.samples.tokens.iter().max().copied()
    }

    /// Tokens of the longest sample.
    pub fn max_len(&self) -> usize {
        (0..self.num_samples()).map(|sample| self.samples.length(sample)).max().unwrap_or(0)
    }

    /// Rows that became no sample, bad ones and those the template left out.
    pub fn skipped(&self) -> u64 {
        self.report.bad_rows + self.report.left_out
    }

    /// Hex digest of the elements: equal exactly where the same tokens carry the same loss, in the same packs.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

impl Default for Samples {
    fn default() -> Self {
        Self { tokens: vec![], trained: vec![], offsets: vec![0] }
    }
}

impl Samples {
    pub fn push(&mut self, tokens: &[u32], trained: &[bool]) {
        assert_eq!(tokens.len(), trained.len(), "one flag a token");
        self.tokens.extend_from_slice(tokens);
        self.trained.extend_from_slice(trained);
        self.offsets.push(self.tokens.len() as u64);
    }

    pub fn append(&mut self, other: &Samples) {
        let base = self.tokens.len() as u64;
        self.tokens.extend_from_slice(&other.tokens);
        self.trained.extend_from_slice(&other.trained);
        self.offsets.extend(other.offsets[1..].iter().map(|offset| base + offset));
    }

    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn get(&self, index: usize) -> SampleRef<'_> {
        let range = self.offsets[index] as usize..self.offsets[index + 1] as usize;
        SampleRef { tokens: &self.tokens[range.clone()], trained: &self.trained[range] }
    }

    pub fn length(&self, index: usize) -> usize {
        (self.offsets[index + 1] - self.offsets[index]) as usize
    }

    fn digest(&self) -> String {
        // One write a few thousand values: the hash is fastest on long runs.
        fn feed<T: Copy, const N: usize>(hasher: &mut blake3::Hasher, values: &[T], bytes: fn(T) -> [u8; N]) {
            hasher.update(&(values.len() as u64).to_le_bytes());
            for chunk in values.chunks(1 << 14) {
                hasher.update(chunk.iter().map(|&value| bytes(value)).collect::<Vec<_>>().as_flattened());
            }
        }
        let mut hasher = blake3::Hasher::new();
        feed(&mut hasher, &self.tokens, u32::to_le_bytes);
        feed(&mut hasher, &self.trained, |trained| [u8::from(trained)]);
        feed(&mut hasher, &self.offsets, u64::to_le_bytes);
        hasher.finalize().to_hex().to_string()
    }
}

impl SampleRef<'_> {
    /// Unshifted: `labels[i]` is `tokens[i]` or [`IGNORE_INDEX`].
    pub fn labels(&self) -> Vec<i32> {
        let label = |(&token, &trained): (&u32, &bool)| if trained { token as i32 } else { IGNORE_INDEX as i32 };
        self.tokens.iter().zip(self.trained).map(label).collect()
    }

    /// Whether any token can be learned: the first one cannot, nothing comes before it.
    pub fn has_labels(&self) -> bool {
        self.trained.iter().skip(1).any(|&trained| trained)
    }
}
