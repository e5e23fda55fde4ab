//! `cargo xtask configs`: the configs of torchtune's names, a table and one text.
//!
//! The values are those of torchtune's last configs of these names (Code Llama: v0.2.1's), but for optimizers that page or
//! update inside the backward pass: here it is AdamW. `llama3_1/8B_lora`, `generation` and SmolLM2's are written by hand.

use std::path::{Path, PathBuf};

use crate::shell::{Failure, Result};

struct Row {
    /// Of the config, without what it is for.
    name: &'static str,
    model: &'static str,
    /// On the hub.
    repo: &'static str,
    tokenizer: Tokenizer,
    runs: Runs,
    /// Of adapters; 0: all weights are trained.
    rank: u32,
    alpha: u32,
    /// Of several devices, and of one.
    lr: [&'static str; 2],
    accumulation: [u32; 2],
    batch_size: u32,
    /// An adapter on the output layer.
    adapts_output: bool,
    method: Method,
}

#[derive(Clone, Copy)]
enum Method {
    Instructions,
    Preferences,
    /// From a larger model: its component, and its name on the hub.
    Distillation(&'static str, &'static str),
}

#[derive(Clone, Copy, PartialEq)]
enum Runs {
    /// One for several devices, and `…_single_device`.
    Both,
    Distributed,
    Single,
}

#[derive(Clone, Copy)]
enum Tokenizer {
    Llama2,
    Llama3,
    Mistral,
    /// `qwen2`, `qwen2_5` or `qwen3`.
    Qwen(&'static str),
}

use Runs::{Both, Distributed, Single};
use Tokenizer::{Llama2, Llama3, Mistral, Qwen};

const fn row(
    name: &'static str,
    model: &'static str,
    repo: &'static str,
    tokenizer: Tokenizer,
    runs: Runs,
    rank: u32,
) -> Row {
    let (lr, accumulation) = (["3e-4"; 2], [8; 2]);
    Row {
        name,
        model,
        repo,
        tokenizer,
        runs,
        rank,
        alpha: 2 * rank,
        lr,
        accumulation,
        batch_size: 2,
        adapts_output: false,
        method: Method::Instructions,
    }
}

/// All weights.
const fn full(
    name: &'static str,
    model: &'static str,
    repo: &'static str,
    tokenizer: Tokenizer,
    runs: Runs,
    lr: &'static str,
    accumulation: [u32; 2],
) -> Row {
    Row { lr: [lr; 2], accumulation, ..row(name, model, repo, tokenizer, runs, 0) }
}

const QWEN2: Tokenizer = Qwen("qwen2");
const QWEN2_5: Tokenizer = Qwen("qwen2_5");
const QWEN3: Tokenizer = Qwen("qwen3");

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row("llama2/7B", "llama2_7b", "meta-llama/Llama-2-7b-hf", Llama2, Both, 8),
    Row { lr: ["2e-4"; 2], adapts_output: true, ..row("llama2/13B", "llama2_13b", "meta-llama/Llama-2-13b-hf", Llama2, Distributed, 8) },
    Row { accumulation: [1; 2], ..row("llama2/70B", "llama2_70b", "meta-llama/Llama-2-70b-hf", Llama2, Distributed, 16) },
    Row { accumulation: [64; 2], ..row("code_llama2/7B", "code_llama2_7b", "codellama/CodeLlama-7b-hf", Llama2, Single, 8) },
    row("llama3/8B", "llama3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", Llama3, Both, 8),
    Row { accumulation: [1; 2], ..row("llama3/70B", "llama3_70b", "meta-llama/Meta-Llama-3-70B-Instruct", Llama3, Distributed, 16) },
    row("llama3_1/8B", "llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", Llama3, Single, 8),
    Row { accumulation: [1; 2], ..row("llama3_1/70B", "llama3_1_70b", "meta-llama/Meta-Llama-3.1-70B-Instruct", Llama3, Distributed, 16) },
    Row { batch_size: 4, ..row("llama3_2/1B", "llama3_2_1b", "meta-llama/Llama-3.2-1B-Instruct", Llama3, Both, 64) },
    Row { batch_size: 4, ..row("llama3_2/3B", "llama3_2_3b", "meta-llama/Llama-3.2-3B-Instruct", Llama3, Both, 64) },
    Row { accumulation: [1; 2], ..row("llama3_3/70B", "llama3_3_70b", "meta-llama/Llama-3.3-70B-Instruct", Llama3, Distributed, 16) },
    Row { alpha: 16, lr: ["2e-5"; 2], accumulation: [1, 8], batch_size: 4, adapts_output: true, ..row("mistral/7B", "mistral_7b", "mistralai/Mistral-7B-v0.1", Mistral, Both, 64) },
    Row { lr: ["2e-3"; 2], batch_size: 4, ..row("qwen2/0.5B", "qwen2_0_5b", "Qwen/Qwen2-0.5B-Instruct", QWEN2, Both, 32) },
    Row { lr: ["2e-5", "2e-3"], ..row("qwen2/1.5B", "qwen2_1_5b", "Qwen/Qwen2-1.5B-Instruct", QWEN2, Both, 32) },
    row("qwen2/7B", "qwen2_7b", "Qwen/Qwen2-7B-Instruct", QWEN2, Both, 8),
    Row { lr: ["2e-3"; 2], ..row("qwen2_5/0.5B", "qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct", QWEN2_5, Both, 32) },
    Row { lr: ["2e-5", "2e-3"], ..row("qwen2_5/1.5B", "qwen2_5_1_5b_instruct", "Qwen/Qwen2.5-1.5B-Instruct", QWEN2_5, Both, 32) },
    row("qwen2_5/3B", "qwen2_5_3b", "Qwen/Qwen2.5-3B-Instruct", QWEN2_5, Both, 8),
    row("qwen2_5/7B", "qwen2_5_7b_instruct", "Qwen/Qwen2.5-7B-Instruct", QWEN2_5, Both, 8),
    row("qwen2_5/14B", "qwen2_5_14b_instruct", "Qwen/Qwen2.5-14B-Instruct", QWEN2_5, Single, 8),
    row("qwen2_5/32B", "qwen2_5_32b_instruct", "Qwen/Qwen2.5-32B-Instruct", QWEN2_5, Distributed, 8),
    Row { accumulation: [1; 2], ..row("qwen2_5/72B", "qwen2_5_72b_instruct", "Qwen/Qwen2.5-72B-Instruct", QWEN2_5, Distributed, 8) },
    Row { lr: ["1e-4"; 2], ..row("qwen3/0.6B", "qwen3_0_6b_instruct", "Qwen/Qwen3-0.6B", QWEN3, Both, 32) },
    Row { lr: ["2e-5", "1e-4"], ..row("qwen3/1.7B", "qwen3_1_7b_instruct", "Qwen/Qwen3-1.7B", QWEN3, Both, 32) },
    row("qwen3/4B", "qwen3_4b_instruct", "Qwen/Qwen3-4B", QWEN3, Both, 8),
    row("qwen3/8B", "qwen3_8b_instruct", "Qwen/Qwen3-8B", QWEN3, Both, 8),
    row("qwen3/14B", "qwen3_14b_instruct", "Qwen/Qwen3-14B", QWEN3, Single, 8),
    Row { method: Method::Preferences, ..row("llama2/7B", "llama2_7b", "meta-llama/Llama-2-7b-hf", Llama2, Both, 8) },
    Row { method: Method::Preferences, ..row("llama3_1/8B", "llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", Llama3, Both, 8) },
    Row { batch_size: 8, method: Method::Distillation("qwen2_1_5b", "Qwen/Qwen2-1.5B-Instruct"), ..row("qwen2/1.5_to_0.5B", "qwen2_0_5b", "Qwen/Qwen2-0.5B-Instruct", QWEN2, Both, 32) },
    Row { batch_size: 4, method: Method::Distillation("llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct"), ..row("llama3_2/8B_to_1B", "llama3_2_1b", "meta-llama/Llama-3.2-1B-Instruct", Llama3, Both, 64) },
    Row { method: Method::Distillation("qwen3_14b_instruct", "Qwen/Qwen3-14B"), ..row("qwen3/14B_to_8B", "qwen3_8b_base", "Qwen/Qwen3-8B", QWEN3, Single, 64) },
    full("llama2/7B", "llama2_7b", "meta-llama/Llama-2-7b-hf", Llama2, Distributed, "2e-5", [1; 2]),
    full("llama3/8B", "llama3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", Llama3, Distributed, "2e-5", [1; 2]),
    full("llama3_1/8B", "llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", Llama3, Both, "2e-5", [1; 2]),
    Row { batch_size: 4, ..full("llama3_2/1B", "llama3_2_1b", "meta-llama/Llama-3.2-1B-Instruct", Llama3, Both, "2e-5", [8, 1]) },
    Row { batch_size: 4, ..full("llama3_2/3B", "llama3_2_3b", "meta-llama/Llama-3.2-3B-Instruct", Llama3, Both, "2e-5", [8, 1]) },
    full("mistral/7B", "mistral_7b", "mistralai/Mistral-7B-v0.1", Mistral, Distributed, "5e-6", [1; 2]),
    full("qwen2/0.5B", "qwen2_0_5b", "Qwen/Qwen2-0.5B-Instruct", QWEN2, Both, "2e-5", [8; 2]),
    full("qwen2/1.5B", "qwen2_1_5b", "Qwen/Qwen2-1.5B-Instruct", QWEN2, Both, "2e-5", [1; 2]),
    full("qwen2/7B", "qwen2_7b", "Qwen/Qwen2-7B-Instruct", QWEN2, Both, "5e-6", [8, 1]),
    full("qwen2_5/0.5B", "qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct", QWEN2_5, Both, "2e-5", [8; 2]),
    full("qwen2_5/1.5B", "qwen2_5_1_5b_instruct", "Qwen/Qwen2.5-1.5B-Instruct", QWEN2_5, Distributed, "2e-5", [1; 2]),
    Row { batch_size: 4, ..full("qwen2_5/1.5B", "qwen2_5_1_5b_instruct", "Qwen/Qwen2.5-1.5B-Instruct", QWEN2_5, Single, "2e-5", [1; 2]) },
    full("qwen2_5/3B", "qwen2_5_3b", "Qwen/Qwen2.5-3B-Instruct", QWEN2_5, Both, "5e-6", [8, 1]),
    full("qwen2_5/7B", "qwen2_5_7b_instruct", "Qwen/Qwen2.5-7B-Instruct", QWEN2_5, Both, "5e-6", [8, 1]),
    full("qwen3/0.6B", "qwen3_0_6b_instruct", "Qwen/Qwen3-0.6B", QWEN3, Both, "2e-5", [8; 2]),
    full("qwen3/1.7B", "qwen3_1_7b_instruct", "Qwen/Qwen3-1.7B", QWEN3, Distributed, "2e-5", [1; 2]),
    Row { batch_size: 4, ..full("qwen3/1.7B", "qwen3_1_7b_instruct", "Qwen/Qwen3-1.7B", QWEN3, Single, "2e-5", [1; 2]) },
    Row { lr: ["5e-6", "2e-5"], ..full("qwen3/4B", "qwen3_4b_instruct", "Qwen/Qwen3-4B", QWEN3, Both, "5e-6", [8, 1]) },
    full("qwen3/8B", "qwen3_8b_instruct", "Qwen/Qwen3-8B", QWEN3, Both, "5e-6", [8, 1]),
    Row { method: Method::Preferences, ..full("llama3_1/8B", "llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", Llama3, Distributed, "2e-5", [8; 2]) },
    row("qwen3/32B", "qwen3_32b", "Qwen/Qwen3-32B", QWEN3, Distributed, 8),
];

/// Writes every config, or with `check` says which is not as it would be written.
pub fn generate(root: &Path, check: bool) -> Result<()> {
    let mut stale = vec![];
    for (path, text) in files() {
        let path = root.join("configs").join(path);
        if std::fs::read_to_string(&path).is_ok_and(|found| found == text) {
            continue;
        }
        if check {
            stale.push(path.display().to_string());
            continue;
        }
        let folder = path.parent().unwrap_or(root);
        let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
        written.map_err(|error| Failure::new(format!("cannot write `{}`", path.display())).cause(error))?;
    }
    if stale.is_empty() {
        return Ok(());
    }
    let failure = Failure::new("configs are not as `cargo xtask configs` writes them");
    Err(stale.into_iter().fold(failure, |failure, path| failure.cause(path)))
}

fn files() -> Vec<(PathBuf, String)> {
    let of_row = |row: &Row| {
        let file = |distributed| {
            (PathBuf::from(format!("{}_{}.yaml", row.name, suffix(row, distributed))), text(row, distributed))
        };
        [(row.runs != Single).then(|| file(true)), (row.runs != Distributed).then(|| file(false))].into_iter().flatten()
    };
    ROWS.iter().flat_map(of_row).collect()
}

/// The end of a config's name.
fn suffix(row: &Row, distributed: bool) -> &'static str {
    match (row.method, row.rank, distributed) {
        (Method::Instructions, 0, true) => "full",
        (Method::Instructions, 0, false) => "full_single_device",
        (Method::Instructions, _, true) => "lora",
        (Method::Instructions, _, false) => "lora_single_device",
        (Method::Preferences, 0, _) => "full_dpo",
        (Method::Preferences, _, true) => "lora_dpo",
        (Method::Preferences, _, false) => "lora_dpo_single_device",
        (Method::Distillation(..), _, true) => "KD_lora_distributed",
        (Method::Distillation(..), _, false) => "KD_lora_single_device",
    }
}

