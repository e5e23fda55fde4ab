//! From a plan to a [`Run`]: data, model, what of it is trained, optimizer, and the checkpoint to go on from.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::config::plan::{DatasetPlan, ModelPlan, RowsPlan, SchedulePlan, TrainPlan};
use host::data::template::Templates;
use host::data::{self, BatchLayout, Order, Tokenized};
use host::hf::{ModelConfig, WeightIndex};
use host::saved;
use host::tokenizer::Tokenizer;
use host::worker::{StopFlag, WorkerEnv};
use host::{Error, Result};
use tch::{Device, Kind};

use crate::adapter::{LoraAdapter, peft};
use crate::checkpoint::resume::{Identity, Position, ResumeState, Wanted};
use crate::checkpoint::{Saver, Writer, folder};
use crate::dist::{self, Group};
use crate::metrics::{Curve, Recorder};
use crate::model::builder::Builder;
use crate::model::{Llama, Weights};
use crate::optim::{AdamW, Schedule};
use crate::shard::{Pieces, Sharding, Spread};
use crate::train::agree::{self, Facts};
use crate::train::evaluate::Validation;
use crate::train::placement;
use crate::train::run::{Loss, Others, Parts, Run, rows_of_epoch};
use crate::trained::{Trained, WholeModel};
use crate::{device, torch};

/// What the worker's start-up hands to a run besides the plan.
pub struct Inputs {
    pub env: WorkerEnv,
    /// Of each data set.
    pub templates: Vec<Templates>,
    /// Of each data set that is measured on.
    pub templates_val: Vec<Templates>,
    pub stop: StopFlag,
    /// The recipe's content, recorded beside checkpoints.
    pub recipe_digest: String,
    /// Takes the place of cross-entropy.
    pub loss: Option<Box<dyn Loss>>,
}

/// Rows as tokens.
pub struct Tokens {
    pub training: Tokenized,
    /// Has a label, as every set that [`data::prepare`] returns.
    pub validation: Option<Tokenized>,
    /// What a padded layout fills with.
    pub pad: i64,
}

/// A model, perhaps with an adapter.
pub struct Opened {
    pub weights: Weights,
    pub model: Llama,
    /// What of it requires a gradient.
    pub trained: Option<Trained>,
    pub num_parameters: i64,
}

/// How a model that is to be trained starts.
#[derive(Clone, Copy)]
pub struct Start {
    pub seed: u64,
    /// The type that the factors of an adapter are kept in.
    pub adapter_kind: Kind,
}

impl Opened {
    /// Builds the model of a plan's section: to `start` training, or as it stands. Without an adapter all of it is trained.
    pub fn open(plan: &ModelPlan, kind: Kind, device: Device, start: Option<Start>) -> Result<Self> {
        Self::spread(plan, kind, device, start, None)
    }

