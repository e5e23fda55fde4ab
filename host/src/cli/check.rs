//! The files a plan names, looked at before anything starts: model folder, weights, tokenizer, data, guests, output.
//!
//! Reads headers, first bytes and first rows only. Every finding points at the line of the config that names the file.
//! It leaves nothing behind: an output folder is judged by the nearest folder above it that exists.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::config::plan::{
    DatasetPlan, GuestRef, MessageFormat, MetricSink, ModelPlan, Plan, RowsPlan, TokenizerPlan, TrainPlan,
};
use crate::config::registry::{self, Role};
use crate::config::{Config, Notice};
use crate::data::source::{SourceFile, Wanted};
use crate::data::split;
use crate::error::{Error, Result};
use crate::guest;
use crate::hf::{ModelConfig, WeightIndex};
use crate::tokenizer;

/// Finds everything that is wrong with the files a plan names, or what to know about them.
pub fn check(plan: &Plan, config: &Config) -> Result<Vec<Notice>> {
    let mut findings = Findings { config, errors: vec![], notices: vec![] };
    match plan {
        Plan::Train(plan) => findings.train(plan),
        Plan::Generate(plan) => {
            findings.model(&plan.model);
            findings.tokenizer(&plan.tokenizer, &plan.model.checkpoint_dir);
        }
        Plan::Preview(_) | Plan::Check(_) | Plan::Test(_) => {}
    }
    findings.end()
}

/// The same for what makes samples of rows; `key` is `dataset` or `dataset_val`.
pub fn check_data(plan: &TrainPlan, key: &'static str, config: &Config) -> Result<Vec<Notice>> {
    let mut findings = Findings { config, errors: vec![], notices: vec![] };
    findings.tokenizer(&plan.tokenizer, &plan.model.checkpoint_dir);
    let datasets = if key == "dataset" { &plan.dataset } else { &plan.dataset_val };
    for (section, dataset) in config.sections(key).zip(datasets) {
        findings.dataset(&section, dataset);
    }
    findings.end()
}

struct Findings<'a> {
    config: &'a Config,
    errors: Vec<Error>,
    notices: Vec<Notice>,
}

