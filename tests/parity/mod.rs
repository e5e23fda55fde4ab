//! Against numbers that torchtune 0.6.1, PEFT and transformers recorded on the same weights and rows
//! (`tests/fixtures/golden/README.md`).
//!
//! Tolerances: 1e-5 absolute on an fp32 loss, where torchtune and PEFT differ from each other by 8e-7 over 30 steps; 1e-2
//! in bf16, where bf16 and fp32 of one implementation differ by 4e-3.

pub mod methods;

use std::path::Path;

use host::config::plan::{Dtype, Layout, PackingPlan, TrainPlan};
use host::data::Sample;
use host_rank::generate::{Sampling, continue_tokens};
use host_rank::train::Opened;
use tch::{Device, Kind, Tensor};

use crate::support::{self, Logged};

fn losses(name: &str) -> Vec<f64> {
    let value = support::golden(name);
    value["steps"].as_array().unwrap().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
}

fn worst(steps: &[Logged], expected: &[f64]) -> f64 {
    assert_eq!(steps.len(), expected.len());
    steps.iter().zip(expected).map(|(step, loss)| (step.loss - loss).abs()).fold(0.0, f64::max)
}

/// Trains the golden run with `change` and compares every loss with each of `files`.
#[track_caller]
fn check(world: usize, tolerance: f64, files: &[&str], change: impl FnOnce(&mut TrainPlan)) -> Vec<Logged> {
    let dir = tempfile::tempdir().unwrap();
    let mut plan = support::golden_plan(dir.path());
    plan.model.adapter = Some(support::golden_adapter(dir.path()));
    plan.gradient_accumulation_steps /= world;
    change(&mut plan);
    let finished = support::train(&plan, &support::golden_rows(), world, usize::MAX);
    for file in files {
        let distance = worst(&finished.steps, &losses(file));
        println!("{file}: worst of {} losses differs by {distance:.2e}", finished.steps.len());
        assert!(distance < tolerance, "{file}: a loss differs by {distance:e}, tolerance {tolerance:e}");
    }
    finished.steps
}

const FP32: &[&str] = &["tiny-pre-lora-fp32.json", "tiny-pre-hf-lora-fp32.json", "tiny-pre-lora-fp32-dist2.json"];

#[test]
fn thirty_fp32_losses_match_torchtune_and_peft() {
    let steps = check(1, 1e-5, FP32, |_| {});
    let recorded = support::golden("tiny-pre-lora-fp32.json");
    for (step, recorded) in steps.iter().zip(recorded["steps"].as_array().unwrap()) {
        let number = |key: &str| recorded[key].as_f64().unwrap();
        assert_eq!(step.label_tokens, number("label_tokens"));
        assert_eq!(step.real_tokens, number("real_tokens"));
        assert!((step.lr - number("lr_next")).abs() < 1e-12, "{} {}", step.lr, number("lr_next"));
        let norm = number("grad_norm");
        assert!((step.grad_norm - norm).abs() < 1e-4 * norm, "{} {norm}", step.grad_norm);
    }
}

#[test]
fn thirty_fp32_losses_match_in_the_padded_layout() {
    check(1, 1e-5, FP32, |plan| plan.layout = Layout::Padded);
}

#[test]
fn thirty_fp32_losses_match_on_two_ranks() {
    check(2, 1e-5, FP32, |_| {});
    check(2, 1e-5, FP32, |plan| plan.layout = Layout::Padded);
}

/// Every weight trained, as torchtune's full recipe: losses, norms before clipping, counts.
#[test]
fn thirty_losses_of_full_fine_tuning_match_torchtune() {
    let recorded = support::golden("tiny-pre-full-fp32.json");
    for (world, layout) in [(1, Layout::Varlen), (1, Layout::Padded), (2, Layout::Varlen)] {
        let steps = check(world, 1e-5, &["tiny-pre-full-fp32.json"], |plan| {
            support::train_whole(plan);
            plan.layout = layout;
        });
        for (step, recorded) in steps.iter().zip(recorded["steps"].as_array().unwrap()) {
            let number = |key: &str| recorded[key].as_f64().unwrap();
            assert_eq!(step.label_tokens, number("label_tokens"));
            assert!((step.lr - number("lr_next")).abs() < 1e-12, "{} {}", step.lr, number("lr_next"));
            let norm = number("grad_norm");
            assert!((step.grad_norm - norm).abs() < 1e-4 * norm, "{} {norm}", step.grad_norm);
        }
    }
}

