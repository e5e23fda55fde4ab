//! Sections that training and generation share: model, tokenizer, checkpoint folder, device, limits.

use std::path::PathBuf;

use serde_yaml::Value;

use super::super::Config;
use super::super::plan::{
    CollectivesPlan, DevicePlan, Dtype, GuestLimits, GuestRef, LoraPlan, MessageFormat, ModelPlan, TokenizerPlan,
    Truncation, TurnTexts,
};
use super::super::registry::keys::LIMITS;
use super::super::registry::{self, Role};
use super::super::section::{Found, Reported, Section};
use super::super::yaml::{Node, Tree};
use super::{Surroundings, guest};
use crate::data::template::Role as Speaker;

pub fn model(root: &Section<'_>, around: &Surroundings<'_>) -> Found<ModelPlan> {
    let checkpoint = root.component("checkpointer").and_then(|section| checkpoint(&section));
    let lora = root.component("model").and_then(|section| lora(&section));
    let adapter = adapter(root, around);
    let (checkpoint_dir, checkpoint_files) = checkpoint?;
    Ok(ModelPlan { checkpoint_dir, checkpoint_files, lora: lora?, adapter: adapter? })
}

fn checkpoint(section: &Section<'_>) -> Found<(PathBuf, Vec<String>)> {
    Ok((section.get::<PathBuf>("checkpoint_dir")?, checkpoint_files(section)?))
}

/// A model beside the trained one, which nothing is written of: only its folder and files count.
pub fn frozen(root: &Section<'_>, checkpointer: &str) -> Found<Option<ModelPlan>> {
    let Some(section) = root.optional_component(checkpointer)? else { return Ok(None) };
    let (checkpoint_dir, checkpoint_files) = checkpoint(&section)?;
    Ok(Some(ModelPlan { checkpoint_dir, checkpoint_files, lora: None, adapter: None }))
}

/// The model to learn from. Its builder says no more than that it has no adapters.
pub fn teacher(root: &Section<'_>) -> Found<Option<ModelPlan>> {
    let (model, frozen) = (root.optional_component("teacher_model")?, frozen(root, "teacher_checkpointer")?);
    match (&model, &frozen) {
        (Some(model), Some(_)) if model.knows("lora_rank") => Err(root.fail(
            "teacher_model",
            format!("`teacher_model` is `{}`, and a teacher has no adapters", model.component_name()),
            format!("take `{}`", model.component_name().trim_start_matches("lora_")),
        )),
        (Some(_), Some(_)) | (None, None) => Ok(frozen),
        (Some(_), None) => Err(root.fail(
            "teacher_model",
            "`teacher_model` needs `teacher_checkpointer`, which says where its weights are",
            "`teacher_checkpointer: {_component_: FullModelHFCheckpointer, checkpoint_dir: FOLDER}`",
        )),
        (None, Some(_)) => Err(root.fail(
            "teacher_checkpointer",
            "`teacher_checkpointer` needs `teacher_model`",
            "name the model without adapters, such as `teacher_model: {_component_: qwen2_1_5b}`",
        )),
    }
}

/// Where an adapter comes from: `adapter_dir` of a generation, or torchtune's `checkpointer.adapter_checkpoint`.
fn adapter(root: &Section<'_>, around: &Surroundings<'_>) -> Found<Option<PathBuf>> {
    const KEY: &str = "adapter_checkpoint";
    let folder = if root.knows("adapter_dir") { root.get("adapter_dir")? } else { None };
    let section = root.component("checkpointer")?;
    let Some(file) = section.get::<Option<PathBuf>>(KEY)? else { return Ok(folder) };
    let fail = |what: &str, hint: &str| Err(section.fail(KEY, format!("`{}` {what}", section.path(KEY)), hint));
    if folder.is_some() {
        return fail("and `adapter_dir` both name an adapter", "delete one of them");
    }
    // The file itself says neither.
    if !root.component("model")?.knows("lora_rank") {
        return fail("needs a model with adapters, which says rank and alpha", "take the `lora_` model of that name");
    }
    // Of the model's folder, as torchtune has it.
    let inside = section.get::<PathBuf>("checkpoint_dir")?.join(&file);
    Ok(Some(if (around.kind)(&inside).is_some() { inside } else { file }))
}

