//! How long a step takes: arithmetic at the rate that a device reaches, and bytes over the link to the other ranks.
//!
//! A model to compare placements with and to plan a day by, not a measurement. What it leaves out: validation, waiting for
//! the slowest rank, the optimizer's own time, and the way from the machine's memory to a GPU under `fsdp_cpu_offload`.

use serde::Serialize;

use super::Placement;
use super::job::{self, Job, Lengths};
use crate::config::plan::{HardwarePlan, Layout, TrainPlan};

/// Whose way of working.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    #[value(skip)]
    Host,
    /// 0.2.1, on several devices
    // FSDP1 with `FULL_SHARD` gathers each block twice a micro-batch, and overlaps none of it that one could see; micro-batches
    // are padded to their longest; scores are computed at every position; every micro-batch of an epoch is computed, whether
    // it becomes a step or not; the merged model is written each epoch.
    Torchtune,
}

/// How many ranks there are and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Ranks {
    pub world_size: usize,
    pub nodes: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// Micro-batches of a rank in a step.
    pub microbatches: f64,
    /// Tokens that a rank computes in a step, padding included.
    pub tokens_computed: f64,
    /// Real tokens of all ranks in a step.
    pub tokens: f64,
    pub flops: f64,
    pub compute_seconds: f64,
    /// What a rank receives in a step.
    pub bytes_received: f64,
    pub communication_seconds: f64,
    /// Of that, what goes on while something is computed.
    pub hidden_seconds: f64,
    pub step_seconds: f64,
    pub tokens_per_second: f64,
    /// Bytes of weights that are read at the start, and of what each checkpoint writes.
    pub start_bytes: f64,
    pub save_bytes: f64,
    pub start_seconds: f64,
    pub save_seconds: f64,
    /// With the rows known.
    pub run: Option<RunCost>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RunCost {
    pub steps_per_epoch: f64,
    pub epochs: f64,
    /// With the checkpoint at its end.
    pub epoch_seconds: f64,
    pub seconds: f64,
}

impl Cost {
    #[allow(clippy::too_many_arguments, reason = "each is a thing of its own that a plan is made for")]
    pub fn estimate(
        plan: &TrainPlan,
        job: &Job,
        placement: &Placement,
        hardware: &HardwarePlan,
        ranks: Ranks,
        lengths: &Lengths,
        rows: Option<f64>,
        way: Way,
    ) -> Self {
        let per_rank = (plan.batch_size * plan.gradient_accumulation_steps) as f64;
        let is_padded = way == Way::Torchtune || plan.layout == Layout::Padded;
        let fill = if is_padded { job::longest_of(plan.batch_size as f64, lengths.spread) } else { 1.0 };
        let real = per_rank * lengths.mean;
        let microbatches = match is_padded {
            true => plan.gradient_accumulation_steps as f64,
            false => (real / plan.tokens_per_microbatch as f64).ceil(),
        };
        let tokens_computed = real * fill;
        let scored = if way == Way::Torchtune { tokens_computed } else { real * lengths.label_share };
        let flops = flops(job, placement, lengths.mean * fill, tokens_computed, scored, way);
        let on_node = ranks.world_size.div_ceil(ranks.nodes) as f64;
        // A machine's cores are shared by its ranks; a GPU has one.
        let rate = hardware.tflops * 1e12 / if hardware.is_cpu { on_node } else { 1.0 };
        let compute_seconds = flops / rate;

        let others = |ranks: usize| (ranks - 1) as f64 / ranks as f64;
        let link = |is_far: bool| 1e9 * if is_far { hardware.node_link_gb_s } else { hardware.link_gb_s };
        let (gathered, summed) = communication(job, placement, microbatches, way);
        let shared_by = placement.shard_ranks(ranks.world_size);
        // What each copy has summed of its gradients the copies add up.
        let between = 2.0 * 4.0 * if job.trains_all() { job.num_trained() / shared_by as f64 } else { 0.0 };
        let (gathered, summed, between) =
            (gathered * others(shared_by), summed * others(ranks.world_size), between * others(placement.copies));
        let gathering_seconds = gathered / link(shared_by as f64 > on_node);
        let communication_seconds = gathering_seconds + (summed + between) / link(ranks.nodes > 1);
        // The next block is fetched while one is computed; a sum at the end of a step waits for all of it.
        let hidden_seconds = if way == Way::Host { gathering_seconds.min(compute_seconds) } else { 0.0 };
        let step_seconds = compute_seconds + communication_seconds - hidden_seconds;

        let disk = hardware.disk_gb_s * 1e9;
        let weights = (job.num_parameters() + job.frozen_beside) * job.element;
        let resume = 2.0 * job.num_trained() * if job.trains_all() { job.element } else { job.adapter_element };
        let save_bytes = if job.saves_merged { job.num_parameters() * job.element } else { 0.0 } + resume;
        let (start_seconds, save_seconds) = (weights / disk, save_bytes / disk);
        let tokens = real * ranks.world_size as f64;
        let run = rows.map(|rows| {
            let whole = (rows / (per_rank * ranks.world_size as f64)).floor();
            let steps_per_epoch = whole.min(plan.max_steps_per_epoch.map_or(f64::INFINITY, |most| most as f64));
            let epochs = plan.epochs as f64;
            let computed = match way {
                Way::Host => steps_per_epoch,
                // In steps; those that make none count.
                Way::Torchtune if plan.max_steps_per_epoch.is_none() => {
                    (rows / (plan.batch_size * ranks.world_size) as f64).ceil() / microbatches
                }
                Way::Torchtune => steps_per_epoch,
            };
            let saves = 1.0 + plan.checkpoint.save_every_n_steps.map_or(0.0, |n| (steps_per_epoch / n as f64).floor());
            let epoch_seconds = computed * step_seconds + saves * save_seconds;
            RunCost { steps_per_epoch, epochs, epoch_seconds, seconds: start_seconds + epochs * epoch_seconds }
        });
        Self {
            microbatches,
            tokens_computed,
            tokens,
            flops,
            compute_seconds,
            bytes_received: gathered + summed + between,
            communication_seconds,
            hidden_seconds,
            step_seconds,
            tokens_per_second: tokens / step_seconds,
            start_bytes: weights,
            save_bytes,
            start_seconds,
            save_seconds,
            run,
        }
    }
}

