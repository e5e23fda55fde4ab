//! Every config that comes with `host`, on a shrunken random model of its architecture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use host::config::resolve::{self, FileKind, Surroundings};
use host::config::{Config, registry};
use host::hf::ModelConfig;
use host::worker::{StopFlag, WorkerEnv};
use host_rank::script;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::case::{Case, Running, free_port, root};

/// Enough for every tokenizer of the fixtures.
const VOCABULARY: i64 = 4100;

/// The fixture whose `config.json` has the architecture of a config's family, and its tokenizer.
fn family(config: &str) -> (&'static str, &'static str) {
    match config.split('/').next().unwrap() {
        "llama2" | "generation" => ("llama2", "llama2.model"),
        "code_llama2" => ("code_llama", "llama2.model"),
        "llama3" => ("llama3", "llama3.model"),
        "llama3_1" | "llama3_3" => ("llama3_1", "llama3.model"),
        "llama3_2" => ("llama3_2", "llama3.model"),
        "mistral" => ("mistral", "llama2.model"),
        "qwen2" | "qwen2_5" => ("qwen2", "vocab.json"),
        "qwen3" => ("qwen3", "vocab.json"),
        "smollm2" => ("llama3_2", "../tiny-llama/tokenizer.json"),
        other => panic!("no model for `{other}`"),
    }
}

/// A model of `family` with as large a vocabulary as the tokenizers need, its weights drawn.
fn add_model(case: &Case, family: &str) -> PathBuf {
    let folder = case.path(&format!("models/{family}"));
    let fixture = root().join("tests/fixtures/families").join(family).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    config["vocab_size"] = VOCABULARY.into();
    draw_model(case, &format!("models/{family}"), &config);
    folder
}

/// A model of a `config.json`, its weights drawn.
pub fn draw_model(case: &Case, folder: &str, config: &Value) {
    case.write(&format!("{folder}/config.json"), config.to_string());
    tch::manual_seed(7);
    let draw = |shape: &[i64], name: &str| match name.contains("norm") {
        true => Tensor::ones(shape, (Kind::BFloat16, tch::Device::Cpu)),
        false => (Tensor::randn(shape, (Kind::Float, tch::Device::Cpu)) * 0.05).to_kind(Kind::BFloat16),
    };
    let tensors = ModelConfig::parse(&config.to_string()).unwrap().tensors();
    let tensors: Vec<_> = tensors.into_iter().map(|(name, shape)| (name.clone(), draw(&shape, &name))).collect();
    Tensor::write_safetensors(&tensors, case.path(folder).join("model.safetensors")).unwrap();
}

/// What a user of the config changes to run it here.
fn overrides(case: &Case, config: &str, model: &Path) -> Vec<String> {
    let tokenizers = root().join("tests/fixtures/tokenizers");
    let (_, tokenizer) = family(config);
    let mut changes = vec![
        format!("checkpointer.checkpoint_dir={}", model.display()),
        format!("tokenizer.path={}", tokenizers.join(tokenizer).display()),
        "tokenizer.max_seq_len=64".to_owned(),
        "device=cpu".to_owned(),
    ];
    match tokenizer {
        "vocab.json" => changes.push(format!("tokenizer.merges_file={}", tokenizers.join("merges.txt").display())),
        "llama3.model" => {
            let special = tokenizers.join("llama3_special_tokens.json");
            changes.push(format!("tokenizer.special_tokens_path={}", special.display()));
        }
        _ => {}
    }
    if registry::recipe("generate").unwrap().configs.contains(&config) {
        changes.extend(["max_new_tokens=4".to_owned()]);
        return changes;
    }
    let data = case.path("rows");
    changes.extend([
        format!("output_dir={}", case.path("out").join(config).display()),
        format!("cache_dir={}", case.path("cache").display()),
        format!("dataset.source={}", data.display()),
        "gradient_accumulation_steps=1".to_owned(),
        "max_steps_per_epoch=2".to_owned(),
    ]);
    // Full fine-tuning runs at one rate.
    if config.contains("lora") || config.contains("dpo") || config.starts_with("smollm2") {
        changes.push("lr_scheduler.num_warmup_steps=1".to_owned());
    }
    if config.starts_with("smollm2") {
        changes.extend(["dataset.split=train".to_owned(), "dataset_val.split=validation".to_owned()]);
    }
    if config.contains("KD_lora") {
        changes.push(format!("teacher_checkpointer.checkpoint_dir={}", model.display()));
    }
    if config.ends_with("_full_dpo") {
        changes.push(format!("ref_checkpointer.checkpoint_dir={}", model.display()));
    }
    if (config.ends_with("_lora") && config != "llama3_1/8B_lora") || config.ends_with("_full") {
        changes.push(format!("dataset_val.source={}", data.display()));
    }
    changes
}

