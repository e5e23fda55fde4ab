//! The Llama family in GGUF terms: sizes and RoPE from metadata, tensor names, and what has to become of each tensor.
//!
//! A file must hold exactly the tensors of its architecture, each in the shape that its metadata implies; one that is
//! left over (biases, experts, another head) means a model that the written folder would not describe.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::{Gguf, TensorInfo, TensorType};
use crate::error::{Error, Result};

/// What `config.json` says of the model.
#[derive(Clone, Debug)]
pub struct LlamaShape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// `rope_scaling` in Hugging Face terms; null for none.
    pub rope_scaling: Json,
    pub tie_word_embeddings: bool,
}

/// A tensor of the written folder and where it comes from.
pub struct TensorTarget<'a> {
    pub name: String,
    pub source: &'a TensorInfo,
    /// llama.cpp interleaves the two halves of each head's rows (its RoPE rotates neighbours, Hugging Face's rotates
    /// halves): rows per head, where they are to be put back.
    pub interleaved_rows: Option<usize>,
}

impl LlamaShape {
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let file = gguf.path().display();
        let architecture = gguf.required("general.architecture", gguf.string("general.architecture"))?;
        if architecture != "llama" {
            return Err(Error::config(format!("`{file}` holds a model of architecture `{architecture}`"))
                .cause("this one is read: `llama` (Llama, SmolLM, TinyLlama and others of its shape)"));
        }
        let key = |name: &str| format!("llama.{name}");
        let required = |name: &str| {
            let n = gguf.required(&key(name), gguf.int(&key(name)))?;
            // Products of two of these stay far inside 64 bits.
            let sane = (1..=1 << 24).contains(&n);
            if sane { Ok(n) } else { Err(bad_value(gguf, &key(name), &n.to_string(), "1 to 16777216")) }
        };
        if gguf.int(&key("expert_count"))?.is_some_and(|n| n > 0) {
            return Err(Error::config(format!("`{file}` is a mixture of experts, which is not read yet")));
        }
        let (hidden_size, num_heads) = (required("embedding_length")?, required("attention.head_count")?);
        let num_kv_heads = match gguf.get(&key("attention.head_count_kv")) {
            Some(_) => required("attention.head_count_kv")?,
            None => num_heads,
        };
        let head_dim = match gguf.get(&key("attention.key_length")) {
            Some(_) => required("attention.key_length")?,
            None => hidden_size / num_heads,
        };
        let rotated = gguf.int(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        if head_dim == 0
            || !head_dim.is_multiple_of(2)
            || !num_heads.is_multiple_of(num_kv_heads)
            || rotated != head_dim
        {
            return Err(Error::config(format!("the attention sizes of `{file}` do not go together"))
                .cause(format!(
                    "hidden size {hidden_size}, {num_heads} heads, {num_kv_heads} key/value heads, head size {head_dim}, {rotated} of it rotated"
                )));
        }
        let rms_norm_eps = gguf
            .required(&key("attention.layer_norm_rms_epsilon"), gguf.float(&key("attention.layer_norm_rms_epsilon")))?;
        let rope_theta = gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        for (name, x) in [("attention.layer_norm_rms_epsilon", rms_norm_eps), ("rope.freq_base", rope_theta)] {
            if !(x.is_finite() && x > 0.0) {
                return Err(bad_value(gguf, &key(name), &x.to_string(), "a number above zero"));
            }
        }
        let shape = Self {
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_layers: required("block_count")?,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: find(gguf, "token_embd.weight")?.shape[0],
            max_position_embeddings: required("context_length")?,
            rms_norm_eps,
            rope_theta,
            rope_scaling: Json::Null,
            tie_word_embeddings: !gguf.tensors.iter().any(|tensor| tensor.name == "output.weight"),
        };
        let rope_scaling = shape.read_rope_scaling(gguf)?;
        Ok(Self { rope_scaling, ..shape })
    }

