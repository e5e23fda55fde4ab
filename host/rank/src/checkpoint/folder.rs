//! Checkpoint folders: `step_N/` and `epoch_N/` under the output folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use host::config::plan::{CheckpointPlan, ModelPlan};
use host::error::IoContext;
use host::hf::config_folder;
use host::saved;
use host::{Error, Result};
use tch::{Kind, Tensor};

use crate::adapter::peft;
use crate::checkpoint::resume::ResumeState;
use crate::checkpoint::shards::{Piece, ShardFiles};
use crate::checkpoint::{files, merged};
use crate::metrics::Curve;
use crate::model::Weights;
use crate::trained::Snapshot;

/// Files of the base model at least this large are weights or the like, and not copied beside a checkpoint.
const MAX_COPIED_BYTES: u64 = 100 * 1024 * 1024;

/// The adapter's folder in a checkpoint.
pub const ADAPTER_DIR: &str = "adapter";

/// Writes and prunes the checkpoints of one run. Rank 0 has one.
pub struct Saver {
    plan: CheckpointPlan,
    checkpoint_dir: PathBuf,
    kind: Kind,
    /// What a run records beside its weights: the resolved config and versions.
    record: serde_json::Value,
    resolved_yaml: String,
    /// Folders of this run, oldest first.
    written: Vec<PathBuf>,
}

impl Saver {
    pub fn new(
        plan: &CheckpointPlan,
        model: &ModelPlan,
        kind: Kind,
        record: serde_json::Value,
        yaml: &str,
    ) -> Result<Self> {
        Ok(Self {
            // A resumed run prunes what it finds as well: the limit is the folder's.
            written: match plan.resume {
                true => saved::existing(&plan.output_dir)?.into_iter().map(|saved| saved.path).collect(),
                false => vec![],
            },
            plan: plan.clone(),
            checkpoint_dir: config_folder(&model.checkpoint_dir).to_owned(),
            kind,
            record,
            resolved_yaml: yaml.to_owned(),
        })
    }

    /// Makes the folder that the checkpoint `name` is written in before it gets its name.
    pub fn prepare(&self, name: &str) -> Result<PathBuf> {
        let output_dir = &self.plan.output_dir;
        fs::create_dir_all(output_dir).path_context("create", output_dir)?;
        let partial = partial(output_dir, name);
        if partial.exists() {
            fs::remove_dir_all(&partial).path_context("remove the unfinished", &partial)?;
        }
        fs::create_dir(&partial).path_context("create", &partial)?;
        Ok(partial)
    }

    /// Writes the checkpoint `name` and returns its folder. Either the whole folder appears, or none. Where ranks share the
    /// model, `shared` is this rank's piece and tells when the others are written too, to the folder that was prepared.
    pub fn save(
        &mut self,
        name: &str,
        base: &Weights,
        trained: &Snapshot,
        state: &ResumeState,
        curve: &Curve,
        shared: Option<(Piece, Receiver<()>)>,
    ) -> Result<PathBuf> {
        let target = self.plan.output_dir.join(name);
        let partial = match &shared {
            Some((piece, _)) => piece.dir.clone(),
            None => self.prepare(name)?,
        };
        let begun = self.copy_small_files(&partial);
        let pieces = match shared {
            Some(shared) => write_pieces(begun, shared),
            None => begun,
        };
        let filled = pieces.and_then(|()| self.fill(&partial, base, trained, state, curve));
        let written = filled.and_then(|()| publish(&partial, &target));
        if written.is_err() {
            // The error that matters is the one that stopped the write; a leftover has a name no reader takes for whole.
            let _ = fs::remove_dir_all(&partial);
        }
        written?;
        self.written.retain(|path| *path != target);
        self.written.push(target.clone());
        self.prune();
        Ok(target)
    }

