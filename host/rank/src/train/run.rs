//! One run: what a recipe's calls do. Every rank makes the same calls; what differs is which samples it holds.

mod save;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use host::config::plan::{ClipPlan, TrainPlan};
use host::config::registry::keys;
use host::data::{BatchLayout, MicroBatch, Order, Tokenized};
use host::error::quoted;
use host::worker::StopFlag;
use host::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{Position, Writer};
use crate::dist::{self, Group};
use crate::metrics::{self, Curve, Progress, Recorder, StepMetrics};
use crate::model::Llama;
use crate::optim::{AdamW, Schedule};
use crate::shard::{Sharding, Spread};
use crate::torch::TorchContext;
use crate::train::batch::{DeviceBatch, DropoutSeed, Which};
use crate::train::evaluate::Validation;
use crate::train::lockstep::{self, Apart, Arrival, Call, Met, Place, Waiting, Work};
use crate::train::step::{Hidden, Metrics, StepState, Sums, Totals};
use crate::trained::Trained;

/// Everything a run is made of; [`Run::open`] gathers it.
pub struct Parts {
    pub plan: TrainPlan,
    /// The resolved config as values, for recipes that ask.
    pub config: serde_json::Value,
    pub group: Rc<Group>,
    /// Where ranks share the models.
    pub spread: Option<Spread>,
    pub device: Device,
    pub model: Llama,
    /// Frozen ones beside it.
    pub others: Others,
    pub trained: Trained,
    pub optimizer: AdamW,
    pub schedule: Schedule,
    pub data: Tokenized,
    pub validation: Option<Validation>,
    pub order: Order,
    pub layout: BatchLayout,
    pub position: Position,
    pub steps_per_epoch: usize,
    pub writer: Writer,
    /// On rank 0.
    pub recorder: Option<Recorder>,
    pub curve: Curve,
    /// In place of cross-entropy.
    pub loss: Option<RefCell<Box<dyn Loss>>>,
    pub stop: StopFlag,
}

/// Models that are not trained.
#[derive(Default)]
pub struct Others {
    /// In place of the trained one without its adapters; a model that is trained as a whole has no other.
    pub reference: Option<Llama>,
    pub teacher: Option<Llama>,
}

/// Whose numbers of a recipe's tensors are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    Local,
    Sum,
    Mean,
    Max,
}

impl Over {
    pub const ALL: [Self; 4] = [Self::Local, Self::Sum, Self::Mean, Self::Max];

    /// As a recipe says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Sum => "sum",
            Self::Mean => "mean",
            Self::Max => "max",
        }
    }
}

/// A loss of somebody's own.
pub trait Loss {
    /// From scores `[L, V]` in fp32 and target tokens `[L]`, `L` above 0: a scalar sum, and its weight, finite and not below 0.
    fn compute(&mut self, logits: &Tensor, labels: &Tensor) -> Result<(Tensor, f64)>;
}

impl Parts {
    /// Models that ranks share.
    fn sharded(&self) -> impl Iterator<Item = &Rc<Sharding>> {
        let Others { reference, teacher } = &self.others;
        [Some(&self.model), reference.as_ref(), teacher.as_ref()]
            .into_iter()
            .flatten()
            .filter_map(|model| model.sharding.as_ref())
    }

    /// Of all ranks, and of parts of them.
    fn groups(&self) -> impl Iterator<Item = &Rc<Group>> {
        let parts = self.spread.iter().flat_map(|spread| [&spread.group, &spread.copies]);
        std::iter::once(&self.group).chain(parts)
    }

    /// Nothing of the micro-batch is needed any more.
    pub(super) fn end_batch(&self) -> Result<()> {
        self.sharded().try_for_each(|sharding| sharding.end_batch())
    }

    fn epoch_order(&self) -> Vec<u32> {
        let mut order = self.order.epoch(self.position.epoch);
        let more = rows_of_epoch(&self.plan, order.len(), self.group.world_size) - order.len();
        order.extend_from_within(..more);
        order
    }
}

