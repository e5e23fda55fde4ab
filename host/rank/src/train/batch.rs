//! A micro-batch on the device, and what the model makes of it.

use host::Result;
use host::data::MicroBatch;
use tch::{Device, Tensor};

use crate::adapter::lora::splitmix;
use crate::model::{Forward, Llama};

/// Documents laid end to end, as the model takes them. `T` tokens, `L` label positions.
pub struct DeviceBatch {
    tokens: Tensor,    // [T]
    positions: Tensor, // [T]
    cu_seqlens: Vec<i64>,
    label_positions: Tensor, // [L], into T
    pub labels: Tensor,      // [L]
    pub num_labels: i64,
    pub num_tokens: i64,
    /// Its samples, by their number in the data set.
    pub samples: Vec<u32>,
    dropout_keys: Option<Tensor>, // [T]
}

/// What dropout masks of one step are keyed by, besides sample, position and layer.
#[derive(Clone, Copy)]
pub struct DropoutSeed {
    pub seed: u64,
    pub step: usize,
}

impl DeviceBatch {
    pub fn new(batch: &MicroBatch, device: Device, dropout: Option<DropoutSeed>) -> Self {
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Self {
            tokens: on_device(&batch.tokens),
            positions: on_device(&batch.positions),
            cu_seqlens: batch.cu_seqlens.clone(),
            label_positions: on_device(&batch.label_positions),
            labels: on_device(&batch.labels),
            num_labels: batch.labels.len() as i64,
            num_tokens: batch.num_real_tokens as i64,
            samples: batch.sample_ids.clone(),
            dropout_keys: dropout.map(|seed| on_device(&keys(batch, seed))),
        }
    }

    fn forward(&self, model: &Llama) -> Forward<'_> {
        let mut forward = model.forward(&self.positions, &self.cu_seqlens);
        forward.dropout_keys = self.dropout_keys.as_ref().map(Tensor::shallow_clone);
        forward
    }

    /// Summed cross-entropy over the label positions, at most `chunk_rows` of them at a time.
    pub fn loss_sum(&self, model: &Llama, chunk_rows: i64) -> Result<Tensor> {
        let forward = self.forward(model);
        let hidden = model.hidden(&self.tokens, &forward, Some(&self.label_positions), None)?;
        model.head.cross_entropy_sum(&hidden, &self.labels, chunk_rows, &forward.at(&self.label_positions))
    }

    /// Scores at the label positions, f32: `[L, V]`.
    pub fn logits(&self, model: &Llama) -> Result<Tensor> {
        let forward = self.forward(model);
        let hidden = model.hidden(&self.tokens, &forward, Some(&self.label_positions), None)?;
        model.head.logits(&hidden, &forward.at(&self.label_positions))
    }
}

/// One key per token from (seed, step, sample, position): the same whatever the layout and the rank.
fn keys(batch: &MicroBatch, seed: DropoutSeed) -> Vec<i64> {
    let base = splitmix(seed.seed ^ splitmix(seed.step as u64));
    let mut keys = Vec::with_capacity(batch.tokens.len());
    for (document, bounds) in batch.cu_seqlens.windows(2).enumerate() {
        let sample = splitmix(base ^ u64::from(batch.sample_ids[document]));
        let positions = &batch.positions[bounds[0] as usize..bounds[1] as usize];
        keys.extend(positions.iter().map(|position| splitmix(sample ^ *position as u64) as i64));
    }
    keys
}
