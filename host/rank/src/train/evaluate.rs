//! Validation: the loss over a held-out set, each sample once, whatever the rank count.

use host::Result;
use tch::{Kind, Tensor};

use crate::train::batch::{DeviceBatch, Which};
use crate::train::run::Run;

impl Run {
    /// Mean loss over the label tokens of the validation set, which has some, or over what the loss weighs; `None` without such a set.
    pub(super) fn evaluate(&self) -> Result<Option<f64>> {
        let parts = &self.parts;
        let Some(batches) = &parts.validation else { return Ok(None) };
        let sums = Tensor::zeros([2], (Kind::Double, parts.device));
        tch::no_grad(|| -> Result<()> {
            for batch in batches.iter().filter(|batch| !batch.labels.is_empty()) {
                let batch = DeviceBatch::new(batch, parts.device, None);
                let (loss, weight) = self.loss_of(&batch, Which::Trained)?;
                let _ = sums.get(0).g_add_(&loss.to_kind(Kind::Double).reshape([0i64; 0]));
                let _ = sums.get(1).g_add_scalar_(weight);
            }
            Ok(())
        })?;
        parts.group.all_reduce_sum(&sums)?;
        let weight = sums.double_value(&[1]);
        Ok((weight > 0.0).then(|| sums.double_value(&[0]) / weight))
    }
}
