//! `cargo xtask`: everything about this repository that is not `host` itself.
//!
//! Links no libtorch, because it is what fetches it; it says what else is missing, such as a C++ compiler. Each task prints
//! the commands it runs in the form a person can type.

mod apt;
mod bench;
mod build;
mod configs;
mod data;
mod demo;
mod deny;
mod gate;
mod guests;
mod interop;
mod libtorch;
mod model;
mod peers;
mod sdk_gen;
mod setup;
mod shell;
mod soak;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use shell::{Result, root};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, demo, tests and measurements of `host`", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Lay out libtorch and Gloo's headers in `.libtorch` and add the wasm target; does nothing a second time
    Setup,
    /// Set up, then build `host`, `host-rank` and the guest modules in `recipes/` and `templates/`
    Build,
    /// Make the summarisation data set in `.demo/data` from Debian's package descriptions
    Data,
    /// Import SmolLM2, fine-tune it to summarise, and show what it learned
    Demo {
        /// Use the train, validation and test `.jsonl` files of this folder instead of Debian's
        #[arg(long, value_name = "FOLDER")]
        data: Option<PathBuf>,
    },
    /// Format, lints and every test
    Test,
    /// Write the LoRA configs of torchtune's names
    Configs,
    /// Check dependencies: bans, licences, sources, and advisories where they can be reached
    Deny,
    /// Generate the Rhai side of the SDK from its WIT
    Sdk {
        /// Only compare with what is committed
        #[arg(long)]
        check: bool,
    },
    /// Check imported, merged and adapter folders against transformers and PEFT
    Interop(interop::Args),
    /// Measure `host` beside torchtune and PEFT; fails when a target is missed
    Bench(bench::Args),
    /// Kill, interrupt and resume short runs at random, and compare them with undisturbed ones
    Soak(soak::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let root = &root();
    match task {
        Task::Setup => setup::run(root),
        Task::Build => build::run(root),
        Task::Data => data::run(root),
        Task::Demo { data } => demo::run(root, data.as_deref()),
        Task::Test => gate::run(root),
        Task::Configs => configs::generate(root, false),
        Task::Deny => deny::run(root),
        Task::Sdk { check } => sdk_gen::generate(root, check).map_err(shell::Failure::new),
        Task::Interop(args) => interop::run(root, &args),
        Task::Bench(args) => bench::run(root, &args),
        Task::Soak(args) => soak::run(root, &args),
    }
}
