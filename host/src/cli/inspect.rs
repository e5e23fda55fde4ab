//! `host inspect`: what a guest file is and says of itself.

use std::path::PathBuf;

use crate::config::plan::{CheckPlan, CheckStyle, Plan};
use crate::error::Result;
use crate::launch::{self, LaunchOptions};

const EXAMPLES: &str = "\
Examples:
  host inspect my_loss.rhai
  host inspect --json downloaded.wasm | jq .metadata.keys

Nothing of the guest is run. A guest that does not pass `host check` is not shown.";

/// Shows what a recipe, a template or a loss says of itself, what it uses, its size and its digest
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A .wasm or .rhai file
    file: PathBuf,

    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let style = if args.json { CheckStyle::Json } else { CheckStyle::Details };
    // Whatever its size: nothing of it runs.
    let plan = CheckPlan { path: args.file.clone(), guest_mb: 4096, style };
    launch::run(&Plan::Check(plan), 1, &LaunchOptions::default())
}
