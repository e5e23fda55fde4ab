//! A micro-batch on the device, and what the model makes of it.

use std::rc::Rc;

use host::Result;
use host::data::MicroBatch;
use tch::{Device, Tensor};

use crate::adapter::lora::splitmix;
use crate::model::{Forward, Llama};
use crate::torch::TorchContext;

/// Whose numbers are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The model that is trained.
    Trained,
    /// What it was before, or the model that stands for that.
    Reference,
    /// The model to learn from.
    Teacher,
}

impl Which {
    pub const ALL: [Self; 3] = [Self::Trained, Self::Reference, Self::Teacher];
}

/// Documents laid end to end, as the model takes them. `T` tokens, `L` label positions.
pub struct DeviceBatch {
    tokens: Tensor,    // [T]
    positions: Tensor, // [T]
    cu_seqlens: Rc<[i64]>,
    label_positions: Tensor, // [L], into T
    pub labels: Tensor,      // [L]
    documents: Vec<i64>,     // [L]
    pub num_labels: i64,
    pub num_tokens: i64,
    /// The sample of each document, by their number in the data set.
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
    pub fn new(batch: &MicroBatch, device: Device, dropout: Option<DropoutSeed>) -> Result<Self> {
        let on_device = |values: &[i64]| to_device(values, device);
        Ok(Self {
            tokens: on_device(&batch.tokens)?,
            positions: on_device(&batch.positions)?,
            cu_seqlens: batch.cu_seqlens.as_slice().into(),
            label_positions: on_device(&batch.label_positions)?,
            labels: on_device(&batch.labels)?,
            documents: batch.label_documents(),
            num_labels: batch.labels.len() as i64,
            num_tokens: batch.num_real_tokens as i64,
            samples: batch.sample_ids.clone(),
            dropout_keys: dropout.map(|seed| on_device(&keys(batch, seed))).transpose()?,
        })
    }

    /// Which of the batch's documents each label is of, `[L]`.
    pub fn segments(&self) -> Result<Tensor> {
        to_device(&self.documents, self.labels.device())
    }

    /// With dropout for a model in training, and with its adapters; as it is in the checkpoint otherwise.
    fn forward(&self, model: &Llama, which: Which) -> Forward {
        let mut forward = model.forward(&self.positions, Rc::clone(&self.cu_seqlens));
        forward.adapters = which == Which::Trained;
        forward.dropout_keys = self.dropout_keys.as_ref().filter(|_| forward.adapters).map(Tensor::shallow_clone);
        forward
    }

    /// Hidden states at the label positions, `[L, D]`.
    pub fn hidden(&self, model: &Llama, which: Which) -> Result<Tensor> {
        model.hidden(&self.tokens, &self.forward(model, which), Some(&self.label_positions), None)
    }

    /// Scores of the `hidden` states at labels `start..start + length`, f32: `[length, V]`.
    pub fn logits_of(&self, model: &Llama, which: Which, hidden: &Tensor, start: i64, length: i64) -> Result<Tensor> {
        let forward = self.forward(model, which).at(&self.label_positions.narrow(0, start, length));
        model.head.logits(&hidden.narrow(0, start, length), &forward)
    }

    /// Summed cross-entropy over the label positions, at most `chunk_rows` of them at a time.
    pub fn loss_sum(&self, model: &Llama, which: Which, chunk_rows: i64) -> Result<Tensor> {
        let forward = self.forward(model, which).at(&self.label_positions);
        model.head.cross_entropy_sum(&self.hidden(model, which)?, &self.labels, chunk_rows, &forward)
    }

    /// Log-probability of each label, f32 `[L]`, at most `chunk_rows` of them at a time.
    pub fn log_probs(&self, model: &Llama, which: Which, chunk_rows: i64) -> Result<Tensor> {
        let forward = self.forward(model, which).at(&self.label_positions);
        model.head.log_probs(&self.hidden(model, which)?, &self.labels, chunk_rows, &forward)
    }

    /// Scores at the label positions, f32: `[L, V]`.
    pub fn logits(&self, model: &Llama, which: Which) -> Result<Tensor> {
        self.logits_of(model, which, &self.hidden(model, which)?, 0, self.num_labels)
    }
}

fn to_device(values: &[i64], device: Device) -> Result<Tensor> {
    host_ffi::backend::to_device(&Tensor::from_slice(values), device).torch("bring a batch to the device")
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
