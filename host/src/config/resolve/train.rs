//! A training config to a [`TrainPlan`].

use std::path::{Path, PathBuf};

use super::super::plan::{
    CheckpointPlan, ClipPlan, DatasetPlan, DiskFormat, GuestRef, Layout, LossPlan, MetricSink, MetricsPlan, ModelPlan,
    OptimizerPlan, RowsPlan, SchedulePlan, TrainPlan, Updates,
};
use super::super::registry::keys::{FOR_RECIPES, TRAIN};
use super::super::section::{Found, Reader, Section};
use super::super::yaml::{Node, Tree};
use super::super::{Config, Notice};
use super::parts::{self, number};
use super::{Resolved, Surroundings, data, defaults, guest, placement, resolve};
use crate::error::Result;

/// `varlen` without a `max_seq_len` to go by.
const DEFAULT_TOKENS_PER_MICROBATCH: usize = 4096;

/// Resolves a config for a recipe; an empty path when there is none yet (`validate`).
pub fn train(config: &Config, recipe: &Path, around: &Surroundings<'_>) -> Result<Resolved<TrainPlan>> {
    let config = &config.with_guests(recipe, TRAIN, around.metadata);
    resolve(config, TRAIN, |reader, notices| build(reader, recipe, around, notices))
}

pub(super) fn build(
    reader: &Reader<'_>,
    recipe: &Path,
    around: &Surroundings<'_>,
    notices: &mut Vec<Notice>,
) -> Found<TrainPlan> {
    let root = reader.root("train", TRAIN);
    // Everything is asked for before anything is given up, so that every mistake is found.
    let output_dir = root.get::<PathBuf>("output_dir");
    let recipe_settings = recipe_settings(&root);
    let model = parts::model(&root, around);
    let reference = parts::frozen(&root, "ref_checkpointer");
    let teacher = parts::teacher(&root);
    let tokenizer = parts::tokenizer(&root, around);
    let run_val_every_n_steps = run_val_every_n_steps(&root);
    let optimizer = root.component("optimizer").and_then(|section| optimizer(&section));
    let schedule = schedule(&root);
    let loss = loss(&root);
    let clip_grad_norm = clip_grad_norm(&root);
    let metrics = metrics(&root, around);
    let checkpoint = checkpoint(&root, around, notices);
    // Known so that a section that is switched off is fine; its only key that counts is fixed.
    let profiler =
        root.optional_component("profiler").and_then(|section| section.map(|s| s.get::<bool>("enabled")).transpose());
    let device = parts::device(&root);
    let collectives = parts::collectives(&root);
    let dtype = parts::dtype(&root);
    let placement = placement::placement(&root, notices);
    let limits = parts::limits(&root);
    let seed = parts::seed(&root, around);
    let sizes = sizes(&root);

    old_lengths(&root, notices);
    let max_seq_len = max_seq_len(&root, tokenizer.as_ref().ok().and_then(|tokenizer| tokenizer.max_seq_len));
    let datasets = datasets(&root, max_seq_len.unwrap_or_default(), around, notices);

    profiler?;
    let [dataset, dataset_val] = datasets?;
    let (model, mut tokenizer) = (model?, tokenizer?);
    tokenizer.max_seq_len = max_seq_len?;
    let batch_size = root.get::<usize>("batch_size")?;
    let checkpoint = checkpoint?;
    let tokens_per_microbatch = match root.get::<Option<usize>>("tokens_per_microbatch")? {
        Some(tokens) => tokens,
        None => tokenizer.max_seq_len.map_or(DEFAULT_TOKENS_PER_MICROBATCH, |length| length.saturating_mul(batch_size)),
    };
    let sizes = sizes?;
    let (loss, reference) = (loss?, reference?);
    if model.lora.is_none() {
        whole(&root, &checkpoint, &loss, reference.as_ref())?;
    }
    let of_recipe = |key: &str| match key {
        "loss" => loss.of_recipe.is_some(),
        key => root.is_given(key),
    };
    let for_recipe = FOR_RECIPES.iter().filter(|key| of_recipe(key)).map(|key| (*key).to_owned()).collect();
    if let (Some(name), false) = (&loss.of_recipe, dataset_val.is_empty()) {
        let what = format!("`dataset_val` is measured by a loss of the model's, and `{name}` is a recipe's");
        return Err(root.fail("dataset_val", what, "leave `dataset_val` out: `~dataset_val`"));
    }
    Ok(TrainPlan {
        recipe: GuestRef { settings: recipe_settings?, ..guest(recipe.to_owned()) },
        config_path: reader.config.path.clone(),
        overrides: reader.config.overrides.clone(),
        resolved_yaml: reader.config.to_yaml(),
        output_dir: output_dir?,
        model,
        reference,
        teacher: teacher?,
        config: defaults::filled(&reader.config.root, TRAIN),
        for_recipe,
        tokenizer,
        dataset,
        dataset_val,
        run_val_every_n_steps: run_val_every_n_steps?,
        seed: seed?,
        shuffle: root.get("shuffle")?,
        batch_size,
        gradient_accumulation_steps: sizes.accumulation,
        epochs: sizes.epochs,
        max_steps_per_epoch: sizes.max_steps_per_epoch,
        layout: if root.get::<String>("layout")? == "padded" { Layout::Padded } else { Layout::Varlen },
        tokens_per_microbatch,
        optimizer: optimizer?,
        schedule: schedule?,
        loss,
        clip_grad_norm: clip_grad_norm?,
        checkpoint,
        metrics: metrics?,
        device: device?,
        collectives: collectives?,
        collective_timeout_seconds: root.get("collective_timeout_seconds")?,
        dtype: dtype?,
        placement: placement?,
        compat_torchtune: root.get::<Option<String>>("compat")?.is_some(),
        limits: limits?,
    })
}

