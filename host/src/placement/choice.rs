//! The cheapest placement that fits, or by how much none does and what would.

use serde::Serialize;

use super::memory::Where;
use super::{Cost, Job, Lengths, Memory, Placement, Ranks, Way};
use crate::config::plan::{HardwarePlan, TrainPlan};
use crate::{Error, Result};

/// The estimate is held to this by `tests/dist/memory.rs`: what exceeds a device by less may fit.
const TOLERANCE: f64 = 1.2;

/// What a placement is wanted for.
#[derive(Clone)]
pub struct Question<'a> {
    pub plan: &'a TrainPlan,
    pub job: Job,
    pub hardware: &'a HardwarePlan,
    pub ranks: Ranks,
    pub lengths: Lengths,
    pub rows: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    pub placement: Placement,
    pub memory: Memory,
    pub cost: Cost,
    pub need_bytes: f64,
    pub host_need_bytes: f64,
    pub fits: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    pub candidates: Vec<Candidate>,
    /// Among the candidates.
    pub chosen: usize,
    /// What each rank has.
    pub have_bytes: f64,
}

impl Choice {
    pub fn chosen(&self) -> &Candidate {
        &self.candidates[self.chosen]
    }
}

impl Question<'_> {
    /// Memory of a rank: its device's, or its part of the machine's.
    pub fn have_bytes(&self) -> f64 {
        self.hardware.memory_gb * 1e9 / if self.hardware.is_cpu { self.ranks_per_node() } else { 1.0 }
    }

    fn host_have_bytes(&self) -> f64 {
        self.hardware.host_memory_gb * 1e9 / self.ranks_per_node()
    }

    fn ranks_per_node(&self) -> f64 {
        self.ranks.world_size.div_ceil(self.ranks.nodes) as f64
    }

    pub fn candidate(&self, placement: Placement, way: Way) -> Candidate {
        let memory = Memory::estimate(&self.job, &placement, self.ranks.world_size, self.hardware.is_cpu);
        let cost =
            Cost::estimate(self.plan, &self.job, &placement, self.hardware, self.ranks, &self.lengths, self.rows, way);
        let (need_bytes, host_need_bytes) = (memory.peak(Where::Device), memory.peak(Where::Host));
        let fits = need_bytes <= self.have_bytes() && host_need_bytes <= self.host_have_bytes();
        Candidate { placement, memory, cost, need_bytes, host_need_bytes, fits }
    }

    /// Whether a change of the question lets something fit.
    fn would_fit(&self, placement: Placement) -> bool {
        self.candidate(placement, Way::Host).fits
    }
}

/// Chooses among the placements that the plan leaves open: what fits before what does not, then the fastest, then the
/// plainest.
pub fn choose(question: &Question<'_>) -> Result<Choice> {
    let open = Placement::open_to(&question.plan.placement, question.ranks)?;
    let candidates: Vec<Candidate> =
        open.into_iter().map(|placement| question.candidate(placement, Way::Host)).collect();
    let better = |one: &Candidate, other: &Candidate| match (one.fits, other.fits) {
        (true, true) => one.cost.step_seconds < other.cost.step_seconds,
        (false, false) => one.need_bytes < other.need_bytes,
        (fits, _) => fits,
    };
    let chosen =
        (1..candidates.len()).fold(0, |best, at| if better(&candidates[at], &candidates[best]) { at } else { best });
    Ok(Choice { candidates, chosen, have_bytes: question.have_bytes() })
}

impl Choice {
    /// An error where nothing fits by more than the estimate may be off.
    pub fn check(&self, question: &Question<'_>) -> Result<()> {
        let candidate = self.chosen();
        if candidate.fits || candidate.need_bytes <= TOLERANCE * self.have_bytes {
            return Ok(());
        }
        let placement = candidate.placement;
        let (need, have) = (gb(candidate.need_bytes), gb(self.have_bytes));
        let over = gb(candidate.need_bytes - self.have_bytes);
        let each = match question.ranks.world_size {
            1 => "the run needs".to_owned(),
            ranks => format!("each of {ranks} ranks needs"),
        };
        let what = format!("{each} about {need} ({}) and has {have}: {over} too much", placement.describe());
        let mut parts: Vec<_> = candidate.memory.parts.iter().filter(|part| part.place == Where::Device).collect();
        parts.sort_by(|one, other| other.bytes.total_cmp(&one.bytes));
        let largest = parts.iter().take(3).map(|part| format!("{} {}", part.name, gb(part.bytes)));
        let error = Error::config(what).cause(format!("most of it: {}", largest.collect::<Vec<_>>().join(", ")));
        let ways = ways_out(question, placement);
        Err(match ways.is_empty() {
            true => error.hint("take a smaller model, or ranks with more memory"),
            false => ways.into_iter().fold(error, Error::hint),
        })
    }
}

/// What would make it fit, each by itself, tried.
fn ways_out(question: &Question<'_>, placement: Placement) -> Vec<String> {
    let mut ways = vec![];
    let ranks = question.ranks;
    let plan = &question.plan.placement;
    let copies = plan.copies.unwrap_or(1);
    let sharded = Placement { is_sharded: true, copies, reshard_after_forward: true, ..placement };
    if ranks.world_size > 1 && placement != sharded && question.would_fit(sharded) {
        ways.push("`parallel=shard fsdp_reshard_after_forward=True` would fit".to_owned());
    }
    if copies > 1 && question.would_fit(Placement { copies: 1, ..sharded }) {
        ways.push("`parallel=shard data_parallel_replicate_dim=1 data_parallel_shard_dim=-1` would fit".to_owned());
    }
    let recomputed = Placement { checkpoint_every: Some(1), ..placement };
    if placement.checkpoint_every != Some(1) && question.would_fit(recomputed) {
        ways.push("`enable_activation_checkpointing=True` would fit, and take longer".to_owned());
    }
    let with_tokens = |tokens: f64| {
        let share = (tokens / question.job.tokens).min(1.0);
        let job = Job { tokens, labels: question.job.labels * share, ..question.job.clone() };
        Question { job, ..question.clone() }
    };
    let halves = (1..24).map(|times| (question.job.tokens / f64::from(1 << times)).floor());
    if let Some(tokens) =
        halves.take_while(|tokens| *tokens >= 128.0).find(|tokens| with_tokens(*tokens).would_fit(placement))
    {
        ways.push(format!("`tokens_per_microbatch={tokens}` would fit, if no sample is longer"));
    }
    let offloaded = Placement { cpu_offload: true, ..sharded };
    if !question.hardware.is_cpu && !placement.cpu_offload && question.would_fit(offloaded) {
        ways.push("`fsdp_cpu_offload=True` would fit, and take longer".to_owned());
    }
    let more = (1..=7).map(|times| ranks.world_size << times);
    let on_more = |world_size: usize| {
        let per_node = ranks.world_size.div_ceil(ranks.nodes);
        Question { ranks: Ranks { world_size, nodes: world_size.div_ceil(per_node) }, ..question.clone() }
    };
    if plan.shard_ranks.is_none()
        && let Some(ranks) = more.clone().find(|ranks| on_more(*ranks).would_fit(sharded))
    {
        ways.push(format!("`parallel=shard` over {ranks} such ranks would fit"));
    }
    ways
}

/// GB, as one says it.
pub fn gb(bytes: f64) -> String {
    match bytes / 1e9 {
        gb if gb < 10.0 => format!("{gb:.2} GB"),
        gb => format!("{gb:.1} GB"),
    }
}