#[test]
fn thirty_bf16_losses_match_torchtune() {
    const BF16: &[&str] = &["tiny-pre-lora-bf16.json", "tiny-pre-lora-fp32.json"];
    for (world, layout) in [(1, Layout::Varlen), (1, Layout::Padded), (2, Layout::Varlen)] {
        for compat_torchtune in [false, true] {
            check(world, 1e-2, BF16, |plan| {
                (plan.dtype, plan.layout, plan.compat_torchtune) = (Dtype::Bf16, layout, compat_torchtune);
            });
        }
    }
}

/// Losses and gradient norms of `tests/fixtures/curves/FILE` (its `generate.py`), by each program in it, in both layouts.
#[track_caller]
fn check_curve(file: &str, programs: &[&str], rows: &[Sample], change: impl Fn(&mut TrainPlan)) {
    for (world, layout) in [(1, Layout::Varlen), (1, Layout::Padded), (2, Layout::Varlen)] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = support::golden_plan(dir.path());
        plan.model.adapter = Some(support::golden_adapter(dir.path()));
        plan.layout = layout;
        change(&mut plan);
        // The same samples in a step, whoever has them.
        match plan.gradient_accumulation_steps {
            1 => plan.batch_size /= world,
            more => plan.gradient_accumulation_steps = more / world,
        }
        let finished = support::train(&plan, rows, world, usize::MAX);
        for program in programs {
            let recorded = support::fixture(file);
            let steps = recorded[*program].as_array().unwrap();
            assert_eq!(finished.steps.len(), steps.len());
            for (step, recorded) in finished.steps.iter().zip(steps) {
                let number = |key: &str| recorded[key].as_f64().unwrap();
                let (loss, norm) = (number("loss"), number("grad_norm"));
                assert_eq!(step.label_tokens, number("label_tokens"));
                assert!((step.loss - loss).abs() < 1e-5, "{program}, {layout:?}: {} {loss}", step.loss);
                assert!((step.grad_norm - norm).abs() < 1e-4 * norm, "{program}: {} {norm}", step.grad_norm);
            }
        }
    }
}

/// Biases in attention, tied embeddings and an adapter on every layer.
#[test]
fn a_qwen_2_5_shape_matches_torchtune_and_peft() {
    let rows = support::rows(&support::fixture("curves/qwen2_5.json"));
    check_curve("curves/qwen2_5.json", &["torchtune", "peft"], &rows, |plan| {
        let adapter = support::fixtures().join("curves/qwen2_5_adapter");
        plan.model.checkpoint_dir = support::fixtures().join("families/qwen2");
        plan.model.lora = Some(host_rank::adapter::peft::read_plan(&adapter).unwrap());
        plan.model.adapter = Some(adapter);
    });
}

/// `dataset.packed: True`: torchtune's packs in torchtune's order under its block mask.
#[test]
fn packed_rows_match_torchtune() {
    check_curve("curves/packed.json", &["torchtune"], &support::golden_rows(), |plan| {
        plan.dataset[0].packing = Some(PackingPlan { max_seq_len: 512, split_across_pack: false });
        plan.gradient_accumulation_steps = 1;
    });
}