/// What a model without adapters cannot do.
fn whole(root: &Section<'_>, checkpoint: &CheckpointPlan, loss: &LossPlan, reference: Option<&ModelPlan>) -> Found<()> {
    let name = root.component("model")?.component_name();
    if checkpoint.adapter_only {
        let what =
            format!("`save_adapter_weights_only: True`, and `{name}` has no adapter: all its weights are trained");
        let hint = format!("set it to False, or take `lora_{name}`");
        return Err(root.fail("save_adapter_weights_only", what, hint));
    }
    if let (Some(loss), None) = (&loss.of_recipe, reference) {
        let what = format!("`{loss}` compares with a reference, which without adapters is a second model");
        let hint = "add `ref_checkpointer: {_component_: FullModelHFCheckpointer, checkpoint_dir: FOLDER}`, with the folder of `checkpointer`";
        return Err(root.fail("loss", what, hint));
    }
    Ok(())
}

/// v0.2.1 cut the samples of some data sets at a length of their own, where a config says nothing of one.
fn old_lengths(root: &Section<'_>, notices: &mut Vec<Notice>) {
    let config = root.reader.config;
    if config.has("tokenizer.max_seq_len") {
        return;
    }
    for section in root.components("dataset").into_iter().flatten() {
        let length = match section.component_name() {
            "alpaca_dataset" | "alpaca_cleaned_dataset" => 512,
            "slimorca_dataset" => 1024,
            _ => continue,
        };
        if !section.is_given("max_seq_len") {
            notices.push(Notice {
                message: format!(
                    "`{}` cuts no sample, as torchtune 0.6; v0.2.1 cut at {length} tokens: set `tokenizer.max_seq_len={length}` for that",
                    section.component_name()
                ),
                location: config.locate(&section.path("_component_")),
            });
        }
    }
}

