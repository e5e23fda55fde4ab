//! Which checkpoints an output folder holds. The worker writes and reads them; the launcher has to know where a run that
//! it restarts goes on.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{IoContext, Result};

/// The file that makes a folder a checkpoint to resume from; it is there last.
pub const STATE: &str = "resume.json";

/// A checkpoint that can be resumed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub path: PathBuf,
    /// Optimizer steps done.
    pub step: usize,
    /// In nanoseconds of Unix time.
    pub at: u128,
}

/// Checkpoints below `output_dir` that can be resumed from, oldest first.
pub fn existing(output_dir: &Path) -> Result<Vec<Saved>> {
    #[derive(Deserialize)]
    struct State {
        step: usize,
        saved_at: u128,
    }
    if !output_dir.exists() {
        return Ok(vec![]);
    }
    let mut found = Vec::new();
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
        let Ok(State { step, saved_at: at }) = serde_json::from_str(&text) else { continue };
        found.push(Saved { path, step, at });
    }
    found.sort_by(|one, other| (one.at, &one.path).cmp(&(other.at, &other.path)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save(output_dir: &Path, name: &str, at: u128) {
        std::fs::create_dir_all(output_dir.join(name)).unwrap();
        let state = serde_json::json!({ "step": 1, "saved_at": at, "epoch": 0 }).to_string();
        std::fs::write(output_dir.join(name).join(STATE), state).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let name = |saved: Saved| saved.path.file_name().unwrap().to_str().unwrap().to_owned();
        existing(dir).unwrap().into_iter().map(name).collect()
    }

    #[test]
    fn the_newest_checkpoint_is_the_one_saved_last() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(names(&dir.path().join("absent")), [""; 0]);
        save(dir.path(), "step_9", 1_000);
        save(dir.path(), "step_10", 3_000);
        save(dir.path(), "epoch_0", 2_000);
        // A new run in the folder of one that went further.
        save(dir.path(), "step_3", 4_000);
        assert_eq!(names(dir.path()), ["step_9", "epoch_0", "step_10", "step_3"]);
        // What is no whole checkpoint of ours is passed over.
        save(dir.path(), ".step_4.partial", 5_000);
        save(dir.path(), "logs", 5_000);
        std::fs::create_dir(dir.path().join("step_99")).unwrap();
        assert_eq!(names(dir.path()).last().unwrap(), "step_3");
    }

    #[test]
    fn an_old_version_counts_while_it_is_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "step_1", 1);
        save(dir.path(), "step_2.old", 2);
        assert_eq!(names(dir.path()), ["step_1", "step_2.old"]);
        save(dir.path(), "step_2", 3);
        assert_eq!(names(dir.path()), ["step_1", "step_2"]);
    }
}