    fn fill(&self, dir: &Path, base: &Weights, trained: &Snapshot, state: &ResumeState, curve: &Curve) -> Result<()> {
        if !self.plan.adapter_only {
            let shared = trained
                .shards()
                .map(|shards| ShardFiles::open(dir, shards.clone(), state.position.saved_at))
                .transpose()?;
            // Everything that can fail about what was just written failed when it was written.
            let now = |name: &str, before: &dyn Fn() -> Tensor| match &shared {
                Some(files) => {
                    let kept = files.tensor(trained.name_of(name), self.kind);
                    kept.map_or_else(before, |read| read.expect("a rank's file was just written"))
                }
                None => trained.now(name, before),
            };
            merged::write(base, &now, self.kind, merged::MAX_SHARD_BYTES, dir)?;
        }
        if let Some(adapter) = trained.lora() {
            // In a folder of its own: beside merged weights, transformers would find it and apply it a second time.
            let adapter_dir = dir.join(ADAPTER_DIR);
            fs::create_dir(&adapter_dir).path_context("create", &adapter_dir)?;
            peft::write(adapter, &peft::base_model_name(&self.checkpoint_dir)?, &adapter_dir)?;
            files::sync(&adapter_dir)?;
        }
        files::write_json(&dir.join("run.json"), &self.record)?;
        files::write_bytes(&dir.join("config_resolved.yaml"), self.resolved_yaml.as_bytes())?;
        curve.write(dir)?;
        state.write(dir)
    }

    /// Config and tokenizer files of the base, so that the folder loads by itself.
    fn copy_small_files(&self, dir: &Path) -> Result<()> {
        let base = &self.checkpoint_dir;
        for entry in fs::read_dir(base).path_context("list", base)? {
            let path = entry.path_context("list", base)?.path();
            let name = path.file_name().unwrap_or_default();
            let meta = fs::metadata(&path).path_context("read", &path)?;
            let is_weights = [".safetensors", ".bin", ".pt", ".pth", ".gguf", "index.json"]
                .iter()
                .any(|end| name.to_string_lossy().ends_with(end));
            // Another run's records, when the base is itself a checkpoint of ours.
            let is_record = [
                "run.json",
                "config_resolved.yaml",
                "resume.json",
                "losses.json",
                "adapter_config.json",
                "original_repo_id.json",
            ]
            .iter()
            .any(|record| name == *record);
            if meta.is_file() && meta.len() < MAX_COPIED_BYTES && !is_weights && !is_record {
                let bytes = fs::read(&path).path_context("read", &path)?;
                files::write_bytes(&dir.join(name), &self.with_dtype(&name.to_string_lossy(), bytes))?;
            }
        }
        Ok(())
    }

    /// `config.json` names the type the weights are saved in.
    fn with_dtype(&self, name: &str, bytes: Vec<u8>) -> Vec<u8> {
        if name != "config.json" {
            return bytes;
        }
        let Ok(serde_json::Value::Object(mut map)) = serde_json::from_slice(&bytes) else { return bytes };
        let dtype = if self.kind == Kind::Float { "float32" } else { "bfloat16" };
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = map.get_mut(key) {
                *value = dtype.into();
            }
        }
        let mut text = serde_json::to_string_pretty(&map).unwrap_or_default();
        text.push('\n');
        text.into_bytes()
    }

    /// Keeps the newest folders of this run, as many as the config says.
    fn prune(&mut self) {
        let Some(keep) = self.plan.keep_last_n else { return };
        while self.written.len() > keep.max(1) {
            remove_old(&self.written.remove(0));
        }
    }
}

/// Writes this rank's piece, and waits for the others, also where that failed: they write to the same folder.
fn write_pieces(begun: Result<()>, (piece, written): (Piece, Receiver<()>)) -> Result<()> {
    let own = begun.and_then(|()| piece.write());
    let others = written.recv().map_err(|_| Error::run("the run ended before every rank had written its part"));
    own.and(others)
}

/// Where the checkpoint `name` is written before it gets its name.
pub fn partial(output_dir: &Path, name: &str) -> PathBuf {
    output_dir.join(format!(".{name}.partial"))
}

/// Removes what saves that were killed have left in `output_dir`: unfinished folders, and old versions whose name a new
/// one has taken. Nothing else is touched.
pub fn sweep(output_dir: &Path) {
    let Ok(entries) = fs::read_dir(output_dir) else { return };
    for entry in entries.flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && entry.file_name().to_str().is_some_and(|name| is_leftover(output_dir, name)) {
            match fs::remove_dir_all(entry.path()) {
                Ok(()) => tracing::info!("removed `{}`, which a save that was killed had left", entry.path().display()),
                Err(error) => tracing::warn!("cannot remove the leftover `{}`: {error}", entry.path().display()),
            }
        }
    }
}

