//! What a recipe needs of a training run; `train` implements it.
//!
//! The scripts know nothing else of training. A micro-batch is named by its key, so nothing is borrowed across a call. An
//! `Err` from here is the run's own failure (a dead rank, a full disk, a stop): it ends the guest and is reported unchanged.

/// The micro-batch a guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchInfo {
    /// Names the micro-batch in later calls of the same step.
    pub index: u64,
    /// Positions that carry loss.
    pub num_labels: i64,
    /// Tokens that go through the model, padding not counted.
    pub num_tokens: i64,
}

/// One rank's side of a run, as the recipe drives it.
pub trait Training {
    /// Begins the next step; false when the run is complete or was asked to stop.
    fn next_step(&mut self) -> host::Result<bool>;
    /// The next micro-batch of the step on this rank; none when all were handed out.
    fn next_batch(&mut self) -> host::Result<Option<BatchInfo>>;
    /// The target token at each position that carries loss; integers `[L]`.
    fn labels(&mut self, batch: u64) -> host::Result<tch::Tensor>;
    /// Cross-entropy as the config says: the sum over the positions that carry loss, and its weight.
    fn loss(&mut self, batch: u64) -> host::Result<(tch::Tensor, f64)>;
    /// Where the model is.
    fn device(&self) -> tch::Device;
    /// Scores at the positions that carry loss; 32-bit floats `[L, vocabulary]`.
    fn logits(&mut self, batch: u64) -> host::Result<tch::Tensor>;
    /// Adds the gradient of `sum`, a scalar, and `weight` to the step.
    fn backward(&mut self, sum: &tch::Tensor, weight: f64) -> host::Result<()>;
    /// Reduces, clips, updates, logs, saves.
    fn finish_step(&mut self) -> host::Result<()>;
    /// A key of the config by dotted path.
    fn config(&self, key: &str) -> Option<serde_json::Value>;
    /// The step a message about a failure names.
    fn current_step(&self) -> usize;
}
