//! What a guest may ask of the host, once: both fronts call the traits implemented here and in [`super::tensors`].
//!
//! A guest's mistake is a [`types::Error`] that goes back to it. A failure of the run itself is remembered and ends the
//! guest: no guest can handle a dead rank, and the first error is the one to report. A handle that outlives its step is
//! such a mistake too, not a crash: guests in languages with a garbage collector keep handles for longer than they mean.
//!
//! Between two backward passes every tensor a guest makes counts, dropped or not, because autograd may keep it; after one only
//! those it still holds do. What no limit here sees is a graph that a guest keeps through another backward pass.

use std::collections::BTreeSet;
use std::time::Instant;

use host::config::plan::GuestLimits;
use host::worker::StopFlag;
use host_ffi::alloc::held_by_thread;
use wasmtime::component::Resource;

use super::guest::Blame;
use super::handles::Slab;
use super::limits::{Clock, PEAKS, Peaks, ScriptMemory};
use super::log::SharedLog;
use super::settings::value_of;
use super::tensors::TensorSlot;
use super::training::{BatchInfo, Training};
use crate::metrics;
use crate::train::{Over, Place, Which};

/// The traits and types that WIT defines, as Rust.
pub mod wit {
    wasmtime::component::bindgen!({
        path: "../../sdk/wit/0.1.0",
        world: "recipe",
        imports: { default: trappable },
        trappable_error_type: { "host:sdk/types.error" => crate::script::api::HostError },
        with: {
            "host:sdk/tensors.tensor": crate::script::tensors::TensorSlot,
            "host:sdk/training.batch": crate::script::api::Batch,
            "host:sdk/training.model": crate::script::api::Model,
            "host:sdk/training.step": crate::script::api::Step,
            "host:sdk/training.run": crate::script::api::Run,
        },
    });
}

pub use wit::host::sdk::{tensors, training, types};

/// How a host call fails.
#[derive(Debug)]
pub enum HostError {
    /// The guest's mistake: it may handle the error or hand it on.
    Guest(types::Error),
    /// The guest ends here.
    End(Box<Failure>),
}

/// Why the host ended a guest.
#[derive(Debug)]
pub enum Failure {
    /// The run failed or was stopped: reported as it is, the guest had no part in it.
    Run(host::Error),
    /// The guest did what it must not do, in a place where it cannot be told.
    Guest(types::Error),
}

impl HostError {
    pub fn guest(code: types::Code, message: impl Into<String>) -> Self {
        Self::Guest(types::Error { code, message: message.into(), hint: None })
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Self::Guest(error) = &mut self {
            error.hint = Some(hint.into());
        }
        self
    }

    /// The same as an end of the guest.
    pub fn into_failure(self) -> Failure {
        match self {
            Self::Guest(error) => Failure::Guest(error),
            Self::End(failure) => *failure,
        }
    }
}

impl From<host::Error> for HostError {
    fn from(error: host::Error) -> Self {
        Self::End(Box::new(Failure::Run(error)))
    }
}

pub type HostResult<T> = Result<T, HostError>;

/// A micro-batch handle. It outlives its step only to say so.
pub struct Batch {
    info: BatchInfo,
    turn: u64,
}

/// The handle of a model.
pub struct Model(Which);

/// A step handle.
pub struct Step {
    turn: u64,
}

/// The handle of the one run.
pub struct Run;

/// The step in progress.
struct Turn {
    number: u64,
    /// The micro-batch handed out last.
    batch: Option<BatchInfo>,
    /// A micro-batch the run gave and the guest has not taken yet.
    waiting: Option<BatchInfo>,
    all_taken: bool,
    /// The run's own loss of the batch in hand weighs nothing: none of its tokens counts.
    weighs_nothing: bool,
}

