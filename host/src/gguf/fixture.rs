//! A small GGUF writer, so that tests of the reader need no file from elsewhere.

use half::f16;

/// A file as parts: tests change them before [`GgufFile::bytes`] joins them.
pub struct GgufFile {
    pub version: u32,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Slowest first, as in Hugging Face.
    pub shape: Vec<usize>,
    pub type_id: u32,
    pub values: Vec<f32>,
}

pub const HIDDEN: usize = 64;
pub const FFN: usize = 96;
pub const LAYERS: usize = 2;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 32;

const F32: u32 = 0;
const F16: u32 = 1;
const Q8_0: u32 = 8;

/// A Llama of two layers with the 256 bytes, three merges and three special tokens as its vocabulary.
pub fn tiny_llama() -> GgufFile {
    let (tokens, merges, types) = vocabulary();
    let rows = tokens.len();
    let metadata = vec![
        ("general.architecture".into(), Meta::Str("llama".into())),
        ("llama.block_count".into(), Meta::U32(LAYERS as u32)),
        ("llama.context_length".into(), Meta::U32(128)),
        ("llama.embedding_length".into(), Meta::U32(HIDDEN as u32)),
        ("llama.feed_forward_length".into(), Meta::U32(FFN as u32)),
        ("llama.attention.head_count".into(), Meta::U32(HEADS as u32)),
        ("llama.attention.head_count_kv".into(), Meta::U32(KV_HEADS as u32)),
        ("llama.attention.layer_norm_rms_epsilon".into(), Meta::F32(1e-5)),
        ("llama.rope.freq_base".into(), Meta::F32(10_000.0)),
        ("tokenizer.ggml.model".into(), Meta::Str("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Meta::Str("smollm".into())),
        ("tokenizer.ggml.tokens".into(), Meta::Strs(tokens)),
        ("tokenizer.ggml.token_type".into(), Meta::I32s(types)),
        ("tokenizer.ggml.merges".into(), Meta::Strs(merges)),
        ("tokenizer.ggml.bos_token_id".into(), Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Meta::U32(2)),
        ("tokenizer.ggml.add_bos_token".into(), Meta::Bool(false)),
        ("tokenizer.chat_template".into(), Meta::Str("{{ messages[0].content }}".into())),
    ];
    let mut tensors = vec![tensor("token_embd.weight", &[rows, HIDDEN], Q8_0)];
    for layer in 0..LAYERS {
        for (name, shape, type_id) in [
            ("attn_q", &[HEADS * HEAD_DIM, HIDDEN][..], F32),
            ("attn_k", &[KV_HEADS * HEAD_DIM, HIDDEN], F16),
            ("attn_v", &[KV_HEADS * HEAD_DIM, HIDDEN], F16),
            ("attn_output", &[HIDDEN, HEADS * HEAD_DIM], Q8_0),
            ("ffn_gate", &[FFN, HIDDEN], Q8_0),
            ("ffn_up", &[FFN, HIDDEN], Q8_0),
            ("ffn_down", &[HIDDEN, FFN], Q8_0),
            ("attn_norm", &[HIDDEN], F32),
            ("ffn_norm", &[HIDDEN], F32),
        ] {
            tensors.push(tensor(&format!("blk.{layer}.{name}.weight"), shape, type_id));
        }
    }
    tensors.push(tensor("output_norm.weight", &[HIDDEN], F32));
    GgufFile { version: 3, metadata, tensors }
}

/// Values that each name their row (halves, exact in every encoding used here).
fn tensor(name: &str, shape: &[usize], type_id: u32) -> Tensor {
    let columns = shape[shape.len() - 1];
    let values = (0..shape.iter().product::<usize>()).map(|i| (i / columns) as f32 / 2.0).collect();
    Tensor { name: name.into(), shape: shape.into(), type_id, values }
}

fn vocabulary() -> (Vec<String>, Vec<String>, Vec<i32>) {
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let moved = (0..256u32).filter(|&b| !printable(b)).enumerate().map(|(i, _)| 0x100 + i as u32);
    let bytes = (0..256u32).filter(|&b| printable(b)).chain(moved).filter_map(char::from_u32).map(String::from);
    let merges = ["h e", "l l", "he ll"].map(str::to_owned).to_vec();
    let merged = ["he", "ll", "hell"].map(str::to_owned);
    let tokens: Vec<String> = specials.into_iter().chain(bytes).chain(merged).collect();
    let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    (tokens, merges, types)
}

impl GgufFile {
    pub fn set(&mut self, key: &str, value: Meta) {
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => self.metadata.push((key.into(), value)),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            push_string(&mut out, key);
            push_value(&mut out, value);
        }
        let mut data = vec![];
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            push_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
            out.extend(tensor.type_id.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            push_tensor(&mut data, tensor);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn push_value(out: &mut Vec<u8>, value: &Meta) {
    let mut tagged = |tag: u32, bytes: &[u8]| {
        out.extend(tag.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Meta::U32(n) => tagged(4, &n.to_le_bytes()),
        Meta::F32(x) => tagged(6, &x.to_le_bytes()),
        Meta::Bool(b) => tagged(7, &[u8::from(*b)]),
        Meta::Str(s) => {
            tagged(8, &[]);
            push_string(out, s);
        }
        Meta::Strs(all) => {
            tagged(9, &8u32.to_le_bytes());
            out.extend((all.len() as u64).to_le_bytes());
            all.iter().for_each(|s| push_string(out, s));
        }
        Meta::I32s(all) => {
            tagged(9, &5u32.to_le_bytes());
            out.extend((all.len() as u64).to_le_bytes());
            all.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}

fn push_tensor(out: &mut Vec<u8>, tensor: &Tensor) {
    match tensor.type_id {
        F32 => tensor.values.iter().for_each(|x| out.extend(x.to_le_bytes())),
        F16 => tensor.values.iter().for_each(|x| out.extend(f16::from_f32(*x).to_le_bytes())),
        // A scale of a half holds the fixture's values exactly while a row's number is at most 127; rows above repeat.
        _ => tensor.values.chunks(32).for_each(|block| {
            out.extend(f16::from_f32(0.5).to_le_bytes());
            block.iter().for_each(|x| out.push((x * 2.0) as u32 as u8 & 127));
        }),
    }
}
