//! The top-level keys of a training config and of a generation config.

use super::{Class, Key, Role, Type, key, optional, refused, required};

/// Sizes and counts; a product of two of them still fits 64 bits.
pub const LARGEST: u64 = i32::MAX as u64;
pub(super) const POSITIVE: Type = Type::Count { min: 1, max: LARGEST };
const SEED: Type = Type::Count { min: 0, max: u32::MAX as u64 };
const FRACTION: Type = Type::Number { min: 0.0, max: 1.0 };
const RATE: Type = Type::Number { min: 1e-3, max: f64::INFINITY };
const ANY_NUMBER: Type = Type::Number { min: f64::NEG_INFINITY, max: f64::INFINITY };

const SHARDED_BY_BLOCK: &str = "embedding, blocks and output are sharded one by one already";
const NOT_YET: &str = "not available yet";

const DEVICE: Key = key("device", Type::OneOf(&["cpu", "cuda"]), "cuda", "Where the model runs; `cuda` is ROCm too.");
const DTYPE: Key = key(
    "dtype",
    Type::OneOf(&["bf16", "fp32"]),
    "bf16",
    "The type of weights and activations. Small updates of weights that are bf16 themselves are lost in rounding; adapters are fp32.",
);
const LIMITS_KEY: Key = key("limits", Type::Section(LIMITS), "{}", "What a guest may use.");
const ISOLATE: Key = key(
    "isolate",
    Type::Bool,
    "False",
    "Run templates in processes of their own, with a memory limit and without files, network or devices.",
);
const OUTPUT_DIR: &str = "Everything the run writes is below this folder.";
const CACHE_DIR: Key =
    optional("cache_dir", Type::Text, "Where tokenised rows are kept; by default the user's cache folder.");

/// What a guest may use.
pub const LIMITS: &[Key] = &[
    key("guest_mb", POSITIVE, "10", "A guest's file, in MiB."),
    key("memory_mb", POSITIVE, "256", "Memory of the guest, in MiB."),
    key("tensors_mb", POSITIVE, "32768", "Tensors that the guest holds or its gradients may still need, in MiB."),
    key("handles", POSITIVE, "20000", "Tensors and other handles alive at once."),
    key("hostcall_mb", POSITIVE, "32", "What a guest may hand over in one call, in MiB."),
    key("compile_mb", POSITIVE, "2048", "Memory that compiling a component may take, in MiB."),
    key("compile_seconds", Type::Number { min: 0.001, max: f64::INFINITY }, "60.0", "Time that compiling it may take."),
    key("log_lines", POSITIVE, "10000", "Lines a guest may log; the rest is dropped."),
    key("memories", POSITIVE, "4", "Memories of a component."),
    key("instances", POSITIVE, "64", "Modules that a component is made of."),
    key("tables", POSITIVE, "32", "Tables of a component."),
    key("table_elements", POSITIVE, "100000", "Elements of each of them."),
    key(
        "operations",
        Type::Count { min: 1, max: 1 << 53 },
        "10000000000",
        "Steps of a Rhai script since its loop last turned.",
    ),
    key(
        "seconds",
        Type::Number { min: 0.001, max: f64::INFINITY },
        "30.0",
        "Time in the guest since its loop last turned.",
    ),
];

/// As torchtune, which raises the text to capitals, and Python's logging take them.
const LOG_LEVELS: &[&str] =
    &["DEBUG", "INFO", "WARN", "WARNING", "ERROR", "CRITICAL", "debug", "info", "warn", "warning", "error", "critical"];

const COMPILE_PARTS: &str = "nothing is compiled at run time: the first step is as fast as the last";

/// Keys and sections that only a recipe makes use of, `loss` where it names one that a recipe computes.
pub const FOR_RECIPES: &[&str] =
    &["loss", "ref_checkpointer", "teacher_model", "teacher_checkpointer", "kd_loss", "kd_ratio"];