/// One guest's side of the host: its handles, its run, its log and its clock.
pub struct HostState {
    pub clock: Clock,
    /// Of a script alone.
    pub memory: ScriptMemory,
    pub log: SharedLog,
    pub(super) tensors: Slab<TensorSlot>,
    batches: Slab<Batch>,
    models: Slab<Model>,
    steps: Slab<Step>,
    runs: Slab<Run>,
    max_handles: usize,
    /// Bytes of tensors that the guest holds or that autograd may, and the most there may be.
    pub(super) tensor_bytes: usize,
    pub(super) max_tensor_bytes: usize,
    /// Whether the guest's operations record how they were computed.
    pub(super) grad: bool,
    /// Metrics that the guest named.
    metrics: BTreeSet<String>,
    training: Option<Box<dyn Training>>,
    /// Where the guest's tensors are; none where it has no tensors.
    pub(super) device: Option<tch::Device>,
    opened: bool,
    complete: bool,
    turn: Option<Turn>,
    turns: u64,
    failure: Option<Failure>,
}

impl HostState {
    pub fn new(name: &str, limits: &GuestLimits, stop: StopFlag, training: Option<Box<dyn Training>>) -> Self {
        Self {
            clock: Clock::new(limits.seconds, stop),
            memory: ScriptMemory::new(limits),
            log: SharedLog::new(name, limits.log_lines),
            tensors: Slab::default(),
            batches: Slab::default(),
            models: Slab::default(),
            steps: Slab::default(),
            runs: Slab::default(),
            max_handles: limits.handles,
            tensor_bytes: 0,
            max_tensor_bytes: limits.tensors_mb << 20,
            grad: true,
            metrics: BTreeSet::new(),
            device: training.as_ref().map(|training| training.device()),
            training,
            opened: false,
            complete: false,
            turn: None,
            turns: 0,
            failure: None,
        }
    }

    /// The failure that ended the guest, if the host ended it.
    pub fn take_failure(&mut self) -> Option<Failure> {
        self.failure.take()
    }

