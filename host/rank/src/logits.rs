//! Scores of given tokens under a model folder, to compare with another implementation: see `cargo xtask interop`.

use std::path::Path;

use host::config::plan::ModelPlan;
use host::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::files;
use crate::train::Opened;

/// Writes f32 logits `[T, V]` of each sequence in `tokens` (JSON, a list of lists of ids) as tensor `0`, `1`, … An
/// adapter folder (`adapter_config.json`) is applied when `model` is written `BASE+ADAPTER`.
pub fn write(model: &Path, tokens: &Path, out: &Path) -> Result<()> {
    let text = std::fs::read_to_string(tokens)
        .map_err(|error| Error::config(format!("cannot read `{}`", tokens.display())).cause(error))?;
    let sequences: Vec<Vec<i64>> = serde_json::from_str(&text)
        .map_err(|error| Error::config("the token file is no list of lists of ids").cause(error))?;
    let name = model.display().to_string();
    let (base, adapter) = match name.split_once('+') {
        Some((base, adapter)) => (base.into(), Some(adapter.into())),
        None => (model.to_path_buf(), None),
    };
    let plan = ModelPlan { checkpoint_dir: base, checkpoint_files: vec![], lora: None, adapter };
    let opened = Opened::open(&plan, Kind::Float, Device::Cpu, None)?;
    let mut written = Vec::new();
    for (index, sequence) in sequences.iter().enumerate() {
        written.push((index.to_string(), of(&opened, sequence)?));
    }
    files::write_tensors(out, written)
}

/// Logits `[T, V]` of one sequence, in host memory.
pub fn of(opened: &Opened, sequence: &[i64]) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let device = opened.model.device();
    let length = sequence.len() as i64;
    let positions = Tensor::arange(length, (Kind::Int64, device));
    let forward = opened.model.forward(&positions, [0, length].into());
    let tokens = Tensor::from_slice(sequence).to_device(device);
    Ok(opened.model.logits(&tokens, &forward, None, None)?.to_device(Device::Cpu))
}