/// Rows that an epoch goes through. torchtune gives every rank as many, and takes the first ones again for it.
pub fn rows_of_epoch(plan: &TrainPlan, num_rows: usize, world_size: usize) -> usize {
    let is_padded = plan.compat_torchtune && num_rows >= world_size;
    if is_padded { num_rows.next_multiple_of(world_size) } else { num_rows }
}

pub struct Run {
    pub(super) parts: Parts,
    /// Row numbers of the current epoch, in the order all ranks share.
    epoch_order: Vec<u32>,
    step: Option<StepState>,
    /// Names of metrics that a recipe gave, as all ranks know them.
    metric_names: Vec<String>,
    /// Keys for the recipe that it asked for.
    asked: RefCell<BTreeSet<&'static str>>,
    progress: Option<Progress>,
    /// Set, to the steps done, when the ranks agreed to stop before the last one.
    interruption: Rc<Cell<Option<usize>>>,
    waiting: Waiting,
    /// Why this rank cannot go on; the others hear of it at the next call.
    failure: Option<Error>,
    /// Set when the recipe went another way on another rank.
    apart: Option<Apart>,
}

impl Run {
    pub(super) fn start(parts: Parts) -> Result<Self> {
        let epoch_order = parts.epoch_order();
        let mut run = Self {
            parts,
            epoch_order,
            step: None,
            metric_names: vec![],
            asked: RefCell::default(),
            progress: None,
            interruption: Rc::default(),
            waiting: Waiting::default(),
            failure: None,
            apart: None,
        };
        if run.parts.position.step == 0 {
            run.validate()?;
        }
        run.begin_progress();
        Ok(run)
    }

    /// Tells, once the run has ended, after how many steps a signal stopped it.
    pub fn interruption(&self) -> Rc<Cell<Option<usize>>> {
        Rc::clone(&self.interruption)
    }

    pub fn plan(&self) -> &TrainPlan {
        &self.parts.plan
    }

    /// Where the model is.
    pub fn device(&self) -> Device {
        self.parts.device
    }

    /// Optimizer steps done.
    pub fn steps_done(&self) -> usize {
        self.parts.position.step
    }

    /// A key of the resolved config by dotted path.
    pub fn config(&self, key: &str) -> Option<serde_json::Value> {
        self.ask(key.split('.').next().unwrap_or(key));
        key.split('.').try_fold(&self.parts.config, |value, name| value.get(name)).cloned()
    }

    /// Remembers that the recipe wanted a key that is there for it.
    fn ask(&self, key: &str) {
        if let Some(key) = keys::FOR_RECIPES.iter().find(|known| **known == key) {
            self.asked.borrow_mut().insert(key);
        }
    }

    /// Whether there is such a model; a recipe that asks means to use it.
    pub fn has(&self, which: Which) -> bool {
        match which {
            Which::Trained => true,
            Which::Reference => {
                self.ask("ref_checkpointer");
                self.parts.others.reference.is_some() || self.parts.trained.lora().is_some()
            }
            Which::Teacher => {
                self.ask("teacher_model");
                self.ask("teacher_checkpointer");
                self.parts.others.teacher.is_some()
            }
        }
    }

    fn model(&self, which: Which) -> &Llama {
        let Others { reference, teacher } = &self.parts.others;
        let other = match which {
            Which::Trained => None,
            Which::Reference => reference.as_ref(),
            Which::Teacher => teacher.as_ref(),
        };
        other.unwrap_or(&self.parts.model)
    }

    /// Runs a forward: without gradient where the model is not the trained one.
    fn forward<T>(&self, which: Which, work: impl FnOnce(&Llama) -> T) -> T {
        let model = self.model(which);
        if which == Which::Trained { work(model) } else { tch::no_grad(|| work(model)) }
    }

    /// The numbers that are trained, flat; of a model that ranks share this rank's pieces.
    pub fn parameters(&self) -> Tensor {
        self.parts.trained.flat().numbers.detach()
    }

