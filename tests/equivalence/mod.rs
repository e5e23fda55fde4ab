//! What may not change a result: how samples are laid out, accumulated and spread over ranks; stopping and going on;
//! folding the adapter into the weights. Tolerances are design §6's: 1e-6 relative on a loss, 1e-5 by norm on gradients.

use std::path::{Path, PathBuf};

use host::config::plan::{ClipPlan, Dtype, Layout, ModelPlan, Parallel, SchedulePlan, TrainPlan, Updates};
use host_rank::train::{Opened, Place, Start};
use insta::assert_snapshot;
use tch::{Kind, Reduction, Tensor};

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
    let losses = support::relative(&one.steps, &other.steps, |step| step.loss);
    let norms = support::relative(&one.steps, &other.steps, |step| step.grad_norm);
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let distance = |(one, other): (&Vec<f32>, &Vec<f32>)| {
        let gaps = &mut one.iter().zip(other).map(|(one, other)| f64::from(*one) - f64::from(*other));
        norm(gaps) / norm(&mut other.iter().map(|x| f64::from(*x)))
    };
    // From the end: a resumed run has none of the steps before.
    let gradients = one.gradients.iter().rev().zip(other.gradients.iter().rev()).map(distance).fold(0.0, f64::max);
    println!("{what}: losses differ by {losses:.1e}, gradients by {gradients:.1e} of their norm");
    assert!(losses < 1e-6, "{what}: a loss differs by {losses:e}");
    assert!(gradients < 1e-5, "{what}: a gradient differs by {gradients:e} of its norm");
    assert!(norms < 1e-5, "{what}: a gradient's norm differs by {norms:e}");
    assert!(!one.gradients.is_empty() && !other.gradients.is_empty());
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

/// Shards the model over the ranks.
fn shard(plan: &mut TrainPlan) {
    plan.placement.parallel = Parallel::Shard;
    plan.placement.reshard_after_forward = true;
}

/// A model of which every rank has a piece trains as one that each has whole: an adapter over frozen pieces, and all
/// weights; given back after each forward or kept for the step; in the memory of the device or of the machine; in one copy
/// or several.
#[test]
fn sharding_changes_nothing() {
    let run = |world: usize, change: &dyn Fn(&mut TrainPlan)| {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), world, change)
    };
    for whole in [false, true] {
        let method = |plan: &mut TrainPlan| {
            // Norms are above: updates depend on them.
            (plan.run_val_every_n_steps, plan.clip_grad_norm) = (Some(5), Some(ClipPlan::MaxNorm(0.1)));
            if whole {
                support::train_whole(plan);
            }
        };
        let replicated = run(1, &method);
        let what = if whole { "every weight" } else { "an adapter" };
        for (name, (world, copies), reshard, offload, layout) in [
            ("one rank", (1, 1), true, false, Layout::Varlen),
            ("two ranks", (2, 1), true, false, Layout::Varlen),
            ("four ranks", (4, 1), true, false, Layout::Varlen),
            ("two ranks, kept for a step", (2, 1), false, false, Layout::Varlen),
            ("two ranks, offloaded, padded", (2, 1), true, true, Layout::Padded),
            ("two of four ranks", (4, 2), true, false, Layout::Varlen),
            ("two of four ranks, kept for a step", (4, 2), false, false, Layout::Varlen),
        ] {
            if !support::can_share(world) {
                continue;
            }
            let sharded = run(world, &|plan| {
                method(plan);
                shard(plan);
                plan.placement.reshard_after_forward = reshard;
                plan.placement.cpu_offload = offload;
                plan.placement.copies = Some(copies);
                plan.layout = layout;
            });
            same(&format!("{what}, sharded over {name}, and replicated"), &sharded, &replicated);
            for ((_, one), (_, other)) in sharded.validations.iter().zip(&replicated.validations) {
                assert!(((one - other) / one).abs() < 1e-6, "{what}, {name}: {other} is not {one}");
            }
            assert_eq!(sharded.validations.len(), replicated.validations.len());
            assert_eq!(sharded.parameters.len(), replicated.parameters.len());
        }
    }
}