    /// The same of a model that the ranks of `spread` share.
    pub fn spread(
        plan: &ModelPlan,
        kind: Kind,
        device: Device,
        start: Option<Start>,
        spread: Option<&Spread>,
    ) -> Result<Self> {
        let config = ModelConfig::read(&plan.checkpoint_dir)?;
        let weights = Weights::of_model(WeightIndex::open(&plan.checkpoint_dir, &plan.checkpoint_files)?, &config)?;
        weights.check_types()?;
        let lora = match (&plan.lora, &plan.adapter) {
            // A file says nothing of rank and alpha, but in its shapes.
            (Some(lora), Some(dir)) if dir.is_dir() => {
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
            (lora, _) => lora.clone(),
        };
        let trained = match (&lora, start) {
            (Some(lora), start) => {
                let Start { seed, adapter_kind } = start.unwrap_or(Start { seed: 0, adapter_kind: kind });
                Some(Trained::Lora(LoraAdapter::new(lora, &config.linears(), seed, adapter_kind, device)?))
            }
            (None, Some(_)) => Some(Trained::Whole(match spread {
                Some(spread) => WholeModel::sharded(&weights, &config, spread, kind, device)?,
                None => WholeModel::new(&weights, &config, kind, device)?,
            })),
            (None, None) => None,
        };
        if let (Some(Trained::Lora(adapter)), Some(path)) = (&trained, &plan.adapter) {
            peft::read_weights(adapter, path, &config)?;
        }
        let frozen = spread.filter(|_| trained.as_ref().is_none_or(|trained| trained.lora().is_some()));
        let frozen = frozen.map(|spread| Sharding::new(&config, &weights, spread, Pieces::Frozen, (kind, device)));
        let frozen = frozen.transpose()?;
        let builder = Builder::new(&weights, trained.as_ref(), kind, device).sharded(frozen.as_ref());
        let model = Llama::build(&config, &builder)?;
        let base: i64 = weights.index.tensors.values().map(|entry| entry.shape.iter().product::<usize>() as i64).sum();
        let added = trained.as_ref().and_then(Trained::lora).map_or(0, |adapter| adapter.flat.size());
        Ok(Self { weights, model, trained, num_parameters: base + added })
    }
}

impl Run {
    /// Opens everything the plan describes. Nothing is trained yet.
    pub fn open(plan: TrainPlan, inputs: Inputs) -> Result<Run> {
        let device = device::open(plan.device, inputs.env.local_rank, &inputs.env.libtorch_lib)?;
        let mut group = Group::join(&inputs.env, Duration::from_secs_f64(plan.collective_timeout_seconds))?;
        agree::check(&group, &first_facts(&plan.config, &inputs))?;
        group.attach(plan.collectives, device, &inputs.env.libtorch_lib)?;
        let tokenizer = Tokenizer::of(&plan.tokenizer)?;
        // Ranks of one machine share what the first of them caches; when that fails, the others need not read all rows to
        // find the same mistake.
        let load = |rows: &[DatasetPlan], templates: &[Templates]| {
            let prepare = || data::prepare(rows, &plan.tokenizer, &tokenizer, templates);
            let made = (inputs.env.local_rank == 0).then(prepare);
            let failed = group.which(matches!(made, Some(Err(_))))?;
            match made {
                Some(tokenized) => tokenized,
                None if failed.is_empty() => prepare(),
                None => Err(dist::stopped("the data could not be read")),
            }
        };
        let training = load(&plan.dataset, &inputs.templates)?;
        let is_measured = !plan.dataset_val.is_empty();
        let validation = is_measured.then(|| load(&plan.dataset_val, &inputs.templates_val)).transpose();
        let validation = validation.map_err(|error| error.cause("these are the validation rows, `dataset_val`"))?;
        let tokens = Tokens { training, validation, pad: i64::from(tokenizer.pad()) };
        Self::with_data(plan, inputs, tokens, device, group)
    }