    /// Remembers the first failure; what a guest does after it is only a consequence.
    pub fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }

    /// Where in the run a guest is, for its failure report.
    pub fn place(&self) -> Option<String> {
        let step = self.training.as_ref()?.current_step();
        Some(if self.turns == 0 { "before the first step".into() } else { format!("at step {step}") })
    }

    /// A failure of the run, which met the guest at `place`.
    pub fn run_failure(&mut self, error: host::Error, place: Place) -> host::Error {
        match &mut self.training {
            Some(training) => training.explain(error, &place),
            None => error,
        }
    }

    /// What a recipe that returned without an error may still have left undone.
    pub fn check_end(&mut self, blame: &Blame) -> host::Result<()> {
        self.clock.log_share();
        if self.failure.is_none()
            && let Some(training) = &mut self.training
        {
            training.leave().map_err(|error| training.explain(error, &Place::default()))?;
        }
        match self.failure.take() {
            Some(Failure::Run(error)) => Err(error),
            Some(Failure::Guest(mistake)) => Err(blame.mistake(mistake)),
            None if self.complete => Ok(()),
            None if self.turns == 0 => Err(blame
                .error()
                .cause("it returned without taking a step, so nothing is trained")
                .hint("take steps until `run.next_step()` gives none")),
            None => Err(blame
                .error()
                .cause("it returned before the run was complete, so the last checkpoint is not written")
                .hint("take steps until `run.next_step()` gives none")),
        }
    }

    /// Begins a call that a guest without a run is given: its tensors die with it.
    pub(super) fn begin_call(&mut self) {
        self.turns += 1;
        self.grad = true;
        self.turn =
            Some(Turn { number: self.turns, batch: None, waiting: None, all_taken: true, weighs_nothing: false });
        self.clock.restart();
        self.memory.restart();
    }

    pub(super) fn end_call(&mut self) {
        self.end_arena(self.turns);
        self.turn = None;
        self.count_tensors();
    }

    /// The arena a new tensor belongs to.
    pub(super) fn arena(&self) -> Option<u64> {
        self.turn.as_ref().map(|turn| turn.number)
    }

    pub(super) fn check_handles(&self) -> HostResult<()> {
        let held = self.tensors.len() + self.batches.len() + self.models.len() + self.steps.len() + self.runs.len();
        if held < self.max_handles {
            Peaks::raise(&PEAKS.handles, held as u64 + 1);
            return Ok(());
        }
        Err(HostError::guest(types::Code::Limit, format!("{held} handles are held, and a guest may hold {held}"))
            .hint("drop tensors that are no longer needed before making new ones"))
    }

    /// Ends the guest; for calls whose signature has no error too.
    pub(super) fn trap(&mut self, error: HostError) -> wasmtime::Error {
        self.fail(error.into_failure());
        wasmtime::Error::msg("the host ended the guest")
    }

    /// The next micro-batch of the step in progress, looked at or taken for the first time.
    fn pull_batch(&mut self) -> HostResult<Option<BatchInfo>> {
        if let Some(info) = self.turn.as_mut().and_then(|turn| turn.waiting.take()) {
            return Ok(Some(info));
        }
        self.in_training(|training| training.next_batch())
    }

    fn check_metric(&mut self, name: &str) -> HostResult<()> {
        const MOST: usize = 200;
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "/_.-".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(is_fine) {
            let message = format!(
                "`{}` is no name of a metric",
                name.escape_debug().to_string().chars().take(80).collect::<String>()
            );
            return Err(HostError::guest(types::Code::Invalid, message)
                .hint("names are of letters, digits and `/ _ . -`, 64 at most"));
        }
        if metrics::OWN.contains(&name) {
            return Err(HostError::guest(types::Code::Invalid, format!("`{name}` is a metric of the host's"))
                .hint("take another name"));
        }
        if !self.metrics.contains(name) {
            if self.metrics.len() == MOST {
                let message = format!("`{name}` is one metric more than the {MOST} that a run may have");
                return Err(HostError::guest(types::Code::Limit, message));
            }
            self.metrics.insert(name.to_owned());
        }
        Ok(())
    }

    fn training(&mut self) -> HostResult<&mut dyn Training> {
        match self.training.as_deref_mut() {
            Some(training) => Ok(training),
            None => Err(host::Error::bug("a guest without a run asked for training").into()),
        }
    }

    /// Runs `work` of the training run, off the guest's clock.
    fn in_training<T>(&mut self, work: impl FnOnce(&mut dyn Training) -> host::Result<T>) -> HostResult<T> {
        let (entered, held) = (Instant::now(), held_by_thread());
        let result = work(self.training()?);
        self.memory.leave_host(held);
        self.clock.leave_host(entered);
        Ok(result?)
    }

    /// Work of a model, with a gradient where the guest wants one.
    fn in_model<T>(&mut self, work: impl FnOnce(&mut dyn Training) -> host::Result<T>) -> HostResult<T> {
        if self.grad { self.in_training(work) } else { tch::no_grad(|| self.in_training(work)) }
    }

    fn which(&self, handle: &Resource<Model>) -> HostResult<Which> {
        Ok(self.models.get(handle).ok_or_else(unknown_handle)?.0)
    }

    /// Numbers of the guest's over all ranks, where all of them are.
    pub(super) fn over_ranks(&mut self, values: Vec<f64>, over: tensors::Over) -> HostResult<Vec<f64>> {
        let over = match over {
            tensors::Over::Local => return Ok(values),
            tensors::Over::Sum => Over::Sum,
            tensors::Over::Mean => Over::Mean,
            tensors::Over::Max => Over::Max,
        };
        if self.turn.as_ref().is_some_and(|turn| turn.batch.is_some() && !turn.all_taken) {
            let message = "numbers are read over all ranks between batches, of which each rank has its own number";
            return Err(HostError::guest(types::Code::Collective, message)
                .hint("add up in a tensor, and read it after the last batch; or read this rank's with `local`"));
        }
        if self.training.is_none() {
            let message = "a loss has no other ranks: the run adds up what it gives";
            return Err(HostError::guest(types::Code::Collective, message).hint("read this rank's with `local`"));
        }
        self.in_training(|training| training.over_ranks(&values, over))
    }

    /// The step in progress, if `handle` is it.
    fn turn(&mut self, handle: &Resource<Step>) -> HostResult<&mut Turn> {
        let number = self.steps.get(handle).ok_or_else(unknown_handle)?.turn;
        match &mut self.turn {
            Some(turn) if turn.number == number => Ok(turn),
            _ => Err(HostError::guest(types::Code::Invalid, "this step is finished")
                .hint("take the next one with `run.next_step()`")),
        }
    }

    /// The key of a micro-batch of the step in progress.
    fn batch_key(&self, handle: &Resource<Batch>) -> HostResult<u64> {
        let batch = self.batches.get(handle).ok_or_else(unknown_handle)?;
        match &self.turn {
            Some(turn) if turn.number == batch.turn => {
                let newest = turn.batch.is_some_and(|newest| newest.index == batch.info.index);
                if newest && turn.waiting.is_none() && !turn.all_taken {
                    return Ok(batch.info.index);
                }
                Err(HostError::guest(types::Code::Invalid, "this batch went when the next one was asked for")
                    .hint("finish with a batch before calling `step.next_batch()` again"))
            }
            _ => Err(HostError::guest(types::Code::Invalid, "this batch went with its step, which is finished")
                .hint("use a batch before `step.finish()`")),
        }
    }

    fn batch_info(&mut self, handle: &Resource<Batch>) -> wasmtime::Result<BatchInfo> {
        match self.batches.get(handle) {
            Some(batch) => Ok(batch.info),
            None => Err(self.trap(unknown_handle())),
        }
    }
}