    /// Ends the step's last batch, after which its gradients are complete.
    pub fn end_batches(&mut self) -> Result<()> {
        self.step.as_mut().ok_or_else(no_step)?.close_batch()?;
        self.parts.sharded().try_for_each(|sharding| sharding.end_step())
    }

    /// How ranks share what is trained, where they do.
    pub fn sharding(&self) -> Option<&Sharding> {
        self.parts.trained.sharding().map(Rc::as_ref)
    }

    /// Gradients of the step under way, whose batches are done: by parameter, summed on this rank and not yet divided; or,
    /// where ranks share what is trained, of this rank's pieces, summed over all ranks.
    pub fn gradients(&self) -> Vec<(String, Tensor)> {
        if self.sharding().is_some() {
            return vec![("pieces".to_owned(), self.parts.trained.flat().grad.shallow_clone())];
        }
        self.parts.trained.parameters().into_iter().map(|(name, parameter)| (name, parameter.grad())).collect()
    }

    pub fn rank(&self) -> usize {
        self.parts.group.rank
    }

    /// Begins the next step; `false` when the run is complete or was asked to stop.
    pub fn next_step(&mut self) -> Result<bool> {
        if self.step.is_some() {
            return Err(Error::run("a step was begun before the last one was finished")
                .hint("call `step.finish()` at the end of each step"));
        }
        if self.interruption.get().is_some() || self.is_complete() {
            return Ok(false);
        }
        self.parts.groups().for_each(|group| group.set_step(self.parts.position.step + 1));
        let started = Instant::now();
        let waiting = VecDeque::from(self.microbatches());
        let sums = Sums::zero(self.parts.device);
        self.step = Some(StepState {
            waiting,
            current: None,
            next_key: 0,
            hidden: vec![],
            metrics: Metrics::default(),
            sums,
            losses: vec![],
            started,
        });
        Ok(true)
    }

    fn is_complete(&self) -> bool {
        self.parts.position.epoch >= self.parts.plan.epochs
    }

    /// This rank's part of the current step's samples.
    fn microbatches(&self) -> Vec<MicroBatch> {
        let parts = &self.parts;
        let first = parts.position.step_in_epoch * parts.position.samples_per_step;
        let samples = &self.epoch_order[first..first + parts.position.samples_per_step];
        host::data::microbatches(&parts.data, samples, &parts.layout, parts.group.rank, parts.group.world_size)
    }

    /// The next micro-batch of this step on this rank, under a key that names it until the next is taken.
    pub fn next_batch(&mut self) -> Result<Option<(u64, &DeviceBatch)>> {
        let dropout = self.dropout();
        let device = self.parts.device;
        let step = self.step.as_mut().ok_or_else(no_step)?;
        step.close_batch()?;
        self.parts.end_batch()?;
        let Some(batch) = step.waiting.pop_front() else {
            step.current = None;
            return Ok(None);
        };
        step.sums.count(&batch);
        step.next_key += 1;
        let current = step.current.insert((step.next_key, DeviceBatch::new(&batch, device, dropout)?));
        Ok(Some((current.0, &current.1)))
    }

    fn dropout(&self) -> Option<DropoutSeed> {
        let position = &self.parts.position;
        let dropout = self.parts.trained.lora().map_or(0.0, |adapter| adapter.plan.dropout);
        (dropout > 0.0).then_some(DropoutSeed { seed: position.seed, step: position.step })
    }

    fn batch(&self, key: u64) -> Result<&DeviceBatch> {
        let current = self.step.as_ref().ok_or_else(no_step)?.current.as_ref();
        current.filter(|(name, _)| *name == key).map(|(_, batch)| batch).ok_or_else(|| {
            Error::run("a batch was used after the next one was taken")
                .hint("use each batch before asking for the next")
        })
    }

