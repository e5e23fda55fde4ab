//! The real run behind the recipe's calls.

use host::{Error, Result};
use tch::Tensor;

use super::training::{BatchInfo, Training};
use crate::train::batch::DeviceBatch;
use crate::train::{Over, Place, Run, Which, Work};

impl Training for Run {
    fn next_step(&mut self) -> Result<bool> {
        Run::next_step(self)
    }

    fn next_batch(&mut self) -> Result<Option<BatchInfo>> {
        let batch = Run::next_batch(self)?;
        let info = |(index, batch): (u64, &DeviceBatch)| BatchInfo {
            index,
            num_labels: batch.num_labels,
            num_tokens: batch.num_tokens,
            num_samples: batch.samples.len() as i64,
        };
        Ok(batch.map(info))
    }

    fn labels(&mut self, batch: u64) -> Result<Tensor> {
        Run::labels(self, batch)
    }

    fn device(&self) -> tch::Device {
        Run::device(self)
    }

    fn segments(&mut self, batch: u64) -> Result<Tensor> {
        Run::segments(self, batch)
    }

    fn num_pairs(&mut self, batch: u64) -> Result<i64> {
        Run::num_pairs(self, batch)
    }

    fn has(&mut self, which: Which) -> bool {
        Run::has(self, which)
    }

    fn loss(&mut self, batch: u64, which: Which) -> Result<(Tensor, f64)> {
        self.compute(Work::Loss, which)?;
        Run::loss(self, batch, which)
    }

    fn logits(&mut self, batch: u64, which: Which) -> Result<Tensor> {
        self.compute(Work::Logits, which)?;
        Run::logits(self, batch, which)
    }

    fn logits_part(&mut self, batch: u64, which: Which, start: i64, length: i64) -> Result<Tensor> {
        self.compute(Work::LogitsPart, which)?;
        Run::logits_part(self, batch, which, start, length)
    }

    fn log_probs(&mut self, batch: u64, which: Which) -> Result<Tensor> {
        self.compute(Work::LogProbs, which)?;
        Run::log_probs(self, batch, which)
    }

    fn record_metric(&mut self, name: &str, sum: &Tensor, weight: f64) -> Result<()> {
        Run::record_metric(self, name, sum, weight)
    }

    fn over_ranks(&mut self, values: &[f64], over: Over) -> Result<Vec<f64>> {
        Run::over_ranks(self, values, over)
    }

    fn backward(&mut self, sum: &Tensor, weight: f64) -> Result<()> {
        self.compute(Work::Backward, Which::Trained)?;
        Run::backward(self, sum, weight)
    }

    fn finish_step(&mut self) -> Result<()> {
        Run::finish_step(self)
    }

    fn leave(&mut self) -> Result<()> {
        Run::leave(self)
    }

    fn explain(&mut self, error: Error, place: &Place) -> Error {
        Run::explain(self, error, place)
    }

    fn config(&self, key: &str) -> Option<serde_json::Value> {
        Run::config(self, key)
    }

    fn current_step(&self) -> usize {
        self.steps_done() + 1
    }
}
