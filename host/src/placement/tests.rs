//! What changes in an estimate when something changes in a plan, and which placement is taken.

use std::path::{Path, PathBuf};

use insta::assert_snapshot;

use super::memory::Where;
use super::*;
use crate::config::Config;
use crate::config::plan::{HardwarePlan, TrainPlan};
use crate::config::resolve::{self, Surroundings};
use crate::hf::ModelConfig;

/// Llama 3.2 1B.
const MODEL: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": true,
"hidden_act": "silu"}"#;
const FULL: &str = include_str!("../../../configs/llama3_2/1B_full.yaml");
const LORA: &str = include_str!("../../../configs/llama3_2/1B_lora.yaml");
const LENGTHS: Lengths = Lengths { mean: 500.0, label_share: 0.1, spread: 0.5 };

fn plan(text: &str, overrides: &[&str]) -> TrainPlan {
    let around = Surroundings {
        seed: 1,
        cwd: PathBuf::from("/work"),
        shipped: vec![PathBuf::from("/work")],
        cache_dir: None,
        kind: &|path| path.extension().map(|_| resolve::FileKind::File),
        files_below: &|_| vec![],
        metadata: &|_| Ok(Default::default()),
    };
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    let config = Config::parse(text, Path::new("c.yaml"), &overrides).unwrap();
    resolve::train(&config, Path::new("r.rhai"), &around).unwrap_or_else(|error| panic!("{error}")).plan
}

fn gpus(memory_gb: f64) -> HardwarePlan {
    HardwarePlan {
        name: "gpus".into(),
        is_cpu: false,
        devices_per_node: 8,
        memory_gb,
        host_memory_gb: 512.0,
        tflops: 100.0,
        link_gb_s: 10.0,
        node_link_gb_s: 1.0,
        disk_gb_s: 1.0,
    }
}

fn question<'a>(plan: &'a TrainPlan, hardware: &'a HardwarePlan, world_size: usize) -> Question<'a> {
    let job = Job::new(plan, ModelConfig::parse(MODEL).unwrap(), 0.0, &LENGTHS).unwrap();
    Question { plan, job, hardware, ranks: Ranks { world_size, nodes: 1 }, lengths: LENGTHS, rows: Some(10_000.0) }
}

/// The bytes of a part.
fn part(candidate: &Candidate, name: &str) -> f64 {
    candidate.memory.parts.iter().find(|part| part.name == name).map_or(0.0, |part| part.bytes)
}

#[test]
fn shards_are_shares() {
    let (plan, hardware) = (plan(FULL, &["parallel=shard"]), gpus(80.0));
    let of = |ranks| question(&plan, &hardware, ranks).candidate(Placement::new(&plan.placement, Some(1)), Way::Host);
    let (two, eight) = (of(2), of(8));
    for name in ["weights", "gradients", "optimizer"] {
        assert_eq!(part(&two, name), 4.0 * part(&eight, name), "{name}");
    }
    // 1.24 G numbers in bf16.
    assert!((part(&two, "weights") / (1.2358e9 * 2.0 / 2.0) - 1.0).abs() < 1e-3);
    assert_eq!(part(&two, "activations"), part(&eight, "activations"));
}

#[test]
fn every_key_moves_what_it_is_for() {
    let hardware = gpus(80.0);
    let of = |text: &str, overrides: &[&str]| {
        let plan = plan(text, overrides);
        question(&plan, &hardware, 4).candidate(Placement::new(&plan.placement, Some(1)), Way::Host)
    };
    let plain = of(FULL, &["parallel=shard"]);
    let kept = of(FULL, &["parallel=shard", "fsdp_reshard_after_forward=False"]);
    assert!(part(&kept, "gathered blocks") > 3.0 * part(&plain, "gathered blocks"));
    assert!(kept.cost.bytes_received < plain.cost.bytes_received);
    let offloaded = of(FULL, &["fsdp_cpu_offload=True"]);
    let shards = |candidate: &Candidate| {
        part(candidate, "weights") + part(candidate, "gradients") + part(candidate, "optimizer")
    };
    assert!((plain.need_bytes - offloaded.need_bytes - shards(&plain)).abs() < 1.0);
    assert!(offloaded.memory.peak(Where::Host) >= shards(&offloaded));
    let mut least = f64::INFINITY;
    for option in ["ac_option=8", "ac_option=2", "ac_option=1"] {
        let recomputed = of(FULL, &["parallel=shard", "ac_mode=selective", option]);
        assert!(part(&recomputed, "activations") < part(&plain, "activations").min(least), "{option}");
        assert!(recomputed.cost.compute_seconds > plain.cost.compute_seconds);
        least = part(&recomputed, "activations");
    }
    let (short, long) = (
        of(FULL, &["parallel=shard", "tokens_per_microbatch=1000"]),
        of(FULL, &["parallel=shard", "tokens_per_microbatch=4000"]),
    );
    assert!(part(&short, "activations") < part(&long, "activations"));
}

#[test]
fn a_frozen_base_that_fits_is_replicated() {
    let (plan, hardware) = (plan(LORA, &[]), gpus(80.0));
    let choice = choose(&question(&plan, &hardware, 8)).unwrap();
    assert!(!choice.chosen().placement.is_sharded && choice.chosen().fits);
    // One sum of the adapter in fp32 a step, 7/8 of it from others, there and back.
    let trained = question(&plan, &hardware, 8).job.num_trained();
    assert_eq!(choice.chosen().cost.bytes_received, 2.0 * 7.0 / 8.0 * 4.0 * trained);
    // One rank has nobody to share with.
    assert_eq!(choose(&question(&plan, &hardware, 1)).unwrap().candidates.len(), 1);
}

