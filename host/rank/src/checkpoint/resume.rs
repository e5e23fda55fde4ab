//! What a run needs to go on as if it had not stopped: its numbers and moments bit for bit, and where in the data it was.

use std::path::Path;

use host::config::plan::{Dtype, LoraPlan};
use host::hf::{ModelConfig, WeightIndex};
use host::saved::STATE;
use host::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::files;
use crate::checkpoint::shards::ShardFiles;
use crate::model::Weights;
use crate::shard::Shards;

const TENSORS: &str = "resume.safetensors";

/// What a run has in common with the checkpoint it goes on from: the model, the rows and their order, the types of its
/// numbers. Optimizer, schedule, epochs, limits, layout and rank count are not here: they may change on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// [`Weights::fingerprint`] of the base.
    pub base_model: String,
    /// None: every weight is trained.
    pub lora: Option<LoraPlan>,
    /// Trainable parameters.
    pub num_parameters: i64,
    pub dtype: Dtype,
    pub compat_torchtune: bool,
    pub shuffle: bool,
    /// What a loss guest was given; null of any other loss.
    #[serde(default)]
    pub loss_settings: serde_json::Value,
    /// Rows of the training set, and the digest of their tokens.
    pub num_rows: usize,
    pub data_digest: String,
}

impl Identity {
    /// Every part by the config's name for it, as a person reads it.
    pub fn parts(&self) -> [(&'static str, String); 11] {
        // Without `..`, so that a new part has to be thought of here.
        let Self {
            base_model,
            lora,
            num_parameters,
            dtype,
            compat_torchtune,
            shuffle,
            loss_settings,
            num_rows,
            data_digest,
        } = self;
        let of_lora = |value: &dyn Fn(&LoraPlan) -> String| lora.as_ref().map_or_else(|| "none".to_owned(), value);
        let targets = |lora: &LoraPlan| {
            let LoraPlan { rank: _, alpha: _, dropout: _, targets } = lora;
            let mut targets: Vec<_> = targets.iter().map(String::as_str).collect();
            targets.sort_unstable();
            targets.join(", ")
        };
        let short = |digest: &str| digest.chars().take(16).collect::<String>();
        [
            ("the model in `checkpointer.checkpoint_dir`", format!("of fingerprint {}", short(base_model))),
            ("`model.lora_rank`", of_lora(&|lora| lora.rank.to_string())),
            ("`model.lora_alpha`", of_lora(&|lora| lora.alpha.to_string())),
            ("`model.lora_dropout`", of_lora(&|lora| lora.dropout.to_string())),
            ("the layers with adapters (`model.lora_attn_modules`, `apply_lora_to_mlp`, `_output`)", of_lora(&targets)),
            ("the number of trainable parameters", num_parameters.to_string()),
            ("`dtype`", dtype.to_string()),
            ("`compat`", if *compat_torchtune { "torchtune" } else { "null" }.to_owned()),
            ("`shuffle`", if *shuffle { "True" } else { "False" }.to_owned()),
            ("the settings of the loss guest, `loss`", loss_settings.to_string()),
            ("the tokens of `dataset`", format!("{num_rows} rows of digest {}", short(data_digest))),
        ]
    }

    /// Checks that a run of identity `now` may go on from the checkpoint `dir`, which has this one.
    pub fn check(&self, now: &Identity, dir: &Path) -> Result<()> {
        let pairs = self.parts().into_iter().zip(now.parts());
        let differing: Vec<_> = pairs.filter(|((_, then), (_, now))| then != now).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let error = Error::config(format!("the checkpoint `{}` is of another run", dir.display()));
        Err(differing
            .into_iter()
            .map(|((name, then), (_, now))| format!("{name}: {then} in the checkpoint, {now} in this run"))
            .fold(error, Error::cause)
            .hint(format!("`{}/config_resolved.yaml` is the config to resume it with", dir.display()))
            .hint("or start a new run: leave `resume_from_checkpoint` out and take another `output_dir`"))
    }
}

/// Where a run is.
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
    pub identity: Identity,
    pub host_version: String,
    /// When it was written, in nanoseconds of Unix time: a folder may hold an older run that went further.
    pub saved_at: u128,
    /// Ranks that shared the model, each of which wrote a file; 0: one file has everything.
    #[serde(default)]
    pub shards: usize,
}

/// A position with its tensors.
pub struct ResumeState {
    pub position: Position,
    /// Of an adapter; whole models are in the checkpoint's own weights.
    pub adapter: Option<Tensor>,
    /// Undefined where each rank's file has its piece.
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// The parameters in fp32, where an optimizer keeps them so.
    pub master: Option<Tensor>,
}

/// Which part of a state a rank goes on from: of a model that ranks share its piece, else everything.
pub struct Wanted<'a> {
    pub config: &'a ModelConfig,
    /// Ranks that share the model now.
    pub ranks: Option<usize>,
    pub rank: usize,
}

