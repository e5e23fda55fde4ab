//! What the number tests share: the tiny model, the recorded rows, and a run driven as the shipped recipe drives it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use host::config::plan::*;
use host::data::{Sample, Tokenized};
use host::worker::{StopFlag, WorkerEnv};
use host_rank::dist::Group;
use host_rank::train::{Inputs, Run, Tokens};
use serde_json::Value;
use tch::{Device, Tensor};

/// Where the numbers are computed: the CPU, or what `HOST_TEST_DEVICE=cuda` names.
pub fn device() -> Device {
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    *DEVICE.get_or_init(|| match std::env::var("HOST_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            let libtorch = host::libtorch::find().unwrap();
            host_rank::device::open(DevicePlan::Cuda, 0, &libtorch.lib_dir).unwrap()
        }
        Ok(other) => panic!("HOST_TEST_DEVICE={other}: `cuda`, or nothing for the CPU"),
        Err(_) => Device::Cpu,
    })
}

/// Whether `world` threads can be ranks that share a model: on a GPU libtorch has one thread for the backward passes of all
/// of them, and ranks that wait for each other in theirs never end.
pub fn can_share(world: usize) -> bool {
    let can = world == 1 || device() == Device::Cpu;
    if !can {
        println!("skipped: {world} ranks in one process cannot share a model on a GPU");
    }
    can
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

pub fn tiny_model() -> PathBuf {
    fixtures().join("tiny-llama")
}

/// A JSON file of `tests/fixtures`.
pub fn fixture(name: &str) -> Value {
    let path = fixtures().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn golden(name: &str) -> Value {
    fixture(&format!("golden/{name}"))
}

/// The 240 recorded rows, in training order.
pub fn golden_rows() -> Vec<Sample> {
    rows(&golden("rows-tokens-240.json"))
}

/// The `rows` of a recording, which are tokens and labels.
pub fn rows(recording: &Value) -> Vec<Sample> {
    let sample = |(index, row): (usize, &Value)| Sample {
        id: index as u64,
        tokens: row["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect(),
        labels: row["labels"].as_array().unwrap().iter().map(|label| label.as_i64().unwrap() as i32).collect(),
    };
    recording["rows"].as_array().unwrap().iter().enumerate().map(sample).collect()
}

/// The settings of the golden runs, writing below `output_dir`.
pub fn golden_plan(output_dir: &Path) -> TrainPlan {
    let dataset = DatasetPlan {
        files: vec![],
        format: DataFormat::Jsonl,
        hub: None,
        split: "train".into(),
        rows: RowsPlan::Columns { columns: vec![], template: None },
        new_system_prompt: None,
        train_on_input: false,
        on_bad_row: OnBadRow::Error,
        packing: None,
        cache_dir: output_dir.join("cache"),
    };
    TrainPlan {
        recipe: GuestRef { path: "unused".into(), settings: Value::Null },
        config_path: "unused".into(),
        overrides: vec![],
        resolved_yaml: "a: test\n".into(),
        output_dir: output_dir.into(),
        model: ModelPlan {
            checkpoint_dir: tiny_model(),
            checkpoint_files: vec![],
            lora: Some(lora(&["q_proj", "v_proj"])),
            adapter: None,
        },
        reference: None,
        teacher: None,
        config: serde_json::json!({ "a": "test" }),
        for_recipe: vec![],
        tokenizer: TokenizerPlan {
            max_seq_len: Some(512),
            ..TokenizerPlan::plain(tiny_model().join("tokenizer.json"))
        },
        dataset: vec![dataset],
        dataset_val: vec![],
        run_val_every_n_steps: None,
        seed: 42,
        shuffle: false,
        batch_size: 2,
        gradient_accumulation_steps: 4,
        epochs: 1,
        max_steps_per_epoch: None,
        layout: Layout::Varlen,
        tokens_per_microbatch: 2048,
        optimizer: OptimizerPlan {
            lr: 3e-4,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            updates: Updates::Nearest,
        },
        schedule: SchedulePlan::Cosine { num_warmup_steps: 5, num_cycles: 0.5 },
        loss: LossPlan { guest: None, of_recipe: None, num_output_chunks: 1 },
        clip_grad_norm: None,
        checkpoint: CheckpointPlan {
            output_dir: output_dir.into(),
            save_every_n_steps: None,
            keep_last_n: None,
            adapter_only: true,
            resume: false,
            resume_from: None,
        },
        metrics: MetricsPlan {
            sink: MetricSink::Disk {
                log_dir: output_dir.join("logs"),
                format: DiskFormat::Jsonl,
                filename: Some("log.jsonl".into()),
            },
            log_every_n_steps: 1,
            log_peak_memory_stats: false,
            log_level: "INFO".into(),
        },
        device: DevicePlan::Cpu,
        collectives: CollectivesPlan::Gloo,
        collective_timeout_seconds: 1800.0,
        dtype: Dtype::Fp32,
        placement: PlacementPlan {
            parallel: Parallel::Auto,
            reshard_after_forward: true,
            cpu_offload: false,
            checkpoint_every: None,
            shard_ranks: None,
            copies: None,
        },
        compat_torchtune: false,
        limits: GuestLimits::default(),
    }
}

/// The same with every weight trained.
pub fn train_whole(plan: &mut TrainPlan) {
    (plan.model.lora, plan.model.adapter, plan.checkpoint.adapter_only) = (None, None, false);
}

pub fn lora(targets: &[&str]) -> LoraPlan {
    LoraPlan { rank: 8, alpha: 16.0, dropout: 0.0, targets: targets.iter().map(|name| (*name).to_owned()).collect() }
}

/// A PEFT folder holding the recorded start of the golden runs (their A, zero B).
pub fn golden_adapter(dir: &Path) -> PathBuf {
    let dir = dir.join("adapter");
    std::fs::create_dir_all(&dir).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let source = fixtures().join("golden/tiny-pre-lora-A-init.safetensors");
    std::fs::copy(source, dir.join("adapter_model.safetensors")).unwrap();
    dir
}

/// One optimizer step as the log has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Logged {
    pub loss: f64,
    pub lr: f64,
    pub grad_norm: f64,
    pub label_tokens: f64,
    pub real_tokens: f64,
}

/// A finished run: its log, each step's gradients (over all ranks, not yet divided), and what was trained at the end.
pub struct Finished {
    pub steps: Vec<Logged>,
    /// Step and loss.
    pub validations: Vec<(u64, f64)>,
    pub gradients: Vec<Vec<f32>>,
    pub parameters: Vec<f32>,
}

/// Of the rows, how many a plan with `run_val_every_n_steps` is measured on, from the first.
pub const VALIDATION_ROWS: usize = 11;

/// Trains `plan` over `rows` on `world` ranks (threads of this process that talk through Gloo), as the shipped recipe
/// does, for `most_steps` at most.
pub fn train(plan: &TrainPlan, rows: &[Sample], world: usize, most_steps: usize) -> Finished {
    let port = free_port();
    let numbers = |tensor: Tensor| Vec::<f32>::try_from(tensor.to_kind(tch::Kind::Float)).unwrap();
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (plan, rows) = (plan.clone(), rows.to_vec());
                scope.spawn(move || {
                    let mut run = open(plan, rows, rank, world, port);
                    let gradients = drive(&mut run, most_steps);
                    run.leave().unwrap();
                    let whole = |tensor: Tensor| spread_out(&run, numbers(tensor));
                    (gradients.into_iter().map(whole).collect::<Vec<_>>(), whole(run.parameters()))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank failed")).collect()
    });
    let is_shared = plan.placement.parallel == Parallel::Shard && plan.model.lora.is_none();
    let mut ranks = ranks;
    let copies = ranks.split_off(if is_shared { world / plan.placement.copies.unwrap_or(1) } else { world });
    assert!(copies.iter().zip(ranks.iter().cycle()).all(|(copy, rank)| copy == rank), "copies differ");
    let mut ranks = ranks.into_iter();
    let (mut gradients, mut parameters) = ranks.next().unwrap();
    for (others, pieces) in ranks {
        if is_shared {
            parameters.iter_mut().zip(pieces).for_each(|(number, other)| *number += other);
        }
        for (sum, other) in gradients.iter_mut().flatten().zip(others.into_iter().flatten()) {
            *sum += other;
        }
    }
    let (steps, validations) = read_log(plan);
    Finished { steps, validations, gradients, parameters }
}

/// The pieces of a rank where they belong in the whole, with zeros where other ranks' are; the whole as it is.
fn spread_out(run: &Run, pieces: Vec<f32>) -> Vec<f32> {
    let Some(sharding) = run.sharding() else { return pieces };
    let mut whole = vec![0.0; sharding.shards.total() as usize];
    for (begin, kept) in sharding.kept() {
        let (from, to) = (kept.start as usize, kept.end as usize);
        whole[from..to].copy_from_slice(&pieces[begin as usize..][..to - from]);
    }
    whole
}

pub fn open(plan: TrainPlan, rows: Vec<Sample>, rank: usize, world: usize, port: u16) -> Run {
    let env = WorkerEnv {
        rank,
        local_rank: rank,
        world_size: world,
        local_world_size: world,
        master_addr: "127.0.0.1".into(),
        master_port: port,
        rendezvous: Default::default(),
        libtorch_lib: PathBuf::new(),
        report: None,
    };
    let mut group = Group::join(&env, Duration::from_secs(1800)).unwrap();
    // Ranks of one process share a GPU here, which NCCL does not allow.
    if world == 1 && device() != Device::Cpu {
        let libtorch = host::libtorch::find().unwrap();
        group.attach(CollectivesPlan::Nccl, device(), &libtorch.lib_dir).unwrap();
    }
    let inputs = Inputs {
        env,
        templates: vec![],
        templates_val: vec![],
        stop: StopFlag::default(),
        recipe_digest: "test".into(),
        loss: None,
    };
    let validation = plan.run_val_every_n_steps.map(|_| rows[..VALIDATION_ROWS].to_vec());
    let validation = validation.map(Tokenized::from_samples);
    let training = Tokenized::from_samples(rows);
    let training = match &plan.dataset[0].packing {
        Some(packing) => training.packed(packing),
        None if matches!(plan.dataset[0].rows, RowsPlan::Pairs { .. }) => training.paired(),
        None => training,
    };
    let tokens = Tokens { training, validation, pad: 4090 };
    Run::with_data(plan, inputs, tokens, device(), group).unwrap()
}

/// Drives a run and returns the gradients of each step, flat, as this rank has them.
pub fn drive(run: &mut Run, most_steps: usize) -> Vec<Tensor> {
    let mut gradients = vec![];
    while run.steps_done() < most_steps && run.next_step().unwrap() {
        while let Some((key, _)) = run.next_batch().unwrap() {
            let (sum, weight) = run.loss(key, host_rank::train::Which::Trained).unwrap();
            run.backward(&sum, weight).unwrap();
        }
        run.end_batches().unwrap();
        let each: Vec<Tensor> = run.gradients().iter().map(|(_, gradient)| gradient.reshape([-1])).collect();
        gradients.push(Tensor::cat(&each, 0));
        run.finish_step().unwrap();
    }
    gradients
}

/// The steps of a run's log, and the validations as step and loss.
/// The lines of a run's log.
pub fn log_lines(plan: &TrainPlan) -> Vec<Value> {
    let MetricSink::Disk { log_dir, .. } = &plan.metrics.sink else { panic!("the plan logs nowhere") };
    let text = std::fs::read_to_string(log_dir.join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn read_log(plan: &TrainPlan) -> (Vec<Logged>, Vec<(u64, f64)>) {
    let (mut steps, mut validations) = (vec![], vec![]);
    for line in log_lines(plan) {
        if let Some(loss) = line.get("val_loss") {
            validations.push((line["step"].as_u64().unwrap(), loss.as_f64().unwrap()));
            continue;
        }
        let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        steps.push(Logged {
            loss: number("loss"),
            lr: number("lr"),
            grad_norm: number("grad_norm"),
            label_tokens: number("label_tokens"),
            real_tokens: number("real_tokens"),
        });
    }
    (steps, validations)
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Largest relative difference of two curves.
pub fn relative(a: &[Logged], b: &[Logged], of: fn(&Logged) -> f64) -> f64 {
    assert_eq!(a.len(), b.len(), "the runs have different lengths");
    a.iter().zip(b).map(|(a, b)| ((of(a) - of(b)) / of(b)).abs()).fold(0.0, f64::max)
}
