//! `cargo xtask demo`: from a fresh clone to a model that summarises better, each step the command a user would type.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::build;
use crate::data::{self, DATA_DIR, Row, SPLITS};
use crate::model::{self, MODEL_DIR};
use crate::shell::{Failure, PathContext, Result, host, run as run_command, shown};

const RECIPE: &str = "recipes/lora_distributed.wasm";
const TRAIN_CONFIG: &str = "configs/smollm2/135M_lora_summarize.yaml";
const GENERATE_CONFIG: &str = "configs/smollm2/135M_generate.yaml";
/// The `output_dir` of the config.
const RUN_DIR: &str = ".demo/out";
const NUM_SHOWN: usize = 3;
/// Longer documents fill a screen without showing more.
const SHOWN_CHARS: usize = 900;

pub fn run(root: &Path, user_data: Option<&Path>) -> Result<()> {
    let started = Instant::now();
    step(1, "set-up and build");
    build::run(root)?;
    println!("`host` is target/release/host: export PATH=\"$PWD/target/release:$PATH\"");
    let built = Instant::now();

    step(2, "model");
    model::ensure(root)?;

    step(3, "data");
    match user_data {
        Some(folder) => link_data(root, folder)?,
        None => data::run(root)?,
    }

    step(4, "train");
    train(root)?;

    step(5, "use");
    let tuned = newest_epoch(root)?;
    for (index, row) in held_out(root)?.iter().enumerate() {
        let base = generate(root, row, Path::new(MODEL_DIR), index == 0)?;
        let ours = generate(root, row, &tuned, index == 0)?;
        show(row, &base, &ours);
    }
    match validation_losses(root)?[..] {
        [before, .., after] => {
            let change = 100.0 * (after / before - 1.0);
            println!("validation loss: {before:.4} before, {after:.4} after ({change:+.1}%)");
            if after > 0.9 * before {
                return Err(Failure::new("the model learned too little: the loss should end at least 10% lower"));
            }
        }
        _ => return Err(Failure::new(format!("the run in `{RUN_DIR}` logged no validation losses"))),
    }
    let seconds = |from: Instant| from.elapsed().as_secs();
    println!("time: {} s, of which {} s after the build", seconds(started), seconds(built));
    Ok(())
}

fn step(number: usize, what: &str) {
    println!("\n== {number}. {what}");
}

fn train(root: &Path) -> Result<()> {
    // A run begins anew: the demo shows a whole one, not the end of the last.
    let _ = fs::remove_dir_all(root.join(RUN_DIR));
    let mut host = host(root);
    run_command(host.args(["run", RECIPE, "--nproc", "2", "--config", TRAIN_CONFIG]))
}

/// The user's folder takes the place of the data that configs name.
fn link_data(root: &Path, folder: &Path) -> Result<()> {
    let folder = fs::canonicalize(folder).path_context("open", folder)?;
    for split in SPLITS {
        let file = folder.join(split).with_extension("jsonl");
        if !file.is_file() {
            return Err(Failure::new(format!("`{}` is missing", file.display())).hint(
                "a data folder has train.jsonl, validation.jsonl and test.jsonl, rows with document, summary and id",
            ));
        }
    }
    let place = root.join(DATA_DIR);
    if place.is_symlink() {
        fs::remove_file(&place).path_context("replace", &place)?;
    } else if place.exists() {
        // Made by `cargo xtask data`, which makes it again.
        fs::remove_dir_all(&place).path_context("replace", &place)?;
    }
    fs::create_dir_all(root.join(".demo")).path_context("create", &root.join(".demo"))?;
    std::os::unix::fs::symlink(&folder, &place).path_context("link", &place)
}

fn held_out(root: &Path) -> Result<Vec<Row>> {
    let path = root.join(DATA_DIR).join("test.jsonl");
    let text = fs::read_to_string(&path).path_context("read", &path)?;
    let rows = text.lines().enumerate().map(|(index, line)| {
        serde_json::from_str::<Row>(line)
            .map_err(|error| Failure::new(format!("`{}` line {} is not a row", path.display(), index + 1)).cause(error))
    });
    let short = rows.filter(|row| row.as_ref().map_or(true, |row| row.document.chars().count() <= SHOWN_CHARS));
    let rows = short.take(NUM_SHOWN).collect::<Result<Vec<_>>>()?;
    if rows.is_empty() {
        return Err(Failure::new(format!("`{}` has no document of up to {SHOWN_CHARS} characters", path.display())));
    }
    Ok(rows)
}

/// What the model writes for a document. The prompt goes through the training run's template, which the config names.
fn generate(root: &Path, row: &Row, model_dir: &Path, show_command: bool) -> Result<String> {
    let mut host = host(root);
    host.args(["run", "generate", "--config", GENERATE_CONFIG]);
    host.arg(format!("checkpointer.checkpoint_dir={}", model_dir.display()));
    if show_command {
        println!("$ {} prompt.user='…'", shown(&host));
    }
    host.arg(format!("prompt.user={}", row.document));
    let output =
        host.stderr(std::process::Stdio::piped()).output().path_context("run", Path::new("target/release/host"))?;
    if !output.status.success() {
        return Err(Failure::new(format!("`host run generate` failed: {}", output.status))
            .cause(String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" "))
}

fn show(row: &Row, base: &str, tuned: &str) {
    println!("\n--- {}\n{}\n", row.id, row.document);
    println!("  base model:  {base}\n  fine-tuned:  {tuned}\n  Debian's:    {}\n", row.summary);
}

fn newest_epoch(root: &Path) -> Result<PathBuf> {
    let dir = root.join(RUN_DIR);
    let epoch = |name: &str| name.strip_prefix("epoch_").and_then(|number| number.parse::<usize>().ok());
    let names = fs::read_dir(&dir).path_context("read", &dir)?.flatten().map(|entry| entry.file_name());
    let newest = names.filter_map(|name| epoch(&name.to_string_lossy())).max();
    let newest = newest.ok_or_else(|| Failure::new(format!("the run left no `epoch_N` in `{}`", dir.display())))?;
    Ok(Path::new(RUN_DIR).join(format!("epoch_{newest}")))
}

/// Every `val_loss` of the run's metrics, in the order of its steps.
fn validation_losses(root: &Path) -> Result<Vec<f64>> {
    let mut losses = vec![];
    for file in metric_files(&root.join(RUN_DIR).join("logs"))? {
        let text = fs::read_to_string(&file).path_context("read", &file)?;
        losses.extend(text.lines().filter_map(validation_loss));
    }
    Ok(losses)
}

/// `Step 3 | loss:2.5 val_loss:2.4`, torchtune's text form, or a JSON object.
fn validation_loss(line: &str) -> Option<f64> {
    match serde_json::from_str::<serde_json::Value>(line) {
        Ok(json) => json["val_loss"].as_f64(),
        Err(_) => line.split_whitespace().find_map(|word| word.strip_prefix("val_loss:"))?.parse().ok(),
    }
}

/// The metrics files in a `log_dir`.
pub fn metric_files(log_dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(log_dir).path_context("read", log_dir)?.flatten().map(|entry| entry.path());
    let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "jsonl" || extension == "txt");
    let mut files: Vec<_> = entries.filter(is_log).collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validation_losses_are_read_in_both_forms() {
        assert_eq!(validation_loss("Step 20 | loss:2.5 val_loss:2.25 lr:0.1 "), Some(2.25));
        assert_eq!(validation_loss(r#"{"step": 20, "val_loss": 2.25}"#), Some(2.25));
        assert_eq!(validation_loss("Step 20 | loss:2.5"), None);
    }
}