pub const TRAIN: &[Key] = &[
    required("output_dir", Type::Text, OUTPUT_DIR),
    required("tokenizer", Type::Component(Role::Tokenizer), "How text becomes tokens."),
    required("dataset", Type::Components(Role::Dataset), "What to train on; of several the rows follow each other."),
    optional("dataset_val", Type::Components(Role::Dataset), "What to measure on."),
    optional("run_val_every_n_steps", POSITIVE, "Validate every this many steps, besides before and after the run."),
    optional("seed", SEED, "Decides order, dropout and starting weights; null draws one."),
    key("shuffle", Type::Bool, "True", "Whether each epoch has its own order."),
    key("batch_size", POSITIVE, "2", "Samples of one rank in one micro-batch."),
    key("gradient_accumulation_steps", POSITIVE, "1", "Micro-batches of one rank in one step."),
    key("epochs", POSITIVE, "1", "How often the data is seen."),
    optional("max_steps_per_epoch", POSITIVE, "Ends each epoch early."),
    required(
        "model",
        Type::Component(Role::Model),
        "What to train: the adapters of a `lora_` model, all weights of another.",
    ),
    required("checkpointer", Type::Component(Role::Checkpointer), "Where weights come from and go to."),
    key("resume_from_checkpoint", Type::Bool, "False", "Continue from the newest checkpoint of the output folder."),
    optional("resume_from", Type::Text, "A checkpoint to continue from, instead of the newest."),
    key(
        "save_adapter_weights_only",
        Type::Bool,
        "False",
        "Write the adapter without the merged model; not for a model that has none.",
    ),
    optional("save_every_n_steps", POSITIVE, "Checkpoint every this many steps, besides each epoch."),
    required("optimizer", Type::Component(Role::Optimizer), "How gradients change weights."),
    optional("lr_scheduler", Type::Component(Role::LrScheduler), "Learning rate over steps; constant when absent."),
    required(
        "loss",
        Type::Component(Role::Loss),
        "What is made small; also the path of a loss guest, whose settings the other keys are.",
    ),
    optional(
        "ref_checkpointer",
        Type::Component(Role::Checkpointer),
        "A frozen model to compare with: by default the trained one without its adapters, where it has some.",
    )
    .of_recipe(),
    optional("teacher_model", Type::Component(Role::Model), "What to learn from.").of_recipe(),
    optional("teacher_checkpointer", Type::Component(Role::Checkpointer), "Where its weights are.").of_recipe(),
    optional("kd_loss", Type::Component(Role::DistillationLoss), "How far a student is from its teacher.").of_recipe(),
    key("kd_ratio", FRACTION, "0.5", "The share of `kd_loss`; `loss` has the rest.").of_recipe(),
    optional("clip_grad_norm", Type::Any, "Largest gradient norm; `inf` logs it and clips nothing."),
    DEVICE,
    DTYPE,
    optional(
        "metric_logger",
        Type::Component(Role::MetricLogger),
        "Where metrics go; a file in `${output_dir}/logs` when absent.",
    ),
    key("log_every_n_steps", POSITIVE, "1", "Log metrics every this many steps."),
    key("log_peak_memory_stats", Type::Bool, "False", "Log peak device memory with the metrics."),
    key("log_level", Type::OneOf(LOG_LEVELS), "INFO", "How much the log says."),
    key("enable_activation_checkpointing", Type::Bool, "False", "Compute activations again instead of keeping them."),
    optional("ac_mode", Type::OneOf(&["none", "full", "selective"]), "`selective`: only every `ac_option`-th block's."),
    optional("ac_option", Type::Any, "`ac_mode: selective`: a number of blocks."),
    key("fsdp_cpu_offload", Type::Bool, "False", "Keep shards in the machine's memory; shards what is not sharded."),
    key(
        "fsdp_reshard_after_forward",
        Type::Bool,
        "True",
        "Free a gathered block after its forward and gather it again for backward.",
    ),
    key(
        "data_parallel_shard_dim",
        ANY_NUMBER,
        "-1",
        "Ranks that share one copy of the model; -1: as many as there are for one.",
    ),
    optional(
        "data_parallel_replicate_dim",
        POSITIVE,
        "Copies of the model, each shared by its ranks; without it one, or with `parallel: auto` one on each machine.",
    ),
    // Ours.
    key(
        "parallel",
        Type::OneOf(&["auto", "replicate", "shard"]),
        "auto",
        "Whether each rank has the whole model, or a share of it; `auto`: the fastest that fits.",
    ),
    key(
        "layout",
        Type::OneOf(&["varlen", "padded"]),
        "varlen",
        "How the samples of a micro-batch are laid out; results are the same.",
    ),
    optional(
        "tokens_per_microbatch",
        POSITIVE,
        "`varlen`: most tokens of one forward; by default batch_size times max_seq_len.",
    ),
    optional("compat", Type::OneOf(&["torchtune"]), "`torchtune`: its data order, adapters and moments in `dtype`."),
    optional("recipe", Type::Settings, "A mapping of settings for the recipe."),
    LIMITS_KEY,
    ISOLATE,
    CACHE_DIR,
    // Nothing to do here.
    key("compile", Type::Any, "False", "torch.compile.").satisfied(COMPILE_PARTS),
    key("enable_activation_offloading", Type::Bool, "False", "Keep activations in CPU memory.")
        .satisfied("it changes memory and speed, never a result"),
    key("activation_offloading_use_streams", Type::Bool, "True", "Overlap offloading.")
        .satisfied("nothing is offloaded"),
    key("low_cpu_ram", Type::Bool, "False", "Save with less memory.")
        .satisfied("weights are always streamed from a memory map"),
    key("enable_async_checkpointing", Type::Bool, "False", "Write checkpoints in the background.")
        .satisfied("they always are, from a copy of what is trained"),
    key(
        "distributed_backend",
        Type::OneOf(&["auto", "nccl", "gloo"]),
        "auto",
        "What moves tensors between ranks: `nccl` is RCCL on ROCm, `gloo` goes through host memory.",
    ),
    key(
        "collective_timeout_seconds",
        Type::Number { min: 0.001, max: 1e9 },
        "1800.0",
        "How long ranks wait for one that does not come; it may be reading data or writing the last checkpoint.",
    ),
    optional("fsdp", Type::Any, "v0.2.1: settings of FSDP.").satisfied(SHARDED_BY_BLOCK),
    optional("custom_sharded_layers", Type::Texts, "Layers sharded apart.").satisfied(SHARDED_BY_BLOCK),
    key("memory_efficient_fsdp_wrap", Type::Bool, "False", "Embedding and output sharded apart.")
        .satisfied(SHARDED_BY_BLOCK),
    key(
        "collate_fn",
        Type::OneOf(&["torchtune.data.padded_collate_sft"]),
        "torchtune.data.padded_collate_sft",
        "How samples form a batch.",
    )
    .satisfied("`layout` decides how samples are laid out"),
    optional("profiler", Type::Component(Role::Profiler), "torch.profiler."),
    // One value only.
    key("optimizer_in_bwd", Type::Bool, "False", "Update inside the backward pass.")
        .fixed("it gives up clipping and accumulation"),
    key("resize_token_embeddings", Type::Bool, "False", "Grow the vocabulary.")
        .fixed("the vocabulary is the checkpoint's"),
    key("enable_fp8_training", Type::Bool, "False", "Train in 8 bits.").fixed(NOT_YET),
    optional("fp8_recipe_name", Type::Any, "Kind of 8-bit training.").class(Class::Refused(NOT_YET)),
    key("tensor_parallel_dim", POSITIVE, "1", "Ranks that split each layer.")
        .fixed("every rank has the whole model; start more ranks instead"),
    refused("tensor_parallel_plan", "every rank has the whole model"),
    key("context_parallel_dim", POSITIVE, "1", "Ranks that split each sequence.")
        .fixed("every rank takes whole sequences"),
    key("context_parallel_rotate_method", Type::Text, "allgather", "How context parallel ranks talk.")
        .satisfied("sequences are not split"),
    refused("cudnn_deterministic_mode", "deterministic kernels cannot be demanded yet"),
    optional("batch_size_val", POSITIVE, "Samples of one rank in one batch of validation.")
        .satisfied("validation takes whole samples by a token budget, and the mean is over their tokens"),
];