    /// Target tokens of a batch, `[L]`.
    pub fn labels(&self, key: u64) -> Result<Tensor> {
        Ok(self.batch(key)?.labels.shallow_clone())
    }

    /// Which of the batch's samples each label is of, `[L]`.
    pub fn segments(&self, key: u64) -> Result<Tensor> {
        self.batch(key)?.segments()
    }

    /// Pairs of a chosen and a rejected answer.
    pub fn num_pairs(&self, key: u64) -> Result<i64> {
        if !self.parts.data.is_paired() {
            return Err(Error::config("the recipe trains on preferences, and the data set has none")
                .hint("take `dataset._component_: preference_dataset`, or another recipe"));
        }
        Ok(self.batch(key)?.samples.len() as i64 / 2)
    }

    /// The loss of a batch as a sum, and what it is a sum over: cross-entropy over its label tokens, or a guest's.
    pub fn loss(&self, key: u64, which: Which) -> Result<(Tensor, f64)> {
        if let Some(name) = &self.parts.plan.loss.of_recipe {
            return Err(Error::config(format!(
                "the recipe asks for the loss of the config, and `{name}` is none of a model"
            ))
            .hint("take a recipe that computes it, such as `lora_dpo_distributed`, or another `loss`"));
        }
        if self.parts.data.is_paired() {
            return Err(Error::config(
                "the recipe learns every answer, and the data set has pairs of a better and a worse one",
            )
            .hint("take a recipe for preferences, such as `lora_dpo_distributed`, or another data set"));
        }
        self.loss_of(self.batch(key)?, which)
    }

    pub(super) fn loss_of(&self, batch: &DeviceBatch, which: Which) -> Result<(Tensor, f64)> {
        match &self.parts.loss {
            Some(loss) if batch.num_labels > 0 => {
                let logits = self.forward(which, |model| batch.logits(model, which))?;
                let made = loss.borrow_mut().compute(&logits, &batch.labels);
                made.map_err(|error| error.cause(format!("it was at step {}", self.parts.position.step + 1)))
            }
            _ => {
                let rows = self.chunk_rows(batch.num_labels);
                let sum = self.forward(which, |model| batch.loss_sum(model, which, rows))?;
                Ok((sum, batch.num_labels as f64))
            }
        }
    }

    fn chunk_rows(&self, labels: i64) -> i64 {
        /// Scores of this many rows are in memory at once: 100 MB at a vocabulary of 49,152 in f32.
        const MOST_ROWS: i64 = 512;
        let chunks = self.parts.plan.loss.num_output_chunks.max(1) as i64;
        (labels + chunks - 1).div_euclid(chunks).clamp(1, MOST_ROWS)
    }

    /// Scores of a batch at its label positions, f32 `[L, V]`.
    pub fn logits(&self, key: u64, which: Which) -> Result<Tensor> {
        let batch = self.batch(key)?;
        self.forward(which, |model| batch.logits(model, which))
    }

    /// Scores at some of the label positions, f32 `[length, V]`. What they are computed from stays until the batch is done, and
    /// then takes their gradients back through the model.
    pub fn logits_part(&mut self, key: u64, which: Which, start: i64, length: i64) -> Result<Tensor> {
        let batch = self.batch(key)?;
        let step = self.step.as_ref().ok_or_else(no_step)?;
        let leaf = match step.hidden.iter().find(|hidden| hidden.which == which) {
            Some(kept) => kept.leaf.shallow_clone(),
            None => {
                let new = Hidden::new(which, self.forward(which, |model| batch.hidden(model, which))?);
                let leaf = new.leaf.shallow_clone();
                self.step.as_mut().ok_or_else(no_step)?.hidden.push(new);
                leaf
            }
        };
        let batch = self.batch(key)?;
        self.forward(which, |model| batch.logits_of(model, which, &leaf, start, length))
    }

    /// Log-probability of each label, f32 `[L]`.
    pub fn log_probs(&self, key: u64, which: Which) -> Result<Tensor> {
        let batch = self.batch(key)?;
        let rows = self.chunk_rows(batch.num_labels);
        self.forward(which, |model| batch.log_probs(model, which, rows))
    }