/// Every adapter gradient of one step against PyTorch's autograd (`tests/fixtures/gradients/generate.py`), by norm.
#[test]
fn gradients_of_one_step_match_pytorch() {
    let fixture = support::fixtures().join("gradients");
    for layout in [Layout::Varlen, Layout::Padded] {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = support::golden_plan(dir.path());
        plan.layout = layout;
        plan.model.lora = Some(host_rank::adapter::peft::read_plan(&fixture).unwrap());
        plan.model.adapter = Some(fixture.clone());
        let mut run = support::open(plan, support::golden_rows(), 0, 1, support::free_port());
        assert!(run.next_step().unwrap());
        let mut loss = 0.0;
        while let Some((key, _)) = run.next_batch().unwrap() {
            let (sum, weight) = run.loss(key, host_rank::train::Which::Trained).unwrap();
            loss += sum.double_value(&[]);
            run.backward(&sum, weight).unwrap();
        }
        let text = std::fs::read_to_string(fixture.join("loss.json")).unwrap();
        let expected = serde_json::from_str::<serde_json::Value>(&text).unwrap()["loss_sum"].as_f64().unwrap();
        assert!((loss / expected - 1.0).abs() < 1e-6, "{loss} {expected}");

        let index = host::hf::WeightIndex::open(&fixture, &["gradients.safetensors".into()]).unwrap();
        let recorded = host_rank::model::Weights::open(index).unwrap();
        let gradients = run.gradients();
        assert_eq!(gradients.len(), recorded.index.tensors.len());
        for (name, ours) in gradients {
            let theirs = recorded.load(&format!("base_model.model.{name}"), &ours.size(), Kind::Float, Device::Cpu);
            let theirs = theirs.unwrap();
            let distance = ((ours.to_device(Device::Cpu) - &theirs).norm() / theirs.norm()).double_value(&[]);
            assert!(distance < 1e-5, "{name} differs by {distance:e} in {layout:?}");
        }
    }
}

/// The same continuations as transformers' greedy search, with the cache and without, and its scores after each prompt.
#[test]
fn greedy_continuations_match_transformers() {
    let plan = support::golden_plan(&std::env::temp_dir()).model;
    let plan = host::config::plan::ModelPlan { lora: None, ..plan };
    let opened = Opened::open(&plan, Kind::Float, support::device(), None).unwrap();
    let recorded = support::golden("greedy.json");
    let ids = |value: &serde_json::Value| -> Vec<i64> {
        value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
    };
    let greedy = Sampling { temperature: 0.0, top_k: None };
    for case in recorded["cases"].as_array().unwrap() {
        let prompt = ids(&case["prompt"]);
        for cached in [true, false] {
            let mut made = Vec::new();
            continue_tokens(&opened.model, &prompt, greedy, 32, cached, support::device(), |token| {
                made.push(token);
                Ok(token != 4089)
            })
            .unwrap();
            assert_eq!(made, ids(&case["new"]), "kv cache: {cached}");
        }
        let scores = host_rank::logits::of(&opened, &prompt).unwrap().get(-1);
        for (id, logit) in ids(&case["next_top5_ids"]).into_iter().zip(case["next_top5_logits"].as_array().unwrap()) {
            let (ours, theirs) = (scores.double_value(&[id]), logit.as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-4 * theirs.abs().max(1.0), "token {id}: {ours} against {theirs}");
        }
    }
}

/// Sampling draws from the `top_k` likeliest tokens in proportion to `softmax(scores / T)`, and again for the same seed.
#[test]
fn sampling_follows_the_distribution() {
    let scores = Tensor::from_slice(&[2.0f32, 1.0, 0.0, 3.0, -1.0]);
    let sampling = Sampling { temperature: 0.5, top_k: Some(3) };
    let draw = |count: usize| {
        tch::manual_seed(11);
        (0..count).map(|_| sampling.choose(&scores)).collect::<Vec<_>>()
    };
    const DRAWS: usize = 20_000;
    let drawn = draw(DRAWS);
    assert_eq!(drawn[..50], draw(50));
    // softmax of (2, 1, 3) / 0.5; 20,000 draws stray by 0.0035 at most, four times over.
    let weights = [(0, 4f64.exp()), (1, 2f64.exp()), (3, 6f64.exp())];
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    for (token, weight) in weights {
        let share = drawn.iter().filter(|drawn| **drawn == token).count() as f64 / DRAWS as f64;
        assert!((share - weight / total).abs() < 0.014, "token {token}: {share} of {}", weight / total);
    }
    assert!(drawn.iter().all(|token| [0, 1, 3].contains(token)));
}

const TORCHTUNE_FILE: &str = "torchtune_model_0.pt";