/// A second way back through one graph is the guest's mistake, which only torch notices.
fn twice(error: HostError) -> HostError {
    let is_second = |failure: &Failure| match failure {
        Failure::Run(error) => error.causes.iter().any(|cause| cause.contains("through the graph a second time")),
        Failure::Guest(_) => false,
    };
    match error {
        HostError::End(failure) if is_second(&failure) => {
            HostError::guest(types::Code::Invalid, "`backward` went through what led to this sum before")
                .hint("add the sums of a batch up, then call `backward` once")
        }
        error => error,
    }
}

/// A front passed a number that no slot has.
pub(super) fn unknown_handle() -> HostError {
    host::Error::bug("a guest holds a handle that the host does not know").into()
}

impl types::Host for HostState {
    fn log(&mut self, message: String) -> wasmtime::Result<()> {
        self.log.line(&message);
        Ok(())
    }

    fn convert_error(&mut self, error: HostError) -> wasmtime::Result<types::Error> {
        match error {
            HostError::Guest(error) => Ok(error),
            stop => Err(self.trap(stop)),
        }
    }
}

impl training::Host for HostState {
    fn open(&mut self) -> HostResult<Resource<Run>> {
        if self.opened {
            return Err(HostError::guest(types::Code::Invalid, "the run is open already").hint("call `open` once"));
        }
        self.check_handles()?;
        self.opened = true;
        tracing::debug!("the recipe opens its run");
        self.clock.restart();
        Ok(self.runs.insert(Run))
    }
}

impl training::HostRun for HostState {
    fn next_step(&mut self, _run: Resource<Run>) -> HostResult<Option<Resource<Step>>> {
        if self.turn.is_some() {
            return Err(HostError::guest(types::Code::Invalid, "the step before this one is not finished")
                .hint("call `step.finish()` when all its batches are done"));
        }
        if self.complete {
            return Err(HostError::guest(types::Code::Invalid, "the run is complete: there is no further step")
                .hint("return from the recipe when `next_step` gives none"));
        }
        self.check_handles()?;
        if !self.in_training(|training| training.next_step())? {
            self.complete = true;
            return Ok(None);
        }
        self.clock.restart();
        self.turns += 1;
        self.grad = true;
        self.turn =
            Some(Turn { number: self.turns, batch: None, waiting: None, all_taken: false, weighs_nothing: false });
        Ok(Some(self.steps.insert(Step { turn: self.turns })))
    }

    fn model(&mut self, _run: Resource<Run>) -> wasmtime::Result<Resource<Model>> {
        self.check_handles().map_err(|error| self.trap(error))?;
        Ok(self.models.insert(Model(Which::Trained)))
    }

    fn reference(&mut self, _run: Resource<Run>) -> HostResult<Resource<Model>> {
        self.check_handles()?;
        if !self.training()?.has(Which::Reference) {
            return Err(HostError::guest(types::Code::Missing, "the config names no reference to compare with")
                .hint("give `ref_checkpointer`: without adapters to leave out, the reference is a second model"));
        }
        Ok(self.models.insert(Model(Which::Reference)))
    }

    fn teacher(&mut self, _run: Resource<Run>) -> HostResult<Resource<Model>> {
        self.check_handles()?;
        if !self.training()?.has(Which::Teacher) {
            return Err(HostError::guest(types::Code::Missing, "the config names no model to learn from")
                .hint("give `teacher_model` and `teacher_checkpointer`"));
        }
        Ok(self.models.insert(Model(Which::Teacher)))
    }