    /// Adds to a metric of the step.
    pub fn record_metric(&mut self, name: &str, sum: &Tensor, weight: f64) -> Result<()> {
        self.step.as_mut().ok_or_else(no_step)?.metrics.add(name, sum, weight);
        Ok(())
    }

    /// `values` over all ranks, each of which has to ask.
    pub fn over_ranks(&mut self, values: &[f64], over: Over) -> Result<Vec<f64>> {
        self.meet(Call::Read { over, numbers: values.len() })?;
        // Gathered, so that every rank adds in the same order.
        if values.is_empty() {
            return Ok(vec![]);
        }
        let bits: Vec<i64> = values.iter().map(|value| value.to_bits() as i64).collect();
        let ranks = self.parts.group.gather(&bits)?;
        let of = |index: usize| ranks.iter().map(move |rank| f64::from_bits(rank[index] as u64));
        Ok((0..values.len())
            .map(|index| match over {
                Over::Local => values[index],
                Over::Sum => of(index).sum(),
                Over::Mean => of(index).sum::<f64>() / ranks.len() as f64,
                Over::Max => largest(of(index)),
            })
            .collect())
    }

    /// Tells the other ranks what the recipe wants next; fails where it wants something else of them.
    fn meet(&mut self, call: Call) -> Result<Vec<Arrival>> {
        let written = self.parts.writer.poll();
        self.hear(written);
        let is_saving = !self.parts.group.is_main() && self.parts.writer.is_under_way();
        let (step, has_failed) = (self.parts.position.step, self.failure.is_some());
        let seconds = self.step.as_ref().map_or(0.0, |step| step.started.elapsed().as_secs_f64());
        let mine = Arrival { call, step, in_step: self.step.is_some(), seconds, is_saving, has_failed };
        let met = lockstep::meet(&self.parts.group, mine);
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        match met? {
            Met::Together(ranks) => {
                if !ranks.iter().any(|rank| rank.is_saving) {
                    self.parts.writer.all_pieces_written();
                }
                Ok(ranks)
            }
            Met::Apart(apart) => {
                self.apart = Some(apart);
                Err(Error::run("the recipe did not do the same on all ranks"))
            }
        }
    }

    /// Tells the other ranks that the recipe wants `work` of a model, where that is work of all of them.
    pub fn compute(&mut self, work: Work, which: Which) -> Result<()> {
        let is_shared = self.parts.sharded().next().is_some();
        // Of parts of the scores only the first one runs the model.
        let is_known = |step: &StepState| step.hidden.iter().any(|hidden| hidden.which == which);
        let is_done = work == Work::LogitsPart && self.step.as_ref().is_some_and(is_known);
        if is_shared && !is_done { self.meet(Call::Compute { work, which }).map(drop) } else { Ok(()) }
    }

    /// Tells the other ranks that the recipe has returned; what it has saved is whole then.
    pub fn leave(&mut self) -> Result<()> {
        self.meet(Call::Leave)?;
        self.settle_save()
    }

    /// What a failure of the run is to say: of ranks that went apart, where each of them is.
    pub fn explain(&mut self, error: Error, place: &Place) -> Error {
        self.apart.take().map_or(error, |apart| apart.error(&self.parts.group, place))
    }

    /// Adds the gradient of `sum` to the step and `weight` to its divisor.
    pub fn backward(&mut self, sum: &Tensor, weight: f64) -> Result<()> {
        let step = self.step.as_mut().ok_or_else(no_step)?;
        step.sums.add_loss(sum, weight);
        let samples = step.current.as_ref().map(|(_, batch)| batch.samples.clone());
        step.losses.push((samples.unwrap_or_default(), sum.detach()));
        // Nothing to learn from a batch without labels; its sum has no graph.
        if sum.requires_grad() {
            host_ffi::grad::backward(sum).torch("compute gradients")?;
        }
        Ok(())
    }

