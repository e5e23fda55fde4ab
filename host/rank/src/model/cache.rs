//! Keys and values of the tokens so far, for generation.

use host::Result;
use tch::{Device, Kind, Tensor};

use crate::torch::TorchContext;

/// One document's keys and values per layer, in buffers allocated once for the longest it may become.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>, // each [Nkv, capacity, H]
    length: i64,
}

impl KvCache {
    pub fn new(layers: i64, kv_heads: i64, head_dim: i64, capacity: i64, kind: Kind, device: Device) -> Self {
        let buffer = || Tensor::zeros([kv_heads, capacity, head_dim], (kind, device));
        Self { layers: (0..layers).map(|_| (buffer(), buffer())).collect(), length: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Stores `k` and `v` `[T, Nkv, H]` of `layer` behind what is there.
    pub(super) fn store(&mut self, layer: usize, k: &Tensor, v: &Tensor) {
        let tokens = k.size()[0];
        let (keys, values) = &self.layers[layer];
        keys.narrow(1, self.length, tokens).copy_(&k.transpose(0, 1));
        values.narrow(1, self.length, tokens).copy_(&v.transpose(0, 1));
    }

    /// Attention of one new token's `q` `[1, N, H]` over everything stored, itself included: `[1, N, H]`.
    pub(super) fn attend(&self, layer: usize, q: &Tensor, scale: f64) -> Result<Tensor> {
        let (keys, values) = &self.layers[layer];
        let (keys, values) = (keys.narrow(1, 0, self.length + 1), values.narrow(1, 0, self.length + 1));
        let size = q.size(); // [1, N, H]
        let groups = size[1] / keys.size()[0];
        let q = q.view([keys.size()[0], groups, size[2]]); // query heads of one key head side by side
        let scores = q.f_matmul(&keys.transpose(1, 2)).torch("attend to the cache")? * scale;
        let weights = scores.softmax(-1, Kind::Float).to_kind(values.kind());
        Ok(weights.matmul(&values).view([size[0], size[1], size[2]]))
    }

    /// Counts `tokens` as stored, once every layer has stored them.
    pub(super) fn advance(&mut self, tokens: i64) {
        self.length += tokens;
    }
}