/// v0.2.1 has the length on the data set. Both may say it, when they say the same.
fn max_seq_len(root: &Section<'_>, of_tokenizer: Option<usize>) -> Found<Option<usize>> {
    let mut length = of_tokenizer;
    for section in ["dataset", "dataset_val"].iter().flat_map(|name| root.components(name)) {
        let section = section?;
        if !section.knows("max_seq_len") {
            continue;
        }
        let Some(wanted) = section.get::<Option<usize>>("max_seq_len")? else { continue };
        if length.is_some_and(|length| length != wanted) {
            return Err(section.fail(
                "max_seq_len",
                format!("`{}` is {wanted}, and another is {}", section.path("max_seq_len"), length.unwrap_or_default()),
                "give one length, as `tokenizer.max_seq_len`",
            ));
        }
        length = Some(wanted);
    }
    Ok(length)
}

struct Sizes {
    accumulation: usize,
    epochs: usize,
    max_steps_per_epoch: Option<usize>,
}

fn sizes(root: &Section<'_>) -> Found<Sizes> {
    Ok(Sizes {
        accumulation: root.get("gradient_accumulation_steps")?,
        epochs: root.get("epochs")?,
        max_steps_per_epoch: root.get("max_steps_per_epoch")?,
    })
}

fn recipe_settings(root: &Section<'_>) -> Found<serde_json::Value> {
    match root.node("recipe")? {
        None => Ok(serde_json::json!({})),
        Some(node) if node.is_map() => {
            Ok(parts::json_map(node.entries().iter().map(|entry| (entry.key.as_str(), &entry.value))))
        }
        Some(node) => Err(root.fail(
            "recipe",
            format!("`recipe` must be a mapping of the recipe's settings, found {}", node.describe()),
            "the recipe itself is named on the command line: `host run RECIPE --config CONFIG`",
        )),
    }
}

/// What is trained on, and what is measured on.
fn datasets(
    root: &Section<'_>,
    max_seq_len: Option<usize>,
    around: &Surroundings<'_>,
    notices: &mut Vec<Notice>,
) -> Found<[Vec<DatasetPlan>; 2]> {
    let cache_dir = match root.get::<Option<PathBuf>>("cache_dir")?.or_else(|| around.cache_dir.clone()) {
        Some(cache_dir) => cache_dir,
        None => root.get::<PathBuf>("output_dir")?.join("cache"),
    };
    let mut sets = |name: &str| {
        // Every one is looked at before the first mistake ends it.
        let plan = |section: Found<Section<'_>>| {
            section.and_then(|section| data::dataset(&section, max_seq_len, &cache_dir, around, notices))
        };
        let plans: Vec<Found<DatasetPlan>> = root.components(name).into_iter().map(plan).collect();
        let plans: Vec<DatasetPlan> = plans.into_iter().collect::<Found<_>>()?;
        let is_packed = |plan: &DatasetPlan| plan.packing.is_some();
        if plans.iter().any(is_packed) && !plans.iter().all(is_packed) {
            let message = format!("some data sets of `{name}` are packed and some are not");
            return Err(root.fail(name, message, "give each of them the same `packed`"));
        }
        let is_paired = |plan: &DatasetPlan| matches!(plan.rows, RowsPlan::Pairs { .. });
        if plans.iter().any(is_paired) && (name == "dataset_val" || !plans.iter().all(is_paired)) {
            let what = match name {
                "dataset_val" => "`dataset_val` has pairs, and only conversations and texts are measured on".to_owned(),
                _ => format!("some data sets of `{name}` have pairs and some have not"),
            };
            return Err(root.fail(name, what, "preferences are trained on alone"));
        }
        Ok(plans)
    };
    let (train, validation) = (sets("dataset"), sets("dataset_val"));
    Ok([train?, validation?])
}

fn run_val_every_n_steps(root: &Section<'_>) -> Found<Option<usize>> {
    let every = root.get::<Option<usize>>("run_val_every_n_steps")?;
    if every.is_some() && root.node("dataset_val")?.is_none() {
        return Err(root.fail(
            "run_val_every_n_steps",
            "`run_val_every_n_steps` needs a `dataset_val` to measure on",
            "add `dataset_val`, or delete the key with `~run_val_every_n_steps`",
        ));
    }
    Ok(every)
}

