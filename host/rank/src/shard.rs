//! A model of which every rank holds a part. The tensors of a *unit* (a block; what comes before the blocks; what comes
//! after) lie end to end, each rank keeps an equal piece of that, and the whole is there only while it is needed: gathered
//! for a block's forward while the block before it computes, given back after, gathered again for its backward. Gradients
//! of trained weights are reduced to the piece that this rank updates.
//!
//! Layers know nothing of it: their weights are views of the unit's memory, which comes and goes under them. Only the order
//! of blocks is told, by [`Sharding::enter`] and [`Sharding::leave`]. Every rank has to run the same forwards and backwards.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use host::hf::ModelConfig;
use host::placement::Placement;
use host::{Error, Result};
use host_ffi::dist::Work;
use host_ffi::{FfiError, shard as memory};
use tch::{Device, Kind, Tensor};

use crate::dist::Group;
use crate::flat::Flat;
use crate::model::Weights;
use crate::torch::TorchContext;

/// Over whom a model is spread, and how.
#[derive(Clone)]
pub struct Spread {
    /// The ranks that share a copy of the model with this one.
    pub group: Rc<Group>,
    /// Those that train the same pieces of the other copies.
    pub copies: Rc<Group>,
    pub placement: Placement,
}

impl Spread {
    /// Over the ranks of `world`; each has to ask. Copies of a frozen model have nothing to tell each other.
    pub fn new(world: &Rc<Group>, placement: Placement, is_trained: bool) -> Result<Self> {
        let shared_by = world.world_size / placement.copies;
        let (copy, place) = (world.rank / shared_by, world.rank % shared_by);
        let group = world.part(&format!("copy {copy}"), (place, shared_by))?;
        let copies = if is_trained { (copy, placement.copies) } else { (0, 1) };
        Ok(Self { group, copies: world.part(&format!("place {place}"), copies)?, placement })
    }
}

pub struct Sharding {
    pub spread: Spread,
    pub shards: Shards,
    units: Vec<Unit>,
    /// By checkpoint name.
    tensors: BTreeMap<String, Tensor>,
    device: Device,
    /// Memory of units that are away, which the next of that size takes: from and to the allocator it would leave holes.
    spare: RefCell<Vec<Tensor>>,
    /// The unit whose gradients are on their way, and where they arrive.
    reducing: RefCell<Option<(usize, Work, Tensor)>>,
    /// Gradients have come that the other copies have not heard of.
    has_news: Cell<bool>,
}

struct Unit {
    /// `[padded size]`; there while `state` says so.
    whole: Tensor,
    /// Gradients of all of it, where it is trained; there while `has_grad`.
    grad: Option<Tensor>,
    /// This rank's piece, and its gradients.
    shard: Tensor,
    shard_grad: Option<Tensor>,
    state: RefCell<State>,
    has_grad: Cell<bool>,
}

enum State {
    Away,
    Coming(Work),
    Here,
}

/// Where every number of a model is: canonical numbers are the tensors end to end, in the order of
/// [`ModelConfig::tensors`]; a unit is a range of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    /// Name, shape, and the first canonical number of each tensor.
    pub tensors: Vec<(String, Vec<i64>, i64)>,
    /// Canonical ranges.
    pub units: Vec<Range<i64>>,
    pub ranks: i64,
}

impl Shards {
    pub fn new(config: &ModelConfig, ranks: usize) -> Self {
        let (mut tensors, mut units) = (vec![], Vec::<(usize, Range<i64>)>::new());
        let mut next = 0;
        for (name, shape) in config.tensors() {
            let (unit, start) = (config.unit(&name), next);
            next += shape.iter().product::<i64>();
            match units.last_mut() {
                Some((last, range)) if *last == unit => range.end = next,
                _ => units.push((unit, start..next)),
            }
            tensors.push((name, shape, start));
        }
        Self { tensors, units: units.into_iter().map(|(_, range)| range).collect(), ranks: ranks as i64 }
    }

    /// Numbers of a unit that one rank keeps; the last rank's piece is filled up.
    pub fn piece(&self, unit: usize) -> i64 {
        let range = &self.units[unit];
        (range.end - range.start + self.ranks - 1) / self.ranks
    }

