//! `cargo xtask bench`: `host` beside torchtune and PEFT, same model, rows and settings, taking turns.
//!
//! All three are measured from outside and alike: when each optimizer step was reported, and the resident memory of the
//! process and its children. Tokens are those of the rows, padding not counted. Times are of the steps after the first,
//! the figures the medians over rounds.
//!
//! A machine shared with others has no speed of its own, so what must hold ([`targets`]) are ratios of what ran in turns.

mod costs;
mod measure;
mod targets;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build;
use crate::data::{self, DATA_DIR};
use crate::model::{self, MODEL_DIR};
use crate::peers::Peers;
use crate::shell::{Failure, PathContext, Result, host, shown};
use costs::Costs;
use measure::{Figures, StepLog, measure, median};
use targets::Target;

#[derive(clap::Args)]
pub struct Args {
    /// A Python that has torch, transformers, peft and torchtune [default: one made in `target/peers`]
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Optimizer steps of a run; the first is not in the speed
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..))]
    steps: u64,
    /// Runs of each program that count; one more warms the caches
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Threads of each program
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// End the output with the figures as one line of JSON, in place of the tables
    #[arg(long)]
    json: bool,
}

const BATCH_SIZE: usize = 2;
const ACCUMULATION: usize = 8;
const DIR: &str = "target/bench";
const ROWS: &str = "target/bench/rows.json";
const WASM: &str = "recipes/lora_distributed.wasm";
const RHAI: &str = "recipes/lora_distributed.rhai";
/// Preferences, written with tensor operations.
const DPO: [(&str, &str); 2] =
    [("Wasm", "recipes/lora_dpo_distributed.wasm"), ("Rhai", "recipes/lora_dpo_distributed.rhai")];
/// One pair a micro-batch, the smallest: where a script has the most to say.
const DPO_SETTINGS: [&str; 4] = [
    "dataset={_component_: preference_dataset, source: target/bench/pairs}",
    "loss={_component_: DPOLoss}",
    "batch_size=1",
    "max_steps_per_epoch=3",
];
const DPO_STEPS: usize = 3;
/// `x2` are two ranks of one thread each, with half the accumulation; `full` trains all weights, which two ranks share.
const PROGRAMS: [&str; 8] =
    ["host", "host x2", "torchtune", "peft", "torchtune x2", "host full", "host full x2", "torchtune full x2"];
/// Equal rows, weights and rules give equal first losses (adapters begin at zero); bf16 takes the rest.
const FIRST_LOSS_TOLERANCE: f64 = 0.03;

type Runs = BTreeMap<&'static str, Vec<Figures>>;

pub fn run(root: &Path, args: &Args) -> Result<()> {
    build::run(root)?;
    let peers = Peers::find(root, args.python.as_deref())?;
    model::ensure(root)?;
    data::run(root)?;
    fs::create_dir_all(root.join(DIR)).path_context("create", &root.join(DIR))?;
    let step_tokens = tokenise(root, &peers, args.steps as usize)?;
    let load_before = load_average();
    // More than what little we did just now.
    let is_shared = load_before > 1.0;
    if is_shared {
        println!("load average {load_before}: other programs are running; only ratios mean something");
    }

    let mut runs = Runs::new();
    // Round 0 warms everybody's caches (files, compiled modules) and is not counted.
    for round in 0..=args.rounds as usize {
        // Each goes first as often as another, so that a slow minute of the machine is everybody's.
        for turn in 0..PROGRAMS.len() {
            let program = PROGRAMS[(round + turn) % PROGRAMS.len()];
            let (mut command, log) = prepare(root, &peers, program, is_shared, args)?;
            if round == 0 {
                println!("$ {}", shown(&command));
            }
            let figures = measure(&mut command, &log, &step_tokens)?;
            if round == 0 {
                println!("warm-up: {program}: {figures}");
            } else {
                println!("round {round}: {program}: {figures}");
                runs.entry(program).or_default().push(figures);
            }
        }
    }
    compare_first_losses(&runs)?;
    let dpo = prefer(root, args)?;
    let start = costs::first_call(root, || prepare_host(root, WASM, 1, args).0)?;
    // Last, because what it leaves is looked at.
    let (mut command, log) = prepare_host(root, RHAI, 1, args);
    let rhai = measure(command.arg("save_adapter_weights_only=False"), &log, &step_tokens)?;
    println!("once: host with the Rhai recipe and whole checkpoints: {rhai}");
    let costs = costs::of(root, &peers, &runs["host"], &rhai, &dpo, start)?;
    let targets = targets::of(&runs, &costs);
    report(root, args, &runs, &costs, &targets, load_before)?;
    targets::check(&targets)
}

