//! `host plan`: what a run would take, before it is started. The estimates are [`crate::placement`]'s.

use std::path::PathBuf;

use serde_json::json;

use super::{shipped, ui};
use crate::config::Config;
use crate::config::plan::{DevicePlan, HardwarePlan, TrainPlan};
use crate::config::resolve::{self, Surroundings};
use crate::data;
use crate::data::split::{self, Boundary};
use crate::error::{Error, Result};
use crate::placement::{self, Candidate, Choice, Job, Lengths, Placement, Question, Ranks, Table, Way};
use crate::tokenizer::Tokenizer;

const EXAMPLES: &str = "\
Examples:
  host plan --config my.yaml                          on this machine, one rank
  host plan --config my.yaml --nproc 2 parallel=shard
  host plan --config llama3_1/8B_lora --hardware mi210x8 --rows 2000
  host plan --config llama3_1/8B_full --hardware h100x8 --nnodes 2 ac_mode=full
  host plan --config my.yaml --hardware my_cluster.yaml --json | jq .chosen

Of the model only config.json has to be there. `host keys` describes the files of --hardware.
Memory is what the busiest moment takes, good to 20 % on a CPU. Seconds come from a rate and a
bandwidth: good enough to compare, and to tell hours from days. Validation is not counted.";

/// Says how much memory and time a run would take, without starting it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Changes to the config: `key=value`, `~key`
    #[arg(value_name = "OVERRIDE")]
    overrides: Vec<String>,

    /// The config's file, or a name that `host ls` lists
    #[arg(long, value_name = "FILE")]
    config: String,

    /// Machines to plan for: a file, or a name in configs/hardware; by default this one
    #[arg(long, value_name = "FILE")]
    hardware: Option<String>,

    /// Ranks of each machine; by default one for each device of `--hardware`, else one
    #[arg(long, alias = "nproc_per_node", alias = "nproc-per-node", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    nproc: Option<u16>,

    /// Machines
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    nnodes: u16,

    /// Tokens of a sample, on average
    #[arg(long, value_name = "COUNT")]
    tokens_per_sample: Option<f64>,

    /// The share of them that carries loss
    #[arg(long, value_name = "SHARE")]
    label_share: Option<f64>,

    /// Rows of the data set, where neither `split` nor its files say
    #[arg(long, value_name = "COUNT")]
    rows: Option<u64>,

    /// Also how long another program would take
    #[arg(long = "as", value_name = "WAY")]
    way: Option<Way>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let around = shipped::surroundings();
    let config = shipped::load_config(&shipped::find_config(&args.config, &around), &args.overrides, &around)?;
    if config.is_generation() {
        return Err(Error::config("this config is for `generate`, and only training is planned").at_file(&config.path));
    }
    let resolved = resolve::train(&config, &PathBuf::new(), &around)?;
    let plan = resolved.plan;
    ui::notices(&resolved.notices);
    let hardware = hardware(args, &plan, &around)?;
    let nodes = usize::from(args.nnodes);
    let per_node = args.nproc.map_or(if hardware.is_cpu { 1 } else { hardware.devices_per_node }, usize::from);
    if !hardware.is_cpu && per_node > hardware.devices_per_node {
        let (name, devices) = (&hardware.name, hardware.devices_per_node);
        return Err(Error::config(format!("{per_node} ranks a machine, and `{name}` has {devices} devices")));
    }
    let Data { rows, lengths, source } = Data::of(args, &plan);
    let job = Job::of(&plan, &lengths)?;
    let question = Question {
        plan: &plan,
        job,
        hardware: &hardware,
        ranks: Ranks { world_size: nodes * per_node, nodes },
        lengths,
        rows,
    };
    let choice = placement::choose(&question)?;
    let other = args.way.filter(|way| *way != Way::Host).map(|way| as_another(&question, way));
    if args.json {
        ui::out(&to_json(&question, &choice, other.as_ref(), &source)?)?;
    } else {
        ui::out(&Table { question: &question, choice: &choice, other: other.as_ref(), source: &source }.to_string())?;
    }
    choice.check(&question)
}

/// torchtune shards always.
fn as_another(question: &Question<'_>, way: Way) -> Candidate {
    question.candidate(Placement::new(&question.plan.placement, Some(1)), way)
}

fn hardware(args: &Args, plan: &TrainPlan, around: &Surroundings<'_>) -> Result<HardwarePlan> {
    let Some(name) = &args.hardware else { return placement::at_hand(plan.device, plan.dtype) };
    let given = PathBuf::from(name);
    let path = match given.exists() {
        true => given,
        false => shipped::find(&format!("configs/hardware/{}.yaml", shipped::config_name(name)), around)
            .ok_or_else(|| Error::config(format!("there is no hardware `{name}`")).hint(shipped_hardware(around)))?,
    };
    let hardware = resolve::hardware(&Config::load(&path, &[])?)?;
    if hardware.is_cpu != (plan.device == DevicePlan::Cpu) {
        let (has, wants) = if hardware.is_cpu { ("cpu", "cuda") } else { ("cuda", "cpu") };
        let what =
            format!("`{}` has devices of the kind `{has}`, and the config says `device: {wants}`", hardware.name);
        return Err(Error::config(what).at_file(path).hint(format!("plan with `device={has}`")));
    }
    Ok(hardware)
}

