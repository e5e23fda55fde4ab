//! Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use host::config::plan::LoraPlan;
use host::error::IoContext;
use host::hf::WeightIndex;
use host::{Error, Result};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::adapter::LoraAdapter;
use crate::checkpoint::files;
use crate::model::Weights;

const PREFIX: &str = "base_model.model.";
const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// Writes both files into `dir`. `base_model` becomes `base_model_name_or_path`.
pub fn write(adapter: &LoraAdapter, base_model: &str, dir: &Path) -> Result<()> {
    let plan = &adapter.plan;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "target_modules": plan.targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": false,
        "use_rslora": false,
        "revision": null,
    });
    files::write_json(&dir.join(CONFIG), &config)?;
    let mut tensors = Vec::new();
    for (layer, a, b) in adapter.factors() {
        tensors.push((format!("{PREFIX}{layer}.lora_A.weight"), a.detach()));
        tensors.push((format!("{PREFIX}{layer}.lora_B.weight"), b.detach()));
    }
    files::write_tensors(&dir.join(WEIGHTS), tensors)
}

/// The LoRA settings of an adapter folder.
pub fn read_plan(dir: &Path) -> Result<LoraPlan> {
    let path = dir.join(CONFIG);
    let bad = |what: String| Error::config(format!("the adapter in `{}` cannot be used", dir.display())).cause(what);
    let text = std::fs::read_to_string(&path).map_err(|error| {
        bad(format!("cannot read `{CONFIG}`: {error}")).hint("an adapter folder is one that PEFT or `host` wrote")
    })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()).at_file(&path))?;
    let number = |key: &str| {
        value
            .get(key)
            .and_then(Value::as_f64)
            .filter(|number| *number > 0.0)
            .ok_or_else(|| bad(format!("`{key}` is no positive number")))
    };
    if value.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(bad(format!("`peft_type` is {}, only \"LORA\" is read", value["peft_type"])).at_file(&path));
    }
    let unread = [
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
        ("bias", json!("none")),
        ("lora_bias", json!(false)),
        ("fan_in_fan_out", json!(false)),
        ("alpha_pattern", json!({})),
        ("rank_pattern", json!({})),
        ("modules_to_save", json!([])),
        ("layers_to_transform", json!([])),
    ];
    for (key, off) in unread {
        if value.get(key).is_some_and(|found| *found != off && !found.is_null()) {
            return Err(bad(format!("`{key}` is {}, only {off} is read so far", value[key])).at_file(&path));
        }
    }
    let targets: Vec<String> = match value.get("target_modules") {
        Some(Value::Array(list)) => list.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        _ => return Err(bad("`target_modules` is no list of layer names".into()).at_file(&path)),
    };
    let dropout = value.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0);
    Ok(LoraPlan { rank: number("r")? as usize, alpha: number("lora_alpha")?, dropout, targets })
}

/// Fills `adapter` from the weights in `dir`. Every factor must be there, in its shape, and nothing else.
pub fn read_weights(adapter: &LoraAdapter, dir: &Path) -> Result<()> {
    let weights = Weights::open(WeightIndex::open(dir, &[WEIGHTS.to_owned()])?)?;
    let mut read = 0;
    for (layer, a, b) in adapter.factors() {
        for (factor, name) in [(a, "lora_A"), (b, "lora_B")] {
            let name = format!("{PREFIX}{layer}.{name}.weight");
            let source = weights.load(&name, &factor.size(), Kind::Float, Device::Cpu)?;
            tch::no_grad(|| factor.shallow_clone().copy_(&source));
            read += 1;
        }
    }
    if read != weights.index.tensors.len() {
        let known: Vec<String> = adapter.factors().map(|(layer, _, _)| format!("{PREFIX}{layer}.")).collect();
        let stray = weights.index.tensors.keys().find(|name| !known.iter().any(|prefix| name.starts_with(prefix)));
        return Err(Error::config(format!("the adapter in `{}` does not fit this model", dir.display()))
            .cause(format!("it has a tensor `{}` that no target layer takes", stray.map_or("?", String::as_str))));
    }
    Ok(())
}

/// The name of the base model for `base_model_name_or_path`: the hub's, when the folder remembers it, else its path.
pub fn base_model_name(checkpoint_dir: &Path) -> Result<String> {
    let path = checkpoint_dir.join("original_repo_id.json");
    // PEFT looks for it from wherever it is run.
    let absolute =
        || std::path::absolute(checkpoint_dir).unwrap_or_else(|_| checkpoint_dir.into()).display().to_string();
    if !path.exists() {
        return Ok(absolute());
    }
    let text = std::fs::read_to_string(&path).path_context("read", &path)?;
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    Ok(value.get("repo_id").and_then(Value::as_str).map_or_else(absolute, str::to_owned))
}