/// A file of `host plan --hardware`.
pub const HARDWARE: &[Key] = &[
    required("name", Type::Text, "What tables call it."),
    key("device", Type::OneOf(&["cpu", "cuda"]), "cuda", "What computes; `cuda` is ROCm too."),
    required("devices_per_node", POSITIVE, "Devices of one machine; 1 where its cores are the device."),
    required("memory_gb", RATE, "Memory of a device, in GB (10^9 bytes); of the machine where that is the device."),
    key("host_memory_gb", RATE, "512", "Memory of the machine, for `fsdp_cpu_offload`."),
    required("tflops", RATE, "What matrix products of the run reach, in TFLOP/s; far below what a data sheet says."),
    required("link_gb_s", RATE, "What a device receives from the others of its machine, in GB/s."),
    key("node_link_gb_s", RATE, "3", "What a device receives from other machines, in GB/s."),
    key("disk_gb_s", RATE, "1", "What is read and written by one process, in GB/s."),
];

pub const GENERATE: &[Key] = &[
    optional("output_dir", Type::Text, OUTPUT_DIR).satisfied("generation writes to the terminal"),
    required("model", Type::Component(Role::Model), "What to run."),
    required("checkpointer", Type::Component(Role::Checkpointer), "Where the weights are."),
    optional("adapter_dir", Type::Text, "A PEFT adapter folder to apply."),
    required("tokenizer", Type::Component(Role::Tokenizer), "How text becomes tokens."),
    required("prompt", Type::Any, "A text as it is, or `{system, user}` for the tokenizer's template."),
    key("max_new_tokens", POSITIVE, "300", "Most tokens to write."),
    key(
        "temperature",
        Type::Number { min: 0.0, max: f64::INFINITY },
        "0.6",
        "Flattens (above 1) or sharpens the choice.",
    ),
    optional("top_k", POSITIVE, "Choose among this many; 1 is greedy, null is all."),
    key("enable_kv_cache", Type::Bool, "True", "Keep keys and values of earlier tokens."),
    key("echo_prompt", Type::Bool, "True", "Print the prompt before what follows it."),
    optional("seed", SEED, "Decides the choices; null draws one."),
    DEVICE,
    DTYPE,
    LIMITS_KEY,
    ISOLATE,
    key("compile", Type::Any, "False", "torch.compile.").satisfied(COMPILE_PARTS),
    optional("quantizer", Type::Component(Role::Quantizer), "Run a quantised model.").class(Class::Refused(NOT_YET)),
    refused("instruct_template", "it is `tokenizer.prompt_template` now"),
    refused("chat_format", "it is `tokenizer.prompt_template` now"),
];