/// On two machines with a slow link between them a model that does not fit a GPU is shared on each machine.
#[test]
fn copies_keep_gathering_on_a_machine() {
    let (full, hardware) = (plan(FULL, &["tokens_per_microbatch=2000"]), gpus(12.0));
    let asked = |plan: &TrainPlan| {
        let ranks = Ranks { world_size: 16, nodes: 2 };
        choose(&Question { ranks, ..question(plan, &hardware, 16) }).map_err(|error| error.message)
    };
    let copies = |plan: &TrainPlan| {
        let placements = asked(plan).unwrap().candidates.into_iter().map(|candidate| candidate.placement);
        placements.map(|placement| placement.is_sharded.then_some(placement.copies)).collect::<Vec<_>>()
    };
    assert_eq!(copies(&full), [None, Some(1), Some(2)]);
    let choice = asked(&full).unwrap();
    let [whole, over_all, on_each] = &choice.candidates[..] else { unreachable!() };
    assert!(!whole.fits && over_all.fits && on_each.fits);
    assert_eq!(choice.chosen, 2, "the link between machines is the slower one");
    assert_eq!(part(on_each, "optimizer"), 2.0 * part(over_all, "optimizer"));
    // What is gathered comes from 7 of 8, not from 15 of 16; an eighth of the gradients from the other copy, there and back.
    let summed = 2.0 * 4.0 * question(&full, &hardware, 16).job.num_trained() / 8.0 / 2.0;
    let gathered = over_all.cost.bytes_received * (7.0 / 8.0) / (15.0 / 16.0);
    assert!((on_each.cost.bytes_received / (gathered + summed) - 1.0).abs() < 1e-9);

    let with = |overrides: &[&str]| plan(FULL, &[&["tokens_per_microbatch=2000"], overrides].concat());
    assert_eq!(copies(&with(&["data_parallel_replicate_dim=4"])), [Some(4)]);
    assert_eq!(copies(&with(&["data_parallel_replicate_dim=4", "data_parallel_shard_dim=4"])), [Some(4)]);
    assert_eq!(copies(&with(&["data_parallel_replicate_dim=16"])), [None]);
    assert_eq!(copies(&with(&["data_parallel_replicate_dim=1"])), [None, Some(1)]);
    assert_eq!(copies(&with(&["parallel=shard"])), [Some(1)]);
    let refused = |overrides: &[&str]| asked(&with(overrides)).unwrap_err();
    assert_eq!(
        refused(&["data_parallel_replicate_dim=3"]),
        "`data_parallel_replicate_dim` is 3, and there are 16 ranks"
    );
    assert!(refused(&["data_parallel_replicate_dim=16", "fsdp_cpu_offload=True"]).contains("is for shards"));
    assert_eq!(
        refused(&["data_parallel_shard_dim=8"]),
        "`data_parallel_shard_dim` is 8, `data_parallel_replicate_dim` 1, and there are 16 ranks"
    );
}

/// Whatever is proposed was tried: with it, the same plan is accepted.
#[test]
fn what_would_fit_fits() {
    for (base, memory_gb, least) in [("parallel=replicate", 16.0, 3), ("data_parallel_replicate_dim=2", 11.0, 2)] {
        let hardware = gpus(memory_gb);
        let base = [base, "tokens_per_microbatch=8000", "batch_size=16"];
        let error = |plan: &TrainPlan| {
            let question = question(plan, &hardware, 4);
            choose(&question).unwrap().check(&question).err()
        };
        let refused = error(&plan(FULL, &base)).unwrap();
        assert_eq!(refused.kind, crate::error::Kind::Config);
        let changes = refused.hints.iter().filter(|hint| !hint.contains("such ranks"));
        let changes: Vec<&str> = changes.filter_map(|hint| hint.split('`').nth(1)).collect();
        assert!(changes.len() >= least, "{refused}");
        for change in changes {
            let mut overrides = base.to_vec();
            // Offloading is what shards know.
            overrides.retain(|given| !change.starts_with("fsdp") || !given.starts_with("parallel"));
            overrides.extend(change.split(' '));
            assert!(error(&plan(FULL, &overrides)).is_none(), "{base:?} {change}");
        }
    }
}

/// What a run says before it loads a model: a table where there was something to choose, else a line.
#[test]
fn a_run_says_what_it_was_placed_by() {
    let said = |plan: &TrainPlan, memory_gb: f64, world_size: usize| {
        let hardware = gpus(memory_gb);
        let choice = choose(&question(plan, &hardware, world_size)).unwrap();
        Summary { choice: &choice, world_size }.to_string().trim_end().to_owned()
    };
    let open = plan(FULL, &["parallel=auto"]);
    assert_snapshot!(said(&open, 80.0, 8), @"
    placement: replicate, the fastest that fits in 80.0 GB a rank; `host plan` says more
                                       replicate         shard
      memory of a rank, GB                  16.9          9.75
      of the machine's, GB                  7.94          1.45
      a step, s                             1.85          2.41
    ");
    assert_snapshot!(said(&open, 14.0, 8), @"
    placement: shard, the fastest that fits in 14.0 GB a rank; `host plan` says more
                                       replicate         shard
      memory of a rank, GB                  16.9          9.75
      of the machine's, GB                  7.94          1.45
      a step, s                             1.85          2.41
      fits                                    no           yes
    ");
    assert_snapshot!(said(&plan(FULL, &["parallel=shard"]), 14.0, 8), @"placement: shard, about 9.75 GB of 14.0 GB a rank");
    assert_snapshot!(said(&open, 80.0, 1), @"memory: about 16.9 GB of 80.0 GB");
}