    /// Ends the step: reduce, scale, clip, update, schedule; then metrics, validation, checkpoint as the plan says.
    pub fn finish_step(&mut self) -> Result<()> {
        self.check_asked()?;
        let waiting = self.step.as_ref().ok_or_else(no_step)?.waiting.len();
        if waiting > 0 {
            return Err(Error::run(format!("the step was finished with {waiting} of its batches not taken"))
                .hint("take every batch: `for batch in step.batches()`"));
        }
        let rate = self.parts.schedule.at(self.parts.position.step);
        let ranks = self.meet(Call::FinishStep { rate })?;
        self.waiting.add(ranks.iter().map(|rank| rank.seconds));
        self.end_batches()?;
        let step = self.step.take().ok_or_else(no_step)?;
        let new_metrics = step.metrics.new_names(&self.metric_names).len() as f64;
        let totals = self.reduce(&step.sums, new_metrics)?;
        let loss = totals.mean_loss();
        if !loss.is_finite() {
            let is_number = |(_, sum): &&(Vec<u32>, Tensor)| {
                sum.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]).is_finite()
            };
            let what = format!("the loss of step {} is {loss}", self.parts.position.step + 1);
            let Some((samples, _)) = step.losses.iter().find(|batch| !is_number(batch)) else {
                return Err(dist::stopped(format!("{what} on another rank")));
            };
            let samples = samples.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::run(what)
                .cause(format!("it became so in the batch of samples {samples} of the data set, counted from 0"))
                .hint("lower `optimizer.lr`, or train in `dtype: fp32`; the newest checkpoint is untouched"));
        }
        self.update(totals.grad_norm)?;
        let parts = &mut self.parts;
        parts.position.step += 1;
        parts.position.step_in_epoch += 1;
        let own = step.metrics.reduce(
            &mut self.metric_names,
            totals.new_metrics > 0.0,
            &self.parts.group,
            self.parts.device,
        )?;
        self.report(&totals, step.started.elapsed(), own)?;
        self.after_step(totals.stops > 0.0)
    }

    /// Whether the recipe asked for every key that is there for recipes alone.
    fn check_asked(&self) -> Result<()> {
        let plan = &self.parts.plan;
        let asked = self.asked.borrow();
        let unasked: Vec<&String> = plan.for_recipe.iter().filter(|key| !asked.contains(key.as_str())).collect();
        if unasked.is_empty() {
            return Ok(());
        }
        let what = format!("the recipe `{}` never asked for {}", plan.recipe.path.display(), quoted(unasked));
        Err(Error::config(what)
            .at_file(&plan.config_path)
            .hint("that belongs to another method: leave it out, or run its recipe"))
    }

    /// One all-reduce for each piece of the gradients; the sums travel with the first.
    fn reduce(&mut self, sums: &Sums, new_metrics: f64) -> Result<Totals> {
        const SCALARS: i64 = 9;
        let parts = &mut self.parts;
        let stop = f64::from(u8::from(parts.stop.is_set()));
        // Pieces of a model that ranks share are summed over them already, and each copy has them all.
        let sharding = parts.trained.sharding();
        let is_shared = sharding.is_some();
        let square = sharding.map_or(0.0, |sharding| {
            parts.trained.flat().grad_norm().powi(2) / sharding.spread.copies.world_size as f64
        });
        let scalars = [
            sums.weight,
            sums.tokens,
            sums.padded_tokens,
            sums.labels,
            metrics::peak_rss_mb(),
            stop,
            new_metrics,
            square,
        ]
        .map(|x| x as f32);
        let tail = Tensor::cat(
            &[
                sums.loss.to_kind(Kind::Float).view([1]).to_device(parts.device),
                Tensor::from_slice(&scalars).to_device(parts.device),
            ],
            0,
        );
        let mut pieces = parts.trained.flat().grad_pieces();
        let first = &mut pieces[0];
        let size = if is_shared { 0 } else { first.size()[0] };
        let sent = Tensor::cat(&[first.narrow(0, 0, size).to_kind(Kind::Float), tail], 0);
        parts.group.all_reduce_sum(&sent)?;
        let numbers: Vec<f64> =
            Vec::try_from(sent.narrow(0, size, SCALARS).to_kind(Kind::Double).to_device(Device::Cpu))
                .torch("read the step's sums")?;
        parts.groups().try_for_each(|group| group.check())?;
        let [loss, weight, tokens, padded_tokens, labels, peak_rss_mb, stops, new_metrics, square] = numbers[..] else {
            return Err(Error::bug("the reduced sums have another length"));
        };
        let divisor = if weight > 0.0 { weight } else { 1.0 };
        if size > 0 {
            first.copy_(&(sent.narrow(0, 0, size) / divisor));
        }
        for piece in pieces.iter_mut().skip(usize::from(size > 0)) {
            let sent = piece.to_kind(Kind::Float);
            if !is_shared {
                parts.group.all_reduce_sum(&sent)?;
            }
            piece.copy_(&(sent / divisor));
        }
        let grad_norm = if is_shared { square.sqrt() / divisor } else { parts.trained.flat().grad_norm() };
        Ok(Totals { loss, weight, tokens, padded_tokens, labels, peak_rss_mb, stops, new_metrics, grad_norm })
    }

    /// Clips and applies the gradients, which have this `norm`.
    fn update(&mut self, norm: f64) -> Result<()> {
        let parts = &mut self.parts;
        let flat = parts.trained.flat();
        let mut grad = flat.grad.shallow_clone();
        if !norm.is_finite() {
            return Err(Error::run(format!("the gradient norm of step {} is {norm}", parts.position.step + 1))
                .hint("lower `optimizer.lr`, or train in `dtype: fp32`; the newest checkpoint is untouched"));
        }
        if let Some(ClipPlan::MaxNorm(max)) = parts.plan.clip_grad_norm {
            // torch.nn.utils.clip_grad_norm_: the epsilon keeps a zero norm from dividing by zero.
            let factor = (max / (norm + 1e-6)).min(1.0);
            let _ = grad.g_mul_scalar_(factor);
        }
        let lr = parts.schedule.at(parts.position.step);
        let places: Vec<_> = match parts.trained.sharding() {
            Some(sharding) => sharding.kept().collect(),
            None => vec![(0, 0..flat.size())],
        };
        tch::no_grad(|| parts.optimizer.step(flat, &places, lr))?;
        let _ = grad.zero_();
        Ok(())
    }

    fn report(&mut self, totals: &Totals, took: Duration, own: Vec<(String, f64)>) -> Result<()> {
        let parts = &mut self.parts;
        let step = parts.position.step;
        // One that stands there twice has given its count the first time.
        let bytes_received: u64 = parts.groups().map(|group| group.take_bytes_received()).sum();
        let loss = totals.mean_loss();
        parts.curve.push_training(step, loss);
        if let Some(progress) = &self.progress {
            progress.step(parts.position.epoch, step, loss, took);
        }
        let Some(recorder) = &mut parts.recorder else { return Ok(()) };
        if !step.is_multiple_of(parts.plan.metrics.log_every_n_steps) {
            return Ok(());
        }
        let seconds = took.as_secs_f64();
        let mut metrics = StepMetrics::default();
        metrics.push("loss", loss);
        // The rate of the step to come, as torchtune logs it.
        metrics.push("lr", parts.schedule.at(step));
        for (name, mean) in own {
            metrics.push(&name, mean);
        }
        metrics.push("tokens_per_second_per_gpu", totals.labels / seconds / parts.group.world_size as f64);
        metrics.push("tokens_per_second", totals.tokens / seconds);
        metrics.push("grad_norm", totals.grad_norm);
        metrics.push("label_tokens", totals.labels);
        metrics.push("real_tokens", totals.tokens);
        metrics.push("padded_tokens", totals.padded_tokens);
        metrics.push("bytes_received", bytes_received as f64);
        metrics.push("seconds", seconds);
        metrics.push("peak_rss_mb", totals.peak_rss_mb);
        if parts.plan.metrics.log_peak_memory_stats {
            push_memory(&mut metrics, parts.device)?;
        }
        recorder.record(step, &metrics)
    }

    /// Validation, the epoch's turn, checkpoints, and the agreed stop.
    fn after_step(&mut self, stop: bool) -> Result<()> {
        let parts = &mut self.parts;
        let step = parts.position.step;
        let epoch_ends = parts.position.step_in_epoch >= parts.steps_per_epoch;
        let epoch = parts.position.epoch;
        if epoch_ends {
            parts.position.epoch += 1;
            parts.position.step_in_epoch = 0;
        }
        let is_due = |every: Option<usize>| every.is_some_and(|every| step.is_multiple_of(every));
        let validate = is_due(parts.plan.run_val_every_n_steps) || self.is_complete();
        let save_step = is_due(self.parts.plan.checkpoint.save_every_n_steps);
        if validate && (!stop || self.is_complete()) {
            self.validate()?;
        }
        if epoch_ends {
            self.save(&format!("epoch_{epoch}"))?;
        } else if save_step || stop {
            self.save(&format!("step_{step}"))?;
        }
        if stop && !self.is_complete() {
            self.end()?;
            self.interruption.set(Some(step));
            return Ok(());
        }
        if epoch_ends {
            self.end_progress();
            if self.is_complete() {
                self.end()?;
            } else {
                self.epoch_order = self.parts.epoch_order();
                self.begin_progress();
            }
        }
        Ok(())
    }

    fn validate(&mut self) -> Result<()> {
        let Some(loss) = self.evaluate()? else { return Ok(()) };
        let step = self.parts.position.step;
        self.parts.curve.push_validation(step, loss);
        if let Some(recorder) = &mut self.parts.recorder {
            let mut metrics = StepMetrics::default();
            metrics.push("val_loss", loss);
            recorder.record(step, &metrics)?;
            metrics::say(self.progress.as_ref(), &format!("validation loss after step {step}: {loss:.4}"));
        }
        Ok(())
    }

    fn begin_progress(&mut self) {
        if self.parts.group.is_main() && !self.is_complete() {
            self.progress = Some(Progress::epoch(self.parts.steps_per_epoch, self.parts.position.step_in_epoch));
        }
    }

    fn end_progress(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}