impl Findings<'_> {
    fn end(self) -> Result<Vec<Notice>> {
        Error::all(self.errors).map_or(Ok(self.notices), Err)
    }

    /// Adds an error, the config's line first.
    fn add(&mut self, key: &str, mut error: Error) {
        error.locations.insert(0, self.config.locate(key));
        self.errors.push(error);
    }

    fn add_result<T>(&mut self, key: &str, result: Result<T>) {
        if let Err(error) = result {
            self.add(key, error);
        }
    }

    fn train(&mut self, plan: &TrainPlan) {
        if !plan.recipe.path.as_os_str().is_empty()
            && let Err(error) = check_guest(&plan.recipe, "recipe")
        {
            self.errors.push(error);
        }
        if let Some(guest) = &plan.loss.guest {
            let hint = "paths count from the folder `host` is started in";
            let checked = check_guest(guest, "loss");
            let checked = checked.map_err(|error| if guest.path.exists() { error } else { error.hint(hint) });
            self.add_result("loss._component_", checked);
        }
        self.model(&plan.model);
        self.tokenizer(&plan.tokenizer, &plan.model.checkpoint_dir);
        for (key, datasets) in [("dataset", &plan.dataset), ("dataset_val", &plan.dataset_val)] {
            for (section, dataset) in self.config.sections(key).zip(datasets) {
                self.dataset(&section, dataset);
            }
        }
        if let Some(folder) = &plan.checkpoint.resume_from
            && !folder.is_dir()
        {
            let error = Error::config(format!("the checkpoint `{}` is not a folder that exists", folder.display()));
            self.add("resume_from", error.hint("checkpoints are `epoch_N` and `step_N` in the output folder"));
        }
        if plan.checkpoint.resume
            && plan.checkpoint.resume_from.is_none()
            && !has_checkpoint(&plan.checkpoint.output_dir)
        {
            let what = format!(
                "`resume_from_checkpoint: True`, but `{}` holds no checkpoint",
                plan.checkpoint.output_dir.display()
            );
            let hint = "start without it, or set `checkpointer.output_dir` to the folder of the run to go on with";
            self.add("resume_from_checkpoint", Error::config(what).hint(hint));
        }
        let model = &plan.model.checkpoint_dir;
        if let MetricSink::Disk { log_dir, .. } | MetricSink::TensorBoard { log_dir, .. } = &plan.metrics.sink
            && !log_dir.starts_with(&plan.output_dir)
        {
            let hint = "leave `metric_logger.log_dir` out: logs go to `${output_dir}/logs`";
            self.add_result("metric_logger.log_dir", check_output(log_dir, model, hint));
        }
        let hint = "give another with `output_dir=FOLDER`";
        self.add_result("output_dir", check_output(&plan.output_dir, model, hint));
        if plan.checkpoint.output_dir != plan.output_dir {
            let checked = check_output(&plan.checkpoint.output_dir, model, hint);
            self.add_result("checkpointer.output_dir", checked);
        }
    }

    fn model(&mut self, model: &ModelPlan) {
        let folder = &model.checkpoint_dir;
        if !folder.is_dir() {
            let error = Error::config(format!("the model folder `{}` is not there", folder.display()))
                .hint("it is a Hugging Face folder: config.json, tokenizer files, weights; `host import` makes one from a GGUF file");
            self.add("checkpointer.checkpoint_dir", error);
            return;
        }
        let config = ModelConfig::read(folder);
        match &config {
            Err(error) => self.add("checkpointer.checkpoint_dir", error.clone()),
            Ok(config) => {
                let adapts_head = model.lora.as_ref().is_some_and(|lora| lora.targets.iter().any(|t| t == "lm_head"));
                if adapts_head && config.tie_word_embeddings {
                    let what = "this model's output layer is its embedding, which takes no adapter";
                    let error = Error::config(what).at_file(folder.join("config.json"));
                    self.add("model.apply_lora_to_output", error.hint("set `model.apply_lora_to_output: False`"));
                }
            }
        }
        let key = if model.checkpoint_files.is_empty() { "checkpoint_dir" } else { "checkpoint_files" };
        let index = WeightIndex::open(folder, &model.checkpoint_files);
        let checked = index.and_then(|index| config.map_or(Ok(()), |config| check_shapes(&index, &config)));
        self.add_result(&format!("checkpointer.{key}"), checked);
        if let Some(adapter) = &model.adapter {
            let key = if self.config.has("adapter_dir") { "adapter_dir" } else { "checkpointer.adapter_checkpoint" };
            self.add_result(key, check_adapter(adapter));
        }
    }

    fn tokenizer(&mut self, tokenizer: &TokenizerPlan, model: &Path) {
        let path = &tokenizer.path;
        let key = match tokenizer.format {
            MessageFormat::ChatTemplate => "tokenizer.tokenizer_json_path",
            _ => "tokenizer.path",
        };
        if !path.is_file() {
            let error = Error::config(format!("the tokenizer `{}` is not there", path.display()))
                .hint("give the model's tokenizer.json or tokenizer.model, or its folder");
            self.add(key, error);
        } else {
            self.add_result(key, tokenizer::Kind::of(path));
            let own = model.join("tokenizer.json");
            if path.file_name() == own.file_name() && differ(path, &own) {
                let message = format!(
                    "the tokenizer `{}` is not the one in the model's folder `{}`: the model may have learned other tokens",
                    path.display(),
                    model.display()
                );
                self.notices.push(Notice { message, location: self.config.locate(key) });
            }
        }
        let TokenizerPlan { merges_file, special_tokens_path, tokenizer_config, generation_config, .. } = tokenizer;
        for (key, file) in [
            ("merges_file", merges_file),
            ("special_tokens_path", special_tokens_path),
            ("tokenizer_config_json_path", tokenizer_config),
            ("generation_config_path", generation_config),
        ] {
            if let Some(file) = file.as_ref().filter(|file| !file.is_file()) {
                let error = Error::config(format!("the file `{}` is not there", file.display()));
                self.add(&format!("tokenizer.{key}"), error.hint("paths count from the folder `host` is started in"));
            }
        }
        if let Some(template) = &tokenizer.prompt_template {
            let checked = check_guest(template, "template");
            let is_there = template.path.exists();
            let hinted = checked.map_err(|error| if is_there { error } else { error.hint(template_hint(template)) });
            self.add_result("tokenizer.prompt_template", hinted);
        }
    }

    fn dataset(&mut self, section: &str, dataset: &DatasetPlan) {
        let slices = match split::parse(&dataset.split) {
            Ok(slices) => slices,
            Err(error) => return self.add(&format!("{section}.split"), error),
        };
        let needed = Wanted::of(&dataset.rows);
        let column_key = match dataset.rows {
            RowsPlan::Columns { .. } | RowsPlan::Pairs { .. } => "column_map",
            RowsPlan::Chat { .. } => "conversation_column",
            RowsPlan::Text { .. } => "column",
        };
        let has_files = self.config.has(&format!("{section}.data_files"));
        let key = format!("{section}.{}", if has_files { "data_files" } else { "source" });
        // A split that is not asked for need not even be readable.
        for file in dataset.files.iter().filter(|file| slices.iter().any(|slice| slice.split == file.split)) {
            let path = file.path.display();
            match std::fs::metadata(&file.path) {
                Err(error) => {
                    let error = Error::config(format!("cannot read the data file `{path}`")).cause(error);
                    self.add(&key, error.hint("paths count from the folder `host` is started in"));
                }
                Ok(metadata) if metadata.is_dir() => {
                    let error = Error::config(format!("the data file `{path}` is a folder"));
                    self.add(&key, error.hint("`source` takes a folder, `data_files` takes files"));
                }
                // Rows are read more than once, and a pipe would be waited for.
                Ok(metadata) if !metadata.is_file() => {
                    self.add(&key, Error::config(format!("the data file `{path}` is a pipe or a device")));
                }
                Ok(_) => match SourceFile::peek(&file.path, &dataset.format) {
                    Err(error) => self.add(&key, error),
                    Ok(head) if head.num_rows == 0 => {
                        self.add(&key, Error::config(format!("the data file `{path}` has no rows")));
                    }
                    // What one file lacks the others will lack too.
                    Ok(head) => {
                        if let Err(error) = head.require(&needed) {
                            return self.add(&format!("{section}.{column_key}"), error);
                        }
                    }
                },
            }
        }
    }
}

