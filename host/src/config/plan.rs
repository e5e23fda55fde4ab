//! The plan: a config after `resolve`. Nothing is left to default, every path is absolute or relative to the caller's
//! working directory, and each part of the worker takes its own section.
//!
//! The launcher writes it as JSON for the workers, and the run writes it beside its checkpoints.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::limits::GuestLimits;
use crate::data::template::Role;

/// What one `host run` does, or another verb that needs a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    Train(Box<TrainPlan>),
    Generate(Box<GeneratePlan>),
    Preview(Box<PreviewPlan>),
    Check(CheckPlan),
    Test(TestPlan),
}

impl Plan {
    /// The model that it opens, if it opens one.
    pub fn model(&self) -> Option<&ModelPlan> {
        match self {
            Self::Train(plan) => Some(&plan.model),
            Self::Generate(plan) => Some(&plan.model),
            Self::Preview(_) | Self::Check(_) | Self::Test(_) => None,
        }
    }
}

/// A guest file to look at without running it: `host check` and `host inspect`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckPlan {
    pub path: PathBuf,
    /// MiB of a component's file, as [`GuestLimits::guest_mb`].
    pub guest_mb: usize,
    pub style: CheckStyle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckStyle {
    /// That it fits this host, and what a config may say to it.
    Verdict,
    /// What it is.
    Details,
    /// All of it.
    Json,
}

/// A guest to hold against its author's expectations: `host test`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TestPlan {
    pub guest: PathBuf,
    /// What is expected: an object a line. None where the guest's folder has no such file.
    pub rows: Option<PathBuf>,
    /// Write what comes of the rows as what is expected.
    pub accept: bool,
    /// An empty folder for a recipe's tiny model.
    pub scratch: PathBuf,
    /// Changes to the config of that run.
    pub overrides: Vec<String>,
    pub json: bool,
}