    /// Numbers that one rank keeps.
    pub fn size(&self) -> i64 {
        (0..self.units.len()).map(|unit| self.piece(unit)).sum()
    }

    /// Numbers in all.
    pub fn total(&self) -> i64 {
        self.units.last().map_or(0, |range| range.end)
    }

    /// The canonical numbers that `rank` keeps: of each unit where they begin in the rank's vector, and which they are.
    pub fn of_rank(&self, rank: i64) -> impl Iterator<Item = (i64, Range<i64>)> {
        let mut place = 0;
        (0..self.units.len()).map(move |unit| {
            let (range, piece, begin) = (&self.units[unit], self.piece(unit), place);
            place += piece;
            let start = (range.start + rank * piece).min(range.end);
            (begin, start..(start + piece).min(range.end))
        })
    }
}

/// What a unit's pieces are: frozen, or views of what is trained.
pub enum Pieces<'a> {
    Frozen,
    Trained(&'a Flat),
}

impl Sharding {
    /// Lays out a model of which this rank holds its piece, and reads that of `weights`. `kind` is what is computed in.
    pub fn new(
        config: &ModelConfig,
        weights: &Weights,
        spread: &Spread,
        pieces: Pieces,
        (kind, device): (Kind, Device),
    ) -> Result<Rc<Self>> {
        let (group, placement) = (&spread.group, spread.placement);
        check(config, group.world_size)?;
        let shards = Shards::new(config, group.world_size);
        let kept_on = if placement.cpu_offload { Device::Cpu } else { device };
        let mut units = vec![];
        let mut tensors = BTreeMap::new();
        for (unit, (begin, _)) in shards.of_rank(group.rank as i64).enumerate() {
            let piece = shards.piece(unit);
            let zeros = |size: i64| Tensor::zeros([size], (kind, device));
            let whole = zeros(piece * shards.ranks);
            let (shard, shard_grad, grad) = match pieces {
                Pieces::Frozen => (Tensor::zeros([piece], (kind, kept_on)), None, None),
                Pieces::Trained(flat) => (
                    flat.numbers.narrow(0, begin, piece),
                    Some(flat.grad.narrow(0, begin, piece)),
                    Some(zeros(piece * shards.ranks)),
                ),
            };
            let range = &shards.units[unit];
            for (name, shape, start) in shards.tensors.iter().filter(|(_, _, start)| range.contains(start)) {
                let view =
                    |flat: &Tensor| flat.narrow(0, start - range.start, shape.iter().product::<i64>()).view(&shape[..]);
                let mut tensor = view(&whole);
                if let Some(grad) = &grad {
                    tensor = tensor.set_requires_grad(true);
                    host_ffi::grad::set_grad(&tensor, &view(grad)).torch("lay out the gradients")?;
                }
                tensors.insert(name.clone(), tensor);
            }
            memory::free_storage(&whole).torch("free a unit")?;
            if let Some(grad) = &grad {
                memory::free_storage(grad).torch("free a unit")?;
            }
            let (state, has_grad) = (RefCell::new(State::Away), Cell::new(false));
            units.push(Unit { whole, grad, shard, shard_grad, state, has_grad });
        }
        let (reducing, spare, has_news) = (RefCell::default(), RefCell::default(), Cell::default());
        let sharding = Self { spread: spread.clone(), shards, units, tensors, device, spare, reducing, has_news };
        sharding.read(weights)?;
        Ok(Rc::new(sharding))
    }

