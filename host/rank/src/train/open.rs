//! From a plan to a [`Run`]: data, model, adapter, optimizer, and the checkpoint to go on from.

use std::sync::Arc;
use std::time::Instant;

use host::config::plan::{DatasetPlan, SchedulePlan, TrainPlan};
use host::data::template::OpenTemplate;
use host::data::{self, Order, Tokenized};
use host::hf::{ModelConfig, WeightIndex};
use host::tokenizer::Tokenizer;
use host::worker::{StopFlag, WorkerEnv};
use host::{Error, Result};
use tch::{Device, Kind};

use crate::adapter::{LoraAdapter, peft};
use crate::checkpoint::Saver;
use crate::checkpoint::resume::{self, Position, ResumeState};
use crate::dist::{self, Group};
use crate::metrics::Recorder;
use crate::model::builder::Builder;
use crate::model::{Llama, Weights, llama};
use crate::optim::{AdamW, Schedule};
use crate::train::run::{Parts, Run};
use crate::{device, torch};

/// What the worker's start-up hands to a run besides the plan.
pub struct Inputs {
    pub env: WorkerEnv,
    pub template: Arc<dyn OpenTemplate + Send + Sync>,
    pub stop: StopFlag,
    /// The recipe's content, recorded beside checkpoints.
    pub recipe_digest: String,
}

/// Rows as tokens.
pub struct Tokens {
    pub training: Tokenized,
    pub validation: Option<Tokenized>,
    /// What a padded layout fills with.
    pub pad: i64,
}

/// A model with its adapter, ready to train or to generate.
pub struct Opened {
    pub weights: Weights,
    pub model: Llama,
    pub adapter: Option<LoraAdapter>,
    pub num_parameters: i64,
}

impl Opened {
    /// Builds the model of a plan's section. `adapter_kind` is the type the adapter's factors are kept in.
    pub fn open(
        plan: &host::config::plan::ModelPlan,
        seed: u64,
        kind: Kind,
        adapter_kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let config = ModelConfig::read(&plan.checkpoint_dir)?;
        let weights = Weights::open(WeightIndex::open(&plan.checkpoint_dir, &plan.checkpoint_files)?)?;
        weights.check_types()?;
        let lora = match (&plan.lora, &plan.adapter_dir) {
            (Some(lora), Some(dir)) => {
                let found = peft::read_plan(dir)?;
                if found.rank != lora.rank || found.alpha != lora.alpha {
                    return Err(Error::config(format!(
                        "the adapter in `{}` has rank {} and alpha {}, the config says {} and {}",
                        dir.display(),
                        found.rank,
                        found.alpha,
                        lora.rank,
                        lora.alpha
                    )));
                }
                Some(lora.clone())
            }
            (None, Some(dir)) => Some(peft::read_plan(dir)?),
            (lora, None) => lora.clone(),
        };
        let adapter = match &lora {
            Some(lora) => Some(LoraAdapter::new(lora, &llama::linears(&config), seed, adapter_kind, device)?),
            None => None,
        };
        if let (Some(adapter), Some(dir)) = (&adapter, &plan.adapter_dir) {
            peft::read_weights(adapter, dir)?;
        }
        let model = Llama::build(&config, &Builder::new(&weights, adapter.as_ref(), kind, device))?;
        let base: i64 = weights.index.tensors.values().map(|entry| entry.shape.iter().product::<usize>() as i64).sum();
        let num_parameters = base + adapter.as_ref().map_or(0, LoraAdapter::num_parameters);
        Ok(Self { weights, model, adapter, num_parameters })
    }
}

impl Run {
    /// Opens everything the plan describes. Nothing is trained yet.
    pub fn open(plan: TrainPlan, inputs: Inputs) -> Result<Run> {
        let device = device::open(plan.device, inputs.env.local_rank, &inputs.env.libtorch_lib)?;
        let group = Group::join(&inputs.env)?;
        let tokenizer = Tokenizer::open(&plan.tokenizer.path)?;
        let load = |dataset: &DatasetPlan| load_data(dataset, &plan, &tokenizer, &inputs, &group);
        let data = load(&plan.dataset)?;
        let validation = plan.dataset_val.as_ref().map(load).transpose()?;
        Self::with_data(
            plan,
            inputs,
            Tokens { training: data, validation, pad: i64::from(tokenizer.pad()) },
            device,
            group,
        )
    }

