//! What a plan asks of a rank, in the sizes that memory and time are estimated from.

use crate::config::plan::{Dtype, Layout, LoraPlan, TrainPlan, Updates};
use crate::data::Tokenized;
use crate::hf::ModelConfig;
use crate::{Error, Result};

/// The sizes of a run.
#[derive(Clone, Debug)]
pub struct Job {
    pub model: ModelConfig,
    pub lora: Option<LoraPlan>,
    /// Bytes of a weight or an activation.
    pub element: f64,
    /// Bytes of a number of an adapter.
    pub adapter_element: f64,
    /// Bytes that the optimizer keeps for a number that is trained: two moments, and perhaps an fp32 copy.
    pub optimizer_bytes: f64,
    /// Numbers of the models beside the trained one, which stay as they are.
    pub frozen_beside: f64,
    /// Tokens of the largest micro-batch.
    pub tokens: f64,
    /// Its label positions.
    pub labels: f64,
    /// Scores are computed in this many pieces at least.
    pub num_output_chunks: f64,
    /// A loss that is handed all scores of a micro-batch at once.
    pub takes_all_scores: bool,
    pub saves_merged: bool,
}

/// How long samples are.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Lengths {
    /// Tokens of a sample.
    pub mean: f64,
    /// The share of them that carries loss.
    pub label_share: f64,
    /// The standard deviation of their number as a share of the mean.
    pub spread: f64,
}

impl Lengths {
    /// Of rows that are tokens already.
    pub fn of(data: &Tokenized) -> Self {
        let lengths = || (0..data.len()).map(|index| data.length(index) as f64);
        let count = data.len().max(1) as f64;
        let mean = (lengths().sum::<f64>() / count).max(1.0);
        let variance = lengths().map(|length| (length - mean).powi(2)).sum::<f64>() / count;
        let trained = |sample| data.get(sample).trained.iter().filter(|is_trained| **is_trained).count();
        let labels: usize = (0..data.num_samples()).map(trained).sum();
        Self { mean, spread: variance.sqrt() / mean, label_share: labels as f64 / data.num_tokens().max(1) as f64 }
    }
}

impl Job {
    /// Of a plan, on a machine that has its models' `config.json`.
    pub fn of(plan: &TrainPlan, lengths: &Lengths) -> Result<Self> {
        let model = ModelConfig::read(&plan.model.checkpoint_dir)?;
        let beside = [&plan.reference, &plan.teacher].into_iter().flatten();
        let beside = beside.map(|other| Ok(num_parameters(&ModelConfig::read(&other.checkpoint_dir)?)));
        let frozen_beside = beside.sum::<Result<f64>>()?;
        Self::new(plan, model, frozen_beside, lengths)
    }

    pub fn new(plan: &TrainPlan, model: ModelConfig, frozen_beside: f64, lengths: &Lengths) -> Result<Self> {
        if !(lengths.mean >= 1.0 && (0.0..=1.0).contains(&lengths.label_share)) {
            return Err(Error::config("a sample has at least one token, and at most all of them carry loss"));
        }
        let element = bytes(plan.dtype);
        let adapter_element = if plan.compat_torchtune { element } else { 4.0 };
        let trained_element = if plan.model.lora.is_some() { adapter_element } else { element };
        let optimizer_bytes = match plan.optimizer.updates {
            Updates::Master if trained_element < 4.0 => 12.0,
            Updates::Stochastic => 8.0,
            _ => 2.0 * trained_element,
        };
        let tokens = largest_microbatch(plan, lengths);
        Ok(Self {
            model,
            lora: plan.model.lora.clone(),
            element,
            adapter_element,
            optimizer_bytes,
            frozen_beside,
            tokens,
            labels: (tokens * lengths.label_share).max(1.0),
            num_output_chunks: plan.loss.num_output_chunks as f64,
            takes_all_scores: plan.loss.guest.is_some(),
            saves_merged: !plan.checkpoint.adapter_only,
        })
    }

    /// Numbers of the whole model.
    pub fn num_parameters(&self) -> f64 {
        num_parameters(&self.model)
    }

    /// Numbers that are trained.
    pub fn num_trained(&self) -> f64 {
        let Some(lora) = &self.lora else { return self.num_parameters() };
        let targeted = self.model.linears().into_iter().filter(|spec| is_target(lora, &spec.name));
        targeted.map(|spec| (lora.rank as i64 * (spec.inputs + spec.outputs)) as f64).sum()
    }

    /// Numbers of one block.
    pub fn block(&self) -> f64 {
        (self.num_parameters() - self.outside_blocks()) / self.model.num_layers as f64
    }

    /// Numbers of embedding, last norm and head.
    pub fn outside_blocks(&self) -> f64 {
        let copies = if self.model.tie_word_embeddings { 1 } else { 2 };
        (self.model.hidden_size * (copies * self.model.vocab_size + 1)) as f64
    }

    /// Numbers of the head, or of the embedding that is it.
    pub fn head(&self) -> f64 {
        (self.model.vocab_size * self.model.hidden_size) as f64
    }

    pub fn trains_all(&self) -> bool {
        self.lora.is_none()
    }

    /// Whether a linear layer of this name in a block has an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        self.lora.as_ref().is_some_and(|lora| is_target(lora, name))
    }
}

pub fn bytes(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 2.0,
        Dtype::Fp32 => 4.0,
    }
}

fn is_target(lora: &LoraPlan, name: &str) -> bool {
    let last = name.rsplit('.').next();
    lora.targets.iter().any(|target| Some(target.as_str()) == last)
}

fn num_parameters(model: &ModelConfig) -> f64 {
    model.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as f64).sum()
}

/// Tokens of the largest micro-batch: as many of equal size as the budget needs for a rank's samples of a step.
fn largest_microbatch(plan: &TrainPlan, lengths: &Lengths) -> f64 {
    let longest = plan.tokenizer.max_seq_len.map_or(f64::INFINITY, |length| length as f64);
    match plan.layout {
        Layout::Padded => {
            let samples = plan.batch_size as f64;
            (samples * lengths.mean * longest_of(samples, lengths.spread)).min(samples * longest)
        }
        Layout::Varlen => {
            let budget = plan.tokens_per_microbatch as f64;
            let all = (plan.batch_size * plan.gradient_accumulation_steps) as f64 * lengths.mean;
            let longest_sample = (lengths.mean * longest_of(8.0, lengths.spread)).min(longest);
            (all / (all / budget).ceil()).max(longest_sample.min(all))
        }
    }
}

/// What the longest of some samples is to the mean, if lengths are normally distributed: the expected maximum of as many
/// standard normals, by Blom's approximation (1958).
pub fn longest_of(samples: f64, spread: f64) -> f64 {
    1.0 + spread * normal_quantile(((samples - 0.375) / (samples + 0.25)).max(0.5)).max(0.0)
}

/// The upper half of the normal distribution's quantiles (Abramowitz and Stegun 26.2.23, off by 4.5e-4 at most).
fn normal_quantile(p: f64) -> f64 {
    let t = (-2.0 * (1.0 - p).ln()).sqrt();
    let over = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    t - over / (1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_some_samples_is_as_statistics_has_it() {
        for (samples, expected) in [(1.0, 0.0), (2.0, 0.564), (4.0, 1.029), (8.0, 1.424), (64.0, 2.343)] {
            let found = longest_of(samples, 1.0) - 1.0;
            assert!((found - expected).abs() < 0.03, "{samples}: {found}");
        }
    }
}
