//! Runs that end well: the same losses however they are started, whole checkpoints, and text from them.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use host::config::Config;
use host::config::resolve::{self, FileKind, Surroundings};
use host::tokenizer::Tokenizer;
use host_rank::{generate, script};
use serde_json::Value;

use crate::case::{Case, Ended, RHAI, RHAI_TEMPLATE, Running, STEPS, WASM};

const TWO_RANKS: &[&str] = &["--nproc", "2", "gradient_accumulation_steps=2"];

#[track_caller]
fn assert_close(one: &[f64], other: &[f64]) {
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(other) {
        assert!(((one - other) / other).abs() < 1e-6, "{one} and {other}");
    }
}

#[test]
fn ranks_and_kinds_of_guests_change_no_loss() {
    let case = Case::new();
    let one = case.losses(WASM, "one", &[]);
    assert_eq!(one.len(), STEPS);
    assert!(one[STEPS - 1] < 0.9 * one[0], "nothing was learnt: {one:?}");
    let two = case.losses(WASM, "two", TWO_RANKS);
    assert_close(&two, &one);

    assert_eq!(case.losses(RHAI, "one_rhai", &[]), one);
    assert_eq!(case.losses(RHAI, "two_rhai", TWO_RANKS), two);
    // A cache of its own, or the rows that the other template made would be taken.
    let template = &[RHAI_TEMPLATE, "cache_dir=rhai_cache"];
    assert_eq!(case.losses(WASM, "one_template", template), one);
    assert_eq!(case.losses(WASM, "two_template", &[TWO_RANKS, template].concat()), two);
    assert_eq!(
        case.contents("one/epoch_0/adapter")["adapter_model.safetensors"],
        case.contents("one_template/epoch_0/adapter")["adapter_model.safetensors"]
    );
}

/// A compiled guest that could not be taken from the cache would be written to it again.
#[test]
fn guests_are_compiled_once() {
    let case = Case::new();
    let compiled = || {
        let [version] = &case.names("cache/host/wasm/modules")[..] else { panic!("no cache, or several") };
        let folder = format!("cache/host/wasm/modules/{version}");
        let modules = case.names(&folder).into_iter().filter(|name| !name.ends_with(".stats"));
        modules.map(|name| (case.path(&folder).join(&name).metadata().unwrap().ino(), name)).collect::<Vec<_>>()
    };
    case.losses(WASM, "first", &[]);
    let after_the_first = compiled();
    assert_eq!(after_the_first.len(), 2, "a recipe and a template: {after_the_first:?}");
    case.losses(WASM, "second", &[]);
    assert_eq!(compiled(), after_the_first);
}

/// torchrun, Slurm or Kubernetes in the launcher's place: one `host run` a rank, the group in the environment.
#[test]
fn ranks_that_somebody_else_starts_train_together() {
    let case = Case::new();
    let launched = case.losses(WASM, "launched", TWO_RANKS);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: &str| {
        let mut command = case.run(WASM, &["gradient_accumulation_steps=2", "output_dir=joined"]);
        command.env("RANK", rank).env("LOCAL_RANK", rank).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        // As the launcher shares the cores among its workers.
        let cores = std::thread::available_parallelism().unwrap().get();
        command.env("OMP_NUM_THREADS", (cores / 2).max(1).to_string());
        Running::start(&mut command)
    };
    for ended in [start("0"), start("1")].map(Running::wait) {
        assert_eq!(ended.code, 0, "{}", ended.stderr);
    }
    assert_close(&case.log("joined"), &launched);
    assert_eq!(case.checkpoints("joined"), ["epoch_0"]);
}

#[test]
fn a_checkpoint_is_whole_and_generates_the_same_merged_or_not() {
    let case = Case::new();
    let model = case.contents("model");
    case.losses(WASM, "out", &[TWO_RANKS, &["epochs=2", "save_every_n_steps=4"]].concat());
    assert_eq!(case.contents("model"), model, "the model's folder was written to");
    assert_eq!(case.names("out"), ["epoch_0", "epoch_1", "logs", "step_12", "step_16", "step_4", "step_8"]);
    let log = std::fs::read_to_string(case.path("out/logs/log.jsonl")).unwrap();
    assert_eq!(log.matches("val_loss").count(), 2, "before and after the run");
    for checkpoint in ["out/epoch_1", "out/step_4"] {
        check_files(&case, checkpoint);
    }

    let generate = |arguments: &[&str]| {
        let ended = Ended::of(&mut case.host(&[&["run", "generate", "--config", "generate.yaml"], arguments].concat()));
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        ended.stdout
    };
    let base = generate(&[]);
    let adapted = generate(&["adapter_dir=out/epoch_1/adapter"]);
    let merged = generate(&["checkpointer.checkpoint_dir=out/epoch_1"]);
    assert_eq!(adapted, merged);
    assert_ne!(adapted, base, "the adapter changes nothing");
    assert_eq!(generate(&["adapter_dir=out/epoch_1/adapter", "enable_kv_cache=False"]), adapted);
    assert!(adapted.trim().len() > 10, "{adapted:?}");
}