fn is_leftover(output_dir: &Path, name: &str) -> bool {
    let is_checkpoint = |name: &str| {
        let number = name.strip_prefix("step_").or(name.strip_prefix("epoch_"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    if let Some(unfinished) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial")) {
        return is_checkpoint(unfinished.strip_suffix(".old").unwrap_or(unfinished));
    }
    // Without a new version beside it, the old one is the only whole one.
    let has_new = |name: &str| output_dir.join(name).join(saved::STATE).is_file();
    name.strip_suffix(".old").is_some_and(|name| is_checkpoint(name) && has_new(name))
}

/// Removes a checkpoint under a name that no reader takes for whole. That it fails, or that somebody was faster, is no
/// reason to end a run whose new checkpoint is safe.
fn remove_old(folder: &Path) {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let doomed = folder.with_file_name(format!(".{name}.partial"));
    match fs::rename(folder, &doomed).and_then(|()| fs::remove_dir_all(&doomed)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove the old checkpoint `{}`: {error}", folder.display());
        }
        _ => {}
    }
}

/// Gives a finished folder its name. An older folder of that name steps aside first and is removed last, so that at any
/// moment a whole checkpoint is there.
fn publish(partial: &Path, target: &Path) -> Result<()> {
    files::sync(partial)?;
    let mut aside = target.as_os_str().to_owned();
    aside.push(".old");
    let aside = PathBuf::from(aside);
    let replaces = target.exists();
    if replaces {
        if aside.exists() {
            fs::remove_dir_all(&aside).path_context("remove", &aside)?;
        }
        fs::rename(target, &aside).path_context("set aside", target)?;
    }
    fs::rename(partial, target).path_context("rename to", target)?;
    if let Some(parent) = target.parent() {
        files::sync(parent)?;
    }
    if replaces {
        fs::remove_dir_all(&aside).path_context("remove", &aside)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Makes folders, each with a file in it; a name that ends in `!` is a whole checkpoint.
    fn make(dir: &Path, folders: &[&str]) {
        for name in folders {
            let folder = dir.join(name.trim_end_matches('!'));
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join(if name.ends_with('!') { saved::STATE } else { "file" }), "{}").unwrap();
        }
    }

    #[test]
    fn leftovers_are_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let leftovers = [".step_4.partial", ".epoch_0.partial", ".step_2.old.partial", "step_8.old!", "epoch_1.old!"];
        let kept = ["step_8!", "epoch_1!", "step_9.old!", "step_7.old!", "step_7", "logs"];
        let theirs =
            [".step_x.partial", "step_4.partial", ".mine.partial", ".step_.partial", "best.old", ".cache.partial"];
        make(dir.path(), &[&leftovers[..], &kept, &theirs].concat());
        // Neither a file nor a link of such a name is ours.
        fs::write(dir.path().join(".step_5.partial"), "").unwrap();
        std::os::unix::fs::symlink(dir.path().join("logs"), dir.path().join(".step_6.partial")).unwrap();
        let mut expected: Vec<_> =
            kept.iter().chain(&theirs).map(|name| name.trim_end_matches('!').to_owned()).collect();
        expected.extend([".step_5.partial".to_owned(), ".step_6.partial".to_owned()]);
        expected.sort();
        sweep(dir.path());
        assert_eq!(names(dir.path()), expected);
        assert_eq!(names(&dir.path().join("logs")), ["file"]);
        sweep(&dir.path().join("absent"));
    }

    #[test]
    fn a_new_version_takes_the_place_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let (partial, target) = (dir.path().join(".step_1.partial"), dir.path().join("step_1"));
        for content in ["first", "second"] {
            // What a save that was killed between its two renames has left.
            make(dir.path(), &["step_1.old"]);
            fs::create_dir(&partial).unwrap();
            fs::write(partial.join("file"), content).unwrap();
            publish(&partial, &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), content);
            let old = target.with_file_name("step_1.old");
            assert_eq!(old.exists(), content == "first", "only a version with a successor may go");
            let _ = fs::remove_dir_all(old);
        }
    }

    #[test]
    fn pruning_does_not_mind_a_folder_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &["step_2!", "step_3!", "step_4!"]);
        let plan = CheckpointPlan {
            output_dir: dir.path().into(),
            save_every_n_steps: None,
            keep_last_n: Some(1),
            adapter_only: true,
            resume: false,
            resume_from: None,
        };
        let model =
            ModelPlan { checkpoint_dir: dir.path().into(), checkpoint_files: vec![], lora: None, adapter: None };
        let mut saver = Saver::new(&plan, &model, Kind::Float, serde_json::Value::Null, "").unwrap();
        saver.written = (1..5).map(|step| dir.path().join(format!("step_{step}"))).collect();
        saver.prune();
        assert_eq!(names(dir.path()), ["step_4"]);
        assert_eq!(saver.written, [dir.path().join("step_4")]);
    }
}
