//! What a run needs to go on as if it had not stopped: adapter and moments bit for bit, and where in the data it was.

use std::path::{Path, PathBuf};

use host::error::IoContext;
use host::hf::WeightIndex;
use host::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::checkpoint::files;
use crate::model::Weights;

const STATE: &str = "resume.json";
const TENSORS: &str = "resume.safetensors";

/// Where a run is: everything a resumed run must agree with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps done.
    pub step: usize,
    pub epoch: usize,
    /// Steps done in `epoch`.
    pub step_in_epoch: usize,
    pub seed: u64,
    /// batch_size × accumulation × ranks: which samples form a step.
    pub samples_per_step: usize,
    /// Rows of the training set, and the digest of what made them tokens.
    pub num_rows: usize,
    pub data_digest: String,
    /// Trainable parameters, and what they are.
    pub num_parameters: i64,
    pub host_version: String,
    /// When it was written, in nanoseconds of Unix time: a folder may hold an older run that went further.
    pub saved_at: u128,
}

/// A position with its tensors.
pub struct ResumeState {
    pub position: Position,
    pub parameters: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
}

impl ResumeState {
    pub fn write(&self, dir: &Path) -> Result<()> {
        let tensors = vec![
            ("parameters".to_owned(), self.parameters.shallow_clone()),
            ("exp_avg".to_owned(), self.exp_avg.shallow_clone()),
            ("exp_avg_sq".to_owned(), self.exp_avg_sq.shallow_clone()),
        ];
        files::write_tensors(&dir.join(TENSORS), tensors)?;
        files::write_json(&dir.join(STATE), &self.position)
    }

    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::config(format!("cannot resume from `{}`", dir.display()))
                .cause(format!("`{STATE}`: {error}"))
                .hint("name a checkpoint folder that a run wrote, or set `resume_from_checkpoint: False`")
        })?;
        let position: Position = serde_json::from_str(&text)
            .map_err(|error| Error::config("the resume state cannot be read").at_file(&path).cause(error))?;
        let weights = Weights::open(WeightIndex::open(dir, &[TENSORS.to_owned()])?)?;
        let shape = [position.num_parameters];
        let load = |name: &str| {
            let kind = match weights.index.get(name)?.dtype {
                safetensors::Dtype::BF16 => tch::Kind::BFloat16,
                _ => tch::Kind::Float,
            };
            weights.load(name, &shape, kind, Device::Cpu)
        };
        Ok(Self {
            parameters: load("parameters")?,
            exp_avg: load("exp_avg")?,
            exp_avg_sq: load("exp_avg_sq")?,
            position,
        })
    }
}

/// The checkpoint below `output_dir` that was written last.
pub fn newest(output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(existing(output_dir)?.pop())
}

/// Checkpoints below `output_dir` that can be resumed from, oldest first.
pub fn existing(output_dir: &Path) -> Result<Vec<PathBuf>> {
    if !output_dir.exists() {
        return Ok(vec![]);
    }
    let mut found: Vec<(u128, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(output_dir).path_context("list", output_dir)? {
        let path = entry.path_context("list", output_dir)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if !(name.starts_with("step_") || name.starts_with("epoch_")) {
            continue;
        }
        // An old version that stepped aside counts only while no new one has taken its name.
        if name.strip_suffix(".old").is_some_and(|whole| output_dir.join(whole).exists()) {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(path.join(STATE)) else { continue };
        let Ok(position) = serde_json::from_str::<Position>(&text) else { continue };
        found.push((position.saved_at, path));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}
