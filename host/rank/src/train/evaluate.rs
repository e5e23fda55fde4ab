//! Validation: the loss over a held-out set, each sample once, whatever the rank count.

use host::Result;
use host::data;
use tch::{Kind, Tensor};

use crate::train::batch::DeviceBatch;
use crate::train::run::Run;

impl Run {
    /// Mean loss over the label tokens of the validation set; 0 when there are none.
    pub(super) fn evaluate(&self) -> Result<f64> {
        let parts = &self.parts;
        let Some(validation) = &parts.validation else { return Ok(0.0) };
        let rows: Vec<u32> = (0..validation.len() as u32).collect();
        let batches = data::microbatches(validation, &rows, &self.layout(), parts.group.rank, parts.group.world_size);
        let sums = Tensor::zeros([2], (Kind::Double, parts.device));
        tch::no_grad(|| -> Result<()> {
            for batch in batches.iter().filter(|batch| !batch.labels.is_empty()) {
                let batch = DeviceBatch::new(batch, parts.device, None);
                let loss = batch.loss_sum(&parts.model, self.chunk_rows(batch.num_labels))?;
                let _ = sums.get(0).g_add_(&loss.to_kind(Kind::Double));
                let _ = sums.get(1).g_add_scalar_(batch.num_labels as f64);
            }
            Ok(())
        })?;
        parts.group.all_reduce_sum(&sums)?;
        let (loss, labels) = (sums.double_value(&[0]), sums.double_value(&[1]));
        Ok(if labels > 0.0 { loss / labels } else { 0.0 })
    }
}