/// How many programs wanted to run in the last minute.
fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

fn tokenise(root: &Path, peers: &Peers, num_steps: usize) -> Result<Vec<usize>> {
    let per_step = BATCH_SIZE * ACCUMULATION;
    let mut rows = peers.script(root, "host/xtask/bench/rows.py");
    rows.args([MODEL_DIR, &format!("{DATA_DIR}/train.jsonl"), &(num_steps * per_step).to_string(), ROWS]);
    crate::shell::capture(&mut rows)?;
    let text = fs::read_to_string(root.join(ROWS)).path_context("read", &root.join(ROWS))?;
    let rows: Vec<serde_json::Value> =
        serde_json::from_str(&text).map_err(|error| Failure::new(format!("`{ROWS}` is not a list")).cause(error))?;
    let tokens = |row: &serde_json::Value| row["tokens"].as_array().map_or(0, Vec::len);
    Ok(rows.chunks(per_step).map(|step| step.iter().map(tokens).sum()).collect())
}

/// The command of one run, and where it reports its steps.
fn prepare(root: &Path, peers: &Peers, program: &str, is_shared: bool, args: &Args) -> Result<(Command, StepLog)> {
    let mut command = match program {
        "host" => return Ok(prepare_host(root, WASM, 1, args)),
        "host x2" => return Ok(prepare_host(root, WASM, 2, args)),
        "host full" => return Ok(prepare_full(root, 1, args)),
        "host full x2" => return Ok(prepare_full(root, 2, args)),
        "torchtune x2" | "torchtune full x2" => return Ok(prepare_shared(root, peers, program, args)),
        "torchtune" => peers.torchtune_script(root, "host/xtask/bench/torchtune_lora.py"),
        _ => peers.script(root, "host/xtask/bench/peft_lora.py"),
    };
    command.args([MODEL_DIR, ROWS, &BATCH_SIZE.to_string(), &ACCUMULATION.to_string()]);
    command.env("OMP_NUM_THREADS", args.threads.to_string());
    if is_shared {
        // Their best there: threads that spin stand still beside other programs, at a tenth of the speed.
        command.env("OMP_WAIT_POLICY", "passive");
    }
    Ok((command, StepLog::Stdout))
}

fn prepare_full(root: &Path, ranks: usize, args: &Args) -> (Command, StepLog) {
    let (mut host, log) = prepare_host(root, WASM, ranks, args);
    host.args(["model=llama", "optimizer.lr=2e-5", "save_adapter_weights_only=False"]);
    if ranks > 1 {
        host.arg("parallel=shard");
    }
    (host, log)
}

/// Two processes of torchtune, of one thread each.
fn prepare_shared(root: &Path, peers: &Peers, program: &str, args: &Args) -> (Command, StepLog) {
    let mut command = peers.torchtune_script(root, "host/xtask/bench/torchtune_shared.py");
    command.args([MODEL_DIR, ROWS, &BATCH_SIZE.to_string(), &ACCUMULATION.to_string()]);
    command.arg(if program.contains("full") { "full" } else { "lora" });
    command.env("OMP_NUM_THREADS", (args.threads / 2).max(1).to_string());
    (command, StepLog::Stdout)
}