/// A micro-batch without a label on one rank alone takes part in what ranks that share a model do together.
#[test]
fn a_batch_without_labels_needs_the_others_too() {
    if !support::can_share(2) {
        return;
    }
    let mut rows = support::golden_rows();
    for row in rows.iter_mut().skip(1).step_by(5) {
        row.labels.fill(-100);
    }
    let logged = |world: usize, parallel: Parallel, whole: bool| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = support::golden_plan(dir.path());
        if whole {
            support::train_whole(&mut plan);
        }
        (plan.layout, plan.batch_size, plan.gradient_accumulation_steps) = (Layout::Padded, 1, 8 / world);
        (plan.max_steps_per_epoch, plan.placement.parallel) = (Some(6), parallel);
        let lines = crate::parity::methods::by_recipe("scripts/recipes/lora_distributed.rhai", &plan, &rows, world);
        lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    for whole in [false, true] {
        let alone = logged(1, Parallel::Replicate, whole);
        let shared = logged(2, Parallel::Shard, whole);
        assert_eq!(alone.len(), 6);
        assert!(
            alone.iter().zip(&shared).all(|(one, other)| ((one - other) / one).abs() < 1e-6),
            "{alone:?} {shared:?}"
        );
    }
}

/// What collectives bring to a rank in a step is what the formulas say: of replicated weights their adapter's gradients once,
/// of shared ones every block for forward and for backward and the gradients once, or each once for the whole step.
#[test]
fn a_step_moves_as_many_bytes_as_it_must() {
    // That share a copy of the model.
    const SHARED: i64 = 2;
    let config = host::hf::ModelConfig::read(&support::tiny_model()).unwrap();
    let shards = host_rank::shard::Shards::new(&config, SHARED as usize);
    let unit = |index: usize| shards.piece(index) * SHARED;
    let units = shards.units.len();
    let all: i64 = (0..units).map(unit).sum();
    // The last block stays from its forward to its backward.
    let again: i64 = (1..units - 2).map(unit).sum();
    let adapter: i64 = 8 * config
        .linears()
        .iter()
        .filter(|linear| linear.name.ends_with("q_proj") || linear.name.ends_with("v_proj"))
        .map(|linear| linear.inputs + linear.outputs)
        .sum::<i64>();
    let scalars = 9;
    // An all-reduce brings 2 (n - 1) / n of what it reduces, the others (n - 1) / n of the whole: of all ranks, then of those
    // that share a copy and of those that have the same piece.
    let piece = shards.size();
    for (what, is_whole, parallel, copies, keeps, [of_all, shared, of_copies]) in [
        ("an adapter, replicated", false, Parallel::Replicate, 1, false, [2 * (adapter + scalars), 0, 0]),
        ("an adapter over pieces", false, Parallel::Shard, 1, false, [2 * (adapter + scalars), all + again, 0]),
        ("every weight, replicated", true, Parallel::Replicate, 1, false, [2 * (shards.total() + scalars), 0, 0]),
        ("every weight in pieces", true, Parallel::Shard, 1, false, [2 * scalars, all + again + all, 0]),
        ("every weight in pieces that are kept", true, Parallel::Shard, 1, true, [2 * scalars, all + all, 0]),
        ("an adapter over two copies", false, Parallel::Shard, 2, false, [2 * (adapter + scalars), all + again, 0]),
        ("two copies in pieces", true, Parallel::Shard, 2, false, [2 * scalars, all + again + all, 2 * piece]),
    ] {
        let ranks = SHARED * copies;
        if parallel == Parallel::Shard && !support::can_share(ranks as usize) {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut plan = support::golden_plan(dir.path());
        if is_whole {
            support::train_whole(&mut plan);
        }
        plan.gradient_accumulation_steps /= ranks as usize;
        // One micro-batch a rank.
        plan.tokens_per_microbatch = 100_000;
        (plan.placement.parallel, plan.placement.reshard_after_forward) = (parallel, !keeps);
        plan.placement.copies = Some(copies as usize);
        support::train(&plan, &support::golden_rows(), ranks as usize, 3);
        let received: Vec<f64> =
            support::log_lines(&plan).iter().map(|line| line["bytes_received"].as_f64().unwrap()).collect();
        let others = |passes: i64, ranks: i64| passes * 4 * (ranks - 1) / ranks;
        let expected = (others(of_all, ranks) + others(shared, SHARED) + others(of_copies, copies)) as f64;
        // Before the first step the ranks compare notes.
        assert_eq!(received[1..], [expected; 2], "{what}");
    }
}

/// Activations that backward computes again are the ones of the forward, dropout masks among them: of every block, of every
/// second, alone and over shards.
#[test]
fn checkpointed_activations_change_nothing() {
    for whole in [false, true] {
        let method = |plan: &mut TrainPlan| match &mut plan.model.lora {
            Some(lora) if !whole => lora.dropout = 0.3,
            _ => support::train_whole(plan),
        };
        let run = |world: usize, change: &dyn Fn(&mut TrainPlan)| {
            let dir = tempfile::tempdir().unwrap();
            run(dir.path(), world, |plan| {
                method(plan);
                change(plan);
            })
        };
        let plain = run(1, &|_| {});
        for (every, world) in [(1, 1), (2, 1), (1, 2)] {
            if !support::can_share(world) {
                continue;
            }
            let checkpointed = run(world, &|plan| {
                plan.placement.checkpoint_every = Some(every);
                if world > 1 {
                    shard(plan);
                }
            });
            same(&format!("every {every}-th block checkpointed on {world} ranks and plain"), &checkpointed, &plain);
        }
    }
}

/// Updates below half the last bit of a bf16 weight are lost when they are rounded to the nearest, and count when fp32
/// copies sum them up or chance rounds them.
#[test]
fn small_updates_of_bf16_weights_count() {
    let learnt = |change: &dyn Fn(&mut TrainPlan)| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = support::golden_plan(dir.path());
        support::train_whole(&mut plan);
        (plan.optimizer.lr, plan.optimizer.weight_decay) = (1e-5, 0.0);
        plan.run_val_every_n_steps = Some(30);
        change(&mut plan);
        let finished = support::train(&plan, &support::golden_rows(), 1, 30);
        finished.validations[0].1 - finished.validations.last().unwrap().1
    };
    let bf16 = |updates| learnt(&move |plan| (plan.dtype, plan.optimizer.updates) = (Dtype::Bf16, updates));
    let wide = learnt(&|_| {});
    let [nearest, master, stochastic] = [Updates::Nearest, Updates::Master, Updates::Stochastic].map(bf16);
    println!("the validation loss fell by {wide} in fp32; bf16: {nearest}, master {master}, stochastic {stochastic}");
    assert!(nearest < 0.1 * wide, "{nearest} {wide}");
    // What is measured are the copies in bf16, which lag behind by half a bit.
    assert!(master > 0.7 * wide, "{master} {wide}");
    assert!((stochastic / wide - 1.0).abs() < 0.1, "{stochastic} {wide}");
}