    /// Opens a run over rows that are tokens already.
    pub fn with_data(plan: TrainPlan, inputs: Inputs, tokens: Tokens, device: Device, group: Group) -> Result<Run> {
        let started = Instant::now();
        let kind = torch::kind(plan.dtype);
        let adapter_kind = if plan.compat_torchtune { kind } else { Kind::Float };
        let opened = Opened::open(&plan.model, plan.seed, kind, adapter_kind, device)?;
        let Some(adapter) = opened.adapter else {
            return Err(Error::config("the model section describes nothing to train")
                .hint("name a LoRA component, such as `lora_smollm2_135m`; full fine-tuning is not built yet"));
        };
        check_vocabulary(&opened.model.config, &tokens)?;
        // Padding is never looked at; a padding token that was added past the embedding must not be looked up either.
        let pad = if tokens.pad < opened.model.config.vocab_size { tokens.pad } else { 0 };
        let mut optimizer = AdamW::new(&plan.optimizer, &adapter.flat);
        let data = tokens.training;
        let position = match if plan.checkpoint.resume { find_resume(&plan)? } else { None } {
            Some(state) => restore(state, &plan, &data, &adapter, &mut optimizer, &group)?,
            None => beginning(&plan, &data, &adapter, &group),
        };
        let steps_per_epoch = steps_per_epoch(&plan, &data, &position)?;
        if group.is_main() {
            let (all, trainable) = (opened.num_parameters, adapter.num_parameters());
            let share = 100.0 * trainable as f64 / all as f64;
            let layers = opened.model.config.num_layers;
            let seconds = started.elapsed().as_secs_f64();
            tracing::info!(
                "model: {layers} layers, {all} parameters, {trainable} trainable ({share:.2}%), {:?} on {device:?}, loaded in {seconds:.2} s",
                plan.dtype
            );
            let (rows, samples, epochs) = (data.len(), position.samples_per_step, plan.epochs);
            tracing::info!(
                "data: {rows} rows, {steps_per_epoch} steps an epoch of {samples} samples, epochs: {epochs}"
            );
            let steps = epochs * steps_per_epoch;
            if let SchedulePlan::Cosine { num_warmup_steps: warmup, .. } = plan.schedule
                && warmup >= steps
            {
                tracing::warn!(
                    "`lr_scheduler.num_warmup_steps` is {warmup} and the run has {steps} steps: the rate rises to the end and never reaches `optimizer.lr`"
                );
            }
            let report = data.report.to_string();
            if !report.is_empty() {
                tracing::info!("data: {report}");
            }
        }
        let order = Order::new(data.len(), plan.shuffle, position.seed, plan.compat_torchtune)?;
        let recorder = if group.is_main() { Some(Recorder::open(&plan.metrics)?) } else { None };
        let record = record(&plan, &inputs, &position);
        Run::start(Parts {
            saver: Saver::new(&plan.checkpoint, &plan.model, kind, record, &plan.resolved_yaml)?,
            schedule: Schedule::new(&plan.schedule, plan.optimizer.lr, plan.epochs * steps_per_epoch),
            plan,
            group,
            device,
            weights: opened.weights,
            model: opened.model,
            adapter,
            optimizer,
            data,
            validation: tokens.validation,
            order,
            pad,
            position,
            steps_per_epoch,
            recorder,
            stop: inputs.stop,
        })
    }
}

/// Where a new run is.
fn beginning(plan: &TrainPlan, data: &Tokenized, adapter: &LoraAdapter, group: &Group) -> Position {
    Position {
        step: 0,
        epoch: 0,
        step_in_epoch: 0,
        seed: plan.seed,
        samples_per_step: plan.batch_size * plan.gradient_accumulation_steps * group.world_size,
        num_rows: data.len(),
        data_digest: data.digest().to_owned(),
        num_parameters: adapter.num_parameters(),
        host_version: env!("CARGO_PKG_VERSION").to_owned(),
        saved_at: 0,
    }
}

/// Whole steps in an epoch; the rows left over are dropped.
fn steps_per_epoch(plan: &TrainPlan, data: &Tokenized, position: &Position) -> Result<usize> {
    let steps = (data.len() / position.samples_per_step).min(plan.max_steps_per_epoch.unwrap_or(usize::MAX));
    if steps > 0 && position.step_in_epoch >= steps {
        let done = position.step_in_epoch;
        return Err(Error::config(format!("the checkpoint is {done} steps into an epoch that now has {steps}"))
            .hint("raise `max_steps_per_epoch`, or resume from an `epoch_N` folder with `resume_from`"));
    }
    if steps > 0 {
        return Ok(steps);
    }
    Err(Error::config(format!("{} rows make no step of {} samples", data.len(), position.samples_per_step))
        .hint("lower `gradient_accumulation_steps` or `batch_size`, or take more rows with `dataset.split`"))
}