/// Of a rank in a step: two for each multiplication of a weight, and as many again for each gradient.
fn flops(job: &Job, placement: &Placement, length: f64, tokens: f64, scored: f64, way: Way) -> f64 {
    let model = &job.model;
    let in_blocks = model.linears().into_iter().filter(|spec| spec.name != "lm_head");
    let weights: f64 = in_blocks.map(|spec| (spec.inputs * spec.outputs) as f64).sum();
    // Forward and the gradient of the input; where weights learn, theirs too.
    let passes = if job.trains_all() { 6.0 } else { 4.0 };
    let recomputed = placement.checkpoint_every.map_or(0.0, |every| 2.0 / every as f64);
    let wide = (model.num_heads * model.head_dim * model.num_layers) as f64;
    // Causal: half of the products; 1 forward and 2.5 backward (FlashAttention-2).
    let attention = 2.0 * length * wide * (3.5 + recomputed / 2.0);
    // A head that learns is computed again in its backward.
    let of_head = if job.trains_all() && way == Way::Host { passes + 2.0 } else { passes };
    let adapters = 6.0 * if job.trains_all() { 0.0 } else { job.num_trained() };
    tokens * ((passes + recomputed) * weights + attention + adapters) + scored * of_head * job.head()
}

/// Bytes of a step that are gathered (or scattered) along with the computation among the ranks of a copy, and those that all
/// ranks sum at its end; of each a rank receives the others' share.
fn communication(job: &Job, placement: &Placement, microbatches: f64, way: Way) -> (f64, f64) {
    let trained = job.num_trained();
    if !placement.is_sharded {
        // An all-reduce is a reduce-scatter and an all-gather, fp32.
        return (0.0, 2.0 * 4.0 * trained);
    }
    let blocks = job.num_parameters() - job.outside_blocks();
    let once = (blocks + job.outside_blocks()) * job.element;
    let gathers = match (placement.reshard_after_forward, way) {
        // Blocks for forward and for backward; what is around them stays in between.
        (true, _) => microbatches * (once + blocks * job.element),
        // Weights change between steps alone.
        (false, Way::Host) => once,
        (false, Way::Torchtune) => microbatches * once,
    };
    let scattered = if job.trains_all() || way == Way::Torchtune { microbatches * trained * job.element } else { 0.0 };
    let summed = if job.trains_all() || way == Way::Torchtune { 0.0 } else { 2.0 * 4.0 * trained };
    (gathers + scattered, summed)
}