    fn config(&mut self, _run: Resource<Run>, key: String) -> HostResult<types::Value> {
        use serde_json::Value as Json;
        let Some(found) = self.training()?.config(&key) else {
            return Err(HostError::guest(types::Code::Missing, format!("the config has no key `{key}`")));
        };
        value_of(&found).ok_or_else(|| {
            let what = if matches!(found, Json::Array(_)) { "list" } else { "section" };
            HostError::guest(types::Code::Unsupported, format!("config key `{key}` is a {what}, not a single value"))
                .hint(format!("name a key below it, such as `{key}.…`"))
        })
    }

    fn drop(&mut self, run: Resource<Run>) -> wasmtime::Result<()> {
        self.runs.remove(&run);
        Ok(())
    }
}

impl training::HostModel for HostState {
    fn loss(&mut self, model: Resource<Model>, batch: Resource<Batch>) -> HostResult<training::WeightedLoss> {
        let (which, key) = (self.which(&model)?, self.batch_key(&batch)?);
        let (sum, weight) = self.in_model(|training| training.loss(key, which))?;
        if let Some(turn) = &mut self.turn {
            turn.weighs_nothing = weight == 0.0;
        }
        Ok(training::WeightedLoss { sum: self.keep(sum)?, weight })
    }

    fn logits(&mut self, model: Resource<Model>, batch: Resource<Batch>) -> HostResult<Resource<TensorSlot>> {
        let (which, key) = (self.which(&model)?, self.batch_key(&batch)?);
        let logits = self.in_model(|training| training.logits(key, which))?;
        self.keep(logits)
    }

    fn logits_part(
        &mut self,
        model: Resource<Model>,
        batch: Resource<Batch>,
        start: i64,
        length: i64,
    ) -> HostResult<Resource<TensorSlot>> {
        let (which, key) = (self.which(&model)?, self.batch_key(&batch)?);
        let labels = self.batch_info(&batch).map_or(0, |info| info.num_labels);
        if start < 0 || length < 0 || start.checked_add(length).is_none_or(|end| end > labels) {
            let message = format!("`logits_part`: {length} positions from {start} on, of a batch that has {labels}");
            return Err(HostError::guest(types::Code::Shape, message));
        }
        let logits = self.in_model(|training| training.logits_part(key, which, start, length))?;
        self.keep(logits)
    }

    fn log_probs(&mut self, model: Resource<Model>, batch: Resource<Batch>) -> HostResult<Resource<TensorSlot>> {
        let (which, key) = (self.which(&model)?, self.batch_key(&batch)?);
        let log_probs = self.in_model(|training| training.log_probs(key, which))?;
        self.keep(log_probs)
    }

    fn drop(&mut self, model: Resource<Model>) -> wasmtime::Result<()> {
        self.models.remove(&model);
        Ok(())
    }
}

impl training::HostBatch for HostState {
    fn num_labels(&mut self, batch: Resource<Batch>) -> wasmtime::Result<i64> {
        Ok(self.batch_info(&batch)?.num_labels)
    }

    fn num_tokens(&mut self, batch: Resource<Batch>) -> wasmtime::Result<i64> {
        Ok(self.batch_info(&batch)?.num_tokens)
    }

    fn num_samples(&mut self, batch: Resource<Batch>) -> wasmtime::Result<i64> {
        Ok(self.batch_info(&batch)?.num_samples)
    }

    fn num_pairs(&mut self, batch: Resource<Batch>) -> HostResult<i64> {
        let key = self.batch_key(&batch)?;
        self.in_training(|training| training.num_pairs(key))
    }

    fn segments(&mut self, batch: Resource<Batch>) -> HostResult<Resource<TensorSlot>> {
        let key = self.batch_key(&batch)?;
        let segments = self.in_training(|training| training.segments(key))?;
        self.keep(segments)
    }

    fn labels(&mut self, batch: Resource<Batch>) -> HostResult<Resource<TensorSlot>> {
        let key = self.batch_key(&batch)?;
        let labels = self.in_training(|training| training.labels(key))?;
        self.keep(labels)
    }

