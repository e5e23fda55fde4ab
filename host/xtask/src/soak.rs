//! `cargo xtask soak`: the tests of properties with ten times the cases, a model of 500M parameters that ranks share, and
//! `tests/dist/soak.rs`, which uses what the
//! tests of processes use, for as long as asked.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::shell::{Result, cargo, run as run_command};
use crate::{build, deny};

#[derive(clap::Args)]
pub struct Args {
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Decides what is done to which run, but not where exactly that finds it [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// Ranks killed and frozen, disks filled and networks cut, before the minutes begin
    #[arg(long, default_value_t = 50)]
    faults: usize,
}

const PROPERTY_CASES: &str = "2560";

pub fn run(root: &Path, args: &Args) -> Result<()> {
    build::run(root)?;
    deny::run(root)?;
    let mut test = cargo(root);
    test.args("test --release --workspace --test cli --test scripting -- properties::".split(' '));
    run_command(test.env("PROPTEST_CASES", PROPERTY_CASES))?;
    let mut test = cargo(root);
    test.args("test --release --workspace --test dist -- --ignored --nocapture memory::half_a_billion".split(' '));
    run_command(&mut test)?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut test = cargo(root);
    test.args("test --release --workspace --test dist -- --ignored --nocapture --exact soak::soak".split(' '));
    test.env("HOST_SOAK_MINUTES", args.minutes.to_string());
    test.env("HOST_SOAK_FAULTS", args.faults.to_string());
    test.env("HOST_SOAK_SEED", args.seed.unwrap_or_else(now).to_string());
    run_command(&mut test)
}
