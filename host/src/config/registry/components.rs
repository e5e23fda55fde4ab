//! The components: one row each, grouped by role.

use std::sync::LazyLock;

use super::keys::{LARGEST, POSITIVE};
use super::{Class, Component, Key, Role, Type, key, optional, refused, required};

const FRACTION: Type = Type::Number { min: 0.0, max: 1.0 };
const NOT_NEGATIVE: Type = Type::Number { min: 0.0, max: f64::INFINITY };
const COUNT: Type = Type::Count { min: 0, max: LARGEST };
const RANK: Type = Type::Count { min: 1, max: 65_536 };
const NOT_YET: &str = "not available yet";
const KERNEL_CHOICE: &str = "the host picks the kernel";

const LORA: &[Key] = &[
    required(
        "lora_attn_modules",
        Type::TextsOf(&["q_proj", "k_proj", "v_proj", "output_proj"]),
        "Attention layers that get an adapter.",
    ),
    key("apply_lora_to_mlp", Type::Bool, "False", "Adapters on gate, up and down projections."),
    key("apply_lora_to_output", Type::Bool, "False", "An adapter on the output head."),
    key("lora_rank", RANK, "8", "Inner size of an adapter."),
    key("lora_alpha", NOT_NEGATIVE, "16", "Scale: alpha divided by rank."),
    key("lora_dropout", FRACTION, "0.0", "Dropout before an adapter."),
    key("use_dora", Type::Bool, "False", "Weight-decomposed adapters.").fixed("DoRA is not available yet"),
    key("quantize_base", Type::Bool, "False", "A 4-bit base model.").fixed("a quantised base is not available yet"),
];

/// torchtune's builders by family and size. A name only says whether there are adapters; shapes come from the checkpoint's
/// `config.json`, so a size that is not listed here runs under any name of its family.
const MODELS: &[(&str, &[&str])] = &[
    ("llama2", &["llama2_7b", "llama2_13b", "llama2_70b"]),
    ("code_llama2", &["code_llama2_7b", "code_llama2_13b", "code_llama2_70b"]),
    ("llama3", &["llama3_8b", "llama3_70b"]),
    ("llama3_1", &["llama3_1_8b", "llama3_1_70b", "llama3_1_405b"]),
    ("llama3_2", &["llama3_2_1b", "llama3_2_3b"]),
    ("llama3_3", &["llama3_3_70b"]),
    ("mistral", &["mistral_7b"]),
    ("smollm2", &["smollm2_135m", "smollm2_360m", "smollm2_1_7b"]),
    ("qwen2", &["qwen2_0_5b", "qwen2_1_5b", "qwen2_7b"]),
    (
        "qwen2_5",
        &[
            "qwen2_5_0_5b",
            "qwen2_5_1_5b_base",
            "qwen2_5_1_5b_instruct",
            "qwen2_5_3b",
            "qwen2_5_7b_base",
            "qwen2_5_7b_instruct",
            "qwen2_5_14b_base",
            "qwen2_5_14b_instruct",
            "qwen2_5_32b_base",
            "qwen2_5_32b_instruct",
            "qwen2_5_72b_base",
            "qwen2_5_72b_instruct",
        ],
    ),
    (
        "qwen3",
        &[
            "qwen3_0_6b_base",
            "qwen3_0_6b_instruct",
            "qwen3_1_7b_base",
            "qwen3_1_7b_instruct",
            "qwen3_4b_base",
            "qwen3_4b_instruct",
            "qwen3_8b_base",
            "qwen3_8b_instruct",
            "qwen3_14b_base",
            "qwen3_14b_instruct",
            "qwen3_32b",
        ],
    ),
];

/// torchtune's names of the families that are built.
pub fn model_families() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(family, _)| *family)
}

/// Every component: the models, and the rest.
pub static ALL: LazyLock<Vec<Component>> = LazyLock::new(|| models().chain(OTHERS.iter().copied()).collect());

fn models() -> impl Iterator<Item = Component> {
    const WHOLE: &[&[Key]] = &[];
    const WITH_ADAPTERS: &[&[Key]] = &[LORA];
    let builders = MODELS.iter().flat_map(|(family, names)| names.iter().map(move |name| (Some(*family), *name)));
    std::iter::once((None, "llama")).chain(builders).flat_map(|(family, name)| {
        let component = move |prefix: &str, keys, refused: Option<&'static str>, doc: &str| {
            let name: &'static str = format!("{prefix}{name}").leak();
            let path = family.map(|family| -> &'static str { format!("torchtune.models.{family}.{name}").leak() });
            let aliases: &'static [&'static str] = Vec::from_iter(path).leak();
            Component { role: Role::Model, name, aliases, keys, refused, doc: format!("{name}, {doc}.").leak() }
        };
        const QUANTISED: &str = "a quantised base is not available yet; the `lora_` model of the same name is";
        [
            component("", WHOLE, None, "whole"),
            component("lora_", WITH_ADAPTERS, None, "with adapters"),
            component("qlora_", WHOLE, Some(QUANTISED), QUANTISED),
        ]
    })
}

