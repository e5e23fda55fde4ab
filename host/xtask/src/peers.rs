//! The Python environment of the programs we compare with, in `target/peers`.
//!
//! These releases work together. torchtune needs torchao, and PEFT must not see it (it would patch what it finds), so
//! torchao has a folder of its own that only torchtune's runs get on their path.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::setup::install_hint;
use crate::shell::{Failure, PathContext, Result, command, run, works};

const DIR: &str = "target/peers";
const PACKAGES: &[&str] = &[
    "torch==2.11.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "safetensors",
    "gguf>=0.10",
    // What torchtune imports.
    "datasets",
    "omegaconf",
    "sentencepiece",
    "tiktoken",
    "blobfile",
    "kagglehub",
    "psutil",
    "tqdm",
    "Pillow",
    "torchdata",
];
const TORCHTUNE: &str = "torchtune==0.6.1";
const TORCHAO: &str = "torchao==0.15.0";

pub struct Peers {
    python: PathBuf,
    torchao: PathBuf,
}

impl Peers {
    /// The environment of `python` where one is given; our own otherwise, made when it is missing.
    pub fn find(root: &Path, python: Option<&Path>) -> Result<Self> {
        if let Some(python) = python {
            let beside = python.ancestors().nth(2).unwrap_or(root).join("torchao");
            return Ok(Self { python: python.to_owned(), torchao: beside });
        }
        let dir = root.join(DIR);
        let peers = Self { python: dir.join("bin/python"), torchao: dir.join("torchao") };
        if !dir.join("complete").is_file() {
            peers.make(root, &dir)?;
        }
        Ok(peers)
    }

    fn make(&self, root: &Path, dir: &Path) -> Result<()> {
        if !works("python3", &["-c", "import venv, ensurepip"]) {
            return Err(
                Failure::new("python3 cannot make a virtual environment").hint(install_hint("python3-venv", "python3"))
            );
        }
        println!("making a Python environment in `{DIR}` (several GB: the peers need the whole of torch)");
        let _ = std::fs::remove_dir_all(dir);
        run(command(root, "python3").args(["-m", "venv", DIR]))?;
        let pip = || {
            let mut pip = command(root, &self.python);
            pip.args(["-m", "pip", "install", "--quiet"]);
            pip
        };
        run(pip().args(PACKAGES))?;
        run(pip().args(["--no-deps", TORCHTUNE]))?;
        run(pip().args(["--no-deps", "--target"]).arg(&self.torchao).arg(TORCHAO))?;
        let complete = dir.join("complete");
        std::fs::write(&complete, "").path_context("write", &complete)
    }

    /// A script of ours in this environment.
    pub fn script(&self, root: &Path, script: &str) -> Command {
        let mut python = command(root, &self.python);
        python.arg(script);
        python.env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false").env_remove("PYTHONPATH");
        python
    }

    /// Likewise, with torchao in sight.
    pub fn torchtune_script(&self, root: &Path, script: &str) -> Command {
        let mut python = self.script(root, script);
        python.env("PYTHONPATH", &self.torchao);
        python
    }
}