    fn drop(&mut self, batch: Resource<Batch>) -> wasmtime::Result<()> {
        self.batches.remove(&batch);
        Ok(())
    }
}

impl training::HostStep for HostState {
    fn next_batch(&mut self, step: Resource<Step>) -> HostResult<Option<Resource<Batch>>> {
        if self.turn(&step)?.all_taken {
            return Ok(None);
        }
        self.check_handles()?;
        let batch = self.pull_batch()?;
        let turn = self.turn(&step)?;
        let number = turn.number;
        match batch {
            None => {
                turn.all_taken = true;
                Ok(None)
            }
            Some(info) => {
                turn.batch = Some(info);
                self.clock.restart();
                Ok(Some(self.batches.insert(Batch { info, turn: number })))
            }
        }
    }

    fn backward(&mut self, step: Resource<Step>, sum: Resource<TensorSlot>, weight: f64) -> HostResult<()> {
        let Some(batch) = self.turn(&step)?.batch else {
            return Err(HostError::guest(types::Code::Invalid, "`backward` came before any batch was taken")
                .hint("take a batch with `step.next_batch()` first"));
        };
        let no_labels = batch.num_labels == 0 || self.turn(&step)?.weighs_nothing;
        if !(weight.is_finite() && (weight > 0.0 || (weight == 0.0 && no_labels))) {
            return Err(HostError::guest(
                types::Code::Invalid,
                format!("the weight of a loss must be a finite number above 0, not {weight}"),
            )
            .hint("pass what the sum is summed over: `batch.num_labels` for a loss over label tokens"));
        }
        let sum = self.tensor(&sum)?;
        let shape = sum.size();
        if shape.iter().product::<i64>() != 1 {
            return Err(HostError::guest(
                types::Code::Shape,
                format!("`backward` takes a sum, a tensor of one element, not one of shape {shape:?}"),
            )
            .hint("call `.sum()` on it"));
        }
        if !sum.requires_grad() {
            // Without labels there is nothing to learn, so a constant zero is a fair sum.
            if weight == 0.0 {
                return Ok(());
            }
            return Err(HostError::guest(
                types::Code::Invalid,
                "the sum has no gradient: no trained value went into it",
            )
            .hint("build it from `model.loss(batch)` or `model.logits(batch)`, without `detach`"));
        }
        let sum = sum.shallow_clone();
        self.in_training(|training| training.backward(&sum, weight)).map_err(twice)?;
        self.count_tensors();
        Ok(())
    }

    fn record_metric(
        &mut self,
        step: Resource<Step>,
        name: String,
        sum: Resource<TensorSlot>,
        weight: f64,
    ) -> HostResult<()> {
        self.turn(&step)?;
        self.check_metric(&name)?;
        if !(weight.is_finite() && weight >= 0.0) {
            let message = format!("the weight of a metric must be a finite number, not below 0, and is {weight}");
            return Err(HostError::guest(types::Code::Invalid, message));
        }
        let sum = self.tensor(&sum)?;
        if sum.numel() != 1 {
            let message = format!("a metric is a sum, a tensor of one element, not one of shape {:?}", sum.size());
            return Err(HostError::guest(types::Code::Shape, message).hint("call `.sum()` on it"));
        }
        let sum = sum.detach();
        self.in_training(|training| training.record_metric(&name, &sum, weight))
    }

    fn finish(&mut self, step: Resource<Step>) -> HostResult<()> {
        if !self.turn(&step)?.all_taken {
            // A guest may stop asking after the last batch; only the run knows whether it was the last.
            if let Some(info) = self.pull_batch()? {
                self.turn(&step)?.waiting = Some(info);
                return Err(HostError::guest(types::Code::Invalid, "the step has batches that were not taken")
                    .hint("take batches until `step.next_batch()` gives none, then finish"));
            }
        }
        let turn = self.turn(&step)?.number;
        self.end_arena(turn);
        self.count_tensors();
        self.turn = None;
        self.in_training(|training| training.finish_step())?;
        self.clock.restart();
        Ok(())
    }

    fn drop(&mut self, step: Resource<Step>) -> wasmtime::Result<()> {
        self.steps.remove(&step);
        Ok(())
    }
}
