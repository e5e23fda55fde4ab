//! What torchtune's users look for and do not find yet: each of its recipes and configs, and where on the road it is.

/// A recipe of torchtune's, or some of its configs, that is not there yet.
#[derive(Debug)]
pub struct NotYet {
    pub recipe: &'static str,
    pub configs: &'static [&'static str],
    /// The part of the road (README), and what it will bring.
    pub road: &'static str,
}

const fn not_yet_of(recipe: &'static str, configs: &'static [&'static str], road: &'static str) -> NotYet {
    NotYet { recipe, configs, road }
}

const QLORA: &str = "breadth: a 4-bit base (QLoRA)";
const QAT: &str = "breadth: quantisation-aware training";
const GEMMA: &str = "breadth: the Gemma family";
const PHI: &str = "breadth: the Phi family";
const REWARDS: &str = "breadth: training by rewards";
const MULTIMODAL: &str = "breadth: images";
const DORA: &str = "breadth: DoRA";
const OPTIMIZERS: &str = "breadth: optimizers that page or keep 8 bits";
const EVALUATION: &str = "breadth: evaluation";
const SHARDED: &str = "distribution: sharded models";

/// Recipes and configs of v0.2.1, and the recipes that came after it.
pub const NOT_YET: &[NotYet] = &[
    not_yet_of(
        "full_finetune_single_device",
        &[
            "llama2/7B_full_low_memory",
            "code_llama2/7B_full_low_memory",
            "llama3/8B_full_single_device",
            "mistral/7B_full_low_memory",
        ],
        OPTIMIZERS,
    ),
    not_yet_of("full_finetune_single_device", &["phi3/mini_full_low_memory"], PHI),
    not_yet_of("full_finetune_distributed", &["llama2/13B_full", "llama3/70B_full", "llama3_1/70B_full"], SHARDED),
    not_yet_of("full_finetune_distributed", &["gemma/2B_full", "gemma/7B_full"], GEMMA),
    not_yet_of("full_finetune_distributed", &["phi3/mini_full"], PHI),
    not_yet_of(
        "lora_finetune_single_device",
        &[
            "llama2/7B_qlora_single_device",
            "code_llama2/7B_qlora_single_device",
            "llama3/8B_qlora_single_device",
            "llama3_1/8B_qlora_single_device",
            "llama2/13B_qlora_single_device",
            "mistral/7B_qlora_single_device",
        ],
        QLORA,
    ),
    not_yet_of(
        "lora_finetune_single_device",
        &[
            "gemma/2B_lora_single_device",
            "gemma/2B_qlora_single_device",
            "gemma/7B_lora_single_device",
            "gemma/7B_qlora_single_device",
        ],
        GEMMA,
    ),
    not_yet_of("lora_finetune_single_device", &["phi3/mini_lora_single_device", "phi3/mini_qlora_single_device"], PHI),
    not_yet_of("lora_finetune_distributed", &["gemma/2B_lora", "gemma/7B_lora"], GEMMA),
    not_yet_of("lora_finetune_distributed", &["phi3/mini_lora"], PHI),
    not_yet_of("lora_finetune_distributed", &["llama3_1/405B_qlora"], QLORA),
    not_yet_of("lora_finetune_fsdp2", &["llama2/7B_qlora", "llama2/70B_qlora"], QLORA),
    not_yet_of("ppo_full_finetune_single_device", &["mistral/7B_full_ppo_low_memory"], REWARDS),
    not_yet_of("dev/grpo_full_finetune_distributed", &["dev/3B_full_grpo"], REWARDS),
    not_yet_of("dev/async_grpo_full_finetune_distributed", &["dev/qwen3B_async_grpo"], REWARDS),
    not_yet_of("qat_single_device", &["qwen2_5/1.5B_qat_single_device"], QAT),
    not_yet_of("qat_distributed", &["llama2/7B_qat_full", "llama3/8B_qat_full"], QAT),
    not_yet_of("qat_lora_finetune_distributed", &["llama3/8B_qat_lora"], QAT),
    not_yet_of("dev/early_exit_finetune_distributed", &["llama2/7B_full_early_exit"], "breadth: early exit"),
    not_yet_of("dev/lora_finetune_distributed_multi_dataset", &["dev/11B_lora_multi_dataset"], MULTIMODAL),
    not_yet_of("dev/generate_v2", &["llama3_2_vision/11B_generation_v2"], MULTIMODAL),
    not_yet_of("dev/generate_v2_distributed", &["llama3/70B_generation_distributed"], SHARDED),
    not_yet_of("eleuther_eval", &["eleuther_evaluation"], EVALUATION),
    not_yet_of("quantize", &["quantization"], "breadth: quantisation"),
];

/// Parts of the names of v0.6's other configs (`gemma2/9B_full`, `llama3_2/1B_qlora_single_device`), the telling ones first.
const LATER: &[(&str, &str)] = &[
    ("vision", MULTIMODAL),
    ("llama4/", MULTIMODAL),
    ("ppo", REWARDS),
    ("grpo", REWARDS),
    ("qat", QAT),
    ("evaluation", EVALUATION),
    ("generation", SHARDED),
    ("gemma", GEMMA),
    ("phi", PHI),
    ("qlora", QLORA),
    ("dora", DORA),
    ("low_memory", OPTIMIZERS),
    ("_full", SHARDED),
];

/// Where on the road something is, by the name of a recipe, of which nothing is there, or of a config.
pub fn not_yet(name: &str) -> Option<&'static str> {
    let name = name.strip_suffix(".yaml").unwrap_or(name);
    let is_named = |entry: &&NotYet| {
        entry.configs.contains(&name) || (entry.recipe == name && super::recipe(entry.recipe).is_none())
    };
    if let Some(entry) = NOT_YET.iter().find(is_named) {
        return Some(entry.road);
    }
    let (folder, file) = name.split_once('/')?;
    let of_torchtune = ["llama", "code_llama2", "mistral", "gemma", "phi", "qwen", "dev"];
    if file.contains('/') || !of_torchtune.iter().any(|family| folder.starts_with(family)) {
        return None;
    }
    LATER.iter().find(|(part, _)| name.contains(part)).map(|(_, road)| *road)
}
