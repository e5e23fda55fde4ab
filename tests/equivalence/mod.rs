//! What may not change a result: how samples are laid out, accumulated and spread over ranks; stopping and going on;
//! folding the adapter into the weights. Tolerances are design §6's: 1e-6 relative on a loss, 1e-5 by norm on gradients.

use std::path::Path;

use host::config::plan::{Layout, ModelPlan, TrainPlan};
use host_rank::train::Opened;
use tch::{Device, Kind};

use crate::support::{self, Finished};

/// Twelve steps of the golden run, shuffled, with `change`.
fn run(dir: &Path, world: usize, change: impl FnOnce(&mut TrainPlan)) -> Finished {
    let mut plan = support::golden_plan(dir);
    plan.shuffle = true;
    plan.gradient_accumulation_steps /= world;
    change(&mut plan);
    support::train(&plan, &support::golden_rows(), world, 12)
}

#[track_caller]
fn same(what: &str, one: &Finished, other: &Finished) {
    let losses = support::relative(&one.steps, &other.steps);
    let norms = one.steps.iter().zip(&other.steps).map(|(a, b)| ((a.grad_norm - b.grad_norm) / b.grad_norm).abs());
    let norms = norms.fold(0.0, f64::max);
    println!("{what}: losses differ by {losses:.1e}, gradient norms by {norms:.1e}");
    assert!(losses < 1e-6, "{what}: a loss differs by {losses:e}");
    assert!(norms < 1e-5, "{what}: a gradient norm differs by {norms:e}");
}

#[test]
fn layout_accumulation_and_ranks_change_nothing() {
    let dirs: Vec<_> = (0..6).map(|_| tempfile::tempdir().unwrap()).collect();
    let whole = run(dirs[0].path(), 1, |_| {});
    let padded = run(dirs[1].path(), 1, |plan| plan.layout = Layout::Padded);
    let one_batch = run(dirs[2].path(), 1, |plan| {
        plan.layout = Layout::Padded;
        (plan.batch_size, plan.gradient_accumulation_steps) = (8, 1);
    });
    let small = run(dirs[3].path(), 1, |plan| plan.tokens_per_microbatch = 200);
    let two = run(dirs[4].path(), 2, |_| {});
    let two_padded = run(dirs[5].path(), 2, |plan| plan.layout = Layout::Padded);
    same("padded and varlen", &padded, &whole);
    same("one batch and four accumulated", &one_batch, &padded);
    same("a small and a large token budget", &small, &whole);
    same("two ranks and one", &two, &whole);
    same("two ranks, padded, and one", &two_padded, &whole);
}

/// Masks are keyed by seed, step, sample, position and layer, so that layout and ranks keep them.
#[test]
fn dropout_masks_do_not_depend_on_layout_or_ranks() {
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let dropped = |plan: &mut TrainPlan| plan.model.lora.as_mut().unwrap().dropout = 0.3;
    let plain = run(dirs[0].path(), 1, |_| {});
    let varlen = run(dirs[1].path(), 1, dropped);
    let padded = run(dirs[2].path(), 1, |plan| {
        dropped(plan);
        plan.layout = Layout::Padded;
    });
    let two = run(dirs[3].path(), 2, dropped);
    assert!(support::relative(&plain.steps[2..], &varlen.steps[2..]) > 1e-6, "dropout did nothing");
    same("padded and varlen with dropout", &padded, &varlen);
    same("two ranks and one with dropout", &two, &varlen);
}

/// Stopped at step 7 of an epoch of 30 and gone on with, a run ends in the same bits as one that never stopped.
#[test]
fn a_resumed_run_ends_bit_for_bit_the_same() {
    for world in [1, 2] {
        let (straight_dir, resumed_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let straight = run(straight_dir.path(), world, |_| {});
        run_until(resumed_dir.path(), world, 7);
        let resumed = run(resumed_dir.path(), world, |plan| plan.checkpoint.resume = true);
        let losses = |finished: &Finished| finished.steps.iter().map(|step| step.loss).collect::<Vec<_>>();
        assert_eq!(losses(&resumed), losses(&straight), "{world} ranks");
        assert_eq!(resumed.parameters, straight.parameters, "{world} ranks");
    }
}

fn run_until(dir: &Path, world: usize, step: usize) {
    let mut plan = support::golden_plan(dir);
    plan.shuffle = true;
    plan.gradient_accumulation_steps /= world;
    plan.checkpoint.save_every_n_steps = Some(step);
    support::train(&plan, &support::golden_rows(), world, step);
    assert!(dir.join(format!("step_{step}/resume.json")).exists());
}

/// The same samples form each step when a run goes on with another rank count: accumulation is derived again.
#[test]
fn a_run_resumes_on_another_rank_count() {
    let (straight_dir, resumed_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let straight = run(straight_dir.path(), 1, |_| {});
    run_until(resumed_dir.path(), 1, 7);
    let resumed = run(resumed_dir.path(), 2, |plan| plan.checkpoint.resume = true);
    same("resumed on two ranks", &resumed, &straight);
}

/// The merged weights score as the base with its adapter.
#[test]
fn merged_and_adapter_give_the_same_scores() {
    let dir = tempfile::tempdir().unwrap();
    let mut plan = support::golden_plan(dir.path());
    plan.checkpoint.adapter_only = false;
    plan.checkpoint.save_every_n_steps = Some(6);
    plan.optimizer.lr = 1e-2;
    plan.model.lora = Some(support::lora(&["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]));
    support::train(&plan, &support::golden_rows(), 1, 6);
    let checkpoint = dir.path().join("step_6");
    let open = |checkpoint_dir: &Path, adapter_dir| {
        let plan =
            ModelPlan { checkpoint_dir: checkpoint_dir.into(), checkpoint_files: vec![], lora: None, adapter_dir };
        Opened::open(&plan, 0, Kind::Float, Kind::Float, Device::Cpu).unwrap()
    };
    let base = open(&support::tiny_model(), None);
    let adapted = open(&support::tiny_model(), Some(checkpoint.join("adapter")));
    let merged = open(&checkpoint, None);
    let rows = support::golden_rows();
    for row in rows.iter().take(5) {
        let tokens: Vec<i64> = row.tokens.iter().map(|token| i64::from(*token)).collect();
        let scores = |model: &Opened| host_rank::logits::of(model, &tokens).unwrap();
        let distance = (scores(&adapted) - scores(&merged)).abs().max().double_value(&[]);
        let learnt = (scores(&adapted) - scores(&base)).abs().max().double_value(&[]);
        assert!(learnt > 0.1, "the adapter changed nothing: {learnt}");
        assert!(distance < 1e-4, "merged and adapter differ by {distance}");
    }
}

/// Only the newest checkpoints stay, those of the run before a resume counted.
#[test]
fn old_checkpoints_are_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let keep_two = |resume: bool, steps: usize| {
        let mut plan = support::golden_plan(dir.path());
        plan.checkpoint.save_every_n_steps = Some(1);
        plan.checkpoint.keep_last_n = Some(2);
        plan.checkpoint.resume = resume;
        support::train(&plan, &support::golden_rows(), 1, steps);
    };
    let folders = || {
        let names =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name.contains("step_")).collect();
        names.sort();
        names
    };
    keep_two(false, 3);
    assert_eq!(folders(), ["step_2", "step_3"]);
    keep_two(true, 4);
    assert_eq!(folders(), ["step_3", "step_4"]);
}
