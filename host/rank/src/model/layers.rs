//! The layers a decoder is made of. `T` tokens of all documents laid end to end, `D` hidden, `N` heads, `H` head size.

use host::Result;
use host_ffi::autograd::{self, FrozenLinear};
use tch::{Kind, Tensor};

use crate::adapter::LoraPair;
use crate::model::KvCache;
use crate::torch::TorchContext;

/// What every layer of one forward is given besides its input.
pub struct Forward<'a> {
    /// Where each document begins, and the end: `documents + 1` entries. Attention never crosses one.
    pub cu_seqlens: &'a [i64],
    /// Rotary angles `[T, H/2]`.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Adapter dropout, when training with any: one key per token `[T]`, made of seed, step, sample and position.
    pub dropout_keys: Option<Tensor>,
}

impl Forward<'_> {
    /// The same for the tokens at `rows` alone, past the last attention.
    pub fn at(&self, rows: &Tensor) -> Self {
        Self {
            cu_seqlens: self.cu_seqlens,
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            dropout_keys: self.dropout_keys.as_ref().map(|keys| keys.index_select(0, rows)),
        }
    }
}

/// A linear layer of the checkpoint: frozen, perhaps with an adapter.
pub struct Linear {
    pub name: String,
    pub frozen: FrozenLinear,
    pub lora: Option<LoraPair>,
}

impl Linear {
    /// `y = x Wᵀ + (α/r) (dropout(x) Aᵀ) Bᵀ`.
    pub fn forward(&self, x: &Tensor, forward: &Forward) -> Result<Tensor> {
        let Some(lora) = &self.lora else {
            return self.frozen.forward(x).torch(format!("apply `{}`", self.name));
        };
        let dropped = match &forward.dropout_keys {
            Some(keys) if lora.dropout > 0.0 => Some(lora.drop(x, keys)?),
            _ => None,
        };
        autograd::lora_linear(x, &self.frozen, &lora.a, &lora.b, lora.scale, dropped.as_ref())
            .torch(format!("apply `{}` and its adapter", self.name))
    }
}

/// Root mean square norm with a frozen scale.
pub struct RmsNorm {
    pub weight: Tensor,
    pub eps: f64,
}

impl RmsNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        autograd::rms_norm(x, &self.weight, self.eps).torch("normalise")
    }
}

pub struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
}

impl Attention {
    /// Causal attention within each document, before the output projection: `[T, N·H]`. With a cache, the keys and values
    /// are kept in it, and a single new token attends to all of them.
    pub fn mix(&self, x: &Tensor, forward: &Forward, cache: Option<(&mut KvCache, usize)>) -> Result<Tensor> {
        let tokens = x.size()[0];
        let heads = |y: Tensor, count: i64| y.view([tokens, count, self.head_dim]); // [T, N, H]
        let q = heads(self.q.forward(x, forward)?, self.num_heads);
        let k = heads(self.k.forward(x, forward)?, self.num_kv_heads);
        let v = heads(self.v.forward(x, forward)?, self.num_kv_heads);
        let q = autograd::rope(&q, &forward.cos, &forward.sin).torch("rotate queries")?;
        let k = autograd::rope(&k, &forward.cos, &forward.sin).torch("rotate keys")?;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let mixed = match cache {
            Some((cache, layer)) => {
                cache.store(layer, &k, &v);
                if cache.is_empty() {
                    self.documents(&q, &k, &v, forward, scale)?
                } else {
                    cache.attend(layer, &q, scale)?
                }
            }
            None => self.documents(&q, &k, &v, forward, scale)?,
        };
        Ok(mixed.reshape([tokens, self.num_heads * self.head_dim]))
    }

    fn documents(&self, q: &Tensor, k: &Tensor, v: &Tensor, forward: &Forward, scale: f64) -> Result<Tensor> {
        autograd::attention_varlen(q, k, v, forward.cu_seqlens, scale).torch("attend")
    }
}

/// Gated MLP: `down(silu(gate(x)) · up(x))`.
pub struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Mlp {
    pub fn forward(&self, x: &Tensor, forward: &Forward) -> Result<Tensor> {
        let gated = autograd::swiglu(&self.gate.forward(x, forward)?, &self.up.forward(x, forward)?).torch("gate")?;
        self.down.forward(&gated, forward)
    }
}

/// The head: hidden states to scores over the vocabulary.
pub struct Head(pub Linear);

impl Head {
    /// Scores in f32: `[rows, vocabulary]`.
    pub fn logits(&self, hidden: &Tensor, forward: &Forward) -> Result<Tensor> {
        Ok(self.0.forward(hidden, forward)?.to_kind(Kind::Float))
    }

    /// Summed cross-entropy of `labels` `[L]` under `hidden` `[L, D]`, at most `chunk_rows` rows of scores at a time.
    pub fn cross_entropy_sum(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        chunk_rows: i64,
        forward: &Forward,
    ) -> Result<Tensor> {
        if self.0.lora.is_some() {
            let scores = self.logits(hidden, forward)?;
            return Ok(scores.cross_entropy_loss::<Tensor>(labels, None, tch::Reduction::Sum, -100, 0.0));
        }
        autograd::linear_cross_entropy_sum(hidden, &self.0.frozen, labels, chunk_rows).torch("compute the loss")
    }
}