fn check_files(case: &Case, checkpoint: &str) {
    assert_eq!(
        case.names(checkpoint),
        [
            "README.md",
            "adapter",
            "config.json",
            "config_resolved.yaml",
            "generation_config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "resume.json",
            "resume.safetensors",
            "run.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    let adapter_files = case.contents(&format!("{checkpoint}/adapter"));
    assert_eq!(adapter_files.keys().collect::<Vec<_>>(), ["adapter_config.json", "adapter_model.safetensors"]);
    let files = case.contents(checkpoint);
    let model = case.contents("model");
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"] {
        assert_eq!(files[name], model[name], "{name}");
    }
    let json = |files: &std::collections::BTreeMap<String, Vec<u8>>, name: &str| -> Value {
        serde_json::from_slice(&files[name]).unwrap()
    };
    let keys = |index: &Value| index["weight_map"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        keys(&json(&files, "model.safetensors.index.json")),
        keys(&json(&model, "model.safetensors.index.json")),
        "the merged model has the base's tensors"
    );
    let shapes = |bytes: &[u8]| -> Vec<(String, Vec<usize>)> {
        let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut shapes: Vec<_> = tensors.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec())).collect();
        shapes.sort();
        shapes
    };
    let mut base: Vec<_> =
        model.iter().filter(|(name, _)| name.ends_with(".safetensors")).flat_map(|(_, bytes)| shapes(bytes)).collect();
    base.sort();
    assert_eq!(shapes(&files["model-00001-of-00001.safetensors"]), base);
    // A and B, of q and v, in each of 4 layers.
    assert_eq!(shapes(&adapter_files["adapter_model.safetensors"]).len(), 16);

    let adapter = json(&adapter_files, "adapter_config.json");
    assert_eq!((&adapter["r"], &adapter["peft_type"]), (&8.into(), &"LORA".into()));
    let (run, resume) = (json(&files, "run.json"), json(&files, "resume.json"));
    assert_eq!((&run["world_size"], &run["samples_per_step"]), (&2.into(), &8.into()));
    assert_eq!(run["data_digest"], resume["data_digest"]);
    assert_eq!(resume["step"], if checkpoint.ends_with("step_4") { 4 } else { 20 });
    let resolved: Value = serde_yaml::from_slice(&files["config_resolved.yaml"]).unwrap();
    assert_eq!(resolved["gradient_accumulation_steps"], 2);
    assert_eq!(resolved["output_dir"], "out");
}

/// The config that a checkpoint records trains again, to the same losses.
#[test]
fn a_recorded_config_repeats_its_run() {
    let case = Case::new();
    let losses = case.losses(WASM, "out", &["optimizer.lr=5e-3"]);
    std::fs::copy(case.path("out/epoch_0/config_resolved.yaml"), case.path("train.yaml")).unwrap();
    let elsewhere = ["checkpointer.output_dir=again", "metric_logger.log_dir=again/logs"];
    assert_eq!(case.losses(WASM, "again", &elsewhere), losses);
}

/// `generate` asks for a row as training showed it, up to the answer.
#[test]
fn a_prompt_is_the_beginning_of_a_training_row() {
    let case = Case::new();
    let line = crate::case::rows(1);
    let row: Value = serde_json::from_str(line.trim()).unwrap();
    let around = Surroundings {
        seed: 0,
        cwd: case.path(""),
        shipped: vec![],
        cache_dir: Some(case.path("cache")),
        kind: &|path: &Path| Some(if path.is_dir() { FileKind::Folder } else { FileKind::File }),
    };
    // The library reads paths from where the test runs.
    let at = |key: &str, name: &str| format!("{key}={}", case.path(name).display());
    for template in ["templates/summarize.wasm", "scripts/templates/summarize.rhai"] {
        let common = [at("checkpointer.checkpoint_dir", "model"), at("tokenizer.prompt_template", template)];
        let train = [&common[..], &[at("dataset.source", "data"), at("output_dir", "out")]].concat();
        let train = Config::load(&case.path("train.yaml"), &train).unwrap();
        let train = resolve::train(&train, &case.path(WASM), &around).unwrap().plan;
        let ask = [&common[..], &[format!("prompt.user={}", row["document"])]].concat();
        let ask = Config::load(&case.path("generate.yaml"), &ask).unwrap();
        let ask = resolve::generate(&ask, &around).unwrap().plan;

        let tokenizer = Tokenizer::open(&ask.tokenizer.path).unwrap();
        let guest = ask.tokenizer.prompt_template.as_ref().unwrap();
        let template = script::open_template(guest, &ask.limits).unwrap();
        let prompt = generate::prompt_tokens(&ask, &tokenizer, template.as_ref()).unwrap();
        let data = host::data::prepare(&train.dataset, &train.tokenizer, &tokenizer, template.as_ref()).unwrap();
        let row = data.sample(0);
        assert_eq!(prompt, row.tokens[..prompt.len()]);
        assert!(row.labels[..prompt.len()].iter().all(|label| *label == -100), "{:?}", row.labels);
        assert!(row.labels[prompt.len()..].iter().all(|label| *label >= 0), "{:?}", row.labels);
        assert!(row.labels.len() > prompt.len());
    }
}

#[test]
fn doctor_finds_this_machine_usable() {
    let case = Case::new();
    let text = Ended::of(&mut case.host(&["doctor"]));
    assert_eq!(text.code, 0, "{}{}", text.stdout, text.stderr);
    assert!(text.stdout.contains("libtorch   2.11."), "{}", text.stdout);
    let json = Ended::of(&mut case.host(&["doctor", "--json"]));
    assert_eq!(json.code, 0, "{}{}", json.stdout, json.stderr);
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["usable"], true);
    assert!(json["facts"]["probe"]["libtorch_version"].as_str().unwrap().starts_with("2.11."), "{json}");
}
