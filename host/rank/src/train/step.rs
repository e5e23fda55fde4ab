//! One optimizer step on this rank: its micro-batches, and the sums that the ranks add up at its end.

use std::collections::VecDeque;
use std::time::Instant;

use host::data::MicroBatch;
use tch::{Device, Kind, Tensor};

use crate::train::batch::DeviceBatch;

/// A step under way.
pub struct StepState {
    /// Micro-batches not handed out yet.
    pub waiting: VecDeque<MicroBatch>,
    /// The one handed out last, under its key.
    pub current: Option<(u64, DeviceBatch)>,
    pub next_key: u64,
    pub sums: Sums,
    /// The sum of each backward and the samples it is of, looked at when the step's loss is no number.
    pub losses: Vec<(Vec<u32>, Tensor)>,
    pub started: Instant,
}

/// What is added over micro-batches, and then over ranks.
pub struct Sums {
    /// Sum of the loss over what is weighted; a tensor, so that nothing waits for the device inside a step.
    pub loss: Tensor,
    pub weight: f64,
    pub tokens: f64,
    pub padded_tokens: f64,
    pub labels: f64,
}

impl Sums {
    pub fn zero(device: Device) -> Self {
        Self {
            loss: Tensor::zeros([], (Kind::Double, device)),
            weight: 0.0,
            tokens: 0.0,
            padded_tokens: 0.0,
            labels: 0.0,
        }
    }

    pub fn count(&mut self, batch: &MicroBatch) {
        self.tokens += batch.num_real_tokens as f64;
        self.padded_tokens += batch.num_padded_tokens as f64;
        self.labels += batch.labels.len() as f64;
    }

    pub fn add_loss(&mut self, sum: &Tensor, weight: f64) {
        let _ = self.loss.g_add_(&sum.detach().to_kind(Kind::Double).reshape([0i64; 0]));
        self.weight += weight;
    }
}

/// The sums over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    pub loss: f64,
    pub weight: f64,
    pub tokens: f64,
    pub padded_tokens: f64,
    pub labels: f64,
    pub peak_rss_mb: f64,
    /// Ranks that were asked to stop.
    pub stops: f64,
}

impl Totals {
    /// Loss per unit of weight; 0 when nothing was weighted.
    pub fn mean_loss(&self) -> f64 {
        if self.weight > 0.0 { self.loss / self.weight } else { 0.0 }
    }
}