/// A list of names, or torchtune's pattern: `{filename_format: "model-{}-of-{}.safetensors", max_filename: "00030"}`.
fn checkpoint_files(section: &Section<'_>) -> Found<Vec<String>> {
    let Some(node) = section.node("checkpoint_files")? else {
        return Ok(vec![]);
    };
    let fail = || {
        let name = section.path("checkpoint_files");
        section.fail(
            "checkpoint_files",
            format!("`{name}` must be a list of file names, found {}", node.describe()),
            "leave it out to take the files that the folder's index names",
        )
    };
    let files = match &node.tree {
        Tree::List(items) => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>().ok_or_else(fail)?
        }
        Tree::Map(_) => file_pattern(node).ok_or_else(|| {
            section.fail(
                "checkpoint_files",
                "a pattern of checkpoint files has `filename_format` with two `{}` and `max_filename`",
                "`{filename_format: \"model-{}-of-{}.safetensors\", max_filename: \"00030\"}`",
            )
        })?,
        _ => return Err(fail()),
    };
    let is_read = |file: &String| [".safetensors", ".bin", ".pt", ".pth"].iter().any(|end| file.ends_with(end));
    match files.iter().find(|file| !is_read(file)) {
        Some(file) => Err(section.fail(
            "checkpoint_files",
            format!("the weight file `{file}` is neither safetensors nor PyTorch's"),
            "files read end in .safetensors, .bin, .pt or .pth",
        )),
        None => Ok(files),
    }
}

fn file_pattern(node: &Node) -> Option<Vec<String>> {
    let format = node.child("filename_format")?.as_str()?;
    let last = node.child("max_filename")?.as_str()?;
    let count = last.parse::<usize>().ok().filter(|count| (1..=10_000).contains(count))?;
    if node.entries().len() != 2 || format.matches("{}").count() != 2 {
        return None;
    }
    let width = last.len();
    Some(
        (1..=count)
            .map(|index| format.replacen("{}", &format!("{index:0width$}"), 1).replacen("{}", last, 1))
            .collect(),
    )
}

fn lora(section: &Section<'_>) -> Found<Option<LoraPlan>> {
    if !section.knows("lora_rank") {
        return Ok(None);
    }
    let modules = section.get::<Vec<String>>("lora_attn_modules")?;
    let mut targets: Vec<String> =
        modules.iter().map(|name| if name == "output_proj" { "o_proj".into() } else { name.clone() }).collect();
    if section.get("apply_lora_to_mlp")? {
        targets.extend(["gate_proj", "up_proj", "down_proj"].map(String::from));
    }
    if section.get("apply_lora_to_output")? {
        targets.push("lm_head".into());
    }
    let mut seen = std::collections::BTreeSet::new();
    targets.retain(|target| seen.insert(target.clone()));
    if targets.is_empty() {
        return Err(section.fail(
            "lora_attn_modules",
            format!(
                "`{}` is empty and neither mlp nor output has adapters, so nothing would be trained",
                section.path("lora_attn_modules")
            ),
            "`lora_attn_modules: [q_proj, v_proj]`",
        ));
    }
    let plan = LoraPlan {
        rank: section.get("lora_rank")?,
        alpha: section.get("lora_alpha")?,
        dropout: section.get("lora_dropout")?,
        targets,
    };
    // More is refused by its type.
    if plan.dropout == 1.0 {
        return Err(section.fail(
            "lora_dropout",
            "`lora_dropout` of 1 leaves nothing of the adapter's input",
            "0.05 is usual",
        ));
    }
    Ok(Some(plan))
}

pub fn tokenizer(root: &Section<'_>, around: &Surroundings<'_>) -> Found<TokenizerPlan> {
    let section = root.component("tokenizer")?;
    // A family's own template, where the config says nothing of one.
    let (format, own) = match section.component_name() {
        "llama3_tokenizer" => (MessageFormat::Llama3, None),
        "llama2_tokenizer" => (MessageFormat::Turns, Some("llama2_chat")),
        "mistral_tokenizer" => (MessageFormat::Turns, Some("mistral_chat")),
        "qwen2_tokenizer" => (MessageFormat::Qwen2, None),
        "qwen2_5_tokenizer" => (MessageFormat::Qwen2_5, None),
        "qwen3_tokenizer" => (MessageFormat::Qwen3, None),
        "HuggingFaceModelTokenizer" => (MessageFormat::ChatTemplate, None),
        _ => (MessageFormat::Plain, None),
    };
    // v0.2.1 had its templates on the data set, and none here.
    let own = own.filter(|_| !names_old_template(root.reader.config));
    let (turn_texts, prompt_template) = match turn_texts(&section, format) {
        Ok(Some(texts)) => (Ok(texts), Ok(None)),
        Ok(None) if section.is_given("prompt_template") => (Ok(vec![]), template(&section, "prompt_template", around)),
        Ok(None) => (Ok(vec![]), own.map(|own| guest_ref(&section, "_component_", own, around)).transpose()),
        Err(reported) => (Err(reported), Ok(None)),
    };
    let key = if format == MessageFormat::ChatTemplate { "tokenizer_json_path" } else { "path" };
    let path = section.get::<PathBuf>(key)?;
    let path = if around.is_folder(&path) {
        let names = ["tokenizer.json", "original/tokenizer.model", "tokenizer.model"].map(|name| path.join(name));
        names.iter().find(|path| around.is_file(path)).unwrap_or(&names[0]).clone()
    } else {
        path
    };
    let file = |key: &str| if section.knows(key) { section.get::<Option<PathBuf>>(key) } else { Ok(None) };
    Ok(TokenizerPlan {
        path,
        merges_file: file("merges_file")?,
        special_tokens_path: file("special_tokens_path")?,
        tokenizer_config: file("tokenizer_config_json_path")?,
        generation_config: file("generation_config_path")?,
        format,
        max_seq_len: section.get("max_seq_len")?,
        truncation: match section.get::<String>("truncation_type")?.as_str() {
            "left" => Truncation::Left,
            _ => Truncation::Right,
        },
        prompt_template: prompt_template?,
        turn_texts: turn_texts?,
    })
}