fn shipped_hardware(around: &Surroundings<'_>) -> String {
    let folders = around.shipped.iter().map(|root| root.join("configs/hardware"));
    let names = folders.flat_map(|folder| (around.files_below)(&folder));
    let mut names: Vec<_> = names.filter_map(|name| Some(name.strip_suffix(".yaml")?.to_owned())).collect();
    names.sort();
    names.dedup();
    match names.is_empty() {
        true => "give the path of a file; `host keys` describes its keys under Hardware".to_owned(),
        false => format!("give the path of a file, or one of {}", crate::error::quoted(names)),
    }
}

/// What a sample is like where nothing tells: the mean of XSum's first 2000 rows as Llama 3 reads them, and its spread.
const ASSUMED: Lengths = Lengths { mean: 500.0, label_share: 0.05, spread: 0.7 };

/// Rows and what they are like.
struct Data {
    rows: Option<f64>,
    lengths: Lengths,
    /// Where that is from.
    source: String,
}

impl Data {
    fn of(args: &Args, plan: &TrainPlan) -> Self {
        // Whatever is wrong with files or tokenizer, a run will say.
        let looked = look(plan).ok().flatten();
        let (rows, found) = looked.map_or((None, None), |(rows, lengths)| (Some(rows), lengths));
        let rows = args.rows.map(|rows| rows as f64).or(rows).or_else(|| rows_of_splits(plan));
        let mut lengths = found.unwrap_or(ASSUMED);
        let longest = plan.tokenizer.max_seq_len.map_or(f64::INFINITY, |length| length as f64);
        let packing = plan.dataset.first().and_then(|dataset| dataset.packing.as_ref());
        if let Some(mean) = args.tokens_per_sample {
            lengths.mean = mean;
        }
        lengths.label_share = args.label_share.unwrap_or(lengths.label_share);
        if plan.dataset.iter().all(|dataset| dataset.train_on_input) {
            lengths.label_share = 1.0;
        }
        if let Some(packing) = packing {
            lengths = Lengths { mean: packing.max_seq_len as f64, spread: 0.0, ..lengths };
        } else if lengths.mean >= longest {
            // Samples that are all cut are of one length.
            lengths = Lengths { mean: longest, spread: 0.0, ..lengths };
        }
        let source = match (found, args.tokens_per_sample) {
            (_, Some(_)) => "as given",
            (Some(_), None) => "of the first rows' texts; a template adds to them",
            (None, None) => "assumed: set `--tokens-per-sample` and `--label-share`",
        };
        let source = if packing.is_some() { "packed" } else { source }.to_owned();
        Self { rows, lengths, source }
    }
}

/// Rows, and lengths where texts tell them, of files that are here.
fn look(plan: &TrainPlan) -> Result<Option<(f64, Option<Lengths>)>> {
    if plan.dataset.iter().any(|dataset| dataset.files.is_empty()) {
        return Ok(None);
    }
    let tokenizer = Tokenizer::of(&plan.tokenizer)?;
    let looks = plan.dataset.iter().map(|dataset| data::outlook(dataset, &tokenizer)).collect::<Result<Vec<_>>>()?;
    let rows = looks.iter().map(|look| look.rows).sum::<u64>() as f64;
    let longest = plan.tokenizer.max_seq_len.unwrap_or(usize::MAX);
    let samples: Vec<(f64, f64)> = looks
        .iter()
        .flat_map(|look| &look.samples)
        .map(|(tokens, labels)| ((*tokens).min(longest) as f64, (*labels).min(longest) as f64))
        .collect();
    let count = samples.len() as f64;
    let sum = |of: &dyn Fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>();
    let (tokens, labels) = (sum(&|sample| sample.0), sum(&|sample| sample.1));
    let mean = tokens / count;
    let variance = sum(&|sample| (sample.0 - mean).powi(2)) / count;
    let is_known = tokens > 0.0;
    let lengths = Lengths { mean, label_share: labels / tokens, spread: variance.sqrt() / mean };
    Ok(Some((rows, is_known.then_some(lengths))))
}

/// What the splits themselves say.
fn rows_of_splits(plan: &TrainPlan) -> Option<f64> {
    let of_slice = |slice: &split::Slice| match (slice.from, slice.to) {
        (None, Some(Boundary::Rows(to @ 0..))) => Some(to as f64),
        (Some(Boundary::Rows(from @ 0..)), Some(Boundary::Rows(to @ 0..))) => Some((to - from) as f64),
        _ => None,
    };
    let of_split = |text: &str| split::parse(text).ok()?.iter().map(of_slice).sum::<Option<f64>>();
    plan.dataset.iter().map(|dataset| of_split(&dataset.split)).sum()
}

fn to_json(question: &Question<'_>, choice: &Choice, other: Option<&Candidate>, source: &str) -> Result<String> {
    let value = json!({
        "hardware": question.hardware,
        "ranks": question.ranks,
        "parameters": question.job.num_parameters(),
        "trained": question.job.num_trained(),
        "largest_microbatch": {"tokens": question.job.tokens, "labels": question.job.labels},
        "rows": question.rows,
        "lengths": question.lengths,
        "lengths_are": source,
        "have_bytes": choice.have_bytes,
        "candidates": choice.candidates,
        "chosen": choice.chosen(),
        "other": other,
    });
    serde_json::to_string_pretty(&value).map_err(|error| Error::bug("the plan is not JSON").cause(error))
}