    /// Returns the tensors of the folder, in the order of the Hugging Face module.
    pub fn targets<'a>(&self, gguf: &'a Gguf) -> Result<Vec<TensorTarget<'a>>> {
        let mut left: BTreeMap<&str, &TensorInfo> =
            gguf.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        left.remove("rope_freqs.weight"); // became `rope_scaling`
        let mut targets = vec![];
        let mut take = |from: String, name: String, shape: &[usize], interleaved_rows: Option<usize>| -> Result<()> {
            let source = left.remove(from.as_str()).ok_or_else(|| missing(gguf, &from))?;
            if source.shape != shape {
                return Err(Error::config(format!(
                    "tensor `{from}` of `{}` does not fit its metadata",
                    gguf.path().display()
                ))
                .cause(format!("it has shape {:?}, the metadata needs {shape:?}", source.shape)));
            }
            targets.push(TensorTarget { name, source, interleaved_rows });
            Ok(())
        };
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let (q_rows, kv_rows) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let rows_per_head = Some(self.head_dim);
        take("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[self.vocab_size, hidden], None)?;
        for layer in 0..self.num_layers {
            for (from, to, shape, interleaved_rows) in [
                ("attn_q", "self_attn.q_proj", &[q_rows, hidden][..], rows_per_head),
                ("attn_k", "self_attn.k_proj", &[kv_rows, hidden], rows_per_head),
                ("attn_v", "self_attn.v_proj", &[kv_rows, hidden], None),
                ("attn_output", "self_attn.o_proj", &[hidden, q_rows], None),
                ("ffn_gate", "mlp.gate_proj", &[ffn, hidden], None),
                ("ffn_up", "mlp.up_proj", &[ffn, hidden], None),
                ("ffn_down", "mlp.down_proj", &[hidden, ffn], None),
                ("attn_norm", "input_layernorm", &[hidden], None),
                ("ffn_norm", "post_attention_layernorm", &[hidden], None),
            ] {
                let name = format!("model.layers.{layer}.{to}.weight");
                take(format!("blk.{layer}.{from}.weight"), name, shape, interleaved_rows)?;
            }
        }
        take("output_norm.weight".into(), "model.norm.weight".into(), &[hidden], None)?;
        if !self.tie_word_embeddings {
            take("output.weight".into(), "lm_head.weight".into(), &[self.vocab_size, hidden], None)?;
        }
        match left.into_keys().next() {
            None => Ok(targets),
            Some(name) => {
                Err(Error::config(format!("`{}` has a tensor `{name}` that is not read", gguf.path().display()))
                    .cause("a plain Llama model has no biases, experts or extra heads"))
            }
        }
    }

    fn read_rope_scaling(&self, gguf: &Gguf) -> Result<Json> {
        if gguf.tensors.iter().any(|tensor| tensor.name == "rope_freqs.weight") {
            return self.llama3_scaling(gguf, find(gguf, "rope_freqs.weight")?);
        }
        let kind = gguf.string("llama.rope.scaling.type")?.unwrap_or("none");
        let factor = match gguf.float("llama.rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => gguf.float("llama.rope.scale_linear")?,
        };
        match (kind, factor) {
            ("none", None | Some(1.0)) => Ok(Json::Null),
            ("none" | "linear", Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
            ("yarn", Some(factor)) => {
                let original = gguf.int("llama.rope.scaling.original_context_length")?;
                let original = original.unwrap_or(self.max_position_embeddings);
                Ok(json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}))
            }
            _ => Err(Error::config(format!("`{}` scales RoPE by `{kind}`, which is not read", gguf.path().display()))
                .cause("these are read: none, linear, yarn with a factor, and Llama 3's factors")),
        }
    }

    /// Llama 3.1's scaling is a tensor here, one divisor per frequency; `config.json` wants the numbers that made it.
    /// Its band (1, 4, 8192) is that of every Llama 3 release, and the factor is the largest divisor: made again from
    /// these, the tensor must come out the same.
    fn llama3_scaling(&self, gguf: &Gguf, tensor: &TensorInfo) -> Result<Json> {
        let unknown = |cause: String| {
            let message = format!("`{}` scales RoPE in a way that is not Llama 3's", gguf.path().display());
            Err(Error::config(message).cause(cause))
        };
        if tensor.tensor_type != TensorType::F32 || tensor.shape != [self.head_dim / 2] {
            return unknown(format!(
                "`rope_freqs.weight` is {} of shape {:?}",
                tensor.tensor_type.name(),
                tensor.shape
            ));
        }
        let mut raw = vec![0; tensor.bytes as usize];
        gguf.read_at(tensor.offset, &mut raw)?;
        let found: Vec<f64> =
            raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect();
        let factor = found.iter().copied().fold(1.0, f64::max);
        let (low, high, original) = (1.0, 4.0, 8192.0);
        for (i, &found) in found.iter().enumerate() {
            let wavelength = std::f64::consts::TAU * self.rope_theta.powf(2.0 * i as f64 / self.head_dim as f64);
            let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - smooth) / factor + smooth);
            // `!(a <= b)` so that a NaN is a difference.
            if found.is_nan() || (found - expected).abs() > 1e-3 * expected {
                return unknown(format!("divisor {i} is {found}, Llama 3's with factor {factor} is {expected:.4}"));
            }
        }
        Ok(json!({
            "factor": factor,
            "high_freq_factor": high,
            "low_freq_factor": low,
            "original_max_position_embeddings": original as u64,
            "rope_type": "llama3",
        }))
    }
}

fn find<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a TensorInfo> {
    gguf.tensors.iter().find(|tensor| tensor.name == name).ok_or_else(|| missing(gguf, name))
}

fn missing(gguf: &Gguf, name: &str) -> Error {
    let (file, count) = (gguf.path().display(), gguf.tensors.len());
    Error::config(format!("`{file}` has no tensor `{name}`"))
        .cause(format!("the file holds {count} tensors"))
        .hint("a model split into several files (`-00001-of-…`) is joined with llama.cpp's `llama-gguf-split --merge`")
}

fn bad_value(gguf: &Gguf, key: &str, found: &str, needed: &str) -> Error {
    Error::config(format!("metadata `{key}` of `{}` is {found}; it must be {needed}", gguf.path().display()))
}