const VOCABULARY: &[Key] =
    &[required("path", Type::Text, "tokenizer.json, tokenizer.model or vocab.json, or the folder that holds one.")];

const MESSAGES: &[Key] = &[
    optional("max_seq_len", POSITIVE, "Longer samples are cut to this many tokens."),
    optional(
        "prompt_template",
        Type::Template,
        "A template's name, a path to a .wasm or .rhai guest, or a role's texts: `{user: [before, after]}`.",
    ),
    key("truncation_type", Type::OneOf(&["right", "left"]), "right", "Which end of a long sample goes."),
];

const SOURCE: &str = "A folder, a hub data set `org/name`, or `json`, `csv`, `parquet` or `text` with `data_files`.";
const SPECIAL_TOKENS: &[Key] =
    &[optional("special_tokens_path", Type::Text, "A file whose `added_tokens` follow the vocabulary.")];
const MERGES: &[Key] = &[optional("merges_file", Type::Text, "The merges of a vocab.json.")];

const NO_SPECIAL_TOKENS: &[Key] = &[refused("special_tokens_path", "the vocabulary file has its special tokens")];
const NO_MERGES: &[Key] = &[refused("merges_file", "the vocabulary file has its merges")];

const HUGGING_FACE_MODEL: &[Key] = &[
    required("tokenizer_json_path", Type::Text, "tokenizer.json."),
    optional("tokenizer_config_json_path", Type::Text, "By default the tokenizer_config.json beside it."),
    optional("generation_config_path", Type::Text, "By default the generation_config.json beside it."),
];

const fn tokenizer(
    name: &'static str,
    aliases: &'static [&'static str],
    keys: &'static [&'static [Key]],
    doc: &'static str,
) -> Component {
    Component { role: Role::Tokenizer, name, aliases, keys, refused: None, doc }
}

const OLD_LENGTH: Key = optional("max_seq_len", POSITIVE, "v0.2.1: what `tokenizer.max_seq_len` is now.");
const TRAIN_ON_INPUT: Key = key("train_on_input", Type::Bool, "False", "Whether the prompt carries loss.");
const NEW_SYSTEM_PROMPT: Key =
    optional("new_system_prompt", Type::Text, "A system message, in place of any that the rows have.");
const CHAT_FORMAT: Key =
    optional("chat_format", Type::Template, "v0.2.1: a template of this data set; its text is one piece.");

const fn source(default: &'static str) -> Key {
    key("source", Type::Text, default, SOURCE)
}

const INSTRUCT: &[Key] = &[
    required("source", Type::Text, SOURCE),
    TRAIN_ON_INPUT,
    optional("template", Type::Template, "v0.2.1: a template of this data set; its text is one piece."),
    NEW_SYSTEM_PROMPT,
    OLD_LENGTH,
];
const SAMSUM: &[Key] = &[source("Samsung/samsum"), TRAIN_ON_INPUT, NEW_SYSTEM_PROMPT];
const GRAMMAR: &[Key] = &[source("liweili/c4_200m"), TRAIN_ON_INPUT, NEW_SYSTEM_PROMPT];

const ALPACA: &[Key] = &[
    source("tatsu-lab/alpaca"),
    key("train_on_input", Type::Bool, "True", "Whether the prompt carries loss."),
    OLD_LENGTH,
];
const ALPACA_CLEANED: &[Key] = &[
    source("yahma/alpaca-cleaned"),
    key("train_on_input", Type::Bool, "True", "Whether the prompt carries loss."),
    OLD_LENGTH,
];

const CHAT: &[Key] = &[
    required("source", Type::Text, SOURCE),
    required(
        "conversation_style",
        Type::OneOf(&["sharegpt", "openai"]),
        "How a turn says whose it is, and which tools it calls.",
    ),
    optional("conversation_column", Type::Text, "The column of conversations; `conversations` or `messages` by style."),
    TRAIN_ON_INPUT,
    NEW_SYSTEM_PROMPT,
    CHAT_FORMAT,
    OLD_LENGTH,
    refused("column_map", "give `conversation_column`"),
];
const SLIMORCA: &[Key] = &[
    source("Open-Orca/SlimOrca-Dedup"),
    TRAIN_ON_INPUT,
    NEW_SYSTEM_PROMPT,
    CHAT_FORMAT,
    OLD_LENGTH,
    optional("column_map", Type::Any, "`{conversations: COLUMN}`."),
];

