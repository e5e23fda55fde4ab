//! `host check`: a guest file, looked at without running it.

use std::path::PathBuf;

use crate::config::plan::{CheckPlan, CheckStyle, GuestLimits, Plan};
use crate::error::Result;
use crate::launch::{self, LaunchOptions};

const EXAMPLES: &str = "\
Examples:
  host check my_recipe.rhai
  host check downloaded.wasm
  host check --json my_template.wasm | jq .functions

Nothing of the guest is run. A component is turned away that imports more than guests get, or another SDK; a script that
cannot be parsed, or calls what there is not. What the guest says of itself is read too: see `host inspect`.";

/// Looks at a recipe, a template or a loss without running it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A .wasm or .rhai file
    file: PathBuf,

    /// How large a component may be, as a config's `limits.guest_mb` says it
    #[arg(long, value_name = "MIB", default_value_t = GuestLimits::default().guest_mb)]
    guest_mb: usize,

    /// Print what is found as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let style = if args.json { CheckStyle::Json } else { CheckStyle::Verdict };
    let plan = CheckPlan { path: args.file.clone(), guest_mb: args.guest_mb, style };
    launch::run(&Plan::Check(plan), 1, &LaunchOptions::default())
}
