//! Text from a prompt: one sequence, a key/value cache, torchtune's sampling rule.

use std::io::Write;
use std::time::Instant;

use host::config::plan::{GeneratePlan, PromptPlan};
use host::data::template::SharedTemplate;
use host::data::{encode_prompt, encode_text, messages};
use host::tokenizer::Tokenizer;
use host::worker::{StopFlag, WorkerEnv};
use host::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::model::{KvCache, Llama};
use crate::torch::TorchContext;
use crate::train::Opened;
use crate::{device, metrics, torch};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f64,
    pub top_k: Option<usize>,
}

impl Sampling {
    /// The next token after `scores` `[V]`. Greedy at temperature 0 or `top_k` 1; otherwise `argmax(p / Exp(1))`, which
    /// draws from `p = softmax(top_k(scores / T))`.
    pub fn choose(&self, scores: &Tensor) -> i64 {
        if self.temperature == 0.0 || self.top_k == Some(1) {
            return scores.argmax(-1, false).int64_value(&[]);
        }
        let mut scores = scores / self.temperature.max(1e-5);
        if let Some(k) = self.top_k {
            let k = (k as i64).min(scores.size()[0]);
            let (best, _) = scores.topk(k, -1, true, true);
            let bar = best.get(k - 1);
            scores = scores.masked_fill(&scores.lt_tensor(&bar), f64::NEG_INFINITY);
        }
        let probabilities = scores.softmax(-1, Kind::Float);
        let noise = probabilities.empty_like().exponential_(1.0);
        (probabilities / noise).argmax(-1, false).int64_value(&[])
    }
}

/// Continues `prompt` by up to `max_new_tokens` tokens, handing each to `emit` until it answers `false`.
pub fn continue_tokens(
    model: &Llama,
    prompt: &[i64],
    sampling: Sampling,
    max_new_tokens: usize,
    kv_cache: bool,
    device: Device,
    mut emit: impl FnMut(i64) -> Result<bool>,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let config = &model.config;
    let capacity = (prompt.len() + max_new_tokens) as i64;
    let kind = model.head.0.layer.weight().kind();
    let mut cache =
        kv_cache.then(|| KvCache::new(config.num_layers, config.num_kv_heads, config.head_dim, capacity, kind, device));
    let mut all = prompt.to_vec();
    let mut seen = 0;
    for _ in 0..max_new_tokens {
        let new = &all[seen..];
        let tokens = Tensor::from_slice(new).to_device(device);
        let positions = Tensor::arange_start(seen as i64, all.len() as i64, (Kind::Int64, device));
        let bounds = [0, new.len() as i64];
        let last = Tensor::from_slice(&[new.len() as i64 - 1]).to_device(device);
        let forward = model.forward(&positions, bounds.into());
        let scores = model.logits(&tokens, &forward, Some(&last), cache.as_mut())?;
        let token = sampling.choose(&scores.get(0));
        if cache.is_some() {
            seen = all.len();
        }
        all.push(token);
        if !emit(token)? {
            break;
        }
    }
    Ok(())
}