const PAIR_TEMPLATE: Key = optional(
    "template",
    Type::Template,
    "A template that makes pairs; it reads `chosen` and `rejected`, and `prompt` where `column_map` names one.",
);
const PREFERENCE: &[Key] =
    &[required("source", Type::Text, SOURCE), TRAIN_ON_INPUT, PAIR_TEMPLATE, NEW_SYSTEM_PROMPT, OLD_LENGTH];
const HH_RLHF: &[Key] =
    &[source("RLHFlow/HH-RLHF-Helpful-standard"), TRAIN_ON_INPUT, PAIR_TEMPLATE, NEW_SYSTEM_PROMPT, OLD_LENGTH];
const STACK_EXCHANGE: &[Key] =
    &[source("lvwerra/stack-exchange-paired"), TRAIN_ON_INPUT, PAIR_TEMPLATE, NEW_SYSTEM_PROMPT, OLD_LENGTH];

/// Of data sets whose rows are columns.
const COLUMNS: &[Key] = &[optional("column_map", Type::Any, "Names the template knows to the columns of the data.")];

const TEXT: &[Key] = &[
    required("source", Type::Text, SOURCE),
    key("column", Type::Text, "text", "The column of texts."),
    key("add_eos", Type::Bool, "True", "Whether EOS ends a text."),
    SPLIT_ACROSS_PACK,
    OLD_LENGTH,
];
const WIKITEXT: &[Key] = &[
    source("EleutherAI/wikitext_document_level"),
    key("subset", Type::Text, "wikitext-103-v1", "The subset."),
    SPLIT_ACROSS_PACK,
    OLD_LENGTH,
];
const CNN_DAILYMAIL: &[Key] = &[source("ccdv/cnn_dailymail"), SPLIT_ACROSS_PACK, OLD_LENGTH];
const SPLIT_ACROSS_PACK: Key =
    key("split_across_pack", Type::Bool, "True", "A text that does not fit a pack goes on in the next.");

/// Of data sets that say which subset they take.
const SUBSET: &[Key] = &[optional("name", Type::Text, "The subset of a hub data set.")];

/// Of every data set.
const ROWS: &[Key] = &[
    optional("data_files", Type::Any, "A file, a list of files, or a mapping of split to files."),
    optional("field", Type::Text, "The field of a `json` file that holds the list of rows."),
    optional("revision", Type::Text, "The branch, tag or commit of a hub data set."),
    key("split", Type::Text, "train", "Which rows: `train`, `train[:2000]`, `train[90%:]+test`."),
    key("on_bad_row", Type::OneOf(&["error", "skip"]), "error", "What a row that cannot be used does."),
    key("packed", Type::Bool, "False", "Samples in packs of `tokenizer.max_seq_len` tokens; a batch counts packs."),
    key("trust_remote_code", Type::Bool, "False", "Run code of the data set.")
        .satisfied("no code of a data set is ever run"),
    refused("filter_fn", "a config cannot name code; let the template skip rows"),
    refused("data_dir", "give `data_files`"),
];

const CHECKPOINTER: &[Key] = &[
    required("checkpoint_dir", Type::Text, "The model's folder; never written to."),
    optional("checkpoint_files", Type::Any, "Weight files; by default what the folder's index says."),
    optional("output_dir", Type::Text, "Where checkpoints go; `${output_dir}` by default."),
    optional("keep_last_n_checkpoints", POSITIVE, "Older checkpoints are removed."),
    optional("model_type", Type::Text, "The model's family.")
        .satisfied("the family comes from the checkpoint's config.json"),
    key("safe_serialization", Type::Bool, "True", "Write safetensors.")
        .fixed("weights are always written as safetensors"),
    key("should_load_recipe_state", Type::Bool, "False", "Resume.")
        .fixed("`resume_from_checkpoint` says whether to resume"),
    key("resume_from_checkpoint", Type::Bool, "False", "Resume.")
        .fixed("`resume_from_checkpoint` belongs to the top level"),
    key("enable_dcp", Type::Bool, "False", "Distributed checkpoints.").fixed("checkpoints are safetensors"),
    optional(
        "adapter_checkpoint",
        Type::Text,
        "An adapter to start from: torchtune's `adapter_model.pt` of the model's folder, or PEFT's folder.",
    ),
    refused(
        "recipe_checkpoint",
        "torchtune's optimizer state is not read; `adapter_checkpoint` alone starts a run from its adapter",
    ),
];