/// What a data set's first rows become: `host preview`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreviewPlan {
    pub datasets: Vec<DatasetPlan>,
    pub tokenizer: TokenizerPlan,
    pub limits: GuestLimits,
    /// Rows of each data set.
    pub rows: usize,
    pub style: PreviewStyle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviewStyle {
    /// What carries loss stands in brackets.
    Plain,
    /// What carries loss is green.
    Colour,
    /// An object a line.
    Json,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainPlan {
    pub recipe: GuestRef,
    /// The config as the user gave it, for messages: file and the overrides on the command line.
    pub config_path: PathBuf,
    pub overrides: Vec<String>,
    /// The resolved config as YAML, interpolations replaced; printed at the start and written beside checkpoints.
    pub resolved_yaml: String,
    pub output_dir: PathBuf,

    pub model: ModelPlan,
    /// A frozen model to compare with, in place of the trained one without its adapters.
    pub reference: Option<ModelPlan>,
    /// A frozen model to learn from.
    pub teacher: Option<ModelPlan>,
    /// The config with its defaults, for recipes that ask.
    pub config: serde_json::Value,
    /// Keys of the config that only a recipe makes use of.
    pub for_recipe: Vec<String>,
    pub tokenizer: TokenizerPlan,
    /// Data sets, the rows of one after those of the other.
    pub dataset: Vec<DatasetPlan>,
    /// Likewise, to measure on; none where there is none.
    pub dataset_val: Vec<DatasetPlan>,
    /// Validate every this many steps (besides before the first and after the last).
    pub run_val_every_n_steps: Option<usize>,

    pub seed: u64,
    pub shuffle: bool,
    /// Samples per rank in one micro-batch as torchtune counts them.
    pub batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub epochs: usize,
    pub max_steps_per_epoch: Option<usize>,
    pub layout: Layout,
    /// `varlen`: most tokens one forward takes; a longer sample goes alone.
    pub tokens_per_microbatch: usize,

    pub optimizer: OptimizerPlan,
    pub schedule: SchedulePlan,
    pub loss: LossPlan,
    pub clip_grad_norm: Option<ClipPlan>,

    pub checkpoint: CheckpointPlan,
    pub metrics: MetricsPlan,
    pub device: DevicePlan,
    pub collectives: CollectivesPlan,
    /// How long ranks wait for one that does not come.
    pub collective_timeout_seconds: f64,
    pub dtype: Dtype,
    pub placement: PlacementPlan,
    /// `compat: torchtune`: adapters and moments in `dtype`, torchtune's data order.
    pub compat_torchtune: bool,
    pub limits: GuestLimits,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GeneratePlan {
    pub config_path: PathBuf,
    pub overrides: Vec<String>,
    pub resolved_yaml: String,
    pub model: ModelPlan,
    pub tokenizer: TokenizerPlan,
    pub prompt: PromptPlan,
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_k: Option<usize>,
    pub enable_kv_cache: bool,
    /// Print the prompt before what follows it, as torchtune does.
    pub echo_prompt: bool,
    pub seed: u64,
    pub device: DevicePlan,
    pub dtype: Dtype,
    pub limits: GuestLimits,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptPlan {
    /// The text as it is, after BOS; what torchtune's `generate` does with a string.
    Text(String),
    /// `prompt: {system: …, user: …}`: through the tokenizer section's prompt template.
    Messages { system: Option<String>, user: String },
}

/// A guest file: a Wasm component or a Rhai script, told apart by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRef {
    pub path: PathBuf,
    /// Keys of the guest's own config section, as JSON (empty object when it has none).
    pub settings: serde_json::Value,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelPlan {
    /// Hugging Face folder: config.json and the files below.
    pub checkpoint_dir: PathBuf,
    /// Weight files in `checkpoint_dir`; empty: whatever its index, or its single file, says.
    pub checkpoint_files: Vec<String>,
    pub lora: Option<LoraPlan>,
    /// An adapter to generate with, or to start training from: PEFT's folder, or a file that torchtune wrote.
    pub adapter: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraPlan {
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Linear names as in the checkpoint: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head.
    pub targets: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenizerPlan {
    /// The vocabulary: tokenizer.json, tokenizer.model or vocab.json.
    pub path: PathBuf,
    /// The merges of a vocab.json.
    pub merges_file: Option<PathBuf>,
    /// A file whose `added_tokens` replace the format's own list of special tokens.
    pub special_tokens_path: Option<PathBuf>,
    /// Instead of the files of that name beside `path`.
    pub tokenizer_config: Option<PathBuf>,
    pub generation_config: Option<PathBuf>,
    pub format: MessageFormat,
    pub max_seq_len: Option<usize>,
    pub truncation: Truncation,
    /// A guest that makes messages of rows, or other messages of messages.
    pub prompt_template: Option<GuestRef>,
    /// Texts before and after the messages of a role, whoever made them.
    pub turn_texts: TurnTexts,
}

/// The texts before and after the messages of a role.
pub type TurnTexts = Vec<(Role, [String; 2])>;

impl TokenizerPlan {
    /// A tokenizer for texts without a message format.
    pub fn plain(path: PathBuf) -> Self {
        Self {
            path,
            merges_file: None,
            special_tokens_path: None,
            tokenizer_config: None,
            generation_config: None,
            format: MessageFormat::Plain,
            max_seq_len: None,
            truncation: Truncation::Right,
            prompt_template: None,
            turn_texts: vec![],
        }
    }
}

/// How a family writes messages as tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageFormat {
    /// The texts, between BOS and EOS.
    Plain,
    Llama3,
    /// Llama 2 and Mistral: a turn is a question and its answer.
    Turns,
    Qwen2,
    Qwen2_5,
    Qwen3,
    /// The checkpoint's own chat template.
    ChatTemplate,
}

impl MessageFormat {
    pub fn is_qwen(self) -> bool {
        matches!(self, Self::Qwen2 | Self::Qwen2_5 | Self::Qwen3)
    }
}

/// Which end of a long sample is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The right end goes.
    Right,
    Left,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DatasetPlan {
    /// Files to read, in order, by the name of the split they are (`train`, `validation`, `test`). A data set of the hub
    /// has none before [`crate::hub::dataset`] was asked for them; workers always get files.
    pub files: Vec<DataFile>,
    pub format: DataFormat,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubDataPlan>,
    /// Split expression, parity §5.7: `train[:2000]`.
    pub split: String,
    pub rows: RowsPlan,
    /// Takes the place of every system message.
    pub new_system_prompt: Option<String>,
    pub train_on_input: bool,
    pub on_bad_row: OnBadRow,
    pub packing: Option<PackingPlan>,
    /// Where the tokenised rows are cached.
    pub cache_dir: PathBuf,
}

/// What a row is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowsPlan {
    /// Columns of text. Without a template `input` is the user's and `output` the assistant's.
    Columns {
        columns: Vec<ColumnPlan>,
        /// The data set's own template; the tokenizer section's follows it.
        template: Option<TemplatePlan>,
    },
    /// A conversation, which one column holds.
    Chat { column: String, style: ChatStyle, template: Option<TemplatePlan> },
    /// A better and a worse answer: two texts after a prompt, or without one two conversations.
    Pairs { prompt: Option<String>, chosen: String, rejected: String, template: Option<TemplatePlan> },
    /// A text to be continued, without messages.
    Text { column: String, add_eos: bool },
}

impl RowsPlan {
    pub fn template(&self) -> Option<&TemplatePlan> {
        match self {
            Self::Columns { template, .. } | Self::Chat { template, .. } | Self::Pairs { template, .. } => {
                template.as_ref()
            }
            Self::Text { .. } => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnPlan {
    /// What templates know it by: `input`, `output`.
    pub name: String,
    /// What the data calls it.
    pub column: String,
    /// Not every row has a value, and no row need have one.
    pub optional: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatStyle {
    /// `[{"from": "human", "value": "…"}, …]`
    ShareGpt,
    /// `[{"role": "user", "content": "…"}, …]`
    OpenAi,
}

/// Samples laid end to end into packs; a pack is then what a batch counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackingPlan {
    /// Tokens of a pack, at most.
    pub max_seq_len: usize,
    /// A sample that does not fit fills the pack, and its rest begins the next.
    pub split_across_pack: bool,
}

/// A data set of the hub, as the config asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubDataPlan {
    /// `org/name`.
    pub repo: String,
    /// The subset.
    pub name: Option<String>,
    pub revision: Option<String>,
    /// File names or patterns in the repository; empty: told by name.
    pub data_files: Vec<DataFile>,
    /// What `files` were read from; none before the hub was asked.
    pub pinned: Option<PinnedRevision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedRevision {
    /// A branch or tag, such as `refs/convert/parquet`.
    pub revision: String,
    /// The commit it was.
    pub commit: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplatePlan {
    pub guest: GuestRef,
    /// A message's parts become one text before they are tokens, as in torchtune v0.2.1, which formats one string.
    pub joined: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    pub split: String,
    pub path: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// An object a line, or one list of objects.
    Jsonl,
    /// One object, a field of which is the list of rows.
    JsonField(String),
    /// Comma-separated, the first line names the columns; `.tsv` files are separated by tabs.
    Csv,
    /// A row a line, in the column `text`.
    Text,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    Error,
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    Varlen,
    Padded,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerPlan {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    pub updates: Updates,
}

/// How an update reaches a weight of few bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Updates {
    /// Rounded to the nearest: one below half the last bit is lost.
    Nearest,
    /// Summed up in fp32 copies.
    Master,
    /// Rounded up or down at random, so that the mean is right.
    Stochastic,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulePlan {
    Constant,
    Cosine { num_warmup_steps: usize, num_cycles: f64 },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossPlan {
    /// A loss of somebody's own, in place of cross-entropy.
    pub guest: Option<GuestRef>,
    /// The name of one that a recipe computes itself.
    pub of_recipe: Option<String>,
    /// Label positions are projected to the vocabulary in this many pieces at least.
    pub num_output_chunks: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipPlan {
    /// `clip_grad_norm: inf`: log the norm, clip nothing.
    LogOnly,
    MaxNorm(f64),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointPlan {
    /// Checkpoints go to `output_dir/step_N`, `output_dir/epoch_N`.
    pub output_dir: PathBuf,
    pub save_every_n_steps: Option<usize>,
    pub keep_last_n: Option<usize>,
    /// Write the adapter without the merged model.
    pub adapter_only: bool,
    pub resume: bool,
    /// A checkpoint to resume from instead of the newest in `output_dir`.
    pub resume_from: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MetricsPlan {
    pub sink: MetricSink,
    pub log_every_n_steps: usize,
    pub log_peak_memory_stats: bool,
    pub log_level: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MetricSink {
    Stdout,
    /// A file in `log_dir`, one line a step.
    Disk {
        log_dir: PathBuf,
        format: DiskFormat,
        filename: Option<String>,
    },
    /// Event files in `log_dir`, or in a folder of the run below it.
    TensorBoard {
        log_dir: PathBuf,
        organize_logs: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    Txt,
    Jsonl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DevicePlan {
    Cpu,
    /// CUDA and ROCm alike, as in PyTorch.
    Cuda,
}

/// What moves tensors between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CollectivesPlan {
    /// NCCL or RCCL where each of several ranks has a GPU, else Gloo.
    Auto,
    /// Through host memory.
    Gloo,
    /// NCCL or RCCL, for a group of one too.
    Nccl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    Bf16,
    Fp32,
}

/// Machines to plan for, as a file describes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HardwarePlan {
    pub name: String,
    /// Ranks compute on a machine's cores and share its memory and rate.
    pub is_cpu: bool,
    pub devices_per_node: usize,
    /// Of a device; of the machine where it is the device.
    pub memory_gb: f64,
    /// Of a machine with GPUs.
    pub host_memory_gb: f64,
    /// What matrix products reach.
    pub tflops: f64,
    /// What a device receives from those of its machine.
    pub link_gb_s: f64,
    /// What a device receives from another machine.
    pub node_link_gb_s: f64,
    pub disk_gb_s: f64,
}

/// What each rank is to hold of the model and keep of a forward, as the config asks; [`crate::placement`] decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementPlan {
    pub parallel: Parallel,
    /// Shards: a block is freed after its forward, and gathered again for backward.
    pub reshard_after_forward: bool,
    /// Shards are kept in the machine's memory.
    pub cpu_offload: bool,
    /// Every n-th block's activations are computed again in backward; none: all are kept.
    pub checkpoint_every: Option<usize>,
    /// `data_parallel_shard_dim`: the ranks that share a copy; none: as many as there are.
    pub shard_ranks: Option<usize>,
    /// `data_parallel_replicate_dim`: copies that are shared so; none: left open.
    pub copies: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parallel {
    Auto,
    Replicate,
    Shard,
}

/// As the config writes it.
impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::Fp32 => "fp32",
        })
    }
}