/// Whether a data set has the template of v0.2.1, which stands alone.
fn names_old_template(config: &Config) -> bool {
    let sections = ["dataset", "dataset_val"].into_iter().flat_map(|key| config.sections(key));
    let mut keys = sections.flat_map(|section| ["template", "chat_format"].map(|key| format!("{section}.{key}")));
    keys.any(|key| config.root.at(&key).is_some_and(|node| !node.is_null()))
}

/// A `prompt_template` that is texts and no guest: `{role: [before, after]}`.
fn turn_texts(section: &Section<'_>, format: MessageFormat) -> Found<Option<TurnTexts>> {
    const KEY: &str = "prompt_template";
    let Some(node) = section.node(KEY)? else { return Ok(None) };
    if let Some(name) = node.as_str() {
        let is_chatml = registry::component(name).is_some_and(|component| component.name == "chatml");
        if is_chatml && format.is_qwen() {
            let message = format!("`{}` writes ChatML's tokens itself", section.component_name());
            return Err(section.fail(KEY, message, "leave `prompt_template` out, or put other texts there"));
        }
        return Ok(None);
    }
    if !node.is_map() || node.entry("_component_").is_some() {
        return Ok(None);
    }
    let mut roles = vec![];
    for entry in node.entries() {
        let name = if entry.key == "ipython" { "tool" } else { &entry.key };
        let role = Speaker::ALL.into_iter().find(|role| role.name() == name);
        let text = |node: &Node| if node.is_null() { Some(String::new()) } else { node.as_str().map(str::to_owned) };
        let texts: Option<Vec<String>> = match &entry.value.tree {
            Tree::List(items) => items.iter().map(text).collect(),
            _ => None,
        };
        match (role, texts.map(<[String; 2]>::try_from)) {
            (Some(role), Some(Ok(texts))) => roles.push((role, texts)),
            _ => {
                let what =
                    format!("`{}.{}` is not a role with the texts before and after it", section.path(KEY), entry.key);
                let hint = "`prompt_template: {user: [\"Question: \", \"\\nAnswer: \"]}`; roles are system, user, assistant and ipython";
                return Err(section.fail(KEY, what, hint));
            }
        }
    }
    Ok(Some(roles))
}

/// A registered name, a path to a guest, or `{_component_: either, …settings}`.
pub fn template(section: &Section<'_>, key: &str, around: &Surroundings<'_>) -> Found<Option<GuestRef>> {
    let Some(node) = section.node(key)? else {
        return Ok(None);
    };
    let (name, settings) = match &node.tree {
        Tree::Map(entries) => {
            let Some(component) = node.entry("_component_") else {
                return Err(section.fail(
                    key,
                    format!("`{}` maps roles to texts, which is not read yet", section.path(key)),
                    "write the texts into a template script of a few lines, and give its path",
                ));
            };
            let settings = entries.iter().filter(|entry| entry.key != "_component_");
            (&component.value, json_map(settings.map(|entry| (entry.key.as_str(), &entry.value))))
        }
        _ => (node, serde_json::json!({})),
    };
    let Some(name) = name.as_str().filter(|name| !name.is_empty()) else {
        return Err(section.fail(
            key,
            format!(
                "`{}` must be a template's name or the path of a guest, found {}",
                section.path(key),
                name.describe()
            ),
            format!("`{key}: SummarizeTemplate`"),
        ));
    };
    if let (Some(_), Some(entry)) =
        (registry::component(name), node.entries().iter().find(|entry| entry.key != "_component_"))
    {
        let what = format!("`{}.{}`: `{name}` takes no settings", section.path(key), entry.key);
        let error = section.reader.config.error(entry.key_mark, what);
        return Err(section.reader.fail(error.hint("copy the template with `host cp` and change the copy")));
    }
    Ok(Some(GuestRef { settings, ..guest_ref(section, key, name, around)? }))
}