/// Rank 0 of each machine makes and caches the tokens; the others read its cache.
fn load_data(
    dataset: &DatasetPlan,
    plan: &TrainPlan,
    tokenizer: &Tokenizer,
    inputs: &Inputs,
    group: &Group,
) -> Result<Tokenized> {
    let prepare = || data::prepare(dataset, &plan.tokenizer, tokenizer, inputs.template.as_ref());
    let made = (inputs.env.local_rank == 0).then(prepare);
    let failed = group.any_failed(&made)?;
    match made {
        Some(tokenized) => tokenized,
        // Or it would read all rows again, to find the same mistake.
        None if failed => Err(dist::stopped("the data could not be read")),
        None => prepare(),
    }
}

/// A token beyond the embedding would read past its end.
fn check_vocabulary(config: &ModelConfig, tokens: &Tokens) -> Result<()> {
    let sets = std::iter::once(&tokens.training).chain(&tokens.validation);
    let largest = sets.filter_map(Tokenized::max_token).max().unwrap_or(0);
    if i64::from(largest) < config.vocab_size {
        return Ok(());
    }
    Err(Error::config("the tokenizer does not belong to this model")
        .cause(format!("the data has token {largest}, the model's vocabulary has {} entries", config.vocab_size))
        .hint("`tokenizer.path` should be the tokenizer.json in the model's own folder"))
}

fn find_resume(plan: &TrainPlan) -> Result<Option<ResumeState>> {
    let dir = match &plan.checkpoint.resume_from {
        Some(dir) => dir.clone(),
        None => resume::newest(&plan.checkpoint.output_dir)?.ok_or_else(|| {
            Error::config(format!(
                "`resume_from_checkpoint: True`, but `{}` holds no checkpoint",
                plan.checkpoint.output_dir.display()
            ))
            .hint("start without it, or set `checkpointer.output_dir` to the folder of the run to go on with")
        })?,
    };
    tracing::info!("resuming from {}", dir.display());
    ResumeState::read(&dir).map(Some)
}

/// Puts a checkpoint's numbers in place after checking that it is of this run.
fn restore(
    state: ResumeState,
    plan: &TrainPlan,
    data: &Tokenized,
    adapter: &LoraAdapter,
    optimizer: &mut AdamW,
    group: &Group,
) -> Result<Position> {
    let position = state.position;
    let differs = |what: &str, then: &dyn std::fmt::Display, now: &dyn std::fmt::Display| {
        Error::config(format!("the checkpoint is of another run: its {what} differs"))
            .cause(format!("{then} then, {now} now"))
            .hint("resume with the config that the checkpoint's `config_resolved.yaml` holds")
    };
    if position.num_parameters != adapter.num_parameters() {
        return Err(differs("number of trainable parameters", &position.num_parameters, &adapter.num_parameters()));
    }
    if position.data_digest != data.digest() {
        return Err(differs("training data", &format!("{} rows", position.num_rows), &format!("{} rows", data.len()))
            .cause("rows, template, tokenizer, or a setting that decides the tokens has changed"));
    }
    let per_turn = plan.batch_size * group.world_size;
    if !position.samples_per_step.is_multiple_of(per_turn) {
        return Err(differs(
            "samples per step",
            &position.samples_per_step,
            &format!("a multiple of batch_size × ranks = {per_turn}"),
        ));
    }
    tch::no_grad(|| {
        adapter.flat.shallow_clone().copy_(&state.parameters);
        optimizer.exp_avg.copy_(&state.exp_avg);
        optimizer.exp_avg_sq.copy_(&state.exp_avg_sq);
    });
    optimizer.updates = position.step;
    Ok(position)
}

/// What makes the run reproducible: versions, seed, the guests' content, the command.
fn record(plan: &TrainPlan, inputs: &Inputs, position: &Position) -> serde_json::Value {
    serde_json::json!({
        "host_version": env!("CARGO_PKG_VERSION"),
        "libtorch_version": host_ffi::backend::libtorch_version().ok(),
        "config": plan.config_path,
        "overrides": plan.overrides,
        "recipe": plan.recipe.path,
        "recipe_digest": inputs.recipe_digest,
        "template_digest": inputs.template.digest(),
        "seed": position.seed,
        "world_size": inputs.env.world_size,
        "samples_per_step": position.samples_per_step,
        "data_digest": position.data_digest,
        "prompt_template": plan.tokenizer.prompt_template,
        "tokenizer": plan.tokenizer.path,
    })
}