fn no_step() -> Error {
    Error::run("no step is under way").hint("take one first: `for step in run.steps()`")
}

/// Peak GPU memory since the last report, in GiB as torchtune logs it; a CPU has none.
fn push_memory(metrics: &mut StepMetrics, device: Device) -> Result<()> {
    const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
    if let Some(stats) = host_ffi::backend::memory_stats(device).torch("read the memory statistics")? {
        metrics.push("peak_memory_active", stats.active as f64 / GIB);
        metrics.push("peak_memory_alloc", stats.allocated as f64 / GIB);
        metrics.push("peak_memory_reserved", stats.reserved as f64 / GIB);
        host_ffi::backend::reset_peak(device).torch("reset the memory statistics")?;
    }
    Ok(())
}

/// As in PyTorch a NaN is larger than any number: a maximum that hides it would hide the rank that is broken.
fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, |most, value| if value.is_nan() || value > most { value } else { most })
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn a_nan_of_one_rank_is_the_largest_wherever_it_is() {
        for ranks in [[f64::NAN, 1.0, 2.0], [1.0, f64::NAN, 2.0], [1.0, 2.0, f64::NAN]] {
            assert!(largest(ranks.into_iter()).is_nan(), "{ranks:?}");
        }
        assert_eq!(largest([-3.0, -1.0, f64::NEG_INFINITY].into_iter()), -1.0);
    }
}