const ADAMW: &[Key] = &[
    key("lr", NOT_NEGATIVE, "1e-3", "Learning rate, before the schedule."),
    key("betas", Type::Any, "[0.9, 0.999]", "Decay of the two moments."),
    key("eps", NOT_NEGATIVE, "1e-8", "Keeps the division finite."),
    key("weight_decay", NOT_NEGATIVE, "0.01", "Decoupled weight decay."),
    key(
        "fp32_master_weights",
        Type::Bool,
        "False",
        "Update fp32 copies of bf16 weights, with fp32 moments: nothing is lost, for 8 to 12 bytes a weight more.",
    ),
    key(
        "bf16_stochastic_round",
        Type::Bool,
        "False",
        "Round updates of bf16 weights up or down at random: small ones count on average, with fp32 moments.",
    ),
    optional("fused", Type::Bool, "One kernel for all weights.").satisfied(KERNEL_CHOICE),
    optional("foreach", Type::Bool, "One call for many weights.").satisfied(KERNEL_CHOICE),
    key("capturable", Type::Bool, "False", "For CUDA graphs.").satisfied(KERNEL_CHOICE),
    key("amsgrad", Type::Bool, "False", "Largest second moment.").fixed(NOT_YET),
    key("maximize", Type::Bool, "False", "Climb instead.").fixed("a loss is made small"),
    key("differentiable", Type::Bool, "False", "Gradients through the update.").fixed("updates have no gradient"),
];

const COSINE: &[Key] = &[
    required("num_warmup_steps", COUNT, "Steps from 0 to the full rate."),
    key("num_cycles", NOT_NEGATIVE, "0.5", "Waves of the cosine; 0.5 ends at 0."),
];

const CHUNKED_LOSS: &[Key] = &[
    key("num_output_chunks", POSITIVE, "8", "Pieces in which label positions are projected to the vocabulary."),
    key("ignore_index", Type::Any, "-100", "The label without loss.").fixed("labels without loss are -100"),
    key("tiled_mm", Type::Bool, "False", "Tiled projection.").satisfied(KERNEL_CHOICE),
    key("mask_ignored_tokens", Type::Bool, "True", "Leave positions without loss out early.")
        .satisfied("they are always left out"),
];

const PLAIN_LOSS: &[Key] = &[
    key("ignore_index", Type::Any, "-100", "The label without loss.").fixed("labels without loss are -100"),
    key("reduction", Type::OneOf(&["mean", "sum", "none"]), "mean", "How positions are summed up.")
        .fixed("the loss is the mean over the label tokens of a step"),
    key("label_smoothing", FRACTION, "0.0", "Share of probability spread over the vocabulary.").fixed(NOT_YET),
    refused("weight", NOT_YET),
];

const DPO_LOSS: &[Key] = &[
    key("beta", NOT_NEGATIVE, "0.1", "How strongly the policy is held to the reference.").of_recipe(),
    key("label_smoothing", Type::Number { min: 0.0, max: 0.5 }, "0.0", "Share of labels taken to be wrong.")
        .of_recipe(),
    key("loss_type", Type::OneOf(&["sigmoid", "hinge", "ipo", "kto_pair"]), "sigmoid", "v0.2.1: which loss.")
        .of_recipe(),
];

const KL_LOSS: &[Key] = &[
    key("num_output_chunks", POSITIVE, "8", "Pieces in which label positions are projected to the vocabulary.")
        .of_recipe(),
    key("ignore_index", Type::Any, "-100", "The label without loss.").fixed("labels without loss are -100"),
];
const SYMMETRIC_KL_LOSS: &[Key] =
    &[key("sym_kd_ratio", FRACTION, "0.5", "The share of the forward direction.").of_recipe()];

const DISK: &[Key] = &[
    optional("log_dir", Type::Text, "The folder of the log; `${output_dir}/logs` by default."),
    key("output_fmt", Type::OneOf(&["txt", "jsonl"]), "txt", "Lines of text, or of JSON."),
    optional("filename", Type::Text, "The log's name; by default with the time in it."),
];

const TENSORBOARD: &[Key] = &[
    optional("log_dir", Type::Text, "The folder of the event files; `${output_dir}/logs` by default."),
    key("organize_logs", Type::Bool, "True", "Each run in a folder of its own below it."),
];

const PROFILER_OFF: &str = "the profiler is off";

