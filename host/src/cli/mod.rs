//! The command line: one file per verb, each with its `Args` (whose doc comments are the help) and a `run`.
//!
//! Only this layer prints. stdout is data, stderr is talk. A verb returns an error and `main` prints it, once.

mod cat;
mod check;
mod check_guest;
mod completions;
mod cp;
mod doctor;
mod download;
mod hub_data;
mod import;
mod inspect;
mod keys;
mod ls;
mod new;
mod plan;
mod preview;
mod run;
mod shipped;
mod test_guest;
mod torchrun;
pub mod ui;
mod validate;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{IoContext, Result};

const EXAMPLES: &str = "\
Examples:
  host ls                                             what comes with it
  host cp smollm2/135M_lora_summarize my.yaml
  host download meta-llama/Llama-3.2-1B-Instruct --output-dir model
  host validate configs/smollm2/135M_lora_summarize.yaml
  host new template my_template                       a folder that builds, tests and runs
  host check my_template.rhai                         a guest, without running it
  host inspect downloaded.wasm                        what it says of itself, and what it uses
  host plan --config my.yaml --nproc 2                what memory and time a run takes
  host preview --config my.yaml                       what rows become, and what carries loss
  host run lora_distributed --nproc 2 --config smollm2/135M_lora_summarize
  host run lora_distributed --config my.yaml epochs=3 optimizer.lr=1e-4 '~lr_scheduler'
  host run generate --config smollm2/135M_generate prompt.user='Some text'
  host doctor                                         what this machine has, and what is wrong

Exit codes: 0 done, 1 the run failed, 2 command line or config, 101 a bug, 130 interrupted.";

/// Fine-tunes language models: configs in YAML, recipes and templates as sandboxed guests.
#[derive(Debug, Parser)]
#[command(name = "host", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(run::Args),
    Validate(validate::Args),
    Ls(ls::Args),
    Cp(cp::Args),
    Cat(cat::Args),
    Keys(keys::Args),
    Plan(plan::Args),
    Preview(preview::Args),
    New(new::Args),
    Check(check_guest::Args),
    Test(test_guest::Args),
    Inspect(inspect::Args),
    Download(download::Args),
    Import(import::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
}

/// Runs what the command line asks for.
pub fn dispatch(cli: Cli) -> Result<()> {
    match cli.verb {
        Some(Verb::Run(args)) => run::run(&args),
        Some(Verb::Validate(args)) => validate::run(&args),
        Some(Verb::Ls(args)) => ls::run(&args),
        Some(Verb::Cp(args)) => cp::run(&args),
        Some(Verb::Cat(args)) => cat::run(&args),
        Some(Verb::Keys(args)) => keys::run(&args),
        Some(Verb::Plan(args)) => plan::run(&args),
        Some(Verb::Preview(args)) => preview::run(&args),
        Some(Verb::New(args)) => new::run(&args),
        Some(Verb::Test(args)) => test_guest::run(&args),
        Some(Verb::Check(args)) => check_guest::run(&args),
        Some(Verb::Inspect(args)) => inspect::run(&args),
        Some(Verb::Download(args)) => download::run(&args),
        Some(Verb::Import(args)) => import::run(&args),
        Some(Verb::Doctor(args)) => doctor::run(&args),
        Some(Verb::Completions(args)) => completions::run(&args),
        None => Cli::command().print_help().path_context("write to", "stdout"),
    }
}