fn text(row: &Row, distributed: bool) -> String {
    let Row { name, model, repo, tokenizer, runs: _, rank, alpha, lr, accumulation, batch_size, adapts_output, method } =
        row;
    let (lr, accumulation) = (lr[usize::from(!distributed)], accumulation[usize::from(!distributed)]);
    let folder_of = |repo: &str| format!("/tmp/{}", repo.rsplit('/').next().unwrap_or(repo));
    let folder = folder_of(repo);
    let (family, size) = name.split_once('/').unwrap_or((name, ""));
    let suffix = suffix(row, distributed);
    let is_full = *rank == 0;
    let recipe = match (method, is_full, distributed) {
        (Method::Instructions, true, true) => "full_finetune_distributed",
        (Method::Instructions, true, false) => "full_finetune_single_device",
        (Method::Instructions, false, true) => "lora_finetune_distributed",
        (Method::Instructions, false, false) => "lora_finetune_single_device",
        (Method::Preferences, true, _) => "full_dpo_distributed",
        (Method::Preferences, false, true) => "lora_dpo_distributed",
        (Method::Preferences, false, false) => "lora_dpo_single_device",
        (Method::Distillation(..), _, true) => "knowledge_distillation_distributed",
        (Method::Distillation(..), _, false) => "knowledge_distillation_single_device",
    };
    let command = if distributed { format!("--nproc 2 {recipe}") } else { recipe.to_owned() };
    let (modules, mlp) = match family {
        "code_llama2" => ("[q_proj, v_proj]", "False"),
        _ => ("[q_proj, v_proj, output_proj]", "True"),
    };
    let output = if *adapts_output { "True" } else { "False" };
    // Measured before and after; `run_val_every_n_steps` in between.
    let validation = "\
dataset_val:
  _component_: alpaca_cleaned_dataset
  split: train[95%:]
run_val_every_n_steps: null # besides before and after the run
";
    let data = match (method, distributed) {
        (Method::Preferences, _) => "  _component_: stack_exchange_paired_dataset\n".to_owned(),
        (Method::Instructions, true) => {
            format!("  _component_: alpaca_cleaned_dataset\n  split: train[:95%]\n  packed: False\n{validation}")
        }
        (Method::Instructions, false) if is_full && *name == "llama3_1/8B" => {
            "  _component_: alpaca_dataset\n  packed: False\n".to_owned()
        }
        _ => "  _component_: alpaca_cleaned_dataset\n  packed: False\n".to_owned(),
    };
    let dpo = |beta: &str| format!("  _component_: DPOLoss\n  beta: {beta}\n  label_smoothing: 0\n");
    // A second model beside the trained one.
    let (what, frozen, loss) = match method {
        Method::Instructions => {
            let what = if is_full { "Full fine-tuning" } else { "LoRA" };
            (what, String::new(), "  _component_: cross_entropy\n".to_owned())
        }
        Method::Preferences if is_full => {
            let reference = format!(
                "\
ref_checkpointer: # the model before training, frozen
  _component_: FullModelHFCheckpointer
  checkpoint_dir: {folder}

"
            );
            ("Preferences (DPO), all weights,", reference, dpo("0.05"))
        }
        Method::Preferences => ("Preferences (DPO), LoRA", String::new(), dpo("0.1")),
        Method::Distillation(model, repo) => {
            let folder = folder_of(repo);
            let teacher = format!(
                "\
teacher_model:
  _component_: {model}
teacher_checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: {folder}

"
            );
            let loss = "  _component_: cross_entropy
kd_loss:
  _component_: ForwardKLLoss
kd_ratio: 0.5 # the share of kd_loss; loss has the rest
";
            ("Distillation, LoRA", teacher, loss.to_owned())
        }
    };
    let (model, adapter_only) = if is_full {
        (format!("  _component_: {model}\n"), "")
    } else {
        let model = format!(
            "  _component_: lora_{model}
  lora_attn_modules: {modules}
  apply_lora_to_mlp: {mlp}
  apply_lora_to_output: {output}
  lora_rank: {rank} # more learns more, for more memory
  lora_alpha: {alpha} # the adapter's scale is alpha / rank
  lora_dropout: 0.0
"
        );
        (model, "save_adapter_weights_only: False\n")
    };
    let cosine = |warmup| format!("lr_scheduler:\n  _component_: cosine\n  num_warmup_steps: {warmup}\n");
    let schedule = match method {
        Method::Instructions if is_full => String::new(),
        Method::Preferences if is_full => cosine(20),
        _ => cosine(100),
    };
    let rounding = if is_full { " # small updates of bf16 weights are lost in rounding; fp32 keeps them" } else { "" };
    let (lr, weight_decay, most_steps, length) = match method {
        Method::Preferences if is_full => (lr, "0.05", "1000", "1024"),
        Method::Preferences => ("5e-4", "0.05", "1000", "1024"),
        _ => (lr, "0.01", "null", "null"),
    };
    let batch_size = if matches!(method, Method::Preferences) { &4 } else { batch_size };
    let tokenizer = match tokenizer {
        Llama2 => format!("llama2_tokenizer\n  path: {folder}/tokenizer.model"),
        Mistral => format!("mistral_tokenizer\n  path: {folder}/tokenizer.model"),
        Llama3 => format!("llama3_tokenizer\n  path: {folder}/original/tokenizer.model"),
        Qwen(version) => {
            format!("{version}_tokenizer\n  path: {folder}/vocab.json\n  merges_file: {folder}/merges.txt")
        }
    };
    let download = |repo: &str| {
        let token = if repo.starts_with("Qwen") { "" } else { " --hf-token <TOKEN>" };
        format!("host download {repo} --output-dir {}{token}", folder_of(repo))
    };
    let download = match method {
        Method::Distillation(_, teacher) => format!("{}\n#   {}", download(teacher), download(repo)),
        _ => download(repo),
    };
    format!(
        "\
# {what} for {repo}.
#
#   {download}
#   host run {command} --config {name}_{suffix}
#
# Not run on a GPU by us yet: what fits into its memory is `batch_size` and `tokenizer.max_seq_len`.

output_dir: /tmp/host/{family}_{size}/{suffix}

model:
{model}
{frozen}checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: {folder} # never written to
  output_dir: ${{output_dir}}
resume_from_checkpoint: False
{adapter_only}
tokenizer:
  _component_: {tokenizer}
  max_seq_len: {length} # longer samples are cut to this many tokens

dataset:
{data}seed: null
shuffle: True
batch_size: {batch_size} # per rank
gradient_accumulation_steps: {accumulation}

optimizer:
  _component_: AdamW
  lr: {lr}
  weight_decay: {weight_decay}
{schedule}loss:
{loss}clip_grad_norm: null

epochs: 1
max_steps_per_epoch: {most_steps}

metric_logger:
  _component_: DiskLogger
  log_dir: ${{output_dir}}/logs
log_every_n_steps: 1
log_peak_memory_stats: True

device: cuda
dtype: bf16{rounding}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configs_are_current() {
        generate(&crate::shell::root(), true).unwrap();
    }
}