/// An adapter in torchtune's own file is the one that torchtune itself made of it for PEFT.
#[test]
fn a_torchtune_adapter_is_read_as_torchtune_converts_it() {
    let families = support::fixtures().join("families");
    let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];
    let lora =
        host::config::plan::LoraPlan { rank: 4, alpha: 8.0, dropout: 0.0, targets: targets.map(str::to_owned).into() };
    let parameters = |adapter: &str, lora: Option<&host::config::plan::LoraPlan>| {
        let plan = host::config::plan::ModelPlan {
            checkpoint_dir: families.join("llama3_1"),
            checkpoint_files: vec![],
            lora: lora.cloned(),
            adapter: Some(families.join(adapter)),
        };
        let opened = Opened::open(&plan, Kind::Float, support::device(), None).map_err(|error| error.to_string())?;
        Ok::<_, String>(Vec::<f32>::try_from(opened.trained.unwrap().flat().numbers.detach()).unwrap())
    };
    let theirs = parameters("torchtune_adapter", None).unwrap();
    let file = "torchtune_adapter/adapter_model.pt";
    let ours = parameters(file, Some(&lora)).unwrap();
    assert_eq!(theirs.len(), ours.len());
    assert!(theirs == ours && ours.iter().any(|number| *number != 0.0));
    let other = host::config::plan::LoraPlan { rank: 8, ..lora.clone() };
    assert!(parameters(file, Some(&other)).unwrap_err().contains("the file has shape [4, 32]"));
    let fewer = host::config::plan::LoraPlan { targets: vec!["q_proj".to_owned()], ..lora };
    assert!(parameters(file, Some(&fewer)).unwrap_err().contains("no target layer takes"));
}

/// Small random models of every family: transformers' logits, `1e-4 · max(1, |logit|)` as in the numbers contract, and the
/// same ones with a KV cache (`tests/fixtures/families/generate.py`).
#[test]
fn logits_of_every_family_match_transformers() {
    let families = support::fixtures().join("families");
    let open = |dir: &Path, config: &Path| {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir).unwrap().chain(
            std::fs::read_dir(config)
                .unwrap()
                .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name() == "config.json")),
        ) {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let plan = host::config::plan::ModelPlan {
            checkpoint_dir: folder.path().to_owned(),
            checkpoint_files: match dir.join(TORCHTUNE_FILE).exists() {
                true => vec![TORCHTUNE_FILE.to_owned()],
                false => vec![],
            },
            lora: None,
            adapter: None,
        };
        Opened::open(&plan, Kind::Float, support::device(), None).unwrap()
    };
    // Folder of the weights, folder of the config and the recorded logits.
    let cases = ["llama2", "code_llama", "llama3", "llama3_1", "llama3_2", "llama_bias", "mistral", "qwen2", "qwen3"]
        .map(|name| (name, name))
        .into_iter()
        .chain([("meta", "llama3_1"), ("bin", "qwen2"), ("torchtune", "llama3_1"), ("torchtune_qwen", "qwen2")]);
    for (weights, name) in cases {
        let opened = open(&families.join(weights), &families.join(name));
        let recorded: std::collections::HashMap<_, _> =
            Tensor::read_safetensors(families.join(name).join("logits.safetensors")).unwrap().into_iter().collect();
        let (tokens, theirs) = (Vec::<i64>::try_from(&recorded["tokens"]).unwrap(), &recorded["logits"]);
        let ours = host_rank::logits::of(&opened, &tokens).unwrap();
        let distance = ((&ours - theirs).abs() / theirs.abs().clamp_min(1.0)).max().double_value(&[]);
        println!("{weights}: {distance:.1e}");
        assert!(distance < 1e-4, "{weights}: logits differ by {distance:e}");
        assert!(theirs.std(true).double_value(&[]) > 0.1, "{name}: the recorded logits say nothing");
        let (top, _) = theirs.topk(2, -1, true, true);
        let clear = (top.select(1, 0) - top.select(1, 1)).gt(2e-4);
        let same = ours.argmax(-1, false).eq_tensor(&theirs.argmax(-1, false));
        assert!(bool::try_from(same.logical_or(&clear.logical_not()).all()).unwrap(), "{weights}: another next token");

        let greedy = Sampling { temperature: 0.0, top_k: None };
        let continued = |cached| {
            let mut made = Vec::new();
            let keep = |token| {
                made.push(token);
                Ok(true)
            };
            continue_tokens(&opened.model, &tokens[..20], greedy, 12, cached, support::device(), keep).unwrap();
            made
        };
        assert_eq!(continued(true), continued(false), "{weights}: the KV cache changes what is written");
    }
}