/// The same numbers whether ranks share them or not, and after going on from a checkpoint.
#[test]
fn small_updates_depend_on_no_rank_and_survive_a_checkpoint() {
    for updates in [Updates::Master, Updates::Stochastic] {
        let method = |plan: &mut TrainPlan| {
            support::train_whole(plan);
            (plan.dtype, plan.optimizer.updates) = (Dtype::Bf16, updates);
            shard(plan);
        };
        let straight = run(tempfile::tempdir().unwrap().path(), 1, method);
        let replicated = run(tempfile::tempdir().unwrap().path(), 1, |plan| {
            method(plan);
            plan.placement.parallel = Parallel::Replicate;
        });
        assert!(straight.parameters == replicated.parameters, "{updates:?}");
        let dir = tempfile::tempdir().unwrap();
        run_until(dir.path(), 1, 7, method);
        let resumed = run(dir.path(), 1, |plan| {
            method(plan);
            plan.checkpoint.resume = true;
        });
        assert!(resumed.parameters == straight.parameters, "{updates:?}");
    }
}

/// What is saved by shards is gone on from by any number of ranks, sharing or not, and the other way round.
#[test]
fn a_sharded_run_resumes_anywhere() {
    let whole = |plan: &mut TrainPlan| support::train_whole(plan);
    let straight_dir = tempfile::tempdir().unwrap();
    let straight = run(straight_dir.path(), 1, whole);
    // Ranks, none where each has the model whole, and copies of it.
    let (none, two, four, two_copies) = ((0, 1), (2, 1), (4, 1), (4, 2));
    for (before, after) in
        [(two, two), (two, four), (four, two), (two, none), (none, two), (two, two_copies), (two_copies, four)]
    {
        if !support::can_share(before.0.max(after.0)) {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let spread = |(ranks, copies): (usize, usize)| {
            move |plan: &mut TrainPlan| {
                support::train_whole(plan);
                if ranks > 0 {
                    shard(plan);
                    plan.placement.copies = Some(copies);
                }
            }
        };
        run_until(dir.path(), before.0.max(1), 7, spread(before));
        let resumed = run(dir.path(), after.0.max(1), |plan| {
            spread(after)(plan);
            plan.checkpoint.resume = true;
        });
        same(&format!("resumed on {after:?} after {before:?} shards and copies"), &resumed, &straight);
    }
}

/// Before the first step, every so many and in the end: the mean over the label tokens of all rows, however they are computed.
#[test]
fn validation_is_the_mean_over_label_tokens() {
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let measured = |plan: &mut TrainPlan| plan.run_val_every_n_steps = Some(5);
    let whole = run(dirs[0].path(), 1, measured);
    let padded = run(dirs[1].path(), 1, |plan| {
        measured(plan);
        plan.layout = Layout::Padded;
    });
    let two = run(dirs[2].path(), 2, measured);
    let steps = |finished: &Finished| finished.validations.iter().map(|(step, _)| *step).collect::<Vec<_>>();
    assert_eq!(steps(&whole), [0, 5, 10]);
    for (what, other) in [("padded", &padded), ("two ranks", &two)] {
        assert_eq!(steps(other), steps(&whole), "{what}");
        for ((_, one), (_, other)) in whole.validations.iter().zip(&other.validations) {
            assert!(((one - other) / one).abs() < 1e-6, "{what}: {other} is not {one}");
        }
    }
    let (before, after) = (whole.validations[0].1, whole.validations[2].1);
    let opened = open(&support::tiny_model(), None);
    let (sum, count) = losses(&opened, support::VALIDATION_ROWS);
    assert!((before - sum / count).abs() < 1e-5, "{before} is not {}", sum / count);
    assert!(after < before, "nothing was learnt: {before}, {after}");

    let ended = run(dirs[3].path(), 1, |plan| {
        measured(plan);
        plan.max_steps_per_epoch = Some(3);
    });
    assert_eq!(steps(&ended), [0, 3]);
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
    assert!(support::relative(&plain.steps[2..], &varlen.steps[2..], |step| step.loss) > 1e-6, "dropout did nothing");
    same("padded and varlen with dropout", &padded, &varlen);
    same("two ranks and one with dropout", &two, &varlen);
}

/// The same of every weight as of an adapter.
#[test]
fn full_fine_tuning_does_not_depend_on_layout_or_ranks() {
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let whole = run(dirs[0].path(), 1, support::train_whole);
    let padded = run(dirs[1].path(), 1, |plan| {
        support::train_whole(plan);
        plan.layout = Layout::Padded;
    });
    let chunked = run(dirs[2].path(), 1, |plan| {
        support::train_whole(plan);
        plan.loss.num_output_chunks = 5;
    });
    let two = run(dirs[3].path(), 2, support::train_whole);
    same("padded and varlen, every weight", &padded, &whole);
    same("a loss in five pieces and in one, every weight", &chunked, &whole);
    same("two ranks and one, every weight", &two, &whole);
}

/// Stopped at step 7 of an epoch of 30 and gone on with, a run ends in the same bits as one that never stopped.
#[test]
fn a_resumed_run_ends_bit_for_bit_the_same() {
    let adapter: fn(&mut TrainPlan) = |_| {};
    for (world, change) in [(1, adapter), (2, adapter), (1, support::train_whole), (2, support::train_whole)] {
        let (straight_dir, resumed_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let straight = run(straight_dir.path(), world, change);
        run_until(resumed_dir.path(), world, 7, change);
        let resumed = run(resumed_dir.path(), world, |plan| {
            change(plan);
            plan.checkpoint.resume = true;
        });
        let losses = |finished: &Finished| finished.steps.iter().map(|step| step.loss).collect::<Vec<_>>();
        assert_eq!(losses(&resumed), losses(&straight), "{world} ranks");
        assert_eq!(resumed.parameters, straight.parameters, "{world} ranks");
    }
}

fn run_until(dir: &Path, world: usize, step: usize, change: impl FnOnce(&mut TrainPlan)) {
    let mut plan = support::golden_plan(dir);
    change(&mut plan);
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
    run_until(resumed_dir.path(), 1, 7, |_| {});
    let resumed = run(resumed_dir.path(), 2, |plan| plan.checkpoint.resume = true);
    same("resumed on two ranks", &resumed, &straight);
}

fn open(checkpoint_dir: &Path, adapter: Option<PathBuf>) -> Opened {
    let plan = ModelPlan { checkpoint_dir: checkpoint_dir.into(), checkpoint_files: vec![], lora: None, adapter };
    Opened::open(&plan, Kind::Float, support::device(), None).unwrap()
}

/// The summed cross-entropy of the first `rows` recorded rows by their logits, and the number of their labels.
fn losses(model: &Opened, rows: usize) -> (f64, f64) {
    let (mut sum, mut count) = (0.0, 0.0);
    for row in support::golden_rows().iter().take(rows) {
        let tokens: Vec<i64> = row.tokens.iter().map(|token| i64::from(*token)).collect();
        let labels: Vec<i64> = row.labels[1..].iter().map(|label| i64::from(*label)).collect();
        let scores = host_rank::logits::of(model, &tokens).unwrap().narrow(0, 0, labels.len() as i64);
        let targets = Tensor::from_slice(&labels);
        let loss = scores.to_kind(Kind::Double).cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, -100, 0.0);
        sum += loss.double_value(&[]);
        count += labels.iter().filter(|label| **label >= 0).count() as f64;
    }
    (sum, count)
}

/// The merged weights give the loss of the base with its adapter.
#[test]
fn merged_and_adapter_give_the_same_loss() {
    let dir = tempfile::tempdir().unwrap();
    let mut plan = support::golden_plan(dir.path());
    plan.checkpoint.adapter_only = false;
    plan.checkpoint.save_every_n_steps = Some(6);
    plan.optimizer.lr = 1e-2;
    plan.model.lora = Some(support::lora(&["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]));
    support::train(&plan, &support::golden_rows(), 1, 6);
    let checkpoint = dir.path().join("step_6");
    const ROWS: usize = 16;
    let [base, adapted, merged] = [
        open(&support::tiny_model(), None),
        open(&support::tiny_model(), Some(checkpoint.join("adapter"))),
        open(&checkpoint, None),
    ]
    .map(|model| losses(&model, ROWS).0);
    assert!(adapted < 0.95 * base, "the adapter changed nothing: {base}, {adapted}");
    let distance = ((adapted - merged) / adapted).abs();
    println!("merged and adapter: losses differ by {distance:.1e}");
    assert!(distance < 1e-6, "merged and adapter differ by {distance:e}");
}

/// What full fine-tuning writes is what it trained, to the last bit, and loads by itself.
#[test]
fn the_checkpoint_of_full_fine_tuning_is_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut plan = support::golden_plan(dir.path());
    support::train_whole(&mut plan);
    plan.checkpoint.save_every_n_steps = Some(6);
    let trained = support::train(&plan, &support::golden_rows(), 1, 6).parameters;
    let checkpoint = dir.path().join("step_6");
    assert!(!checkpoint.join("adapter").exists());
    let plan = ModelPlan { checkpoint_dir: checkpoint.clone(), checkpoint_files: vec![], lora: None, adapter: None };
    let start = Some(Start { seed: 0, adapter_kind: Kind::Float });
    let again = Opened::open(&plan, Kind::Float, support::device(), start).unwrap().trained.unwrap();
    assert_eq!(Vec::<f32>::try_from(again.flat().numbers.detach()).unwrap(), trained);
    let [base, after] = [support::tiny_model(), checkpoint].map(|dir| losses(&open(&dir, None), 16).0);
    assert!(after < 0.95 * base, "nothing was learnt: {base}, {after}");
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

/// Whatever made it so: a step of ranks that would not do the same is taken on none of them.
#[test]
fn ranks_of_another_learning_rate_take_no_step() {
    let dir = tempfile::tempdir().unwrap();
    let port = support::free_port();
    let errors = std::thread::scope(|scope| {
        let ranks = [3e-4, 2e-4].map(|lr| (support::golden_plan(dir.path()), lr)).into_iter().enumerate();
        let ranks: Vec<_> = ranks
            .map(|(rank, (mut plan, lr))| {
                (plan.optimizer.lr, plan.schedule) = (lr, SchedulePlan::Constant);
                scope.spawn(move || {
                    let mut run = support::open(plan, support::golden_rows(), rank, 2, port);
                    let before = run.parameters().copy();
                    assert!(run.next_step().unwrap());
                    while run.next_batch().unwrap().is_some() {}
                    let error = run.finish_step().unwrap_err();
                    assert!(run.parameters().equal(&before));
                    run.explain(error, &Place::default()).to_string()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(errors[0], errors[1]);
    assert_snapshot!(errors[0], @r#"
    error: the recipe did not do the same on all ranks
    cause: rank 0: end of step 1, at a learning rate of 0.0003
    cause: rank 1: end of step 1, at a learning rate of 0.0002
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}