/// Whether a folder has what may be a checkpoint, by its name; what it is worth, the worker sees.
fn has_checkpoint(output: &Path) -> bool {
    let entries = std::fs::read_dir(output).into_iter().flatten().flatten();
    let is_one = |name: &str| name.starts_with("step_") || name.starts_with("epoch_");
    entries.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| is_one(&name))
}

/// Whether `path` and `other`, if that is there, are files of different bytes.
fn differ(path: &Path, other: &Path) -> bool {
    let is_same_file = path.canonicalize().ok() == other.canonicalize().ok();
    !is_same_file
        && other.is_file()
        && matches!((std::fs::read(path), std::fs::read(other)), (Ok(ours), Ok(theirs)) if ours != theirs)
}

fn template_hint(template: &GuestRef) -> String {
    match template.path.to_str().and_then(|path| registry::similar(registry::file_stem(path), Role::Template)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "paths count from the folder `host` is started in".to_owned(),
    }
}

/// Looks for every tensor of the model; names the first that is not as `config.json` has it.
fn check_shapes(index: &WeightIndex, config: &ModelConfig) -> Result<()> {
    config.tensors().iter().try_for_each(|(name, shape)| index.get_shaped(name, shape).map(drop))
}

fn check_adapter(path: &Path) -> Result<()> {
    if path.is_file() {
        return WeightIndex::open_adapter(path, false).map(drop);
    }
    if !path.is_dir() {
        return Err(Error::config(format!("the adapter `{}` is not there", path.display()))
            .hint("give a folder that PEFT or `host` wrote, or the `adapter_model.pt` that torchtune wrote"));
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        if !path.join(name).is_file() {
            return Err(Error::config(format!("the adapter folder `{}` has no `{name}`", path.display()))
                .hint("give a folder that training or PEFT wrote, such as `OUTPUT/epoch_0`"));
        }
    }
    Ok(())
}

