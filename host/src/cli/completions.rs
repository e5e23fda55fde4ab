//! `host completions`: what a shell needs to complete `host`'s command line.

use clap::CommandFactory;

use super::Cli;
use crate::error::Result;

const EXAMPLES: &str = "\
Examples:
  host completions bash > ~/.local/share/bash-completion/completions/host
  host completions zsh > ~/.zfunc/_host
  host completions fish > ~/.config/fish/completions/host.fish";

/// Prints a shell's completions for `host`
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    shell: clap_complete::Shell,
}

pub fn run(args: &Args) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut Cli::command(), "host", &mut script);
    super::ui::out(String::from_utf8_lossy(&script).trim_end())
}
