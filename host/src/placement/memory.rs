//! How much memory a rank takes, by part: what is always there, and what the busiest moment adds.
//!
//! Counted from what the worker keeps: the flat vectors of what is trained, what each autograd function saves for its backward
//! (`host-ffi`), the pieces that gradients are reduced in. `tests/dist/memory.rs` holds it against measured processes.

use serde::Serialize;

use super::{Job, Placement};

/// Numbers of a piece that gradients are reduced and measured in; `host-rank`'s `flat::PIECE`.
const PIECE: f64 = (1 << 24) as f64;
/// Most rows of scores at once; `host-rank`'s `Run::chunk_rows`.
const MOST_ROWS: f64 = 512.0;
/// A worker that has opened nothing: program, libtorch, guests.
const PROCESS: f64 = 75e6;
/// What a GPU's runtime takes of its memory for itself.
const GPU_CONTEXT: f64 = 600e6;
/// What glibc's heap takes for what is made and freed in a step, as a multiple of the most that is alive at once: in fp32, and
/// in bf16. libtorch aligns blocks to 64 bytes, and glibc before 2.38 does not find a freed block of the same size again for
/// such a wish. Where every block comes from the kernel (`MALLOC_MMAP_THRESHOLD_=65536`) it is 1.0, and half as fast.
/// Measured on random Llamas of 30 to 60M parameters, LoRA and full, 1 and 2 ranks: 1.2 to 1.5, and 1.3 to 1.9.
const GLIBC_HOLES: [f64; 2] = [1.35, 1.5];
/// Blocks above this always come from the kernel and go back to it; smaller ones find a place in the heap, which stays as
/// large as it was (`mallopt(3)`, `M_MMAP_THRESHOLD`).
const GLIBC_MAPPED: f64 = (32 << 20) as f64;
/// libtorch's caching allocator on a GPU. With it the estimates of five runs of 8B on an H200 are 0.97 to 1.05 of what was reserved.
const CACHE_HOLES: f64 = 1.1;

/// Where a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Where {
    /// The memory that the model computes in.
    Device,
    /// The machine's, where that is another.
    Host,
}

/// When a part is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Before anything is opened.
    Idle,
    Always,
    /// While gradients are computed.
    Backward,
    /// While they are reduced and applied.
    Update,
    /// While a checkpoint is written, by rank 0.
    Save,
}

#[derive(Clone, Debug, Serialize)]
pub struct Part {
    pub name: &'static str,
    pub bytes: f64,
    pub place: Where,
    pub when: When,
}

#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    pub parts: Vec<Part>,
}