/// Tells a guest by its first bytes: a Wasm component, or a Rhai script; and reads what it says of itself.
fn check_guest(guest: &GuestRef, noun: &str) -> Result<()> {
    let path = &guest.path;
    guest::metadata(path)?;
    let name = path.display();
    let mut start = [0u8; 8];
    let mut read = || -> std::io::Result<usize> {
        let mut file = File::open(path)?.take(8);
        let mut len = 0;
        while len < 8 {
            match file.read(&mut start[len..])? {
                0 => break,
                count => len += count,
            }
        }
        Ok(len)
    };
    let len = read().map_err(|error| Error::config(format!("cannot read the {noun} `{name}`")).cause(error))?;
    let is_script = path.extension().is_some_and(|extension| extension == "rhai");
    match &start[..len] {
        [0, b'a', b's', b'm', 0x0d, 0, 1, 0] => Ok(()),
        [0, b'a', b's', b'm', 1, 0, 0, 0] => {
            Err(Error::config(format!("the {noun} `{name}` is a core Wasm module, and a {noun} is a component"))
                .hint("build the guest for `wasm32-wasip2`"))
        }
        [0, b'a', b's', b'm', ..] => {
            Err(Error::config(format!("the {noun} `{name}` is of a WebAssembly version that is not known"))
                .hint("build the guest for `wasm32-wasip2`"))
        }
        [] => Err(Error::config(format!("the {noun} `{name}` is empty"))),
        _ if is_script => Ok(()),
        _ => Err(Error::config(format!("the {noun} `{name}` is neither a Wasm component nor a Rhai script"))
            .hint("a script's name ends in .rhai; a component is built for `wasm32-wasip2`")),
    }
}

/// An output folder must be, or be able to become, a folder we can write to, outside the model's.
pub fn check_output(output: &Path, model: &Path, hint: &str) -> Result<()> {
    let nearest = nearest_existing(output);
    let name = output.display();
    if !nearest.is_dir() {
        return Err(Error::config(format!(
            "the output folder `{name}` cannot be made: `{}` is a file",
            nearest.display()
        )));
    }
    // A nameless file answers for permissions, read-only and full disks alike, root or not.
    if let Err(error) = tempfile::tempfile_in(&nearest) {
        return Err(Error::config(format!("the output folder `{name}` cannot be written to"))
            .cause(format!("`{}`: {error}", nearest.display()))
            .hint(hint));
    }
    // `resolve` compared the names; links may still lead into the model's folder.
    if let (Ok(real), Ok(model)) = (nearest.canonicalize(), model.canonicalize())
        && real.starts_with(&model)
    {
        return Err(Error::config(format!(
            "the output folder `{name}` leads into the model's folder, which is never written to"
        ))
        .hint(hint));
    }
    Ok(())
}

fn nearest_existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|folder| folder.symlink_metadata().is_ok());
    // A relative path whose parts are all new stands in the working directory.
    found.unwrap_or(Path::new(".")).to_owned()
}