    /// Takes this rank's numbers of a checkpoint, and reads no others.
    pub fn read(&self, weights: &Weights) -> Result<()> {
        let shards = &self.shards;
        for (unit, (_, kept)) in self.units.iter().zip(self.kept()) {
            for (name, shape, start) in &shards.tensors {
                let end = start + shape.iter().product::<i64>();
                let (from, to) = (kept.start.max(*start), kept.end.min(end));
                if from < to {
                    let read = weights.load_range(name, shape, from - start..to - start, unit.whole.kind())?;
                    tch::no_grad(|| unit.shard.narrow(0, from - kept.start, to - from).copy_(&read));
                }
            }
        }
        Ok(())
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub fn tensors(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// The canonical numbers that this rank keeps, as [`Shards::of_rank`] has them.
    pub fn kept(&self) -> impl Iterator<Item = (i64, Range<i64>)> {
        self.shards.of_rank(self.spread.group.rank as i64)
    }

    fn reshards(&self) -> bool {
        self.spread.placement.reshard_after_forward
    }

    fn last(&self) -> usize {
        self.units.len() - 1
    }

    /// What comes before the first block is needed now, what comes after the last soon.
    pub fn begin(&self) -> Result<()> {
        self.gather(0)?;
        self.start_gather(1)?;
        self.take_root_grads()
    }

    /// Block `index` is computed next, from `x`.
    pub fn enter(self: &Rc<Self>, index: usize, x: Tensor) -> Result<Tensor> {
        let unit = index + 1;
        self.gather(unit)?;
        self.start_gather(unit + 1)?;
        // No backward pass will come through it.
        if !x.requires_grad() {
            return Ok(x);
        }
        let sharding = Rc::clone(self);
        self.hook(x, move || sharding.after_backward(unit))
    }

    /// Block `index` has made `y`.
    pub fn leave(self: &Rc<Self>, index: usize, y: Tensor) -> Result<Tensor> {
        let unit = index + 1;
        let is_recorded = y.requires_grad();
        // The last block is the first that backward needs.
        if self.reshards() && !(is_recorded && unit + 1 == self.last()) {
            self.free(unit)?;
        }
        if !is_recorded {
            return Ok(y);
        }
        let sharding = Rc::clone(self);
        self.hook(y, move || sharding.before_backward(unit))
    }

    /// What comes after the last block is needed now.
    pub fn end(&self) -> Result<()> {
        self.gather(self.last())
    }

    fn hook(&self, x: Tensor, step: impl Fn() -> Result<()> + 'static) -> Result<Tensor> {
        let passed_on = move |grad: &Tensor| {
            step().map_err(|error| FfiError(error.to_string()))?;
            Ok(Some(grad.shallow_clone()))
        };
        memory::node(&x, &x, passed_on).torch("hook into the backward pass")
    }

    fn before_backward(&self, unit: usize) -> Result<()> {
        self.gather(unit)?;
        self.take_grad(unit)?;
        if unit > 1 { self.start_gather(unit - 1) } else { Ok(()) }
    }

    fn after_backward(&self, unit: usize) -> Result<()> {
        if self.reshards() {
            self.free(unit)?;
            self.start_reduce(unit)?;
        }
        Ok(())
    }

    /// A micro-batch is done: nothing of it is needed any more.
    pub fn end_batch(&self) -> Result<()> {
        if self.reshards() { self.release() } else { Ok(()) }
    }

    /// A step's gradients are complete: afterwards the pieces hold their sums over all ranks, and what was gathered, which
    /// is about to change, is given back.
    pub fn end_step(&self) -> Result<()> {
        self.release()?;
        let is_told = !self.has_news.take() || self.spread.copies.world_size == 1;
        for grad in self.units.iter().filter_map(|unit| unit.shard_grad.as_ref()).filter(|_| !is_told) {
            let sum = grad.to_kind(Kind::Float);
            self.spread.copies.all_reduce_sum(&sum)?;
            tch::no_grad(|| grad.shallow_clone().copy_(&sum));
        }
        Ok(())
    }

    /// Reduces what gradients there are and gives everything back.
    fn release(&self) -> Result<()> {
        for unit in (0..self.units.len()).rev() {
            self.start_reduce(unit)?;
        }
        self.finish_reduce()?;
        // Frozen weights that stay between forward and backward stay for good.
        let is_trained = self.units[0].grad.is_some();
        if is_trained || self.reshards() {
            for unit in 0..self.units.len() {
                self.free(unit)?;
            }
        }
        Ok(())
    }

    /// Starts to bring a unit here.
    fn start_gather(&self, index: usize) -> Result<()> {
        let unit = &self.units[index];
        let mut state = unit.state.borrow_mut();
        if let State::Away = *state {
            self.take(&unit.whole)?;
            let shard = unit.shard.detach().to_device(self.device).to_kind(unit.whole.kind());
            *state = State::Coming(self.spread.group.all_gather_into(&unit.whole, &shard)?);
        }
        Ok(())
    }

    /// Waits until a unit is here.
    fn gather(&self, index: usize) -> Result<()> {
        self.start_gather(index)?;
        let mut state = self.units[index].state.borrow_mut();
        if let State::Coming(work) = std::mem::replace(&mut *state, State::Here) {
            self.spread.group.wait(work)?;
        }
        Ok(())
    }

    fn free(&self, index: usize) -> Result<()> {
        let unit = &self.units[index];
        let before = unit.state.replace(State::Away);
        match before {
            State::Away => return Ok(()),
            State::Coming(work) => self.spread.group.wait(work)?,
            State::Here => {}
        }
        self.give_back(&unit.whole)
    }

    /// Memory for a tensor of a unit.
    fn take(&self, tensor: &Tensor) -> Result<()> {
        let mut spare = self.spare.borrow_mut();
        match spare.iter().position(|spare| spare.numel() == tensor.numel() && spare.kind() == tensor.kind()) {
            Some(index) => memory::swap_storage(&spare.swap_remove(index), tensor).torch("take memory for a block"),
            None => memory::take_storage(tensor).torch("take memory for a block"),
        }
    }

    /// On a GPU libtorch's allocator keeps what is given back, and knows which streams still read it.
    fn give_back(&self, tensor: &Tensor) -> Result<()> {
        if self.device != Device::Cpu {
            return memory::free_storage(tensor).torch("free a block");
        }
        let spare = Tensor::empty(tensor.size(), (tensor.kind(), self.device));
        memory::free_storage(&spare).torch("free a block")?;
        memory::swap_storage(tensor, &spare).torch("free a block")?;
        self.spare.borrow_mut().push(spare);
        Ok(())
    }

    /// Memory for the gradients of what is outside of the blocks, which backward reaches before any hook.
    fn take_root_grads(&self) -> Result<()> {
        if host_ffi::grad::is_enabled() {
            self.take_grad(0)?;
            self.take_grad(self.last())?;
        }
        Ok(())
    }

    fn take_grad(&self, index: usize) -> Result<()> {
        let unit = &self.units[index];
        if let Some(grad) = &unit.grad
            && !unit.has_grad.replace(true)
        {
            self.take(grad)?;
            tch::no_grad(|| drop(grad.detach().zero_()));
        }
        Ok(())
    }

    /// Starts to add up a unit's gradients over the ranks, where there are some.
    fn start_reduce(&self, index: usize) -> Result<()> {
        self.finish_reduce()?;
        let unit = &self.units[index];
        let Some(grad) = unit.grad.as_ref().filter(|_| unit.has_grad.get()) else { return Ok(()) };
        let sum = Tensor::empty([unit.shard.size()[0]], (grad.kind(), grad.device()));
        let work = self.spread.group.reduce_scatter_sum(&sum, grad)?;
        *self.reducing.borrow_mut() = Some((index, work, sum));
        Ok(())
    }

    fn finish_reduce(&self) -> Result<()> {
        let Some((index, work, sum)) = self.reducing.take() else { return Ok(()) };
        self.spread.group.wait(work)?;
        let unit = &self.units[index];
        if let (Some(total), Some(grad)) = (&unit.shard_grad, &unit.grad) {
            let sum = sum.to_device(total.device()).to_kind(total.kind());
            tch::no_grad(|| drop(total.shallow_clone().g_add_(&sum)));
            unit.has_grad.set(false);
            self.has_news.set(true);
            self.give_back(grad)?;
        }
        Ok(())
    }
}

/// Whether every rank gets something of every unit.
fn check(config: &ModelConfig, ranks: usize) -> Result<()> {
    let smallest = Shards::new(config, ranks).units.iter().map(|unit| unit.end - unit.start).min().unwrap_or(0);
    if smallest >= ranks as i64 {
        return Ok(());
    }
    Err(Error::config(format!("{ranks} ranks cannot share {smallest} numbers"))
        .hint("start fewer ranks, or set `parallel: replicate`"))
}
