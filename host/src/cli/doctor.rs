//! `host doctor`: what this machine has. The looking is [`crate::doctor`]'s.

use crate::error::Result;

/// Shows what this machine has for a run, and what is wrong with it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    crate::doctor::run(args.json)
}