#[test]
fn every_shipped_config_is_fine_and_trains() {
    let case = Case::new();
    let row = |i: usize| {
        let text = format!("number {i} of the rows");
        let row = serde_json::json!({
            "instruction": "Count.", "input": text, "output": "yes", "document": text, "summary": "a",
            "question": text, "response_j": "yes", "response_k": "no",
        });
        format!("{row}\n")
    };
    for split in ["train", "validation"] {
        case.write(&format!("rows/{split}.jsonl"), (0..60).map(row).collect::<String>());
    }
    let root = root();
    let around = Surroundings {
        seed: 5,
        cwd: case.path(""),
        shipped: vec![root.clone()],
        cache_dir: None,
        kind: &|path: &Path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some(if metadata.is_dir() { FileKind::Folder } else { FileKind::File })
        },
        files_below: &|_| vec!["train.jsonl".to_owned(), "validation.jsonl".to_owned()],
        metadata: &|_| Ok(Default::default()),
    };
    let mut models = BTreeMap::new();
    let mut tried = 0;
    let of_recipe = |recipe: &'static registry::Recipe| {
        recipe.configs.iter().map(move |config| (recipe.guest.unwrap_or_default(), config))
    };
    for (recipe, config) in registry::RECIPES.iter().flat_map(of_recipe) {
        let family = family(config).0;
        let model = models.entry(family).or_insert_with(|| add_model(&case, family));
        let changes = overrides(&case, config, model);
        let path = root.join(format!("configs/{config}.yaml"));
        let mut validate = vec!["validate", path.to_str().unwrap()];
        validate.extend(changes.iter().map(String::as_str));
        let validated = Running::start(&mut case.host(&validate)).wait();
        assert_eq!(validated.code, 0, "{config}: {}", validated.stderr);
        tried += 1;
        let read = Config::load(&path, &changes).unwrap();
        if read.is_generation() {
            continue;
        }
        let plan = resolve::train(&read, &root.join(format!("scripts/recipes/{recipe}.rhai")), &around);
        let plan = plan.unwrap_or_else(|error| panic!("{config}: {error}")).plan;
        let env = WorkerEnv {
            rank: 0,
            local_rank: 0,
            world_size: 1,
            local_world_size: 1,
            master_addr: "127.0.0.1".into(),
            master_port: free_port(),
            rendezvous: Default::default(),
            libtorch_lib: PathBuf::new(),
            report: None,
        };
        let (output_dir, batch_size) = (plan.output_dir.clone(), plan.batch_size);
        script::train(plan, &env, StopFlag::default()).unwrap_or_else(|error| panic!("{config}: {error}"));
        let losses = std::fs::read(output_dir.join("epoch_0/losses.json")).unwrap();
        let losses: Value = serde_json::from_slice(&losses).unwrap();
        let training = losses["training"].as_array().unwrap();
        assert_eq!(training.len(), 2, "{config}: {losses}");
        // Nothing is known by a drawn model: each token is as likely as any other, and each answer.
        let choices = if recipe == "lora_dpo_distributed" { 2 } else { VOCABULARY };
        let expected = (choices as f64).ln();
        let is_near = |point: &Value| (point[1].as_f64().unwrap() - expected).abs() < 1.5;
        assert!(training.iter().all(is_near), "{config}: {losses}, {expected} is expected");
        assert!(batch_size > 0 && output_dir.join("loss.svg").is_file(), "{config}");
    }
    assert!(tried > 80, "{tried}");
}
