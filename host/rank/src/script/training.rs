//! What a recipe needs of a training run; `train` implements it.
//!
//! The scripts know nothing else of training. A micro-batch is named by its key, so nothing is borrowed across a call. An
//! `Err` from here is the run's own failure (a dead rank, a full disk, a stop): it ends the guest and is reported unchanged.

use crate::train::{Over, Place, Which};

/// The micro-batch a guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchInfo {
    /// Names the micro-batch in later calls of the same step.
    pub index: u64,
    /// Positions that carry loss.
    pub num_labels: i64,
    /// Tokens that go through the model, padding not counted.
    pub num_tokens: i64,
    /// Samples, or parts of them.
    pub num_samples: i64,
}

/// One rank's side of a run, as the recipe drives it.
pub trait Training {
    /// Begins the next step; false when the run is complete or was asked to stop.
    fn next_step(&mut self) -> host::Result<bool>;
    /// The next micro-batch of the step on this rank; none when all were handed out.
    fn next_batch(&mut self) -> host::Result<Option<BatchInfo>>;
    /// The target token at each position that carries loss; integers `[L]`.
    fn labels(&mut self, batch: u64) -> host::Result<tch::Tensor>;
    /// Which of the batch's samples each position that carries loss is of; integers `[L]`.
    fn segments(&mut self, batch: u64) -> host::Result<tch::Tensor>;
    /// How many pairs of a chosen and a rejected answer; an error where the data has no pairs.
    fn num_pairs(&mut self, batch: u64) -> host::Result<i64>;
    /// Whether there is such a model.
    fn has(&mut self, which: Which) -> bool;
    /// Cross-entropy as the config says: the sum over the positions that carry loss, and its weight.
    fn loss(&mut self, batch: u64, which: Which) -> host::Result<(tch::Tensor, f64)>;
    /// Where the model is.
    fn device(&self) -> tch::Device;
    /// Scores at the positions that carry loss; 32-bit floats `[L, vocabulary]`.
    fn logits(&mut self, batch: u64, which: Which) -> host::Result<tch::Tensor>;
    /// Scores at `length` of them from `start` on; 32-bit floats `[length, vocabulary]`.
    fn logits_part(&mut self, batch: u64, which: Which, start: i64, length: i64) -> host::Result<tch::Tensor>;
    /// Log-probability of the target token at each position that carries loss; 32-bit floats `[L]`.
    fn log_probs(&mut self, batch: u64, which: Which) -> host::Result<tch::Tensor>;
    /// Adds to a metric of the step: a sum, a scalar, and its weight.
    fn record_metric(&mut self, name: &str, sum: &tch::Tensor, weight: f64) -> host::Result<()>;
    /// Numbers over all ranks, each of which asks.
    fn over_ranks(&mut self, values: &[f64], over: Over) -> host::Result<Vec<f64>>;
    /// Adds the gradient of `sum`, a scalar, and `weight` to the step.
    fn backward(&mut self, sum: &tch::Tensor, weight: f64) -> host::Result<()>;
    /// Reduces, clips, updates, logs, saves.
    fn finish_step(&mut self) -> host::Result<()>;
    /// The recipe has returned.
    fn leave(&mut self) -> host::Result<()>;
    /// What a failure of the run says, which met the guest at `place`.
    fn explain(&mut self, error: host::Error, place: &Place) -> host::Error;
    /// A key of the config by dotted path.
    fn config(&self, key: &str) -> Option<serde_json::Value>;
    /// The step a message about a failure names.
    fn current_step(&self) -> usize;
}