    /// Opens a run over rows that are tokens already.
    pub fn with_data(mut plan: TrainPlan, inputs: Inputs, tokens: Tokens, device: Device, group: Group) -> Result<Run> {
        let started = Instant::now();
        let config = plan.config.clone();
        // Without a seed in the config each start draws one, and ranks may be started one by one: rank 0's is taken.
        let seed = group.from_main(&plan.seed.to_le_bytes())?;
        plan.seed = seed.try_into().map(u64::from_le_bytes).map_err(|_| Error::bug("a seed has eight bytes"))?;
        let group = Rc::new(group);
        let placement = placement::decide(&plan, &tokens.training, &inputs.env, &group)?;
        let checkpoint_every = placement.checkpoint_every;
        let spread =
            placement.is_sharded.then(|| Spread::new(&group, placement, plan.model.lora.is_none())).transpose()?;
        let kind = torch::kind(plan.dtype);
        let adapter_kind = if plan.compat_torchtune { kind } else { Kind::Float };
        let start = Start { seed: plan.seed, adapter_kind };
        let mut opened = Opened::spread(&plan.model, kind, device, Some(start), spread.as_ref())?;
        opened.model.checkpoint_every = checkpoint_every;
        let trained = opened.trained.ok_or_else(|| Error::bug("a model to train has nothing to train"))?;
        check_fit(&opened.model.config, &tokens)?;
        let others = open_others(&plan, &opened.model.config, kind, device, spread.as_ref())?;
        // Padding is never looked at; a padding token that was added past the embedding must not be looked up either.
        let pad = if tokens.pad < opened.model.config.vocab_size { tokens.pad } else { 0 };
        let mut optimizer = AdamW::new(&plan.optimizer, &trained.flat().numbers, plan.seed);
        let data = tokens.training;
        let identity = identity(&plan, &opened.weights, &trained, &data);
        let resume_dir = if plan.checkpoint.resume { Some(find_resume(&plan)?) } else { None };
        let position = match &resume_dir {
            Some(dir) => restore(dir, &plan, &identity, &opened.model.config, &trained, &mut optimizer, &group)?,
            None => beginning(&plan, identity, &group),
        };
        optimizer.seed = position.seed;
        let curve = resume_dir.as_deref().map(Curve::read).unwrap_or_default();
        let steps_per_epoch = steps_per_epoch(&plan, &data, &position, group.world_size)?;
        let total_steps = plan.epochs * steps_per_epoch;
        let record = record(&plan, &inputs, &position);
        agree::check(&group, &facts(&position, tokens.validation.as_ref(), &trained))?;
        if group.is_main() {
            let (all, trainable) = (opened.num_parameters, trained.num_parameters());
            let share = 100.0 * trainable as f64 / all as f64;
            let layers = opened.model.config.num_layers;
            let spread = match &spread {
                Some(Spread { group, placement, .. }) if placement.copies > 1 => {
                    format!("{} copies sharded over {} each, ", placement.copies, ranks(group.world_size))
                }
                Some(Spread { group, .. }) => format!("sharded over {}, ", ranks(group.world_size)),
                None => String::new(),
            };
            let (dtype, device, seconds) = (plan.dtype, device::name(device), started.elapsed().as_secs_f64());
            tracing::info!(
                "model: {layers} layers, {all} parameters, {trainable} trainable ({share:.2}%), {dtype} on {device}, {spread}loaded in {seconds:.2} s"
            );
            let (elements, samples, epochs) = (data.len(), position.samples_per_step, plan.epochs);
            let (rows, noun) = match plan.dataset.first() {
                Some(DatasetPlan { packing: Some(_), .. }) => {
                    (format!("{} rows in {elements} packs", data.num_samples()), "packs")
                }
                Some(DatasetPlan { rows: RowsPlan::Pairs { .. }, .. }) => (format!("{elements} pairs"), "pairs"),
                _ => (format!("{elements} rows"), "samples"),
            };
            tracing::info!("data: {rows}, {steps_per_epoch} steps an epoch of {samples} {noun}, epochs: {epochs}");
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
            if let Some(dir) = &resume_dir {
                report_resume(dir, &plan, &position, total_steps, &group);
            }
            folder::sweep(&plan.checkpoint.output_dir);
        }
        let order = Order::new(data.len(), plan.shuffle, position.seed, plan.compat_torchtune)?;
        let layout = BatchLayout {
            layout: plan.layout,
            batch_size: plan.batch_size,
            tokens_per_microbatch: plan.tokens_per_microbatch,
            pad,
        };
        let validation = tokens.validation.map(|rows| {
            let all: Vec<u32> = (0..rows.len() as u32).collect();
            let of = |rank| data::microbatches(&rows, &all, &layout, rank, group.world_size);
            let most = (0..group.world_size).map(|rank| of(rank).len()).max().unwrap_or(0);
            let filler = data::microbatches(&rows, &all[..1], &layout, 0, 1).pop();
            Validation { batches: of(group.rank), most, filler }
        });
        let (recorder, writer) = if group.is_main() {
            let saver = Saver::new(&plan.checkpoint, &plan.model, kind, record, &plan.resolved_yaml)?;
            let picture = plan.output_dir.join("loss.svg");
            (Some(Recorder::open(&plan.metrics)?), Writer::main(saver, Arc::new(opened.weights), picture))
        } else {
            (None, Writer::default())
        };
        Run::start(Parts {
            writer,
            schedule: Schedule::new(&plan.schedule, plan.optimizer.lr, total_steps),
            plan,
            config,
            group,
            spread,
            device,
            model: opened.model,
            others,
            trained,
            optimizer,
            data,
            validation,
            order,
            layout,
            position,
            steps_per_epoch,
            recorder,
            curve,
            loss: inputs.loss.map(RefCell::new),
            stop: inputs.stop,
        })
    }
}

fn ranks(count: usize) -> String {
    if count == 1 { "1 rank".to_owned() } else { format!("{count} ranks") }
}

/// The frozen models beside the one that is trained. They read the same tokens.
fn open_others(
    plan: &TrainPlan,
    trained: &ModelConfig,
    kind: Kind,
    device: Device,
    spread: Option<&Spread>,
) -> Result<Others> {
    let open = |frozen: &Option<ModelPlan>, what: &str| {
        let Some(frozen) = frozen else { return Ok(None) };
        let model = Opened::spread(frozen, kind, device, None, spread)
            .map_err(|error| error.cause(format!("it is the model of `{what}`")))?
            .model;
        if model.config.vocab_size != trained.vocab_size {
            let (has, needs) = (model.config.vocab_size, trained.vocab_size);
            return Err(Error::config(format!(
                "the model of `{what}` has a vocabulary of {has}, the trained one of {needs}"
            ))
            .hint("take two models of one family, which share their tokens"));
        }
        Ok(Some(model))
    };
    Ok(Others {
        reference: open(&plan.reference, "ref_checkpointer")?,
        teacher: open(&plan.teacher, "teacher_checkpointer")?,
    })
}

fn identity(plan: &TrainPlan, base: &Weights, trained: &Trained, data: &Tokenized) -> Identity {
    Identity {
        base_model: base.fingerprint(),
        lora: trained.lora().map(|adapter| adapter.plan.clone()),
        num_parameters: trained.num_parameters(),
        dtype: plan.dtype,
        compat_torchtune: plan.compat_torchtune,
        shuffle: plan.shuffle,
        loss_settings: plan.loss.guest.as_ref().map(|guest| guest.settings.clone()).into(),
        num_rows: data.len(),
        data_digest: data.digest().to_owned(),
    }
}

/// Where a new run is.
fn beginning(plan: &TrainPlan, identity: Identity, group: &Group) -> Position {
    Position {
        step: 0,
        epoch: 0,
        step_in_epoch: 0,
        seed: plan.seed,
        samples_per_step: plan
            .batch_size
            .saturating_mul(plan.gradient_accumulation_steps)
            .saturating_mul(group.world_size),
        identity,
        host_version: env!("CARGO_PKG_VERSION").to_owned(),
        saved_at: 0,
        shards: 0,
    }
}

/// Whole steps in an epoch; the rows left over are dropped.
fn steps_per_epoch(plan: &TrainPlan, data: &Tokenized, position: &Position, world_size: usize) -> Result<usize> {
    let rows = rows_of_epoch(plan, data.len(), world_size);
    let steps = (rows / position.samples_per_step).min(plan.max_steps_per_epoch.unwrap_or(usize::MAX));
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

/// Whether the model can compute the data: its tokens are in the vocabulary, its samples within reach of attention.
fn check_fit(config: &ModelConfig, tokens: &Tokens) -> Result<()> {
    let sets = || std::iter::once(&tokens.training).chain(&tokens.validation);
    let largest = sets().filter_map(Tokenized::max_token).max().unwrap_or(0);
    if i64::from(largest) >= config.vocab_size {
        return Err(Error::config("the tokenizer does not belong to this model")
            .cause(format!("the data has token {largest}, the model's vocabulary has {} entries", config.vocab_size))
            .hint("`tokenizer.path` should be the tokenizer.json in the model's own folder"));
    }
    let longest = sets().map(Tokenized::max_len).max().unwrap_or(0);
    match config.sliding_window {
        Some(window) if longest as i64 > window => {
            let what = format!("a sample has {longest} tokens, and this model's attention slides over {window}");
            Err(Error::config(what)
                .hint(format!("sliding is not built yet: set `tokenizer.max_seq_len` to {window} at most")))
        }
        _ => Ok(()),
    }
}

/// The checkpoint to go on from.
fn find_resume(plan: &TrainPlan) -> Result<PathBuf> {
    if let Some(dir) = &plan.checkpoint.resume_from {
        return Ok(dir.clone());
    }
    saved::existing(&plan.checkpoint.output_dir)?.pop().map(|saved| saved.path).ok_or_else(|| {
        Error::config(format!(
            "`resume_from_checkpoint: True`, but `{}` holds no checkpoint",
            plan.checkpoint.output_dir.display()
        ))
        .hint("start without it, or set `checkpointer.output_dir` to the folder of the run to go on with")
    })
}

/// Puts a checkpoint's numbers in place after checking that it is of this run.
fn restore(
    dir: &Path,
    plan: &TrainPlan,
    identity: &Identity,
    config: &ModelConfig,
    trained: &Trained,
    optimizer: &mut AdamW,
    group: &Group,
) -> Result<Position> {
    let sharing = trained.sharding().map(|sharding| &sharding.spread.group);
    let rank = sharing.map_or(0, |group| group.rank);
    let state = ResumeState::read(dir, &Wanted { config, ranks: sharing.map(|group| group.world_size), rank })?;
    let position = state.position;
    position.identity.check(identity, dir)?;
    let (samples, per_turn) = (position.samples_per_step, plan.batch_size * group.world_size);
    if !samples.is_multiple_of(per_turn) {
        return Err(Error::config(format!("the checkpoint `{}` cannot go on with these batches", dir.display()))
            .cause(format!("its steps have {samples} samples, `batch_size` × ranks is {per_turn}"))
            .hint("set `batch_size` so that batch_size × ranks divides the samples of a step"));
    }
    match trained {
        Trained::Whole(model) => model.read(&Weights::of_model(WeightIndex::open(dir, &[])?, config)?)?,
        Trained::Lora(adapter) => {
            let numbers = state.adapter.ok_or_else(|| Error::bug("the state of an adapter has no adapter"))?;
            tch::no_grad(|| adapter.flat.numbers.shallow_clone().copy_(&numbers));
        }
    }
    let device = trained.flat().numbers.device();
    let kind = optimizer.exp_avg.kind();
    optimizer.exp_avg = state.exp_avg.to_device(device).to_kind(kind);
    optimizer.exp_avg_sq = state.exp_avg_sq.to_device(device).to_kind(kind);
    if optimizer.master.is_some() {
        // A run that kept none goes on from the weights it had.
        let master = state.master.unwrap_or_else(|| trained.flat().numbers.detach());
        optimizer.master = Some(master.to_device(device).to_kind(Kind::Float));
    }
    optimizer.updates = position.step;
    Ok(position)
}

/// Says where a resumed run goes on, and what of the config the checkpoint decides.
fn report_resume(dir: &Path, plan: &TrainPlan, position: &Position, total_steps: usize, group: &Group) {
    let (dir, step, seed, samples) = (dir.display(), position.step, position.seed, position.samples_per_step);
    if position.epoch >= plan.epochs {
        tracing::info!("nothing to do: `{dir}` is complete ({step} of {total_steps} steps)");
        return;
    }
    tracing::info!("resuming from `{dir}` after step {step} of {total_steps}, seed {seed}");
    let per_turn = plan.batch_size * group.world_size;
    if samples != per_turn * plan.gradient_accumulation_steps {
        tracing::warn!(
            "`gradient_accumulation_steps` is {}, not {}: a step keeps the checkpoint's {samples} samples",
            samples / per_turn,
            plan.gradient_accumulation_steps
        );
    }
}

/// What the ranks compare when they meet.
fn first_facts(config: &serde_json::Value, inputs: &Inputs) -> Facts {
    let mut facts = Facts::new();
    agree::add_config(&mut facts, "", config);
    let mut add = |name: &str, value: String| facts.insert(name.to_owned(), value);
    let short = |text: &str| format!("of digest {}", &blake3::hash(text.as_bytes()).to_hex()[..16]);
    let of = |templates: &[Templates]| short(&templates.iter().map(Templates::digest).collect::<String>());
    add("the version of `host`", env!("CARGO_PKG_VERSION").to_owned());
    add("the version of libtorch", host_ffi::backend::libtorch_version().unwrap_or_default());
    add("the recipe, with its loss", short(&inputs.recipe_digest));
    add("the template", of(&inputs.templates));
    add("the template of `dataset_val`", of(&inputs.templates_val));
    facts
}

/// What the ranks compare before the first step.
fn facts(position: &Position, validation: Option<&Tokenized>, trained: &Trained) -> Facts {
    let mut facts = Facts::new();
    let mut add = |name: &str, value: String| facts.insert(name.to_owned(), value);
    for (name, value) in position.identity.parts() {
        add(name, value);
    }
    add("the tokens of `dataset_val`", validation.map_or("none", Tokenized::digest).to_owned());
    add("the step to go on from", position.step.to_string());
    // Pieces differ; that they are of one model its fingerprint says.
    if trained.sharding().is_none() {
        add("the numbers to train", format!("of digest {}", trained.flat().digest()));
    }
    facts
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
        "template_digest": inputs.templates.iter().map(Templates::digest).collect::<Vec<_>>().join(" "),
        "seed": position.seed,
        "world_size": inputs.env.world_size,
        "samples_per_step": position.samples_per_step,
        "data_digest": position.identity.data_digest,
        "hub_data": plan.dataset.iter().filter_map(|dataset| dataset.hub.as_ref()).collect::<Vec<_>>(),
        "prompt_template": plan.tokenizer.prompt_template,
        "tokenizer": plan.tokenizer.path,
    })
}