fn prepare_host(root: &Path, recipe: &str, ranks: usize, args: &Args) -> (Command, StepLog) {
    let out = root.join(DIR).join("host");
    let _ = fs::remove_dir_all(&out);
    let num_rows = args.steps as usize * BATCH_SIZE * ACCUMULATION;
    let accumulation = ACCUMULATION / ranks;
    let mut host = host(root);
    host.args(["run", recipe, "--nproc", &ranks.to_string()]);
    host.args(["--config", "configs/smollm2/135M_lora_summarize.yaml"]);
    host.arg(format!("output_dir={DIR}/host")).arg(format!("dataset.split=train[:{num_rows}]"));
    host.args([format!("batch_size={BATCH_SIZE}"), format!("gradient_accumulation_steps={accumulation}")]);
    host.args([
        "~lr_scheduler",
        "shuffle=False",
        "metric_logger.output_fmt=jsonl",
        "~dataset_val",
        "~run_val_every_n_steps",
        "save_adapter_weights_only=True",
    ]);
    host.env("OMP_NUM_THREADS", (args.threads / ranks).max(1).to_string());
    // The recipe's own time is logged there.
    host.env("HOST_LOG", "host=info,host_rank=debug");
    (host, StepLog::File(out.join("logs")))
}

/// Pairs out of the rows, the summary of one against the next one's, and a run on them with each form of the recipe.
fn prefer(root: &Path, args: &Args) -> Result<Vec<(&'static str, Figures)>> {
    let from = root.join(DATA_DIR).join("train.jsonl");
    let text = fs::read_to_string(&from).path_context("read", &from)?;
    let rows: Vec<serde_json::Value> =
        text.lines().take(1 + DPO_STEPS * ACCUMULATION).filter_map(|line| serde_json::from_str(line).ok()).collect();
    let turn = |role: &str, text: &serde_json::Value| serde_json::json!({ "role": role, "content": text });
    let pairs = rows.windows(2).map(|rows| {
        let side = |row: &serde_json::Value| [turn("user", &rows[0]["document"]), turn("assistant", &row["summary"])];
        format!("{}\n", serde_json::json!({ "chosen": side(&rows[0]), "rejected": side(&rows[1]) }))
    });
    let dir = root.join(DIR).join("pairs");
    fs::create_dir_all(&dir).path_context("create", &dir)?;
    let path = dir.join("train.jsonl");
    fs::write(&path, pairs.collect::<String>()).path_context("write", &path)?;
    let run = |(front, recipe)| {
        let (mut command, log) = prepare_host(root, recipe, 1, args);
        let figures = measure(command.args(DPO_SETTINGS), &log, &[0; DPO_STEPS])?;
        println!("once: host with the {front} recipe of preferences: loss {:.4}", figures.first_loss);
        Ok((front, figures))
    };
    DPO.into_iter().map(run).collect()
}

fn compare_first_losses(runs: &Runs) -> Result<()> {
    let losses: Vec<_> = runs.iter().map(|(program, runs)| (program, runs[0].first_loss)).collect();
    let (low, high) = losses.iter().fold((f64::MAX, f64::MIN), |(l, h), (_, x)| (l.min(*x), h.max(*x)));
    if high - low > FIRST_LOSS_TOLERANCE {
        return Err(Failure::new("the programs do not train on the same thing: their first losses differ")
            .cause(format!("{losses:?}")));
    }
    Ok(())
}

fn report(root: &Path, args: &Args, runs: &Runs, costs: &Costs, targets: &[Target], load_before: f64) -> Result<()> {
    let medians = |program: &str| {
        let of = |pick: fn(&Figures) -> f64| median(runs[program].iter().map(pick).collect());
        [of(|f| f.tokens_per_second), of(|f| f.peak_rss_mb), of(|f| f.seconds_to_first_step)]
    };
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
        "steps": args.steps, "rounds": args.rounds, "threads": args.threads, "cores": cores,
        "load_average_before": load_before, "programs": programs, "costs": costs, "targets": targets,
    });
    let path = root.join(DIR).join("bench.json");
    fs::write(&path, format!("{json:#}\n")).path_context("write", &path)?;
    if args.json {
        println!("{json}");
        return Ok(());
    }
    println!("\n{:<17} {:>12} {:>10} {:>14}", "", "tokens/s", "peak MB", "first step s");
    for program in PROGRAMS {
        let [speed, memory, start] = medians(program);
        println!("{program:<17} {speed:>12.0} {memory:>10.0} {start:>14.2}");
    }
    println!("\n{costs}\n");
    targets.iter().for_each(|target| println!("{target}"));
    println!("\nload average before: {load_before}, of {cores} cores; written to {DIR}/bench.json");
    Ok(())
}
