//! `cargo xtask interop`: other programs load what `host` writes, and agree with it.

use std::path::{Path, PathBuf};

use crate::build;
use crate::data::{self, DATA_DIR};
use crate::model::{self, MODEL_DIR};
use crate::peers::Peers;
use crate::setup::install_hint;
use crate::shell::{Failure, Result, cargo, command, run as run_command, works};

#[derive(clap::Args)]
pub struct Args {
    /// A Python that has torch, transformers, peft and gguf [default: one made in `target/peers`]
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// The output folder of a training run whose merged model and adapter are checked
    #[arg(long, value_name = "FOLDER", default_value = ".demo/out/epoch_0")]
    checkpoint: PathBuf,
}

const TOKENS: &str = "target/interop/tokens.json";

pub fn run(root: &Path, args: &Args) -> Result<()> {
    build::run(root)?;
    let peers = Peers::find(root, args.python.as_deref())?;
    model::ensure(root)?;
    data::run(root)?;

    println!("\n== imported model against transformers' GGUF loader");
    let rows = format!("{DATA_DIR}/train.jsonl");
    let gguf = model::gguf(root);
    run_command(peers.script(root, "host/xtask/interop/import.py").arg(gguf).args([MODEL_DIR, &rows]))?;

    if !root.join(&args.checkpoint).is_dir() {
        return Err(Failure::new(format!("there is no checkpoint `{}` to check", args.checkpoint.display()))
            .hint("run `cargo xtask demo` first, or name one with `--checkpoint`"));
    }
    println!("\n== merged model and adapter against transformers and PEFT");
    let merged_script = "host/xtask/interop/merged.py";
    run_command(peers.script(root, merged_script).args(["tokens", MODEL_DIR, &rows, TOKENS]))?;
    let checkpoint = args.checkpoint.display().to_string();
    let logits = |name: &str| format!("target/interop/{name}.safetensors");
    let adapted = format!("{MODEL_DIR}+{checkpoint}/adapter");
    for (name, model) in [("base", MODEL_DIR), ("merged", &checkpoint), ("adapted", &adapted)] {
        let mut rank = command(root, "target/release/host-rank");
        rank.env("HOST_LIBTORCH", root.join(".libtorch/view/lib"));
        run_command(rank.args(["--logits", model, "--tokens", TOKENS, "--out", &logits(name)]))?;
    }
    let mut compare = peers.script(root, merged_script);
    compare.args(["compare", MODEL_DIR, &checkpoint, TOKENS, &logits("base"), &logits("merged"), &logits("adapted")]);
    run_command(&mut compare)?;
    events(root, &peers)?;
    token_ids(root, &peers)
}

/// A run's losses as TensorBoard's own package reads them from its event file.
fn events(root: &Path, peers: &Peers) -> Result<()> {
    const DIR: &str = "target/interop/events";
    const PACKAGE: &str = "target/interop/tensorboard";
    println!("\n== event files against TensorBoard");
    if !root.join(PACKAGE).is_dir() {
        let pip = ["pip", "install", "--quiet", "--target", PACKAGE, "tensorboard==2.21.0"];
        run_command(peers.script(root, "-m").args(pip))?;
    }
    let run = ["run", "lora_distributed", "--config", "smollm2/135M_lora_summarize", "metric_logger=TensorBoardLogger"];
    let few = ["max_steps_per_epoch=4", "gradient_accumulation_steps=1", "save_adapter_weights_only=True"];
    let small = ["dataset_val.split=validation[:4]", "run_val_every_n_steps=2", &format!("output_dir={DIR}")];
    let _ = std::fs::remove_dir_all(root.join(DIR));
    run_command(command(root, "target/release/host").args(run).args(few).args(small))?;
    let mut script = peers.script(root, "host/xtask/interop/events.py");
    run_command(script.env("PYTHONPATH", root.join(PACKAGE)).arg(DIR))
}

/// Token ids of the real Llama 2 and Llama 3 vocabularies, which two npm packages hold, against SentencePiece's and
/// tiktoken's; the texts are of Django's translators.
fn token_ids(root: &Path, peers: &Peers) -> Result<()> {
    const DIR: &str = "target/interop/tokens";
    const SCRIPT: &str = "host/xtask/interop/tokens.py";
    const VOCABULARIES: [&str; 2] = ["llama-tokenizer-js@1.2.2", "llama3-tokenizer-js@1.2.0"];
    println!("\n== token ids against SentencePiece and tiktoken");
    let texts = format!("{DIR}/python");
    if !root.join(&texts).is_dir() {
        if !works("npm", &["--version"]) {
            return Err(Failure::new("npm is not there to fetch Llama's vocabularies").hint(install_hint("npm", "npm")));
        }
        let npm = ["install", "--silent", "--no-audit", "--no-fund", "--prefix", DIR];
        run_command(command(root, "npm").args(npm).args(VOCABULARIES))?;
        run_command(peers.script(root, "-m").args(["pip", "install", "--quiet", "--target", &texts, "django==5.2.8"]))?;
    }
    let mut vocabularies = peers.script(root, SCRIPT);
    vocabularies.env("PYTHONPATH", root.join(&texts));
    run_command(vocabularies.args(["vocabularies", &format!("{DIR}/node_modules"), DIR]))?;
    run_command(cargo(root).args(["build", "--release", "--workspace", "--example", "tokenize"]))?;
    for name in ["llama2", "llama3"] {
        let paths = [format!("{DIR}/{name}.model"), format!("{DIR}/texts.json"), format!("{DIR}/{name}.json")];
        run_command(command(root, "target/release/examples/tokenize").args(paths))?;
    }
    run_command(peers.torchtune_script(root, SCRIPT).args(["compare", DIR]))
}
