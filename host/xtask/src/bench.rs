//! `cargo xtask bench`: `host` beside torchtune and PEFT, same model, rows and settings, taking turns.
//!
//! All three are measured from outside and alike: when each optimizer step was reported, and the resident memory of the
//! process and its children. Tokens are those of the rows, padding not counted. Times are of the steps after the first,
//! the figures the medians over rounds.

mod measure;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::data::{self, DATA_DIR};
use crate::model::{self, MODEL_DIR};
use crate::peers::Peers;
use crate::shell::{Failure, PathContext, Result, host, shown};
use measure::{Figures, StepLog, measure, median};

#[derive(clap::Args)]
pub struct Args {
    /// A Python that has torch, transformers, peft and torchtune [default: one made in `target/peers`]
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Optimizer steps of a run; the first is not in the speed
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..))]
    steps: u64,
    /// Runs of each program
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Threads of each program
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

const BATCH_SIZE: usize = 2;
const ACCUMULATION: usize = 8;
const DIR: &str = "target/bench";
const ROWS: &str = "target/bench/rows.json";
/// `host x2` is two ranks of one thread each, with half the accumulation.
const PROGRAMS: [&str; 4] = ["host", "host x2", "torchtune", "peft"];
/// Equal rows, weights and rules give equal first losses (adapters begin at zero); bf16 takes the rest.
const FIRST_LOSS_TOLERANCE: f64 = 0.03;

pub fn run(root: &Path, args: &Args) -> Result<()> {
    let peers = Peers::find(root, args.python.as_deref())?;
    model::ensure(root)?;
    data::run(root)?;
    std::fs::create_dir_all(root.join(DIR)).path_context("create", &root.join(DIR))?;
    let step_tokens = tokenise(root, &peers, args.steps as usize)?;

    let mut runs: BTreeMap<&str, Vec<Figures>> = BTreeMap::new();
    for round in 0..args.rounds as usize {
        // Each goes first as often as another, so that a slow minute of the machine is everybody's.
        for turn in 0..PROGRAMS.len() {
            let program = PROGRAMS[(round + turn) % PROGRAMS.len()];
            let (mut command, log) = prepare(root, &peers, program, args)?;
            if round == 0 {
                println!("$ {}", shown(&command));
            }
            let figures = measure(&mut command, &log, &step_tokens)?;
            println!("round {}: {program}: {figures}", round + 1);
            runs.entry(program).or_default().push(figures);
        }
    }
    compare_first_losses(&runs)?;
    report(root, args, &runs)
}

fn tokenise(root: &Path, peers: &Peers, num_steps: usize) -> Result<Vec<usize>> {
    let per_step = BATCH_SIZE * ACCUMULATION;
    let mut rows = peers.script(root, "host/xtask/bench/rows.py");
    rows.args([MODEL_DIR, &format!("{DATA_DIR}/train.jsonl"), &(num_steps * per_step).to_string(), ROWS]);
    crate::shell::capture(&mut rows)?;
    let text = std::fs::read_to_string(root.join(ROWS)).path_context("read", &root.join(ROWS))?;
    let rows: Vec<serde_json::Value> =
        serde_json::from_str(&text).map_err(|error| Failure::new(format!("`{ROWS}` is not a list")).cause(error))?;
    let tokens = |row: &serde_json::Value| row["tokens"].as_array().map_or(0, Vec::len);
    Ok(rows.chunks(per_step).map(|step| step.iter().map(tokens).sum()).collect())
}