/// The loss as a guest: `{_component_: FILE, …settings}`.
pub fn loss_guest(root: &Section<'_>) -> Found<Option<GuestRef>> {
    let Some(node) = root.node("loss")? else { return Ok(None) };
    let Some(path) = node.entry("_component_").and_then(|entry| entry.value.as_str()) else { return Ok(None) };
    if !registry::is_guest_path(path) {
        return Ok(None);
    }
    let settings = node.entries().iter().filter(|entry| entry.key != "_component_");
    let settings = json_map(settings.map(|entry| (entry.key.as_str(), &entry.value)));
    Ok(Some(GuestRef { settings, ..guest(path.into()) }))
}

/// The guest of a template, by the name or path that `key` gives.
pub fn guest_ref(section: &Section<'_>, key: &str, name: &str, around: &Surroundings<'_>) -> Found<GuestRef> {
    Ok(guest(template_path(section, key, name, around)?))
}

fn template_path(section: &Section<'_>, key: &str, name: &str, around: &Surroundings<'_>) -> Found<PathBuf> {
    if let Some(component) = registry::component(name).filter(|component| component.role == Role::Template) {
        return around.find_guest("templates", component.name).ok_or_else(|| {
            section.fail(
                key,
                format!(
                    "the template `{name}` is not there: no `templates/{}.wasm` here or beside the program",
                    component.name
                ),
                "`cargo xtask build` makes the guests",
            )
        });
    }
    let path = PathBuf::from(name);
    let is_path = name.contains('/') || name.ends_with(".wasm") || name.ends_with(".rhai") || around.is_file(&path);
    if is_path {
        return Ok(path);
    }
    let hint = match registry::similar(name, Role::Template) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!(
            "a path ends in .wasm or .rhai; names are: {}",
            registry::usable(Role::Template).collect::<Vec<_>>().join(", ")
        ),
    };
    Err(section.fail(key, format!("unknown template `{name}` in `{}`", section.path(key)), hint))
}

pub fn json_map<'a>(entries: impl Iterator<Item = (&'a str, &'a Node)>) -> serde_json::Value {
    let to_json = |node: &Node| serde_json::to_value(node.to_value()).unwrap_or(serde_json::Value::Null);
    serde_json::Value::Object(entries.map(|(key, node)| (key.to_owned(), to_json(node))).collect())
}

pub fn device(root: &Section<'_>) -> Found<DevicePlan> {
    Ok(match root.get::<String>("device")?.as_str() {
        "cpu" => DevicePlan::Cpu,
        "cuda" => DevicePlan::Cuda,
        _ => return Err(Reported),
    })
}

pub fn collectives(root: &Section<'_>) -> Found<CollectivesPlan> {
    const KEY: &str = "distributed_backend";
    match root.get::<String>(KEY)?.as_str() {
        "nccl" if device(root)? == DevicePlan::Cpu => Err(root.fail(
            KEY,
            "`distributed_backend: nccl` moves the memory of GPUs, and `device` is cpu",
            "leave it out: on a CPU it is gloo, on a GPU nccl",
        )),
        "nccl" => Ok(CollectivesPlan::Nccl),
        "gloo" => Ok(CollectivesPlan::Gloo),
        _ => Ok(CollectivesPlan::Auto),
    }
}

pub fn dtype(root: &Section<'_>) -> Found<Dtype> {
    Ok(match root.get::<String>("dtype")?.as_str() {
        "bf16" => Dtype::Bf16,
        "fp32" => Dtype::Fp32,
        _ => return Err(Reported),
    })
}

pub fn limits(root: &Section<'_>) -> Found<GuestLimits> {
    let section = root.section("limits", LIMITS)?;
    Ok(GuestLimits {
        guest_mb: section.get("guest_mb")?,
        memory_mb: section.get("memory_mb")?,
        tensors_mb: section.get("tensors_mb")?,
        handles: section.get("handles")?,
        hostcall_mb: section.get("hostcall_mb")?,
        compile_mb: section.get("compile_mb")?,
        compile_seconds: section.get("compile_seconds")?,
        log_lines: section.get("log_lines")?,
        memories: section.get("memories")?,
        instances: section.get("instances")?,
        tables: section.get("tables")?,
        table_elements: section.get("table_elements")?,
        operations: section.get("operations")?,
        seconds: section.get("seconds")?,
        isolate: root.get("isolate")?,
    })
}

pub fn seed(root: &Section<'_>, around: &Surroundings<'_>) -> Found<u64> {
    Ok(root.get::<Option<u64>>("seed")?.unwrap_or(around.seed.into()))
}

/// Returns a number written as one, `inf` included.
pub fn number(node: &Node) -> Option<f64> {
    match &node.tree {
        Tree::Scalar(Value::Number(number)) => number.as_f64(),
        Tree::Scalar(Value::String(text)) if text == "inf" => Some(f64::INFINITY),
        _ => None,
    }
}