impl ResumeState {
    pub fn write(&self, dir: &Path) -> Result<()> {
        if self.position.shards > 0 {
            return files::write_json(&dir.join(STATE), &self.position);
        }
        let tensors = [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)];
        let tensors = self.adapter.iter().map(|adapter| ("parameters", adapter)).chain(tensors);
        let tensors = tensors.chain(self.master.iter().map(|master| ("master", master)));
        let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect();
        files::write_tensors(&dir.join(TENSORS), tensors)?;
        files::write_json(&dir.join(STATE), &self.position)
    }

    pub fn read(dir: &Path, wanted: &Wanted) -> Result<Self> {
        let path = dir.join(STATE);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::config(format!("cannot resume from `{}`", dir.display()))
                .cause(format!("`{STATE}`: {error}"))
                .hint("name a checkpoint folder that a run wrote, or set `resume_from_checkpoint: False`")
        })?;
        let position: Position = serde_json::from_str(&text).map_err(|error| {
            Error::config(format!("the resume state of `{}` cannot be read", dir.display()))
                .at_file(&path)
                .cause(error)
                .hint("it is damaged or of another version of `host`; name another checkpoint with `resume_from`")
        })?;
        let now = Shards::new(wanted.config, wanted.ranks.unwrap_or(1));
        if position.shards > 0 {
            let stored = ShardFiles::open(dir, Shards::new(wanted.config, position.shards), position.saved_at)?;
            let optional =
                |field: &str| stored.kind(field).map(|kind| stored.piece(field, &now, wanted.rank, kind)).transpose();
            let piece = |field: &str| Ok(optional(field)?.expect("each file was looked at"));
            let (exp_avg, exp_avg_sq): (_, Result<_>) = (piece("exp_avg")?, piece("exp_avg_sq"));
            return Ok(Self { adapter: None, exp_avg, exp_avg_sq: exp_avg_sq?, master: optional("master")?, position });
        }
        let weights = Weights::open(WeightIndex::open(dir, &[TENSORS.to_owned()])?)?;
        let shape = [position.identity.num_parameters];
        let load = |name: &str| {
            let kind = match weights.index.get(name)?.dtype {
                safetensors::Dtype::BF16 => Kind::BFloat16,
                _ => Kind::Float,
            };
            if wanted.ranks.is_none() {
                return weights.load(name, &shape, kind, Device::Cpu);
            }
            let piece = Tensor::zeros([now.size()], (kind, Device::Cpu));
            for (begin, kept) in now.of_rank(wanted.rank as i64).filter(|(_, kept)| !kept.is_empty()) {
                let length = kept.end - kept.start;
                piece.narrow(0, begin, length).copy_(&weights.load_range(name, &shape, kept, kind)?);
            }
            Ok(piece)
        };
        Ok(Self {
            adapter: position.identity.lora.as_ref().map(|_| load("parameters")).transpose()?,
            exp_avg: load("exp_avg")?,
            exp_avg_sq: load("exp_avg_sq")?,
            master: weights.index.tensors.contains_key("master").then(|| load("master")).transpose()?,
            position,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position() -> Position {
        let lora = LoraPlan { rank: 8, alpha: 16.0, dropout: 0.0, targets: vec!["q_proj".into(), "v_proj".into()] };
        let identity = Identity {
            base_model: "0123456789abcdef-and-more".into(),
            lora: Some(lora),
            num_parameters: 100,
            dtype: Dtype::Bf16,
            compat_torchtune: false,
            shuffle: true,
            loss_settings: serde_json::json!({ "gamma": 2 }),
            num_rows: 80,
            data_digest: "fedcba9876543210-and-more".into(),
        };
        let host_version = "0.1.0".into();
        Position {
            step: 1,
            epoch: 0,
            step_in_epoch: 1,
            seed: 42,
            samples_per_step: 8,
            identity,
            host_version,
            saved_at: 0,
            shards: 0,
        }
    }

    #[test]
    fn another_run_is_told_by_every_part_that_differs() {
        let then = position().identity;
        let check = |change: &dyn Fn(&mut Identity)| {
            let mut now = then.clone();
            change(&mut now);
            then.check(&now, Path::new("out/step_1")).map_err(|error| error.causes)
        };
        check(&|_| {}).unwrap();
        // In whatever order the config names them.
        check(&|now| now.lora.as_mut().unwrap().targets.reverse()).unwrap();
        type Change = (fn(&mut Identity), &'static str);
        let changes: [Change; 10] = [
            (|now| now.base_model.insert(0, '1'), "of fingerprint 1012345678"),
            (|now| now.lora.as_mut().unwrap().rank = 4, "`model.lora_rank`: 8 in the checkpoint, 4 in this run"),
            (|now| now.lora.as_mut().unwrap().alpha = 4.5, "`model.lora_alpha`: 16 in the checkpoint, 4.5 in this run"),
            (
                |now| now.lora.as_mut().unwrap().dropout = 0.05,
                "`model.lora_dropout`: 0 in the checkpoint, 0.05 in this run",
            ),
            (
                |now| now.lora.as_mut().unwrap().targets.truncate(1),
                "q_proj, v_proj in the checkpoint, q_proj in this run",
            ),
            (|now| now.dtype = Dtype::Fp32, "`dtype`: bf16 in the checkpoint, fp32 in this run"),
            (|now| now.compat_torchtune = true, "`compat`: null in the checkpoint, torchtune in this run"),
            (|now| now.shuffle = false, "`shuffle`: True in the checkpoint, False in this run"),
            (
                |now| now.loss_settings = serde_json::json!({ "gamma": 3 }),
                "`loss`: {\"gamma\":2} in the checkpoint, {\"gamma\":3} in this run",
            ),
            (|now| now.num_rows = 64, "the tokens of `dataset`: 80 rows"),
        ];
        for (change, expected) in changes {
            let causes = check(&change).unwrap_err();
            assert_eq!(causes.len(), 1, "{causes:?}");
            assert!(causes[0].contains(expected), "{causes:?}");
        }
        let both = check(&|now| {
            now.shuffle = false;
            now.lora.as_mut().unwrap().rank = 4;
        });
        assert_eq!(both.unwrap_err().len(), 2);
    }
}
