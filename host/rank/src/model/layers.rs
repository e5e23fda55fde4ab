//! The layers a decoder is made of. `T` tokens of all documents laid end to end, `D` hidden, `N` heads, `H` head size.

use std::rc::Rc;

use host::Result;
use host_ffi::autograd::{self, LinearLayer};
use tch::{Kind, Tensor};

use crate::adapter::LoraPair;
use crate::model::KvCache;
use crate::torch::TorchContext;

/// What every layer of one forward is given besides its input.
pub struct Forward {
    /// Where each document begins, and the end: `documents + 1` entries. Attention never crosses one.
    pub cu_seqlens: Rc<[i64]>,
    /// Rotary angles `[T, H/2]`.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Adapter dropout, when training with any: one key per token `[T]`, made of seed, step, sample and position.
    pub dropout_keys: Option<Tensor>,
    /// Whether adapters count; without them the model is what it was before training.
    pub adapters: bool,
}

impl Forward {
    /// The same, sharing its tensors.
    pub fn share(&self) -> Self {
        Self {
            cu_seqlens: Rc::clone(&self.cu_seqlens),
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            dropout_keys: self.dropout_keys.as_ref().map(Tensor::shallow_clone),
            adapters: self.adapters,
        }
    }

    /// The same for the tokens at `rows` alone, past the last attention.
    pub fn at(&self, rows: &Tensor) -> Self {
        let dropout_keys = self.dropout_keys.as_ref().map(|keys| keys.index_select(0, rows));
        Self { dropout_keys, ..self.share() }
    }
}

/// A linear layer of the checkpoint: trained, or frozen and perhaps with an adapter.
pub struct Linear {
    pub name: String,
    pub layer: LinearLayer,
    pub lora: Option<LoraPair>,
}

impl Linear {
    fn adapter(&self, forward: &Forward) -> Option<&LoraPair> {
        self.lora.as_ref().filter(|_| forward.adapters)
    }

    /// `y = x Wᵀ + (α/r) (dropout(x) Aᵀ) Bᵀ`.
    pub fn forward(&self, x: &Tensor, forward: &Forward) -> Result<Tensor> {
        let Some(lora) = self.adapter(forward) else {
            return self.layer.forward(x).torch(format!("apply `{}`", self.name));
        };
        let dropped = match &forward.dropout_keys {
            Some(keys) if lora.dropout > 0.0 => Some(lora.drop(x, keys)?),
            _ => None,
        };
        autograd::lora_linear(x, &self.layer, &lora.a, &lora.b, lora.scale, dropped.as_ref())
            .torch(format!("apply `{}` and its adapter", self.name))
    }
}

/// Root mean square norm.
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
    /// Norms of each head's queries and keys, before they are rotated (Qwen 3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
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
        let mut q = heads(self.q.forward(x, forward)?, self.num_heads);
        let mut k = heads(self.k.forward(x, forward)?, self.num_kv_heads);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let each = |norm: &RmsNorm, y: &Tensor| Ok(norm.forward(&y.view([-1, self.head_dim]))?.view_as(y));
            (q, k) = (each(q_norm, &q)?, each(k_norm, &k)?);
        }
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
        autograd::attention_varlen(q, k, v, &forward.cu_seqlens, scale).torch("attend")
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
        match self.0.adapter(forward) {
            Some(lora) => self.adapted_cross_entropy_sum(lora, hidden, labels, chunk_rows, forward),
            None => {
                autograd::linear_cross_entropy_sum(hidden, &self.0.layer, labels, chunk_rows).torch("compute the loss")
            }
        }
    }

    /// Log-probability of each label, fp32 `[L]`, at most `chunk_rows` rows of scores at a time; all of them with an adapter.
    pub fn log_probs(&self, hidden: &Tensor, labels: &Tensor, chunk_rows: i64, forward: &Forward) -> Result<Tensor> {
        if self.0.adapter(forward).is_some() {
            let scores = self.logits(hidden, forward)?;
            return Ok(scores.log_softmax(-1, Kind::Float).gather(1, &labels.unsqueeze(1), false).squeeze_dim(1));
        }
        let losses = autograd::linear_cross_entropy(hidden, &self.0.layer, labels, chunk_rows);
        Ok(losses.torch("compute log-probabilities")?.neg())
    }

    /// [`Self::cross_entropy_sum`] for a head with an adapter. As in the fused loss, gradients are made on the way forward, chunk by chunk, so
    /// that one chunk of scores is all that ever exists; what is returned only carries them.
    fn adapted_cross_entropy_sum(
        &self,
        lora: &LoraPair,
        hidden: &Tensor,
        labels: &Tensor,
        chunk_rows: i64,
        forward: &Forward,
    ) -> Result<Tensor> {
        let options = (Kind::Float, hidden.device());
        let mut sum = Tensor::zeros([0i64; 0], options);
        // A function of hidden and factors whose gradient is that of the sum: Σ x · d(sum)/dx.
        let mut linear = Tensor::zeros([0i64; 0], options);
        let (mut grad_a, mut grad_b) = (None, None);
        let add = |total: Option<Tensor>, grad: Tensor| {
            let grad = grad.to_kind(Kind::Float);
            Some(total.map_or(grad.shallow_clone(), |total| total + grad))
        };
        let carry = |x: &Tensor, grad: &Tensor| (x.to_kind(Kind::Float) * grad.to_kind(Kind::Float)).sum(Kind::Float);
        let rows = hidden.size()[0];
        for begin in (0..rows).step_by(chunk_rows.max(1) as usize) {
            let count = chunk_rows.min(rows - begin);
            let part = hidden.narrow(0, begin, count);
            let x = part.detach().set_requires_grad(part.requires_grad());
            let at = forward.at(&Tensor::arange_start(begin, begin + count, (Kind::Int64, hidden.device())));
            let labels = labels.narrow(0, begin, count);
            let loss =
                self.logits(&x, &at)?.cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
            sum += loss.detach();
            if !loss.requires_grad() {
                continue;
            }
            let mut inputs = vec![&lora.a, &lora.b];
            inputs.extend(x.requires_grad().then_some(&x));
            let grads = Tensor::f_run_backward(&[&loss], &inputs, false, false).torch("compute the loss")?;
            let mut grads = grads.into_iter();
            (grad_a, grad_b) = (
                grads.next().and_then(|grad| add(grad_a.take(), grad)),
                grads.next().and_then(|grad| add(grad_b.take(), grad)),
            );
            if let Some(grad) = grads.next() {
                linear += carry(&part, &grad);
            }
        }
        for (factor, grad) in [(&lora.a, grad_a), (&lora.b, grad_b)] {
            if let Some(grad) = grad {
                linear += carry(factor, &grad);
            }
        }
        Ok(sum + (&linear - linear.detach()))
    }
}

