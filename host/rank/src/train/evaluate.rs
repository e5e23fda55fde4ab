//! Validation: the loss over a held-out set, each sample once, whatever the rank count.

use host::Result;
use host::data::MicroBatch;
use tch::{Kind, Tensor};

use crate::train::batch::{DeviceBatch, Which};
use crate::train::run::Run;

/// This rank's part of the validation set.
pub struct Validation {
    pub batches: Vec<MicroBatch>,
    /// How many the rank with the most has.
    pub most: usize,
    /// What a rank without one computes where ranks share a model.
    pub filler: Option<MicroBatch>,
}

impl Run {
    /// Mean loss over the label tokens of the validation set, which has some, or over what the loss weighs; `None` without such a set.
    pub(super) fn evaluate(&self) -> Result<Option<f64>> {
        let parts = &self.parts;
        let Some(validation) = &parts.validation else { return Ok(None) };
        // Ranks that share a model run as many forwards, and what they have too few of counts nothing.
        let is_shared = parts.model.sharding.is_some();
        let missing = if is_shared { validation.most - validation.batches.len() } else { 0 };
        let filler = validation.filler.iter().cycle().take(missing).map(|batch| (batch, 0.0));
        let batches = validation.batches.iter().filter(|batch| is_shared || !batch.labels.is_empty());
        let sums = Tensor::zeros([2], (Kind::Double, parts.device));
        tch::no_grad(|| -> Result<()> {
            for (batch, counts) in batches.map(|batch| (batch, 1.0)).chain(filler) {
                let batch = DeviceBatch::new(batch, parts.device, None)?;
                let (loss, weight) = self.loss_of(&batch, Which::Trained)?;
                let _ = sums.get(0).g_add_(&(loss.to_kind(Kind::Double).reshape([0i64; 0]) * counts));
                let _ = sums.get(1).g_add_scalar_(weight * counts);
                parts.end_batch()?;
            }
            Ok(())
        })?;
        parts.group.all_reduce_sum(&sums)?;
        let weight = sums.double_value(&[1]);
        Ok((weight > 0.0).then(|| sums.double_value(&[0]) / weight))
    }
}