const PROFILER: &[Key] = &[
    key("enabled", Type::Bool, "False", "Record a trace.").fixed("there is no profiler yet"),
    optional("output_dir", Type::Text, "Where traces go.").class(Class::Quiet(PROFILER_OFF)),
    key("cpu", Type::Bool, "True", "Trace the CPU.").class(Class::Quiet(PROFILER_OFF)),
    key("cuda", Type::Bool, "True", "Trace the GPU.").class(Class::Quiet(PROFILER_OFF)),
    key("xpu", Type::Bool, "True", "Trace the GPU.").class(Class::Quiet(PROFILER_OFF)),
    key("hpu", Type::Bool, "True", "Trace the GPU.").class(Class::Quiet(PROFILER_OFF)),
    key("profile_memory", Type::Bool, "False", "Trace memory.").class(Class::Quiet(PROFILER_OFF)),
    key("with_stack", Type::Bool, "False", "Trace with stacks.").class(Class::Quiet(PROFILER_OFF)),
    key("record_shapes", Type::Bool, "True", "Trace with shapes.").class(Class::Quiet(PROFILER_OFF)),
    key("with_flops", Type::Bool, "False", "Trace with FLOPs.").class(Class::Quiet(PROFILER_OFF)),
    optional("wait_steps", COUNT, "Steps before tracing.").class(Class::Quiet(PROFILER_OFF)),
    optional("warmup_steps", COUNT, "Steps before tracing.").class(Class::Quiet(PROFILER_OFF)),
    optional("active_steps", COUNT, "Steps traced.").class(Class::Quiet(PROFILER_OFF)),
    optional("num_cycles", COUNT, "Rounds of tracing.").class(Class::Quiet(PROFILER_OFF)),
];

const fn dataset(
    name: &'static str,
    aliases: &'static [&'static str],
    keys: &'static [&'static [Key]],
    doc: &'static str,
) -> Component {
    Component { role: Role::Dataset, name, aliases, keys, refused: None, doc }
}