fn optimizer(section: &Section<'_>) -> Found<OptimizerPlan> {
    let betas = match section.node("betas")? {
        None => (0.9, 0.999),
        Some(node) => betas(node).ok_or_else(|| {
            section.fail(
                "betas",
                format!("`{}` must be two numbers from 0 to below 1, found {}", section.path("betas"), node.describe()),
                "`betas: [0.9, 0.999]`",
            )
        })?,
    };
    Ok(OptimizerPlan {
        lr: section.get("lr")?,
        betas,
        eps: section.get("eps")?,
        weight_decay: section.get("weight_decay")?,
        updates: match (section.get("fp32_master_weights")?, section.get("bf16_stochastic_round")?) {
            (false, false) => Updates::Nearest,
            (true, false) => Updates::Master,
            (false, true) => Updates::Stochastic,
            (true, true) => {
                let what = "`fp32_master_weights` and `bf16_stochastic_round` are two ways to keep small updates";
                return Err(section.fail("bf16_stochastic_round", what, "take one of them"));
            }
        },
    })
}

fn betas(node: &Node) -> Option<(f64, f64)> {
    match &node.tree {
        Tree::List(items) => match items.iter().map(number).collect::<Option<Vec<_>>>()?[..] {
            [first, second] if (0.0..1.0).contains(&first) && (0.0..1.0).contains(&second) => Some((first, second)),
            _ => None,
        },
        _ => None,
    }
}

fn schedule(root: &Section<'_>) -> Found<SchedulePlan> {
    Ok(match root.optional_component("lr_scheduler")? {
        None => SchedulePlan::Constant,
        Some(section) => SchedulePlan::Cosine {
            num_warmup_steps: section.get("num_warmup_steps")?,
            num_cycles: section.get("num_cycles")?,
        },
    })
}

fn loss(root: &Section<'_>) -> Found<LossPlan> {
    if let Some(guest) = parts::loss_guest(root)? {
        return Ok(LossPlan { guest: Some(guest), of_recipe: None, num_output_chunks: 1 });
    }
    let section = root.component("loss")?;
    let of_recipe = (section.component_name() == "DPOLoss").then(|| section.component_name().to_owned());
    // PyTorch's own loss has no such key; pieces change memory, not the loss.
    let num_output_chunks = if section.knows("num_output_chunks") { section.get("num_output_chunks")? } else { 8 };
    Ok(LossPlan { guest: None, of_recipe, num_output_chunks })
}

fn clip_grad_norm(root: &Section<'_>) -> Found<Option<ClipPlan>> {
    let Some(node) = root.node("clip_grad_norm")? else {
        return Ok(None);
    };
    match number(node) {
        Some(norm) if norm == f64::INFINITY => Ok(Some(ClipPlan::LogOnly)),
        Some(norm) if norm > 0.0 => Ok(Some(ClipPlan::MaxNorm(norm))),
        _ => Err(root.fail(
            "clip_grad_norm",
            format!("`clip_grad_norm` must be a number above 0, `inf` or null, found {}", node.describe()),
            "`clip_grad_norm: 1.0`; `inf` logs the norm and clips nothing",
        )),
    }
}