#[cfg(test)]
mod tests {
    use host::config::plan::LoraPlan;
    use tch::{Device, Reduction};

    use super::*;
    use crate::adapter::LoraAdapter;
    use host::hf::LinearSpec;

    /// The loss of a head with an adapter and every gradient of it, however many rows are taken at a time.
    #[test]
    fn an_adapted_head_is_chunked_without_changing_a_gradient() {
        tch::manual_seed(1);
        let (rows, hidden_size, vocabulary) = (11, 6, 13);
        let kinds = (Kind::Float, Device::Cpu);
        let spec = LinearSpec { name: "lm_head".into(), inputs: hidden_size, outputs: vocabulary, has_bias: false };
        let plan = LoraPlan { rank: 2, alpha: 4.0, dropout: 0.0, targets: vec!["lm_head".into()] };
        let adapter = LoraAdapter::new(&plan, &[spec], 7, Kind::Float, Device::Cpu).unwrap();
        let lora = adapter.pair("lm_head").unwrap();
        let b = Tensor::randn([vocabulary, 2], kinds);
        tch::no_grad(|| lora.b.shallow_clone().copy_(&b));
        let weight = Tensor::randn([vocabulary, hidden_size], kinds);
        let layer = LinearLayer::new(&weight, None, false).unwrap();
        let head = Head(Linear { name: "lm_head".into(), layer, lora: Some(lora) });
        let lora = head.0.lora.as_ref().unwrap();
        let hidden = Tensor::randn([rows, hidden_size], kinds).set_requires_grad(true);
        let labels = Tensor::from_slice(&[3i64, 0, 12, -100, 5, 5, 1, 2, -100, 9, 11]);
        let empty = Tensor::zeros([0], kinds);
        let forward = Forward {
            cu_seqlens: [0, rows].into(),
            cos: empty.shallow_clone(),
            sin: empty,
            dropout_keys: None,
            adapters: true,
        };

        let adapted = weight + lora.b.matmul(&lora.a) * lora.scale;
        let expected = hidden.matmul(&adapted.tr());
        let expected = expected.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, -100, 0.0) * 3.0;
        let inputs = [&hidden, &lora.a, &lora.b];
        let expected_grads = Tensor::run_backward(&[&expected], &inputs, false, false);
        for chunk_rows in [1, 3, 11, 64] {
            let sum = head.cross_entropy_sum(&hidden, &labels, chunk_rows, &forward).unwrap() * 3.0;
            let grads = Tensor::run_backward(&[&sum], &inputs, false, false);
            let difference = (&sum - &expected).abs().double_value(&[]);
            assert!(difference < 1e-4, "{chunk_rows} rows: the loss differs by {difference}");
            for (grad, expected) in grads.iter().zip(&expected_grads) {
                let difference = ((grad - expected).norm() / expected.norm()).double_value(&[]);
                assert!(difference < 1e-5, "{chunk_rows} rows: a gradient differs by {difference}");
            }
        }
        let quiet = tch::no_grad(|| head.cross_entropy_sum(&hidden, &labels, 4, &forward).unwrap());
        assert!(!quiet.requires_grad() && (quiet * 3.0 - expected).abs().double_value(&[]) < 1e-4);
    }
}
