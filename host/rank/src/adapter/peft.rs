//! Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. torchtune's are read too.

use std::path::Path;

use host::config::plan::LoraPlan;
use host::error::IoContext;
use host::hf::{ModelConfig, WeightIndex};
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
    for (key, found) in value.as_object().into_iter().flatten() {
        if !is_read(key, found) {
            let what = format!("`{key}` is {found}, which changes what the adapter computes and is not read yet");
            return Err(bad(what).at_file(&path));
        }
    }
    let targets: Vec<String> = match value.get("target_modules") {
        Some(Value::Array(list)) => list.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        _ => return Err(bad("`target_modules` is no list of layer names".into()).at_file(&path)),
    };
    let dropout = value.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0);
    Ok(LoraPlan { rank: number("r")? as usize, alpha: number("lora_alpha")?, dropout, targets })
}

/// Whether a setting is read above, or says nothing about what the adapter computes: an unknown one must be off.
fn is_read(key: &str, value: &Value) -> bool {
    match key {
        "peft_type" | "r" | "lora_alpha" | "lora_dropout" | "target_modules" => true,
        "task_type" | "base_model_name_or_path" | "revision" | "inference_mode" | "auto_mapping" | "peft_version" => {
            true
        }
        // Settings of what has to be switched on elsewhere.
        "layers_pattern" | "megatron_core" | "qalora_group_size" | "runtime_config" => true,
        "bias" => value == "none",
        // Others replace the base's weights as well.
        "init_lora_weights" => value.is_boolean() || value == "gaussian" || value == "orthogonal" || value == "eva",
        _ => match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(keys) => keys.is_empty(),
            _ => false,
        },
    }
}

/// Fills `adapter` from PEFT's folder, or from a file that torchtune wrote. Every factor must be there, in its shape, and
/// nothing else.
pub fn read_weights(adapter: &LoraAdapter, path: &Path, config: &ModelConfig) -> Result<()> {
    let index = WeightIndex::open_adapter(path, config.is_paired_in_torchtune())?;
    let weights = Weights::of_model(index, config)?;
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
        return Err(Error::config(format!("the adapter in `{}` does not fit this model", path.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What PEFT 0.18 writes for a plain LoRA adapter.
    const PLAIN: &str = r#"{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
        "auto_mapping": null, "base_model_name_or_path": "base", "bias": "none", "corda_config": null,
        "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
        "inference_mode": true, "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.1,
        "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA",
        "peft_version": "0.18.0", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": null,
        "target_modules": ["q_proj", "v_proj"], "target_parameters": null, "task_type": "CAUSAL_LM",
        "trainable_token_indices": null, "use_dora": false, "use_qalora": false, "use_rslora": false}"#;

    fn read(key: &str, value: Value) -> Result<LoraPlan> {
        let dir = tempfile::tempdir().unwrap();
        let mut config: Value = serde_json::from_str(PLAIN).unwrap();
        config[key] = value;
        std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        read_plan(dir.path())
    }

    #[test]
    fn a_plain_adapter_is_read() {
        let targets = vec!["q_proj".to_owned(), "v_proj".to_owned()];
        let expected = LoraPlan { rank: 8, alpha: 16.0, dropout: 0.1, targets };
        assert_eq!(read("revision", json!("main")).unwrap(), expected);
    }

    #[test]
    fn settings_that_are_not_read_are_refused() {
        for (key, value) in [
            ("use_dora", json!(true)),
            ("use_rslora", json!(true)),
            ("bias", json!("lora_only")),
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("modules_to_save", json!(["lm_head"])),
            ("layers_to_transform", json!([0])),
            ("exclude_modules", json!("q_proj")),
            ("init_lora_weights", json!("pissa")),
            ("a_key_of_tomorrow", json!(1)),
        ] {
            let error = read(key, value.clone()).unwrap_err();
            assert!(error.causes[0].starts_with(&format!("`{key}` is {value}")), "{error}");
            assert!(error.locations[0].file.ends_with(CONFIG));
        }
        for (key, value, cause) in [
            ("r", json!(0), "`r` is no positive number"),
            ("target_modules", json!("all-linear"), "`target_modules` is no list"),
            ("peft_type", json!("IA3"), "`peft_type` is \"IA3\""),
        ] {
            let error = read(key, value).unwrap_err();
            assert!(error.causes[0].starts_with(cause), "{error}");
        }
    }
}
