//! The Llama family: pre-norm decoder, RMSNorm, rotary grouped-query attention, gated MLP. Mistral and Qwen 2 and 3 are it
//! too, with biases or norms on queries and keys where `config.json` says so.

use std::rc::Rc;

use host::Result;
use host::hf::ModelConfig;
use host_ffi::FfiError;
use tch::{Device, Tensor};

use crate::model::builder::Builder;
use crate::model::layers::{Attention, Forward, Head, Mlp, RmsNorm};
use crate::model::{KvCache, Rope};
use crate::shard::Sharding;
use crate::torch::TorchContext;

pub struct Llama {
    pub config: ModelConfig,
    embedding: Tensor, // [V, D]
    layers: Vec<Rc<Layer>>,
    norm: RmsNorm,
    pub head: Head,
    rope: Rope,
    /// Where the weights come from while they are needed, when ranks share them.
    pub sharding: Option<Rc<Sharding>>,
    /// Every n-th block's activations are computed again in backward, from its input.
    pub checkpoint_every: Option<usize>,
}

struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

impl Llama {
    pub fn build(config: &ModelConfig, root: &Builder) -> Result<Self> {
        let model = root.pp("model");
        let embedding = model.pp("embed_tokens").tensor("weight", &[config.vocab_size, config.hidden_size])?;
        let layers = (0..config.num_layers)
            .map(|index| Layer::build(config, &model.pp("layers").pp(index)).map(Rc::new))
            .collect::<Result<_>>()?;
        let head = if config.tie_word_embeddings {
            root.linear_of("lm_head", embedding.shallow_clone(), None)?
        } else {
            root.linear("lm_head", config.hidden_size, config.vocab_size, false)?
        };
        let norm = model.rms_norm("norm", config.hidden_size, config.rms_norm_eps)?;
        Ok(Self {
            config: config.clone(),
            embedding,
            layers,
            norm,
            head: Head(head),
            rope: root.rope(config),
            sharding: root.sharding(),
            checkpoint_every: None,
        })
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// What a forward over `positions` `[T]` needs, without dropout.
    pub fn forward(&self, positions: &Tensor, cu_seqlens: Rc<[i64]>) -> Forward {
        let (cos, sin) = self.rope.angles(positions);
        Forward { cu_seqlens, cos, sin, dropout_keys: None, adapters: true }
    }

    /// Hidden states after the final norm at `rows` (all when `None`) for `tokens` `[T]`: `[rows, D]`.
    ///
    /// Nothing mixes tokens after the last attention, so what follows it runs at `rows` alone.
    pub fn hidden(
        &self,
        tokens: &Tensor,
        forward: &Forward,
        rows: Option<&Tensor>,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let selected = rows.map(|rows| (rows, forward.at(rows)));
        let last = self.layers.len() - 1;
        if let Some(sharding) = &self.sharding {
            sharding.begin()?;
        }
        let mut x = Tensor::embedding(&self.embedding, tokens, -1, false, false); // [T, D]
        for (index, layer) in self.layers.iter().enumerate() {
            let slot = cache.as_deref_mut().map(|cache| (cache, index));
            let selected = selected.as_ref().filter(|_| index == last);
            let is_checkpointed = self.checkpoint_every.is_some_and(|every| index.is_multiple_of(every));
            if let Some(sharding) = &self.sharding {
                x = sharding.enter(index, x)?;
            }
            x = match is_checkpointed && slot.is_none() && host_ffi::grad::is_enabled() {
                true => layer.checkpointed(&x, forward, selected)?,
                false => layer.forward(&x, forward, slot, selected)?,
            };
            if let Some(sharding) = &self.sharding {
                x = sharding.leave(index, x)?;
            }
        }
        if let Some(sharding) = &self.sharding {
            sharding.end()?;
        }
        if let Some(cache) = cache {
            cache.advance(tokens.size()[0]);
        }
        self.norm.forward(&x)
    }

    /// Scores over the vocabulary, f32, at `rows`: `[rows, V]`.
    pub fn logits(
        &self,
        tokens: &Tensor,
        forward: &Forward,
        rows: Option<&Tensor>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        self.head.logits(&self.hidden(tokens, forward, rows, cache)?, forward)
    }
}

impl Layer {
    fn build(config: &ModelConfig, layer: &Builder) -> Result<Self> {
        let (hidden, ffn, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        let attention = layer.pp("self_attn");
        let mlp = layer.pp("mlp");
        Ok(Self {
            attention_norm: layer.rms_norm("input_layernorm", hidden, eps)?,
            attention: Attention {
                q: attention.linear("q_proj", hidden, queries, config.qkv_bias)?,
                k: attention.linear("k_proj", hidden, keys, config.qkv_bias)?,
                v: attention.linear("v_proj", hidden, keys, config.qkv_bias)?,
                o: attention.linear("o_proj", queries, hidden, config.o_bias)?,
                qk_norm: if config.qk_norm {
                    let norm = |name| attention.rms_norm(name, config.head_dim, eps);
                    Some((norm("q_norm")?, norm("k_norm")?))
                } else {
                    None
                },
                num_heads: config.num_heads,
                num_kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
            },
            mlp_norm: layer.rms_norm("post_attention_layernorm", hidden, eps)?,
            mlp: Mlp {
                gate: mlp.linear("gate_proj", hidden, ffn, false)?,
                up: mlp.linear("up_proj", hidden, ffn, false)?,
                down: mlp.linear("down_proj", ffn, hidden, false)?,
            },
        })
    }

    /// A forward of which only the input is kept: backward computes the rest again.
    fn checkpointed(
        self: &Rc<Self>,
        x: &Tensor,
        forward: &Forward,
        selected: Option<&(&Tensor, Forward)>,
    ) -> Result<Tensor> {
        let y = tch::no_grad(|| self.forward(x, forward, None, selected))?;
        let layer = Rc::clone(self);
        let forward = forward.share();
        let selected = selected.map(|(rows, forward)| (rows.shallow_clone(), forward.share()));
        let (kept, wants_grad) = (x.detach(), x.requires_grad());
        let again = move |grad: &Tensor| {
            let x = kept.detach().set_requires_grad(wants_grad);
            let selected = selected.as_ref().map(|(rows, forward)| (rows, forward.share()));
            let y = tch::with_grad(|| layer.forward(&x, &forward, None, selected.as_ref()));
            host_ffi::grad::backward_from(&y.map_err(|error| FfiError(error.to_string()))?, grad)?;
            Ok(wants_grad.then(|| x.grad()))
        };
        host_ffi::shard::node(x, &y, again).torch("keep a block's input")
    }

    fn forward(
        &self,
        x: &Tensor,
        forward: &Forward,
        cache: Option<(&mut KvCache, usize)>,
        selected: Option<&(&Tensor, Forward)>,
    ) -> Result<Tensor> {
        let mixed = self.attention.mix(&self.attention_norm.forward(x)?, forward, cache)?;
        let (x, mixed, forward) = match selected {
            Some((rows, forward)) => (x.index_select(0, rows), mixed.index_select(0, rows), forward),
            None => (x.shallow_clone(), mixed, forward),
        };
        let x = x + self.attention.o.forward(&mixed, forward)?;
        let update = self.mlp.forward(&self.mlp_norm.forward(&x)?, forward)?;
        Ok(x + update)
    }
}
