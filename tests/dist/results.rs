//! Runs that end well: the same losses however they are started, whole checkpoints, and text from them.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use host::config::Config;
use host::config::resolve::{self, FileKind, Surroundings};
use host::data::template::Templates;
use host::tokenizer::{Format, Tokenizer};
use host_rank::{generate, script};
use insta::assert_snapshot;
use serde_json::Value;

use crate::case::{Case, Ended, RHAI, RHAI_TEMPLATE, Running, STEPS, WASM, free_port};
use crate::gguf_fixture::tiny_llama;

const TWO_RANKS: &[&str] = &["--nproc", "2", "gradient_accumulation_steps=2"];

/// GPU halves, NCCL and RCCL are found at run time: what is built here starts wherever libtorch's CPU half does.
#[test]
fn the_programs_need_no_vendors_library() {
    for name in ["host", "host-rank"] {
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_host-rank")).with_file_name(name);
        let listed = std::process::Command::new("readelf").arg("-d").arg(&program).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let needed: Vec<&str> = listed.lines().filter(|line| line.contains("(NEEDED)")).collect();
        assert!(needed.iter().any(|line| line.contains("libc.so")), "{listed}");
        assert_eq!(needed.iter().any(|line| line.contains("libtorch_cpu.so")), name == "host-rank", "{listed}");
        let vendors = ["cuda", "nccl", "cublas", "cudnn", "hip", "rccl", "rocm", "amd"];
        let found = needed.iter().find(|line| vendors.iter().any(|vendor| line.contains(vendor)));
        assert_eq!(found, None, "{name}");
    }
}

#[track_caller]
fn assert_close(one: &[f64], other: &[f64]) {
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(other) {
        assert!(((one - other) / other).abs() < 1e-6, "{one} and {other}");
    }
}

