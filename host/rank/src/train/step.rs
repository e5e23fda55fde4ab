//! One optimizer step on this rank: its micro-batches, and the sums that the ranks add up at its end.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use host::Result;
use host::data::MicroBatch;
use tch::{Device, Kind, Tensor};

use crate::dist::Group;
use crate::torch::TorchContext;
use crate::train::batch::{DeviceBatch, Which};

/// A step under way.
pub struct StepState {
    /// Micro-batches not handed out yet.
    pub waiting: VecDeque<MicroBatch>,
    /// The one handed out last, under its key.
    pub current: Option<(u64, DeviceBatch)>,
    /// Of the current one, what its scores are computed from part by part.
    pub hidden: Vec<Hidden>,
    pub metrics: Metrics,
    pub next_key: u64,
    pub sums: Sums,
    /// The sum of each backward and the samples it is of, looked at when the step's loss is no number.
    pub losses: Vec<(Vec<u32>, Tensor)>,
    pub started: Instant,
}

impl StepState {
    /// Takes the gradients of a batch's parts back through the model.
    pub fn close_batch(&mut self) -> Result<()> {
        for Hidden { made, leaf, .. } in self.hidden.drain(..) {
            let grad = leaf.grad();
            if grad.defined() {
                host_ffi::grad::backward(&(made * grad).sum(Kind::Float)).torch("compute gradients")?;
            }
        }
        Ok(())
    }
}

/// The hidden states of a batch `[L, D]`, which parts of its scores are computed from.
pub struct Hidden {
    pub which: Which,
    /// With what they came from.
    pub made: Tensor,
    /// Without it: gradients add up here until the batch is done.
    pub leaf: Tensor,
}

impl Hidden {
    pub fn new(which: Which, made: Tensor) -> Self {
        let leaf = made.detach().set_requires_grad(made.requires_grad());
        Self { which, made, leaf }
    }
}

/// Metrics of a recipe's own: of each a sum and its weight.
#[derive(Default)]
pub struct Metrics(BTreeMap<String, (Tensor, f64)>);

impl Metrics {
    pub fn add(&mut self, name: &str, sum: &Tensor, weight: f64) {
        let sum = sum.detach().to_kind(Kind::Double).reshape([0i64; 0]);
        match self.0.get_mut(name) {
            Some((total, weights)) => {
                *total += sum;
                *weights += weight;
            }
            None => drop(self.0.insert(name.to_owned(), (sum, weight))),
        }
    }

    /// Those that are not among `names`.
    pub fn new_names(&self, names: &[String]) -> Vec<&str> {
        self.0.keys().map(String::as_str).filter(|name| !names.iter().any(|known| known == name)).collect()
    }

    /// Means over all ranks. `names` are those that all ranks know; it grows where one of them has `news`: the batches of a
    /// step differ from rank to rank, and so may its metrics.
    pub fn reduce(
        &self,
        names: &mut Vec<String>,
        news: bool,
        group: &Group,
        device: Device,
    ) -> Result<Vec<(String, f64)>> {
        if news {
            let new = self.new_names(names);
            let all = group.texts(&new.join("\n"))?;
            let mut all: Vec<String> = all.iter().flat_map(|texts| texts.lines()).map(str::to_owned).collect();
            all.sort_unstable();
            all.dedup();
            names.extend(all);
        }
        if names.is_empty() {
            return Ok(vec![]);
        }
        let of = |name: &String| {
            let (sum, weight) = self.0.get(name).map_or((None, 0.0), |(sum, weight)| (Some(sum), *weight));
            let sum = sum.map_or_else(|| Tensor::zeros([0i64; 0], (Kind::Double, device)), Tensor::shallow_clone);
            Tensor::stack(&[sum, Tensor::from(weight).to_kind(Kind::Double).to_device(device)], 0)
        };
        let sums = Tensor::stack(&names.iter().map(of).collect::<Vec<_>>(), 0);
        group.all_reduce_sum(&sums)?;
        let sums = Vec::<Vec<f64>>::try_from(sums.to_device(Device::Cpu)).torch("read the metrics")?;
        let mean = |(name, sum): (&String, Vec<f64>)| (sum[1] > 0.0).then(|| (name.clone(), sum[0] / sum[1]));
        Ok(names.iter().zip(sums).filter_map(mean).collect())
    }
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
    /// Names of metrics that not every rank knows.
    pub new_metrics: f64,
    /// Of the mean gradient, before clipping.
    pub grad_norm: f64,
}

impl Totals {
    /// Loss per unit of weight; 0 when nothing was weighted.
    pub fn mean_loss(&self) -> f64 {
        if self.weight > 0.0 { self.loss / self.weight } else { 0.0 }
    }
}
