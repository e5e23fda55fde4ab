//! `host import`: a model file of another program to a Hugging Face folder.

use std::path::PathBuf;

use super::ui;
use crate::error::Result;

const EXAMPLES: &str = "\
Example:
  host import SmolLM2-135M-Instruct.Q4_1.gguf --output-dir models/SmolLM2-135M-Instruct

Reads Llama-architecture GGUF files with Q4_1, Q8_0, F16, BF16 and F32 tensors; writes bf16 safetensors,
config.json and the tokenizer's files.";

/// Turns a GGUF model into a Hugging Face folder
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The .gguf file
    input: PathBuf,

    /// The folder to write
    #[arg(long, alias = "output_dir", value_name = "FOLDER")]
    output_dir: PathBuf,

    /// Replace a model that is in the folder already
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let report = crate::import::import_gguf(&args.input, &args.output_dir, args.force)?;
    ui::out(&report.to_string())
}