/// The command of one run, and where it reports its steps.
fn prepare(root: &Path, peers: &Peers, program: &str, args: &Args) -> Result<(Command, StepLog)> {
    let (batch, accumulation) = (BATCH_SIZE.to_string(), ACCUMULATION.to_string());
    let (mut command, log) = match program {
        "host" | "host x2" => {
            let ranks = if program == "host" { 1 } else { 2 };
            let out = root.join(DIR).join("host");
            let _ = std::fs::remove_dir_all(&out);
            let num_rows = args.steps as usize * BATCH_SIZE * ACCUMULATION;
            let mut host = host(root);
            host.args(["run", "recipes/lora_distributed.wasm", "--nproc", &ranks.to_string()]);
            host.args(["--config", "configs/smollm2/135M_lora_summarize.yaml"]);
            host.arg(format!("output_dir={DIR}/host")).arg(format!("dataset.split=train[:{num_rows}]"));
            let accumulation = ACCUMULATION / ranks;
            host.args([format!("batch_size={batch}"), format!("gradient_accumulation_steps={accumulation}")]);
            host.env("OMP_NUM_THREADS", (args.threads / ranks).max(1).to_string());
            host.args([
                "~lr_scheduler",
                "shuffle=False",
                "metric_logger.output_fmt=jsonl",
                "~dataset_val",
                "~run_val_every_n_steps",
            ]);
            host.arg("save_adapter_weights_only=True");
            (host, StepLog::File(out.join("logs")))
        }
        "torchtune" => (peers.torchtune_script(root, "host/xtask/bench/torchtune_lora.py"), StepLog::Stdout),
        _ => (peers.script(root, "host/xtask/bench/peft_lora.py"), StepLog::Stdout),
    };
    if matches!(log, StepLog::Stdout) {
        command.args([MODEL_DIR, ROWS, &batch, &accumulation]);
    }
    if !program.starts_with("host") {
        command.env("OMP_NUM_THREADS", args.threads.to_string());
    }
    Ok((command, log))
}

fn compare_first_losses(runs: &BTreeMap<&str, Vec<Figures>>) -> Result<()> {
    let losses: Vec<_> = runs.iter().map(|(program, runs)| (program, runs[0].first_loss)).collect();
    let (low, high) = losses.iter().fold((f64::MAX, f64::MIN), |(l, h), (_, x)| (l.min(*x), h.max(*x)));
    if high - low > FIRST_LOSS_TOLERANCE {
        return Err(Failure::new("the programs do not train on the same thing: their first losses differ")
            .cause(format!("{losses:?}")));
    }
    Ok(())
}

fn report(root: &Path, args: &Args, runs: &BTreeMap<&str, Vec<Figures>>) -> Result<()> {
    let medians = |program: &str| {
        let of = |pick: fn(&Figures) -> f64| median(runs[program].iter().map(pick).collect());
        [of(|f| f.tokens_per_second), of(|f| f.peak_rss_mb), of(|f| f.seconds_to_first_step)]
    };
    let ours = medians("host");
    println!("\n{:<10} {:>12} {:>10} {:>14}   host is", "", "tokens/s", "peak MB", "first step s");
    for program in PROGRAMS {
        let [speed, memory, start] = medians(program);
        print!("{program:<10} {speed:>12.0} {memory:>10.0} {start:>14.2}");
        if program != "host" {
            let [a, b, c] = [ours[0] / speed, ours[1] / memory, ours[2] / start];
            print!("   {a:.2}x as fast, {b:.2}x the memory, {c:.2}x the start");
        }
        println!();
    }
    let programs: BTreeMap<_, _> = PROGRAMS
        .map(|program| {
            let [speed, memory, start] = medians(program);
            let json = serde_json::json!({
                "tokens_per_second": speed, "peak_rss_mb": memory, "seconds_to_first_step": start, "runs": runs[program],
            });
            (program, json)
        })
        .into();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let json = serde_json::json!({
        "model": "SmolLM2-135M-Instruct", "batch_size": BATCH_SIZE, "gradient_accumulation_steps": ACCUMULATION,
        "steps": args.steps, "rounds": args.rounds, "threads": args.threads, "cores": cores, "programs": programs,
    });
    let path = root.join(DIR).join("bench.json");
    std::fs::write(&path, format!("{json:#}\n")).path_context("write", &path)?;
    println!("\nwritten to {DIR}/bench.json");
    Ok(())
}
