//! Preference training and distillation against TRL's and torchtune's own losses on the same weights and rows
//! (`tests/fixtures/curves/methods.py`, which says which release is the reference of what).
//!
//! Tolerances: 1e-5 on a loss, of which the implementations leave 2.4e-6 between each other. ipo's is the square of a number
//! near 5 made of four sums of log-probabilities near -200, of which fp32 keeps 1.5e-5 each: 4 · 1.5e-5 · 2 · 5 = 6e-4 on losses
//! of 25, where the implementations differ by 1.9e-4. The other figures are such sums, times β for rewards.

use std::path::Path;

use host::config::plan::{GuestRef, Layout, LossPlan, ModelPlan, Parallel, RowsPlan, TrainPlan};
use host::data::Sample;
use host::worker::StopFlag;
use host_rank::script::Recipe;
use serde_json::{Value, json};

use crate::support;

/// The lines of the log of a run that `recipe` drives on `world` ranks.
pub fn by_recipe(recipe: &str, plan: &TrainPlan, rows: &[Sample], world: usize) -> Vec<Value> {
    let port = support::free_port();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(recipe);
    std::thread::scope(|scope| {
        for rank in 0..world {
            let (plan, rows, path) = (plan.clone(), rows.to_vec(), path.clone());
            // Scripts recurse deeper than a test's stack reaches.
            let work = move || {
                let guest = GuestRef { path, settings: json!({}) };
                let recipe = Recipe::load(&guest, &plan.limits).unwrap();
                let run = support::open(plan, rows, rank, world, port);
                recipe.run(Box::new(run), StopFlag::default()).unwrap_or_else(|error| panic!("{error}"));
            };
            std::thread::Builder::new().stack_size(64 << 20).spawn_scoped(scope, work).unwrap();
        }
    });
    support::log_lines(plan).into_iter().filter(|line| line.get("loss").is_some()).collect()
}

fn pairs() -> Vec<Sample> {
    let recording = support::fixture("curves/dpo.json");
    let side = |row: &Value, side: &str| row[side].clone();
    let rows =
        recording["rows"].as_array().unwrap().iter().flat_map(|row| [side(row, "chosen"), side(row, "rejected")]);
    support::rows(&json!({ "rows": rows.collect::<Vec<_>>() }))
}

pub fn dpo_plan(dir: &Path, loss: Value, world: usize) -> TrainPlan {
    let mut plan = support::golden_plan(dir);
    plan.model.adapter = Some(support::golden_adapter(dir));
    plan.dataset[0].rows =
        RowsPlan::Pairs { prompt: None, chosen: "chosen".into(), rejected: "rejected".into(), template: None };
    plan.optimizer.lr = 3e-3;
    plan.gradient_accumulation_steps /= world;
    plan.loss = LossPlan { guest: None, of_recipe: Some("DPOLoss".into()), num_output_chunks: 1 };
    plan.for_recipe = vec!["loss".into()];
    plan.config = json!({ "loss": loss });
    plan
}

#[track_caller]
fn compare(steps: &[Value], file: &str, curve: &str, metrics: &[(&str, f64)]) {
    let tolerance = if curve.starts_with("ipo") { 6e-4 } else { 1e-5 };
    let recording = support::fixture(file);
    let recorded = recording[curve].as_array().unwrap();
    assert_eq!(steps.len(), recorded.len());
    let mut worst = 0.0f64;
    for (index, (step, recorded)) in steps.iter().zip(recorded).enumerate() {
        let both = |name: &str| {
            let number = |of: &Value| of[name].as_f64().unwrap_or_else(|| panic!("{curve}: no {name} in {of}"));
            (number(step), number(recorded))
        };
        let (loss, expected) = both("loss");
        let distance = (loss - expected).abs();
        worst = worst.max(distance);
        assert!(distance < tolerance, "{curve}, step {}: the loss is {loss}, not {expected}", index + 1);
        // Before the first update both models are one, and a GPU computes them with and without a graph by kernels of its
        // choice: which answer wins, and on which side of its kink kto_pair is, is rounding. A CPU does the same both times.
        let is_rounding = support::device() != tch::Device::Cpu && recorded["rewards/margins"].as_f64() == Some(0.0);
        let (norm, expected) = both("grad_norm");
        assert!(
            is_rounding || (norm - expected).abs() < 1e-4 * expected,
            "{curve}, step {}: norm {norm}, not {expected}",
            index + 1
        );
        for (name, tolerance) in metrics {
            let (found, expected) = both(name);
            if is_rounding && *name == "rewards/accuracies" {
                continue;
            }
            assert!(
                (found - expected).abs() < *tolerance,
                "{curve}, step {}: {name} {found}, not {expected}",
                index + 1
            );
        }
    }
    println!("{curve}: worst of {} losses differs by {worst:.1e}", steps.len());
}