/// torchtune's name for it shards where the config says nothing, and a piece that is lost or of another save is named.
#[test]
fn a_model_that_ranks_share_trains_and_is_saved_in_pieces() {
    let case = Case::new();
    let ended = Ended::of(&mut case.run("lora_finetune_fsdp2", TWO_RANKS));
    assert!(ended.code == 0 && ended.stderr.contains("fp32 on cpu, sharded over 2 ranks, loaded"), "{}", ended.stderr);
    assert_close(&case.log("out"), &case.losses("lora_distributed", "replicated", TWO_RANKS));

    let whole = [&["model=llama", "optimizer.lr=1e-4", "parallel=shard", "output_dir=whole"], TWO_RANKS].concat();
    assert_eq!(Ended::of(&mut case.run("full_finetune_distributed", &whole)).code, 0);
    let pieces = case.contents("whole/epoch_0");
    let name = |rank: usize| format!("resume-0000{rank}-of-00002.safetensors");
    let halves = [1, 2].map(|rank| pieces[&name(rank)].len());
    assert!(halves[0] == halves[1] && pieces["model.safetensors.index.json"].len() > 100, "{halves:?}");
    let generated = Ended::of(&mut case.host(&[
        "run",
        "generate",
        "--config",
        "generate.yaml",
        "checkpointer.checkpoint_dir=whole/epoch_0",
    ]));
    assert_eq!(generated.code, 0, "{}", generated.stderr);

    let again = [&["resume_from_checkpoint=True", "epochs=2"], &whole[..]].concat();
    let resume = || Ended::of(&mut case.run("full_finetune_distributed", &again)).report();
    let second = case.path("whole/epoch_0").join(name(2));
    let kept = std::fs::read(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    assert_snapshot!(resume(), @"
    exit 2
    error: the checkpoint `whole/epoch_0` is not whole: a rank's file is missing
      --> whole/epoch_0/resume-00002-of-00002.safetensors
    hint: each rank wrote one such file: bring all of them to one folder, or name another checkpoint with `resume_from`
    ");
    let shorter = [&["max_steps_per_epoch=2", "output_dir=other"], &whole[..3], TWO_RANKS].concat();
    assert_eq!(Ended::of(&mut case.run("full_finetune_distributed", &shorter)).code, 0);
    std::fs::copy(case.path("other/epoch_0").join(name(2)), &second).unwrap();
    assert_snapshot!(resume(), @"
    exit 2
    error: the checkpoint `whole/epoch_0` is not whole: a rank's file is of another save
      --> whole/epoch_0/resume-00002-of-00002.safetensors
    hint: each rank wrote one such file: bring all of them to one folder, or name another checkpoint with `resume_from`
    ");
    std::fs::write(&second, kept).unwrap();
    assert!(resume().starts_with("exit 0"));

    // Two copies, each over two ranks, of which one writes.
    let copies =
        ["output_dir=copies", "data_parallel_replicate_dim=2", "--nproc", "4", "gradient_accumulation_steps=1"];
    let ended = Ended::of(&mut case.run("full_finetune_distributed", &[&whole[..2], &copies].concat()));
    let said = "2 copies sharded over 2 ranks each, loaded";
    assert!(ended.code == 0 && ended.stderr.contains(said), "{}", ended.stderr);
    assert_close(&case.log("copies"), &case.log("whole")[..STEPS]);
    let of_copies = case.contents("copies/epoch_0");
    assert_eq!(of_copies.keys().filter(|name| name.starts_with("resume-")).collect::<Vec<_>>(), [&name(1), &name(2)]);
}

#[test]
fn ranks_and_kinds_of_guests_change_no_loss() {
    let case = Case::new();
    let one = case.losses(WASM, "one", &[]);
    assert_eq!(one.len(), STEPS);
    assert!(one[STEPS - 1] < 0.9 * one[0], "nothing was learnt: {one:?}");
    let two = case.losses(WASM, "two", TWO_RANKS);
    assert_close(&two, &one);
    // Cross-entropy written out in a guest, of the model's scores, is the host's own.
    for by_hand in ["guests/by_hand.wasm", "guests/by_hand.rhai"] {
        assert_close(&case.losses(by_hand, &by_hand.replace('/', "_"), &[]), &one);
    }

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
    let port = free_port();
    let ranks = [0, 1].map(|rank| Running::start(&mut case.join(rank, port, &["output_dir=joined"])));
    for ended in ranks.map(Running::wait) {
        assert_eq!(ended.code, 0, "{}", ended.stderr);
    }
    assert_close(&case.log("joined"), &launched);
    assert_eq!(case.checkpoints("joined"), ["epoch_0"]);

    // Each of them draws a seed, and one is taken.
    let port = free_port();
    let seedless = ["~seed", "output_dir=seedless"];
    let ranks = [0, 1].map(|rank| Running::start(&mut case.join(rank, port, &seedless)));
    for ended in ranks.map(Running::wait) {
        assert_eq!(ended.code, 0, "{}", ended.stderr);
    }
}

#[test]
fn a_checkpoint_is_whole_and_generates_the_same_merged_or_not() {
    let case = Case::new();
    let model = case.contents("model");
    case.losses(WASM, "out", &[TWO_RANKS, &["epochs=2", "save_every_n_steps=4"]].concat());
    assert_eq!(case.contents("model"), model, "the model's folder was written to");
    assert_eq!(case.names("out"), ["epoch_0", "epoch_1", "logs", "loss.svg", "step_12", "step_16", "step_4", "step_8"]);
    let log = std::fs::read_to_string(case.path("out/logs/log.jsonl")).unwrap();
    assert_eq!(log.matches("val_loss").count(), 2, "before and after the run");
    for checkpoint in ["out/epoch_1", "out/step_4"] {
        check_files(&case, checkpoint);
    }

    let generate = |arguments: &[&str]| generate_text(&case, arguments);
    let base = generate(&[]);
    let adapted = generate(&["adapter_dir=out/epoch_1/adapter"]);
    let merged = generate(&["checkpointer.checkpoint_dir=out/epoch_1"]);
    assert_eq!(adapted, merged);
    assert_ne!(adapted, base, "the adapter changes nothing");
    assert_eq!(generate(&["adapter_dir=out/epoch_1/adapter", "enable_kv_cache=False"]), adapted);
    assert!(adapted.trim().len() > 10, "{adapted:?}");
}

/// All weights, by torchtune's names: ranks change no loss, the checkpoint is a model that generates, without an adapter.
#[test]
fn all_weights_are_trained_and_generate() {
    let case = Case::new();
    let model = case.contents("model");
    let full = ["model=llama", "optimizer.lr=1e-3", "epochs=2", "save_every_n_steps=4"];
    let one = case.losses("full_finetune_single_device", "one", &full);
    assert!(one.last().unwrap() < &(0.9 * one[0]), "nothing was learnt: {one:?}");
    assert_close(&case.losses("full_finetune_distributed", "two", &[TWO_RANKS, &full].concat()), &one);
    assert_eq!(case.losses(RHAI, "rhai", &full), one);
    assert_eq!(case.contents("model"), model, "the model's folder was written to");
    assert_eq!(case.names("one"), ["epoch_0", "epoch_1", "logs", "loss.svg", "step_12", "step_16", "step_4", "step_8"]);
    assert!(!case.path("one/epoch_1/adapter").exists());
    let index: Value = serde_json::from_slice(&case.contents("one/epoch_1")["model.safetensors.index.json"]).unwrap();
    let before: Value = serde_json::from_slice(&model["model.safetensors.index.json"]).unwrap();
    let names = |index: &Value| index["weight_map"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&index), names(&before));
    let after = generate_text(&case, &["checkpointer.checkpoint_dir=one/epoch_1"]);
    assert_ne!(after, generate_text(&case, &[]), "training changes nothing");
    assert_eq!(generate_text(&case, &["checkpointer.checkpoint_dir=one/epoch_1", "enable_kv_cache=False"]), after);
    // Gone on with from a step.
    std::fs::remove_dir_all(case.path("one/logs")).unwrap();
    let ended = Ended::of(&mut case.run(WASM, &[&full[..], &["output_dir=again", "resume_from=one/step_8"]].concat()));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(case.contents("again/epoch_1")[SHARD], case.contents("rhai/epoch_1")[SHARD]);
}

const SHARD: &str = "model-00001-of-00001.safetensors";

#[track_caller]
fn generate_text(case: &Case, arguments: &[&str]) -> String {
    let ended = Ended::of(&mut case.host(&[&["run", "generate", "--config", "generate.yaml"], arguments].concat()));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    // torchtune's figures, as numbers.
    let found = |before: &str, after: &str| {
        let line =
            ended.stderr.lines().find_map(|line| line.split_once(before)?.1.strip_suffix(after)).unwrap_or("none");
        line.split(" sec total, ").map(|number| number.parse::<f64>().expect(before)).fold(1.0, f64::min)
    };
    assert!(found("Time for inference: ", " tokens/sec") > 0.0, "{}", ended.stderr);
    assert!(found("Bandwidth achieved: ", " GB/s") >= 0.0 && found("Memory used: ", " GB") > 0.0, "{}", ended.stderr);
    ended.stdout
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let case = Case::new();
    let draw = |seed: &str| generate_text(&case, &["top_k=null", "temperature=1.0", &format!("seed={seed}")]);
    let first = draw("1");
    assert_eq!(draw("1"), first);
    assert_ne!(draw("2"), first);
}

/// What a run tells: what it loaded, a line a step, and torchtune's figures with those that can be compared.
#[test]
fn a_run_tells_what_it_does() {
    let case = Case::new();
    let ended = Ended::of(&mut case.run(WASM, &[TWO_RANKS, &["max_steps_per_epoch=2"]].concat()));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    // Which is the faster one, and by how much, is the machine's.
    let placed = "\n                                   replicate         shard\n  memory of a rank, GB  ";
    for line in [
        "placement: ",
        " a rank; `host plan` says more\n",
        placed,
        "model: 4 layers, 1850496 parameters, 14336 trainable (0.77%), fp32 on cpu, loaded in ",
        "data: 80 rows, 2 steps an epoch of 8 samples, epochs: 1",
        "Writing logs to out/logs/log.jsonl",
        "validation loss after step 0: ",
        "1|1|Loss: ",
        " 2/2 [",
        "validation loss after step 2: ",
        "saved out/epoch_0 in ",
    ] {
        assert!(ended.stderr.contains(line), "`{line}` is not in:\n{}", ended.stderr);
    }
    let text = std::fs::read_to_string(case.path("out/logs/log.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "{text}");
    let keys = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&lines[0]), "step val_loss");
    let of_step = "step loss lr tokens_per_second_per_gpu tokens_per_second grad_norm label_tokens real_tokens \
                   padded_tokens bytes_received seconds peak_rss_mb";
    assert_eq!(keys(&lines[1]), of_step);
    for line in &lines[1..3] {
        let number = |key: &str| line[key].as_f64().unwrap();
        let close = |one: f64, other: f64| (one / other - 1.0).abs() < 1e-9;
        assert!(close(number("tokens_per_second"), number("real_tokens") / number("seconds")), "{line}");
        // torchtune's counts labels, and divides by the ranks.
        let labels = number("label_tokens") / number("seconds") / 2.0;
        assert!(close(number("tokens_per_second_per_gpu"), labels), "{line}");
        assert!(number("real_tokens") > 2.0 * number("label_tokens") && number("peak_rss_mb") > 10.0, "{line}");
    }

    let text = ["output_dir=text", "max_steps_per_epoch=2", "metric_logger.output_fmt=txt"];
    let ended = Ended::of(&mut case.run(WASM, &text));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    // Of one rank there is nothing to choose.
    assert!(ended.stderr.contains("memory: about ") && !ended.stderr.contains("placement: "), "{}", ended.stderr);
    let text = std::fs::read_to_string(case.path("text/logs/log.jsonl")).unwrap();
    assert!(text.lines().nth(1).unwrap().starts_with("Step 1 | loss:"), "{text}");
}

/// `import`, and what comes of a folder that it wrote.
#[test]
fn an_imported_model_trains_and_generates() {
    let case = Case::new();
    case.write("tiny.gguf", tiny_llama().bytes());
    let import = |arguments: &[&str]| Ended::of(&mut case.host(&[&["import", "tiny.gguf"], arguments].concat()));
    let ended = import(&["--output-dir", "imported"]);
    insta::assert_snapshot!(format!("{}{}", ended.stdout, ended.report()), @"
    tensors:     20 (9 Q8_0, 7 F32, 4 F16)
    parameters:  0.1 million, as bf16
    vocabulary:  262 tokens
    size:        0 MB -> 0 MB
    written to:  imported (model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json)
    exit 0
    ");
    let taken = import(&["--output-dir", "model"]);
    insta::assert_snapshot!(taken.report(), @"
    exit 2
    error: `model` is not empty
    hint: choose another folder, or replace the model in it with `--force`
    ");
    let nowhere = import(&["--output-dir", "/proc/imported"]);
    insta::assert_snapshot!(nowhere.report(), @"
    exit 2
    error: the output folder `/proc/imported` cannot be written to
    cause: `/proc`: No such file or directory (os error 2)
    hint: give another with `--output-dir`
    ");

    let model = "checkpointer.checkpoint_dir=imported";
    let losses = case.losses(WASM, "out", &[model, "tokenizer.max_seq_len=400"]);
    // Its weights say nothing, so every one of 262 tokens is as likely as another.
    assert!(losses.iter().all(|loss| (loss - 262f64.ln()).abs() < 0.01), "{losses:?}");
    generate_text(&case, &["checkpointer.checkpoint_dir=out/epoch_0", "prompt.user=text"]);
}

/// A model whose output layer is its embedding: no `lm_head` in its files, none in what is saved, the same text from both.
#[test]
fn a_tied_head_trains_saves_and_generates() {
    let case = Case::new();
    case.edit("model/config.json", r#""tie_word_embeddings": false"#, r#""tie_word_embeddings": true"#);
    let with_copy = case.contents("model")["model.safetensors.index.json"].clone();
    let mut index: Value = serde_json::from_slice(&with_copy).unwrap();
    let file = index["weight_map"].as_object_mut().unwrap().remove("lm_head.weight").unwrap();
    case.write("model/model.safetensors.index.json", index.to_string());
    let file = format!("model/{}", file.as_str().unwrap());
    let bytes = std::fs::read(case.path(&file)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = tensors.iter().filter(|(name, _)| *name != "lm_head.weight").collect();
    assert_eq!(kept.len() + 1, tensors.len());
    case.write(&file, safetensors::serialize(kept, None).unwrap());

    let losses = case.losses(WASM, "out", &[]);
    assert!(losses[STEPS - 1] < 0.9 * losses[0], "nothing was learnt: {losses:?}");
    let saved: Value = serde_json::from_slice(&case.contents("out/epoch_0")["model.safetensors.index.json"]).unwrap();
    let names = |index: &Value| index["weight_map"].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&saved), names(&index));
    let merged = generate_text(&case, &["checkpointer.checkpoint_dir=out/epoch_0"]);
    assert_eq!(generate_text(&case, &["adapter_dir=out/epoch_0/adapter"]), merged);
    assert_ne!(generate_text(&case, &[]), merged, "the adapter changes nothing");

    // All weights: one that is two is trained once, and a copy of it in the checkpoint follows.
    let full = ["model=llama", "optimizer.lr=1e-3"];
    let ended = Ended::of(&mut case.run(WASM, &[&full[..], &["output_dir=full"]].concat()));
    assert!(ended.stderr.contains("1311872 parameters, 1311872 trainable (100.00%)"), "{}", ended.stderr);
    let text = generate_text(&case, &["checkpointer.checkpoint_dir=full/epoch_0"]);
    case.write("model/model.safetensors.index.json", with_copy);
    case.write(&file, bytes);
    assert_eq!(case.losses(WASM, "copy", &full), case.log("full"));
    assert_eq!(generate_text(&case, &["checkpointer.checkpoint_dir=copy/epoch_0"]), text);
    let bytes = &case.contents("copy/epoch_0")[SHARD];
    let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let [head, embedding] = ["lm_head.weight", "model.embed_tokens.weight"].map(|name| tensors.tensor(name).unwrap());
    assert!(head.data() == embedding.data());
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
            "losses.json",
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

    let mut adapter = json(&adapter_files, "adapter_config.json");
    let base = adapter["base_model_name_or_path"].take();
    assert!(base.as_str().is_some_and(|path| Path::new(path).is_absolute() && path.ends_with("/model")), "{base}");
    let expected = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": null,
        "r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": false,
        "use_rslora": false,
        "revision": null,
    });
    assert_eq!(adapter, expected);
    let (run, resume) = (json(&files, "run.json"), json(&files, "resume.json"));
    assert_eq!((&run["world_size"], &run["samples_per_step"]), (&2.into(), &8.into()));
    assert_eq!(run["data_digest"], resume["identity"]["data_digest"]);
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
        files_below: &|_| vec!["train.jsonl".to_owned(), "validation.jsonl".to_owned()],
        metadata: &|_| Ok(Default::default()),
    };
    // The library reads paths from where the test runs.
    let at = |key: &str, name: &str| format!("{key}={}", case.path(name).display());
    for (template, tokenizer) in [
        ("templates/summarize.wasm", "hf_tokenizer"),
        ("scripts/templates/summarize.rhai", "hf_tokenizer"),
        ("templates/summarize.wasm", "llama3_tokenizer"),
    ] {
        let common = [
            at("checkpointer.checkpoint_dir", "model"),
            at("tokenizer.prompt_template", template),
            format!("tokenizer={tokenizer}"),
        ];
        let train = [&common[..], &[at("dataset.source", "data"), at("output_dir", "out")]].concat();
        let train = Config::load(&case.path("train.yaml"), &train).unwrap();
        let train = resolve::train(&train, &case.path(WASM), &around).unwrap().plan;
        let ask = [&common[..], &[format!("prompt.user={}", row["document"])]].concat();
        let ask = Config::load(&case.path("generate.yaml"), &ask).unwrap();
        let ask = resolve::generate(&ask, &around).unwrap().plan;

        let tokenizer = Tokenizer::of(&ask.tokenizer).unwrap();
        let guest = ask.tokenizer.prompt_template.as_ref().unwrap();
        let template = script::open_template(guest, &ask.limits).unwrap();
        let prompt = generate::prompt_tokens(&ask, &tokenizer, Some(&template)).unwrap();
        let templates = [Templates { own: None, prompt: Some(template) }];
        let data = host::data::prepare(&train.dataset, &train.tokenizer, &tokenizer, &templates).unwrap();
        let row = data.sample(0);
        assert_eq!(prompt, row.tokens[..prompt.len()]);
        assert!(row.labels.len() > prompt.len());
        // Llama 3's answer begins with a header that is learnt, and ends before EOS.
        let answer = match *tokenizer.format() {
            Format::Llama3 { start_header, .. } => {
                let header = prompt.iter().rposition(|token| *token == start_header).unwrap();
                header..row.labels.len() - 1
            }
            _ => prompt.len()..row.labels.len(),
        };
        let learnt: Vec<usize> = (0..row.labels.len()).filter(|at| row.labels[*at] >= 0).collect();
        assert_eq!(learnt, answer.collect::<Vec<_>>());
    }
}

/// Llama 3 as Meta's folder has it: `original/tokenizer.model`, its message format, texts around the question in YAML.
#[test]
fn a_tokenizer_model_trains_and_its_answers_end() {
    let case = Case::new();
    for (name, file) in [("tokenizer.model", "llama3.model"), ("special.json", "llama3_special_tokens.json")] {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers").join(file);
        case.write(&format!("model/original/{name}"), std::fs::read(fixture).unwrap());
    }
    let tokenizer = "tokenizer={_component_: torchtune.models.llama3.llama3_tokenizer, \
        path: model/original/tokenizer.model, special_tokens_path: model/original/special.json, \
        prompt_template: {user: [\"Summarize: \", \"\\n\"]}}";
    let losses = case.losses(
        WASM,
        "out",
        &[
            tokenizer,
            "epochs=6",
            "model.apply_lora_to_mlp=True",
            "model.apply_lora_to_output=True",
            "model.lora_rank=64",
            "model.lora_alpha=128",
        ],
    );
    assert!(losses[losses.len() - 1] < 0.2 * losses[0], "{losses:?}");
    let row: Value = serde_json::from_str(crate::case::rows(1).trim()).unwrap();
    let user = format!("prompt.user={}", row["document"]);
    let merged = "checkpointer.checkpoint_dir=out/epoch_5";
    let arguments = ["run", "generate", "--config", "generate.yaml", tokenizer, merged, &user, "max_new_tokens=200"];
    let ended = Ended::of(&mut case.host(&arguments));
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    // Stopped by `<|eot_id|>`, long before 200 tokens.
    let answer = ended.stdout.trim();
    assert!((1..100).contains(&answer.len()) && !answer.contains("assistant"), "{answer:?}");
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

/// A resumed run may have another learning rate and length; one that is complete says so, and what killed saves have left
/// goes at the next start.
#[test]
fn a_run_goes_on_with_other_settings_until_it_is_complete() {
    let case = Case::new();
    case.losses(WASM, "out", &["save_every_n_steps=4"]);
    let resume = |arguments: &[&str]| {
        let ended = Ended::of(&mut case.run(WASM, &[&["resume_from_checkpoint=True"], arguments].concat()));
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        ended.stderr
    };
    let said = resume(&[]);
    assert!(said.contains("nothing to do: `out/epoch_0` is complete (10 of 10 steps)"), "{said}");
    assert_eq!(case.log("out").len(), STEPS);

    case.write("out/.step_12.partial/file", "");
    case.write("out/step_8.old/resume.json", "");
    let changes =
        ["epochs=2", "max_steps_per_epoch=5", "optimizer.lr=1e-3", "batch_size=1", "gradient_accumulation_steps=4"];
    let said = resume(&changes);
    assert!(said.contains("resuming from `out/epoch_0` after step 10 of 10, seed 42"), "{said}");
    assert!(
        said.contains("`gradient_accumulation_steps` is 8, not 4: a step keeps the checkpoint's 8 samples"),
        "{said}"
    );
    assert_eq!(case.log("out").len(), STEPS + 5);
    assert_eq!(case.checkpoints("out"), ["epoch_0", "epoch_1", "step_4", "step_8"]);
    // The picture is of the whole run, not of what came after the checkpoint.
    let losses: Value = serde_json::from_slice(&case.contents("out/epoch_1")["losses.json"]).unwrap();
    let logged = case.log("out").into_iter().zip(1..).map(|(loss, step)| serde_json::json!([step, loss]));
    assert_eq!(losses["training"], Value::from(logged.collect::<Vec<_>>()));
    assert!(case.contents("out")["loss.svg"].starts_with(b"<svg"));
}

/// `loss: {_component_: FILE, gamma: …}`: the same losses in both fronts and on two ranks, validation included, with
/// gamma 0 those of cross-entropy.
#[test]
fn a_loss_of_ones_own() {
    let case = Case::new();
    let run = |name: &str, loss: Option<(&str, f64)>, more: &[&str]| {
        let loss = loss.map(|(file, gamma)| format!("loss={{_component_: {file}, gamma: {gamma}}}"));
        let arguments: Vec<&str> = loss.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let losses = case.losses(WASM, name, &arguments);
        let files = case.contents(&format!("{name}/epoch_0"));
        let record: Value = serde_json::from_slice(&files["losses.json"]).unwrap();
        let validation: Vec<f64> =
            record["validation"].as_array().unwrap().iter().map(|point| point[1].as_f64().unwrap()).collect();
        (losses, validation, case.contents(&format!("{name}/epoch_0/adapter")))
    };
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
    const SCRIPT: &str = "examples/own_loss/focal.rhai";
    let plain = run("plain", None, &[]);
    let none = run("none", Some((SCRIPT, 0.0)), &[]);
    assert!(distance(&none.0, &plain.0) < 1e-5 && distance(&none.1, &plain.1) < 1e-5, "{:?} {:?}", none.0, plain.0);

    let script = run("script", Some((SCRIPT, 2.0)), &[]);
    assert!(distance(&script.0, &plain.0) > 1e-3, "gamma changes the loss");
    let component = run("component", Some(("guests/focal.wasm", 2.0)), &[]);
    assert_eq!((&script.0, &script.1), (&component.0, &component.1));
    assert!(script.2["adapter_model.safetensors"] == component.2["adapter_model.safetensors"]);
    let two = run("two", Some((SCRIPT, 2.0)), &["--nproc", "2", "gradient_accumulation_steps=2"]);
    assert!(distance(&two.0, &script.0) < 1e-5 && distance(&two.1, &script.1) < 1e-5, "{:?} {:?}", two.0, script.0);
}