impl Memory {
    /// Estimates what a rank of `world_size` takes.
    pub fn estimate(job: &Job, placement: &Placement, world_size: usize, is_cpu: bool) -> Self {
        let ranks = placement.shard_ranks(world_size) as f64;
        let share = |bytes: f64| if placement.is_sharded { bytes / ranks } else { bytes };
        let shards = if placement.cpu_offload && !is_cpu { Where::Host } else { Where::Device };
        let (all, trained) = (job.num_parameters(), job.num_trained());
        // Adapters are small, and every rank has them.
        let (kept, of_trained) = match job.trains_all() {
            true => (share(all * job.element), share(trained * job.element)),
            false => (share(all * job.element) + trained * job.adapter_element, trained * job.adapter_element),
        };
        let beside = share(job.frozen_beside * job.element);
        let gathered = match (placement.is_sharded, placement.reshard_after_forward) {
            (false, _) => 0.0,
            // Embedding, norm and head; the block that is computed, the one that is fetched meanwhile, and on its way through
            // Gloo once more.
            (true, true) => job.element * (job.outside_blocks() + job.block() * if is_cpu { 3.0 } else { 2.0 }),
            (true, false) => job.element * all,
        };
        // The whole gradients of the same, of the block that is computed and of the one that is being reduced, and what other
        // ranks send of it.
        let reduced = match (placement.is_sharded && job.trains_all(), placement.reshard_after_forward) {
            (false, _) => 0.0,
            (true, true) => job.element * (job.outside_blocks() + job.block() * if is_cpu { 3.0 } else { 2.0 }),
            (true, false) => job.element * (all + job.head()),
        };
        let moments = match job.trains_all() {
            true => share(trained * job.optimizer_bytes),
            false => trained * job.optimizer_bytes,
        };
        // What is written while training goes on; of a model that ranks share each writes its piece.
        let copy = of_trained + moments;
        let holes = match is_cpu {
            true => GLIBC_HOLES[usize::from(job.element < 4.0)],
            false => CACHE_HOLES,
        };
        let (saved, scores, block) = (saved(job, placement), scores(job), in_block(job));
        let alive = saved + scores.max(block);
        let held = if job.trains_all() { share(trained) } else { trained };
        let (update, save) = (update(held, is_cpu), save(job, is_cpu));
        // A heap stays as large as it was; a cache serves the next moment too.
        let stays = if is_cpu { When::Always } else { When::Backward };
        let idle = if is_cpu { ("process", PROCESS) } else { ("the GPU's own", GPU_CONTEXT) };
        let on = |name, bytes, place, when| Part { name, bytes, place, when };
        let mut parts = vec![
            on("weights", kept + beside, shards, When::Always),
            on("gradients", of_trained, shards, When::Always),
            on("optimizer", moments, shards, When::Always),
            on("copy for a checkpoint", copy, if is_cpu { Where::Device } else { Where::Host }, When::Always),
            on("gathered blocks", gathered, Where::Device, When::Always),
            on("their gradients", reduced, Where::Device, stays),
            on("activations", saved, Where::Device, stays),
            on("in computation", alive - saved, Where::Device, stays),
            on("allocator", (holes - 1.0) * alive, Where::Device, stays),
            on("reduce and update", update, Where::Device, When::Update),
            on("write a checkpoint", save, if is_cpu { Where::Device } else { Where::Host }, When::Save),
            on(idle.0, idle.1, Where::Device, When::Idle),
        ];
        parts.retain(|part| part.bytes > 0.0);
        Self { parts }
    }

    /// The most that is taken at once.
    pub fn peak(&self, place: Where) -> f64 {
        let at = |when| self.sum(place, |part| part.when == when);
        at(When::Idle)
            + at(When::Always)
            + [When::Backward, When::Update, When::Save].map(at).into_iter().fold(0.0, f64::max)
    }

    /// Whether a part counts in the peak.
    pub fn is_at_peak(&self, part: &Part) -> bool {
        let at = |when| self.sum(part.place, |other| other.when == when);
        let rest = [When::Backward, When::Update, When::Save];
        !rest.contains(&part.when) || rest.into_iter().all(|when| at(when) <= at(part.when))
    }

    fn sum(&self, place: Where, keep: impl Fn(&Part) -> bool) -> f64 {
        self.parts.iter().filter(|part| part.place == place && keep(part)).map(|part| part.bytes).sum()
    }
}

/// What a token leaves in a block for its backward, before and after the last place where tokens mix.
struct Saved {
    /// The block's input.
    input: f64,
    attention: f64,
    mlp: f64,
}

impl Saved {
    fn per_token(job: &Job) -> Self {
        let model = &job.model;
        let (hidden, ffn) = (model.hidden_size as f64, model.intermediate_size as f64);
        let queries = (model.num_heads * model.head_dim) as f64;
        let keys = (model.num_kv_heads * model.head_dim) as f64;
        let rank = job.lora.as_ref().map_or(0.0, |lora| lora.rank as f64);
        let has_dropout = job.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
        let count = |names: &[&str]| names.iter().filter(|name| job.adapts(name)).count() as f64;
        // An input is kept where a weight or a factor learns from it: once for layers that share it, but masked for each.
        let input = |names: &[&str], width: f64| match (count(names), job.trains_all()) {
            (_, true) => width,
            (0.0, _) => 0.0,
            (adapted, _) if has_dropout => adapted * (2.0 * width + rank),
            (adapted, _) => width + adapted * rank,
        };
        let normed = if model.qk_norm { queries + keys } else { 0.0 };
        // What attention computes is kept as it is, for itself; its input projections' input and its output's mask beside it.
        let output = input(&["o_proj"], queries) - if has_dropout { 0.0 } else { queries };
        let attention =
            input(&["q_proj", "k_proj", "v_proj"], hidden) + normed + 2.0 * queries + 2.0 * keys + output.max(0.0);
        let mlp = hidden + input(&["gate_proj", "up_proj"], hidden) + 2.0 * ffn + input(&["down_proj"], ffn);
        // Sums of rows and the like, fp32.
        let statistics = (2 + model.num_heads) as f64 * 4.0 / job.element;
        Self { input: hidden, attention: attention + statistics, mlp }
    }
}