const LORA_DPO: &str = "scripts/recipes/lora_dpo_distributed.rhai";
const REWARDS: &[(&str, f64)] = &[
    ("rewards/chosen", 1e-5),
    ("rewards/rejected", 1e-5),
    ("rewards/margins", 1e-5),
    ("rewards/accuracies", 1e-9),
    ("log_probs/chosen", 5e-4),
    ("log_probs/rejected", 5e-4),
];

#[track_caller]
fn check_dpo(curve: &str, kind: &str, label_smoothing: f64, ways: &[Way]) {
    for (world, layout, parallel) in ways {
        let dir = tempfile::tempdir().unwrap();
        let loss = json!({ "beta": 0.1, "label_smoothing": label_smoothing, "loss_type": kind });
        let mut plan = dpo_plan(dir.path(), loss, *world);
        (plan.layout, plan.placement.parallel) = (*layout, *parallel);
        compare(&by_recipe(LORA_DPO, &plan, &pairs(), *world), "curves/dpo.json", curve, REWARDS);
    }
}

/// Ranks, layout, and who holds the model.
type Way = (usize, Layout, Parallel);

const ALONE: Way = (1, Layout::Padded, Parallel::Replicate);
const EVERY_WAY: &[Way] = &[
    (1, Layout::Varlen, Parallel::Replicate),
    ALONE,
    (2, Layout::Varlen, Parallel::Replicate),
    (2, Layout::Varlen, Parallel::Shard),
];

#[test]
fn dpo_is_trls_and_torchtunes() {
    check_dpo("sigmoid_trl", "sigmoid", 0.0, EVERY_WAY);
    check_dpo("sigmoid_torchtune", "sigmoid", 0.0, &[(2, Layout::Padded, Parallel::Replicate)]);
}

#[test]
fn hinge_and_smoothing_are_trls() {
    check_dpo("hinge_trl", "hinge", 0.0, EVERY_WAY);
    check_dpo("smoothing_trl", "sigmoid", 0.1, EVERY_WAY);
}

/// kto_pair compares answers within a micro-batch, so only torchtune's own layout gives its numbers.
#[test]
fn ipo_and_kto_pair_are_torchtunes() {
    check_dpo("ipo_torchtune", "ipo", 0.0, EVERY_WAY);
    check_dpo("kto_pair_torchtune", "kto_pair", 0.0, &[ALONE]);
}

/// All weights trained, a second copy frozen. Losses start at ln 2 and the rewards at 0, exactly.
#[test]
fn full_dpo_is_trls_and_torchtunes() {
    for (world, layout, parallel) in EVERY_WAY {
        let dir = tempfile::tempdir().unwrap();
        let mut plan =
            dpo_plan(dir.path(), json!({ "beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid" }), *world);
        support::train_whole(&mut plan);
        plan.reference = Some(plan.model.clone());
        plan.for_recipe.push("ref_checkpointer".into());
        plan.optimizer.lr = 1e-5;
        (plan.layout, plan.placement.parallel) = (*layout, *parallel);
        // Two answers a pair.
        let steps = by_recipe(LORA_DPO, &plan, &pairs()[..2 * 64], *world);
        for curve in ["full_sigmoid_torchtune", "full_sigmoid_trl"] {
            compare(&steps, "curves/dpo.json", curve, REWARDS);
        }
        assert!((steps[0]["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-7);
        let rounding = if support::device() == tch::Device::Cpu { 0.0 } else { 1e-5 };
        assert!(steps[0]["rewards/margins"].as_f64().unwrap().abs() <= rounding);
    }
}

#[test]
fn distillation_is_torchtunes() {
    let rows = support::rows(&support::fixture("curves/distillation.json"));
    for (curve, kind) in [("forward", "ForwardKLLoss"), ("reverse", "ReverseKLLoss"), ("symmetric", "SymmetricKLLoss")]
    {
        // However many pieces the scores are computed in, and whoever computes them.
        for ((world, layout, parallel), chunks) in EVERY_WAY.iter().zip([8, 1, 3, 2]) {
            let dir = tempfile::tempdir().unwrap();
            let mut plan = support::golden_plan(dir.path());
            plan.model.adapter = Some(support::golden_adapter(dir.path()));
            plan.gradient_accumulation_steps /= world;
            (plan.layout, plan.placement.parallel) = (*layout, *parallel);
            plan.teacher = Some(ModelPlan {
                checkpoint_dir: support::fixtures().join("teacher"),
                checkpoint_files: vec![],
                lora: None,
                adapter: None,
            });
            plan.for_recipe = ["teacher_model", "teacher_checkpointer", "kd_loss", "kd_ratio"].map(String::from).into();
            let loss = json!({ "_component_": kind, "num_output_chunks": chunks, "sym_kd_ratio": 0.5 });
            plan.config = json!({ "kd_ratio": 0.5, "kd_loss": loss });
            let steps = by_recipe("scripts/recipes/knowledge_distillation_distributed.rhai", &plan, &rows, *world);
            let metrics = [("class_loss", 2e-5), ("kd_loss", 2e-4), ("label_tokens", 1e-9)];
            compare(&steps, "curves/distillation.json", curve, &metrics);
        }
    }
}