/// Whatever the name, the files say which layout they have.
const fn checkpointer(name: &'static str, aliases: &'static [&'static str], doc: &'static str) -> Component {
    Component { role: Role::Checkpointer, name, aliases, keys: &[CHECKPOINTER], refused: None, doc }
}

const fn template(name: &'static str, aliases: &'static [&'static str], doc: &'static str) -> Component {
    Component { role: Role::Template, name, aliases, keys: &[], refused: None, doc }
}

/// A component torchtune has and we refuse, with the reason.
const fn not_yet(role: Role, name: &'static str, aliases: &'static [&'static str], why: &'static str) -> Component {
    Component { role, name, aliases, keys: &[], refused: Some(why), doc: why }
}

const OTHERS: &[Component] = &[
    // Tokenizers.
    tokenizer(
        "hf_tokenizer",
        &[],
        &[VOCABULARY, MESSAGES, NO_SPECIAL_TOKENS, NO_MERGES],
        "The template's text between the vocabulary's start and end tokens.",
    ),
    tokenizer(
        "llama3_tokenizer",
        &["torchtune.models.llama3.llama3_tokenizer"],
        &[VOCABULARY, MESSAGES, SPECIAL_TOKENS, NO_MERGES],
        "Llama 3's messages: a header with the role, `<|eot_id|>` at the end.",
    ),
    tokenizer(
        "llama2_tokenizer",
        &["torchtune.models.llama2.llama2_tokenizer"],
        &[VOCABULARY, MESSAGES, NO_SPECIAL_TOKENS, NO_MERGES],
        "Llama 2's turns: `[INST]` around the question, by default; `</s>` after the answer.",
    ),
    tokenizer(
        "mistral_tokenizer",
        &["torchtune.models.mistral.mistral_tokenizer"],
        &[VOCABULARY, MESSAGES, NO_SPECIAL_TOKENS, NO_MERGES],
        "Mistral's turns, as Llama 2's, without a system message.",
    ),
    tokenizer(
        "qwen2_tokenizer",
        &["torchtune.models.qwen2.qwen2_tokenizer"],
        &[VOCABULARY, MESSAGES, SPECIAL_TOKENS, MERGES],
        "Qwen 2's messages: `<|im_start|>role`, `<|im_end|>`.",
    ),
    tokenizer(
        "qwen2_5_tokenizer",
        &["torchtune.models.qwen2_5.qwen2_5_tokenizer"],
        &[VOCABULARY, MESSAGES, SPECIAL_TOKENS, MERGES],
        "Qwen 2.5's messages, tool calls and their answers among them.",
    ),
    tokenizer(
        "qwen3_tokenizer",
        &["torchtune.models.qwen3.qwen3_tokenizer"],
        &[VOCABULARY, MESSAGES, SPECIAL_TOKENS, MERGES],
        "Qwen 3's messages, as Qwen 2.5's.",
    ),
    tokenizer(
        "HuggingFaceModelTokenizer",
        &["torchtune.modules.transforms.tokenizers.HuggingFaceModelTokenizer"],
        &[HUGGING_FACE_MODEL, MESSAGES],
        "The chat template of the checkpoint.",
    ),
    not_yet(
        Role::Tokenizer,
        "phi3_mini_tokenizer",
        &["torchtune.models.phi3.phi3_mini_tokenizer"],
        "models of the Phi family are not built yet",
    ),
    not_yet(
        Role::Tokenizer,
        "phi4_tokenizer",
        &["torchtune.models.phi4.phi4_tokenizer"],
        "models of the Phi family are not built yet",
    ),
    not_yet(
        Role::Tokenizer,
        "gemma_tokenizer",
        &["torchtune.models.gemma.gemma_tokenizer"],
        "models of the Gemma family are not built yet",
    ),
    // Templates: names of guests.
    template(
        "summarize",
        &["SummarizeTemplate", "torchtune.data.SummarizeTemplate"],
        "`Summarize this dialogue:` before what is asked, `Summary:` after it.",
    ),
    template(
        "alpaca",
        &["AlpacaInstructTemplate", "torchtune.data.AlpacaInstructTemplate"],
        "Alpaca's preamble, `### Instruction:`, perhaps `### Input:`, and `### Response:`.",
    ),
    template(
        "grammar",
        &["GrammarErrorCorrectionTemplate", "torchtune.data.GrammarErrorCorrectionTemplate"],
        "`Correct this to standard English:` before what is asked, `Corrected:` after it.",
    ),
    template(
        "question_answer",
        &[
            "QuestionAnswerTemplate",
            "torchtune.data.QuestionAnswerTemplate",
            "StackExchangedPairedTemplate",
            "torchtune.data.StackExchangedPairedTemplate",
        ],
        "`Question:` before what is asked, `Answer:` after it.",
    ),
    template(
        "chatml",
        &["ChatMLTemplate", "torchtune.data.ChatMLTemplate", "ChatMLFormat", "torchtune.data.ChatMLFormat"],
        "`<|im_start|>role` before a message, `<|im_end|>` after it.",
    ),
    template(
        "llama2_chat",
        &[
            "Llama2ChatTemplate",
            "torchtune.models.llama2.Llama2ChatTemplate",
            "torchtune.data.Llama2ChatTemplate",
            "Llama2ChatFormat",
            "torchtune.data.Llama2ChatFormat",
        ],
        "`[INST]` around a question, the system's message inside the first.",
    ),
    template(
        "mistral_chat",
        &[
            "MistralChatTemplate",
            "torchtune.models.mistral.MistralChatTemplate",
            "torchtune.data.MistralChatTemplate",
            "MistralChatFormat",
            "torchtune.data.MistralChatFormat",
        ],
        "`[INST]` around a question; there is no system's message.",
    ),
    // Data sets.
    dataset(
        "instruct_dataset",
        &["torchtune.datasets.instruct_dataset"],
        &[INSTRUCT, COLUMNS, SUBSET, ROWS],
        "Rows of an input and an output.",
    ),
    dataset(
        "alpaca_dataset",
        &["torchtune.datasets.alpaca_dataset"],
        &[ALPACA, COLUMNS, SUBSET, ROWS],
        "Rows of an instruction, perhaps an input, and an output, in Alpaca's words.",
    ),
    dataset(
        "alpaca_cleaned_dataset",
        &["torchtune.datasets.alpaca_cleaned_dataset"],
        &[ALPACA_CLEANED, COLUMNS, SUBSET, ROWS],
        "`alpaca_dataset` over the cleaned rows.",
    ),
    dataset(
        "samsum_dataset",
        &["torchtune.datasets.samsum_dataset"],
        &[SAMSUM, COLUMNS, SUBSET, ROWS],
        "Dialogues and their summaries.",
    ),
    dataset(
        "grammar_dataset",
        &["torchtune.datasets.grammar_dataset"],
        &[GRAMMAR, COLUMNS, SUBSET, ROWS],
        "Sentences and their corrections.",
    ),
    dataset(
        "chat_dataset",
        &["torchtune.datasets.chat_dataset"],
        &[CHAT, SUBSET, ROWS],
        "Rows that hold a conversation.",
    ),
    dataset(
        "slimorca_dataset",
        &["torchtune.datasets.slimorca_dataset"],
        &[SLIMORCA, SUBSET, ROWS],
        "`chat_dataset` over SlimOrca.",
    ),
    dataset(
        "text_completion_dataset",
        &["torchtune.datasets.text_completion_dataset"],
        &[TEXT, SUBSET, ROWS],
        "Texts to be continued, without messages.",
    ),
    dataset(
        "wikitext_dataset",
        &["torchtune.datasets.wikitext_dataset"],
        &[WIKITEXT, ROWS],
        "`text_completion_dataset` over Wikipedia's articles.",
    ),
    dataset(
        "cnn_dailymail_articles_dataset",
        &["torchtune.datasets.cnn_dailymail_articles_dataset"],
        &[CNN_DAILYMAIL, ROWS],
        "`text_completion_dataset` over news.",
    ),
    dataset(
        "preference_dataset",
        &["torchtune.datasets.preference_dataset"],
        &[PREFERENCE, COLUMNS, SUBSET, ROWS],
        "Pairs of a better and a worse answer: two conversations in OpenAI's form.",
    ),
    dataset(
        "hh_rlhf_helpful_dataset",
        &["torchtune.datasets.hh_rlhf_helpful_dataset"],
        &[HH_RLHF, COLUMNS, SUBSET, ROWS],
        "`preference_dataset` over HH-RLHF's helpful half.",
    ),
    dataset(
        "stack_exchange_paired_dataset",
        &[
            "torchtune.datasets.stack_exchange_paired_dataset",
            "stack_exchanged_paired_dataset",
            "torchtune.datasets.stack_exchanged_paired_dataset",
        ],
        &[STACK_EXCHANGE, COLUMNS, SUBSET, ROWS],
        "A question with a better and a worse answer, each a text.",
    ),
    not_yet(
        Role::Dataset,
        "multimodal_chat_dataset",
        &[
            "torchtune.datasets.multimodal.multimodal_chat_dataset",
            "torchtune.datasets.multimodal.the_cauldron_dataset",
            "torchtune.datasets.multimodal.llava_instruct_dataset",
            "torchtune.datasets.multimodal.vqa_dataset",
        ],
        "images are not read yet",
    ),
    // Checkpointers.
    checkpointer(
        "FullModelHFCheckpointer",
        &["torchtune.training.FullModelHFCheckpointer", "torchtune.utils.FullModelHFCheckpointer"],
        "Weights in the Hugging Face layout.",
    ),
    checkpointer(
        "FullModelMetaCheckpointer",
        &["torchtune.training.FullModelMetaCheckpointer", "torchtune.utils.FullModelMetaCheckpointer"],
        "Weights in Meta's layout (`consolidated.00.pth`); checkpoints are in the Hugging Face layout.",
    ),
    checkpointer(
        "FullModelTorchTuneCheckpointer",
        &["torchtune.training.FullModelTorchTuneCheckpointer", "torchtune.utils.FullModelTorchTuneCheckpointer"],
        "Weights under torchtune's own names; checkpoints are in the Hugging Face layout.",
    ),
    // Optimizers.
    Component {
        role: Role::Optimizer,
        name: "AdamW",
        aliases: &["adamw", "torch.optim.AdamW"],
        keys: &[ADAMW],
        refused: None,
        doc: "Adam with decoupled weight decay.",
    },
    not_yet(Role::Optimizer, "Adam", &["torch.optim.Adam"], "only `AdamW` is there yet"),
    not_yet(Role::Optimizer, "SGD", &["torch.optim.SGD"], "only `AdamW` is there yet"),
    not_yet(Role::Optimizer, "PagedAdamW8bit", &["bitsandbytes.optim.PagedAdamW8bit"], "only `AdamW` is there yet"),
    // Schedules.
    Component {
        role: Role::LrScheduler,
        name: "cosine",
        aliases: &[
            "get_cosine_schedule_with_warmup",
            "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "torchtune.training.get_cosine_schedule_with_warmup",
            "torchtune.modules.get_cosine_schedule_with_warmup",
            "torchtune.modules.lr_schedulers.get_cosine_schedule_with_warmup",
        ],
        keys: &[COSINE],
        refused: None,
        doc: "Linear warm-up, then half a cosine.",
    },
    // Losses.
    Component {
        role: Role::Loss,
        name: "cross_entropy",
        aliases: &[
            "LinearCrossEntropyLoss",
            "CEWithChunkedOutputLoss",
            "torchtune.modules.loss.LinearCrossEntropyLoss",
            "torchtune.modules.loss.CEWithChunkedOutputLoss",
        ],
        keys: &[CHUNKED_LOSS],
        refused: None,
        doc: "Cross-entropy at label positions, projected in pieces.",
    },
    Component {
        role: Role::Loss,
        name: "CrossEntropyLoss",
        aliases: &["torch.nn.CrossEntropyLoss"],
        keys: &[PLAIN_LOSS],
        refused: None,
        doc: "Cross-entropy at label positions.",
    },
    Component {
        role: Role::Loss,
        name: "DPOLoss",
        aliases: &[
            "torchtune.rlhf.loss.DPOLoss",
            "torchtune.modules.loss.DPOLoss",
            "torchtune.modules.rlhf.loss.DPOLoss",
        ],
        keys: &[DPO_LOSS],
        refused: None,
        doc: "How much more the better answer is preferred than by the reference; for recipes of preferences.",
    },
    not_yet(
        Role::Loss,
        "RSOLoss",
        &["torchtune.rlhf.loss.RSOLoss", "torchtune.modules.rlhf.loss.RSOLoss"],
        "`DPOLoss` with `loss_type: hinge` is it, `beta` its `gamma`",
    ),
    // Distillation losses.
    Component {
        role: Role::DistillationLoss,
        name: "ForwardKLLoss",
        aliases: &[
            "torchtune.modules.loss.ForwardKLLoss",
            "ForwardKLWithChunkedOutputLoss",
            "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss",
        ],
        keys: &[KL_LOSS],
        refused: None,
        doc: "The student's cross-entropy under the teacher's probabilities.",
    },
    Component {
        role: Role::DistillationLoss,
        name: "ReverseKLLoss",
        aliases: &[
            "torchtune.modules.loss.ReverseKLLoss",
            "ReverseKLWithChunkedOutputLoss",
            "torchtune.modules.loss.ReverseKLWithChunkedOutputLoss",
        ],
        keys: &[KL_LOSS],
        refused: None,
        doc: "The divergence of the student from the teacher.",
    },
    Component {
        role: Role::DistillationLoss,
        name: "SymmetricKLLoss",
        aliases: &[
            "torchtune.modules.loss.SymmetricKLLoss",
            "SymmetricKLWithChunkedOutputLoss",
            "torchtune.modules.loss.SymmetricKLWithChunkedOutputLoss",
        ],
        keys: &[KL_LOSS, SYMMETRIC_KL_LOSS],
        refused: None,
        doc: "Some of the forward and some of the reverse one.",
    },
    // Loggers.
    Component {
        role: Role::MetricLogger,
        name: "DiskLogger",
        aliases: &["torchtune.training.metric_logging.DiskLogger", "torchtune.utils.metric_logging.DiskLogger"],
        keys: &[DISK],
        refused: None,
        doc: "A log file.",
    },
    Component {
        role: Role::MetricLogger,
        name: "StdoutLogger",
        aliases: &["torchtune.training.metric_logging.StdoutLogger", "torchtune.utils.metric_logging.StdoutLogger"],
        keys: &[],
        refused: None,
        doc: "Lines on standard output.",
    },
    not_yet(
        Role::MetricLogger,
        "WandBLogger",
        &["torchtune.training.metric_logging.WandBLogger", "torchtune.utils.metric_logging.WandBLogger"],
        "W&B is reached by its own client alone; `wandb sync FOLDER` uploads what `TensorBoardLogger` writes",
    ),
    Component {
        role: Role::MetricLogger,
        name: "TensorBoardLogger",
        aliases: &[
            "torchtune.training.metric_logging.TensorBoardLogger",
            "torchtune.utils.metric_logging.TensorBoardLogger",
        ],
        keys: &[TENSORBOARD],
        refused: None,
        doc: "TensorBoard's event files.",
    },
    not_yet(
        Role::MetricLogger,
        "CometLogger",
        &["torchtune.training.metric_logging.CometLogger"],
        "Comet is reached by its own client alone; `TensorBoardLogger` writes files that it imports",
    ),
    not_yet(
        Role::MetricLogger,
        "MLFlowLogger",
        &["torchtune.training.metric_logging.MLFlowLogger"],
        "MLflow is reached by its own client alone; use `TensorBoardLogger`, or `DiskLogger` with `output_fmt: jsonl`",
    ),
    // Profilers: known so that torchtune's section, switched off, is fine.
    Component {
        role: Role::Profiler,
        name: "setup_torch_profiler",
        aliases: &[
            "torchtune.training.setup_torch_profiler",
            "torchtune.utils.setup_torch_profiler",
            "torchtune.utils.profiler",
        ],
        keys: &[PROFILER],
        refused: None,
        doc: "torch.profiler, switched off.",
    },
];