fn metrics(root: &Section<'_>, around: &Surroundings<'_>) -> Found<MetricsPlan> {
    let default_dir = root.get::<PathBuf>("output_dir").map(|dir| dir.join("logs"));
    let sink = match root.optional_component("metric_logger")? {
        None => MetricSink::Disk { log_dir: default_dir?, format: DiskFormat::Txt, filename: None },
        Some(section) if section.component_name() == "StdoutLogger" => MetricSink::Stdout,
        Some(section) => {
            let log_dir = match section.get::<Option<PathBuf>>("log_dir")? {
                Some(log_dir) => log_dir,
                None => default_dir?,
            };
            let input_dir = root.component("checkpointer")?.get::<PathBuf>("checkpoint_dir")?;
            if around.is_within(&log_dir, &input_dir) {
                let what = format!(
                    "`{}` is the model's folder `{}` or inside it, which is never written to",
                    section.path("log_dir"),
                    input_dir.display()
                );
                return Err(section.fail("log_dir", what, "`log_dir: ${output_dir}/logs`"));
            }
            if section.component_name() == "TensorBoardLogger" {
                MetricSink::TensorBoard { log_dir, organize_logs: section.get("organize_logs")? }
            } else {
                let is_jsonl = section.get::<String>("output_fmt")? == "jsonl";
                let format = if is_jsonl { DiskFormat::Jsonl } else { DiskFormat::Txt };
                let filename = section.get::<Option<String>>("filename")?;
                if filename.as_ref().is_some_and(|name| name.contains('/') || name == "..") {
                    let what = format!("`{}` is the name of a file in `log_dir`", section.path("filename"));
                    return Err(section.fail("filename", what, "`filename: log.jsonl`"));
                }
                MetricSink::Disk { log_dir, format, filename }
            }
        }
    };
    Ok(MetricsPlan {
        sink,
        log_every_n_steps: root.get("log_every_n_steps")?,
        log_peak_memory_stats: root.get("log_peak_memory_stats")?,
        // As `tracing` calls them.
        log_level: match root.get::<String>("log_level")?.to_uppercase().as_str() {
            "WARNING" => "WARN".to_owned(),
            "CRITICAL" => "ERROR".to_owned(),
            level => level.to_owned(),
        },
    })
}

fn checkpoint(root: &Section<'_>, around: &Surroundings<'_>, notices: &mut Vec<Notice>) -> Found<CheckpointPlan> {
    let section = root.component("checkpointer")?;
    let input_dir = section.get::<PathBuf>("checkpoint_dir")?;
    let run_dir = root.get::<PathBuf>("output_dir")?;
    let resume_from = root.get::<Option<PathBuf>>("resume_from")?;
    let resume = root.get::<bool>("resume_from_checkpoint")? || resume_from.is_some();
    if resume && section.node("adapter_checkpoint")?.is_some() {
        let what = "an adapter is where a new run starts, and this one is to go on from a checkpoint";
        let hint = "delete `checkpointer.adapter_checkpoint`, or set `resume_from_checkpoint: False`";
        return Err(section.fail("adapter_checkpoint", what, hint));
    }
    Ok(CheckpointPlan {
        output_dir: output_dir(root, &section, &input_dir, run_dir, around, notices)?,
        save_every_n_steps: root.get("save_every_n_steps")?,
        keep_last_n: section.get("keep_last_n_checkpoints")?,
        adapter_only: root.get("save_adapter_weights_only")?,
        resume,
        resume_from,
    })
}

/// The input folder is never written to: torchtune v0.2.1's configs name it as output.
fn output_dir(
    root: &Section<'_>,
    section: &Section<'_>,
    input_dir: &Path,
    run_dir: PathBuf,
    around: &Surroundings<'_>,
    notices: &mut Vec<Notice>,
) -> Found<PathBuf> {
    if around.is_within(&run_dir, input_dir) {
        return Err(root.fail(
            "output_dir",
            format!(
                "`output_dir` is the model's folder `{}` or inside it, which is never written to",
                input_dir.display()
            ),
            "give the run a folder of its own",
        ));
    }
    let Some(wanted) = section.get::<Option<PathBuf>>("output_dir")? else {
        return Ok(run_dir);
    };
    if !around.is_within(&wanted, input_dir) {
        return Ok(wanted);
    }
    notices.push(Notice {
        message: format!(
            "checkpoints go to `{}`: `{}` is the model's folder or inside it, which is never written to",
            run_dir.display(),
            section.path("output_dir"),
        ),
        location: root.reader.config.locate(&section.path("output_dir")),
    });
    Ok(run_dir)
}
