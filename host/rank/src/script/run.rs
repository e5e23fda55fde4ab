//! The real run behind the recipe's calls.

use host::Result;
use tch::Tensor;

use super::training::{BatchInfo, Training};
use crate::train::Run;

impl Training for Run {
    fn next_step(&mut self) -> Result<bool> {
        Run::next_step(self)
    }

    fn next_batch(&mut self) -> Result<Option<BatchInfo>> {
        let batch = Run::next_batch(self)?;
        Ok(batch.map(|(index, batch)| BatchInfo { index, num_labels: batch.num_labels, num_tokens: batch.num_tokens }))
    }

    fn labels(&mut self, batch: u64) -> Result<Tensor> {
        Run::labels(self, batch)
    }

    fn device(&self) -> tch::Device {
        Run::device(self)
    }

    fn loss(&mut self, batch: u64) -> Result<(Tensor, f64)> {
        Run::loss(self, batch)
    }

    fn logits(&mut self, batch: u64) -> Result<Tensor> {
        Run::logits(self, batch)
    }

    fn backward(&mut self, sum: &Tensor, weight: f64) -> Result<()> {
        Run::backward(self, sum, weight)
    }

    fn finish_step(&mut self) -> Result<()> {
        Run::finish_step(self)
    }

    fn config(&self, key: &str) -> Option<serde_json::Value> {
        Run::config(self, key)
    }

    fn current_step(&self) -> usize {
        self.steps_done() + 1
    }
}