/// `host run generate`: prints the prompt and its continuation as it is made, then torchtune's figures.
pub fn run(plan: &GeneratePlan, env: &WorkerEnv, template: Option<&SharedTemplate>, stop: &StopFlag) -> Result<()> {
    let device = device::open(plan.device, env.local_rank, &env.libtorch_lib)?;
    let tokenizer = Tokenizer::of(&plan.tokenizer)?;
    let prompt: Vec<i64> = prompt_tokens(plan, &tokenizer, template)?.into_iter().map(i64::from).collect();
    // Training cuts a sample there; cut, a prompt would lose what asks for the answer.
    if let Some(longest) = plan.tokenizer.max_seq_len.filter(|longest| prompt.len() > *longest) {
        let what = format!("the prompt has {} tokens, and `tokenizer.max_seq_len` is {longest}", prompt.len());
        return Err(Error::config(what)
            .hint("shorten the prompt, or raise `tokenizer.max_seq_len` beyond what the model was tuned on"));
    }
    let kind = torch::kind(plan.dtype);
    let opened = Opened::open(&plan.model, kind, device, None)?;
    let vocabulary = opened.model.config.vocab_size;
    if let Some(token) = prompt.iter().find(|token| **token >= vocabulary) {
        return Err(Error::config("the tokenizer does not belong to this model")
            .cause(format!("the prompt has token {token}, the model's vocabulary has {vocabulary} entries"))
            .hint("`tokenizer.path` should be the tokenizer.json that the model was trained with, in its own folder"));
    }
    let shape = &opened.model.config;
    let positions = shape.sliding_window.unwrap_or(i64::MAX).min(shape.max_position_embeddings);
    if (prompt.len() as i64).saturating_add(plan.max_new_tokens as i64) > positions {
        let what = format!("the model has {positions} positions, too few for the prompt and `max_new_tokens`");
        return Err(Error::config(what)
            .cause(format!("the prompt has {} tokens, `max_new_tokens` is {}", prompt.len(), plan.max_new_tokens))
            .hint("lower `max_new_tokens`, or shorten the prompt"));
    }
    tch::manual_seed(plan.seed as i64);

    let mut out = std::io::stdout().lock();
    let failed = |error: std::io::Error| Error::run("cannot write to standard output").cause(error);
    if plan.echo_prompt {
        let ids: Vec<u32> = prompt.iter().map(|token| *token as u32).collect();
        write!(out, "{}", tokenizer.decode(&ids)?).and_then(|()| out.flush()).map_err(failed)?;
    }
    let mut decoder = tokenizer.stream();
    let stops = tokenizer.stop_tokens();
    let sampling = Sampling { temperature: plan.temperature, top_k: plan.top_k };
    let started = Instant::now();
    let mut made = 0usize;
    let emit = |token: i64| -> Result<bool> {
        if stops.contains(&(token as u32)) || stop.is_set() {
            return Ok(false);
        }
        made += 1;
        if let Some(text) = decoder.push(token as u32)? {
            write!(out, "{text}").and_then(|()| out.flush()).map_err(failed)?;
        }
        Ok(true)
    };
    continue_tokens(&opened.model, &prompt, sampling, plan.max_new_tokens, plan.enable_kv_cache, device, emit)?;
    let seconds = started.elapsed().as_secs_f64();
    writeln!(out, "{}", decoder.finish()?).map_err(failed)?;

    let speed = made as f64 / seconds;
    let bytes_per_parameter = if kind == Kind::Float { 4.0 } else { 2.0 };
    let model_bytes = opened.num_parameters as f64 * bytes_per_parameter;
    let memory = match host_ffi::backend::memory_stats(device).torch("read the memory statistics")? {
        Some(stats) => stats.allocated as f64 / 1e9,
        None => metrics::peak_rss_mb() * 1024.0 * 1024.0 / 1e9,
    };
    tracing::info!("Time for inference: {seconds:.02} sec total, {speed:.02} tokens/sec");
    tracing::info!("Bandwidth achieved: {:.02} GB/s", model_bytes * speed / 1e9);
    tracing::info!("Memory used: {memory:.02} GB");
    if stop.is_set() { Err(Error::interrupted("generation was stopped")) } else { Ok(()) }
}

/// The prompt as training would have seen it: through the same template and the same encoding, up to the answer.
pub fn prompt_tokens(
    plan: &GeneratePlan,
    tokenizer: &Tokenizer,
    template: Option<&SharedTemplate>,
) -> Result<Vec<u32>> {
    match &plan.prompt {
        PromptPlan::Text(text) => encode_text(tokenizer, text),
        PromptPlan::Messages { system, user } => {
            // As a row's.
            let mut user = user.clone();
            tokenizer.special_tokens().mark(&mut user);
            encode_prompt(tokenizer, &messages::prompt(template, system.as_deref(), &user)?)
        }
    }
}