/// Activations that wait for their backward.
fn saved(job: &Job, placement: &Placement) -> f64 {
    let Saved { input, attention, mlp } = Saved::per_token(job);
    let blocks = job.model.num_layers as f64;
    let recomputed = placement.checkpoint_every.map_or(0.0, |every| (blocks / every as f64).floor());
    // Past the last attention only label positions are computed.
    let last = (input + attention) * job.tokens + (mlp + input) * job.labels;
    let whole = (input + attention + mlp) * job.tokens;
    let in_blocks = match recomputed > 0.0 {
        false => (blocks - 1.0) * whole + last,
        // Of a block that is computed again only the input, and of the one whose turn it is everything.
        true => (blocks - recomputed) * whole + recomputed * input * job.tokens + whole,
    };
    // The first block's input needs no gradient where the embedding does not learn.
    let first = if job.trains_all() { 0.0 } else { input * job.tokens };
    let angles = job.tokens * job.model.head_dim as f64 * 4.0;
    (in_blocks - first + 2.0 * input * job.labels) * job.element + angles
}

/// What the head and the loss take while they are computed.
fn scores(job: &Job) -> f64 {
    let rows = (job.labels / job.num_output_chunks).ceil().clamp(1.0, MOST_ROWS);
    let vocabulary = job.model.vocab_size as f64;
    if job.takes_all_scores {
        return job.labels * vocabulary * (job.element + 8.0);
    }
    match (job.trains_all(), job.adapts("lm_head")) {
        // Scores, their gradient in fp32 and rounded; the head's gradient, and a chunk's part of it.
        (true, _) => rows * vocabulary * (3.0 * job.element + 8.0) + 2.0 * job.head() * job.element,
        (_, true) => rows * vocabulary * (2.0 * job.element + 8.0),
        _ => rows * vocabulary * job.element,
    }
}

/// What a block takes while its gradients are computed, besides what it saved.
fn in_block(job: &Job) -> f64 {
    let (hidden, ffn) = (job.model.hidden_size as f64, job.model.intermediate_size as f64);
    let gradients = job.tokens * 3.0 * (ffn + hidden);
    let weights = if job.trains_all() { job.tokens * ffn + ffn * hidden } else { 0.0 };
    // The gradient of a head that is the embedding too waits for the embedding's.
    let waits = if job.trains_all() && job.model.tie_word_embeddings { job.head() } else { 0.0 };
    (gradients + weights + waits) * job.element
}

/// What a block of memory takes beside a heap that is as large as it was at its busiest.
fn beside_heap(blocks: &[f64], is_cpu: bool) -> f64 {
    blocks.iter().filter(|bytes| !is_cpu || **bytes > GLIBC_MAPPED).sum()
}

/// A piece of the gradients that is reduced: what is sent and what came of it, fp32; then its norm, in fp64.
fn update(held_numbers: f64, is_cpu: bool) -> f64 {
    let piece = held_numbers.min(PIECE);
    beside_heap(&[4.0 * piece, 4.0 * piece], is_cpu).max(beside_heap(&[8.0 * piece], is_cpu))
}

/// The largest tensor of a checkpoint, each written by itself: merged in fp32, as it is written, and its bytes.
fn save(job: &Job, is_cpu: bool) -> f64 {
    let written = job.head() * job.element;
    match (job.saves_merged, job.trains_all()) {
        (false, _) => 0.0,
        (true, true) => beside_heap(&[written], is_cpu),
        (true, false) if job.element < 4.0 => beside_heap(&[4.0 * job.head(), written, written], is_cpu),
        (true, false) => beside_heap(&[written, written], is_cpu),
    }
}
