//! What `host plan` says a rank takes, against what running ranks take.

use std::time::Duration;

use serde_json::{Value, json};

use crate::case::{Case, RHAI, Running};
use crate::configs::draw_model;

/// Of a step in all cases here.
const SAMPLES: usize = 16;

/// A Llama of 39M parameters; and one of next to none, whose run takes what a run takes that holds nothing.
fn add_models(case: &Case) {
    let config = |hidden: i64, ffn: i64, layers: i64, heads: i64| {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads / 2,
            "vocab_size": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
            "tie_word_embeddings": false, "hidden_act": "silu"})
    };
    draw_model(case, "large", &config(512, 1408, 10, 8));
    draw_model(case, "idle", &config(8, 16, 1, 2));
}

/// The most anonymous memory of a rank in a run, in bytes, and the first line of its log.
fn measure(case: &Case, folder: &str, arguments: &[String]) -> (f64, Value) {
    let out = format!("out_{folder}");
    let more = [format!("checkpointer.checkpoint_dir={folder}"), format!("output_dir={out}")];
    let arguments: Vec<&str> = arguments.iter().chain(&more).map(String::as_str).collect();
    let running = Running::start(&mut case.run(RHAI, &arguments));
    let pid = running.pid;
    let ended = std::thread::spawn(move || running.wait());
    let mut most = 0.0f64;
    let mut workers = vec![];
    while !ended.is_finished() {
        // Workers are few and live long; looking for them takes longer than a look at them.
        if workers.is_empty() {
            workers = crate::case::workers_of(pid);
        }
        for (_, worker) in &workers {
            let path = format!("/proc/{}/status", worker.as_raw_nonzero());
            let status = std::fs::read_to_string(path).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok());
            most = most.max(kib.unwrap_or(0.0) * 1024.0);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let ended = ended.join().unwrap();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let log = std::fs::read_to_string(case.path(&out).join("logs/log.jsonl")).unwrap();
    std::fs::remove_dir_all(case.path(&out)).unwrap();
    (most, serde_json::from_str(log.lines().next().unwrap()).unwrap())
}

/// What a rank takes at most besides what it takes idle, in bytes.
fn estimate(case: &Case, log: &Value, arguments: &[String]) -> f64 {
    let number = |name: &str| log[name].as_f64().unwrap();
    let real = number("real_tokens");
    let mut all: Vec<String> =
        ["plan", "--config", "train.yaml", "--json", "--hardware", "roomy.yaml"].map(str::to_owned).into();
    all.extend([
        format!("--tokens-per-sample={}", real / SAMPLES as f64),
        format!("--label-share={}", number("label_tokens") / real),
    ]);
    all.extend_from_slice(arguments);
    all.push("checkpointer.checkpoint_dir=large".to_owned());
    let arguments: Vec<&str> = all.iter().map(String::as_str).collect();
    let ended = Running::start(&mut case.host(&arguments)).wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let plan: Value = serde_json::from_str(&ended.stdout).unwrap();
    let chosen = &plan["chosen"];
    let parts = chosen["memory"]["parts"].as_array().unwrap();
    let idle: f64 =
        parts.iter().filter(|part| part["when"] == "idle").map(|part| part["bytes"].as_f64().unwrap()).sum();
    assert!(idle > 0.0, "{plan}");
    chosen["need_bytes"].as_f64().unwrap() - idle
}

/// Adapters and all weights, on 1 rank and on 2, in both types.
#[test]
fn a_rank_takes_the_memory_that_was_planned() {
    let case = Case::new();
    add_models(&case);
    case.write(
        "roomy.yaml",
        "{name: roomy, device: cpu, devices_per_node: 1, memory_gb: 100, tflops: 0.5, link_gb_s: 1}",
    );
    let mut found = vec![];
    for (model, dtype) in [("lora_llama", "fp32"), ("llama", "bf16")] {
        for (ranks, parallel) in [(1, "replicate"), (2, "replicate"), (2, "shard")] {
            let batch_size = SAMPLES / ranks;
            let arguments: Vec<String> = [
                format!("--nproc={ranks}"),
                format!("model._component_={model}"),
                format!("dtype={dtype}"),
                format!("batch_size={batch_size}"),
                format!("parallel={parallel}"),
            ]
            .into_iter()
            .chain(
                [
                    "gradient_accumulation_steps=1",
                    "max_steps_per_epoch=3",
                    "tokenizer.path=model/tokenizer.json",
                    "~dataset_val",
                ]
                .map(str::to_owned),
            )
            .chain((model == "llama").then(|| "~model.lora_attn_modules".to_owned()))
            .collect();
            let (idle, _) = measure(&case, "idle", &arguments);
            let (peak, log) = measure(&case, "large", &arguments);
            let (measured, estimated) = (peak - idle, estimate(&case, &log, &arguments));
            let ratio = estimated / measured;
            found.push((
                ratio,
                format!(
                    "{model} {dtype}, {ranks} ranks, {parallel}: {estimated:.3e} estimated, {measured:.3e} measured: {ratio:.2}"
                ),
            ));
        }
    }
    let table: Vec<&str> = found.iter().map(|(_, line)| line.as_str()).collect();
    println!("{}", table.join("\n"));
    assert!(found.iter().all(|(ratio, _)| (0.8..=1.2).contains(ratio)), "{table:#?}");
}

/// By how much, and what would fit; before anything is loaded, and without a rank left.
#[test]
fn a_run_that_cannot_fit_is_refused() {
    let case = Case::new();
    let huge = ["--nproc", "2", "batch_size=100000000", "tokens_per_microbatch=1000000000"];
    let ended = Running::start(&mut case.run(RHAI, &huge)).wait();
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    let report = ended.report();
    let expected = [
        "error: each of 2 ranks needs about ",
        " GB too much",
        "cause: most of it: activations ",
        "hint: `tokens_per_microbatch=",
    ];
    assert!(expected.iter().all(|part| report.contains(part)), "{report}");
    assert!(case.names("out").is_empty(), "{report}");
}

/// All weights of 500M parameters on 1, 2 and 4 ranks that share them: the same first step, and memory that falls with the
/// ranks, but for what every rank gathers: embedding, head and a few blocks, and their gradients.
#[test]
#[ignore = "takes 20 GB and minutes: `cargo xtask soak`"]
fn half_a_billion_parameters_are_shared() {
    let case = Case::new();
    let config = |hidden: i64, ffn: i64, layers: i64, heads: i64| {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads / 2,
            "vocab_size": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
            "tie_word_embeddings": false, "hidden_act": "silu"})
    };
    draw_model(&case, "large", &config(1024, 4096, 30, 16));
    draw_model(&case, "idle", &config(8, 16, 1, 2));
    let mut held = vec![];
    let mut first: Option<Value> = None;
    for ranks in [1, 2, 4] {
        let arguments: Vec<String> = [
            format!("--nproc={ranks}"),
            format!("batch_size={}", 8 / ranks),
            "model={_component_: llama}".to_owned(),
            "parallel=shard".to_owned(),
            "gradient_accumulation_steps=1".to_owned(),
            "max_steps_per_epoch=2".to_owned(),
            "optimizer.lr=1e-5".to_owned(),
            "tokenizer.path=model/tokenizer.json".to_owned(),
            "~dataset_val".to_owned(),
        ]
        .into();
        let (idle, _) = measure(&case, "idle", &arguments);
        let (peak, log) = measure(&case, "large", &arguments);
        println!("{ranks} ranks: {:.3e} bytes on one, loss {}, norm {}", peak - idle, log["loss"], log["grad_norm"]);
        held.push(peak - idle);
        let first = first.get_or_insert_with(|| log.clone());
        for (name, tolerance) in [("loss", 1e-6), ("grad_norm", 1e-5)] {
            let (one, other) = (first[name].as_f64().unwrap(), log[name].as_f64().unwrap());
            assert!(((one - other) / one).abs() < tolerance, "{ranks} ranks: {name} {other}, not {one}");
        }
    }
    // 33.6M of 500M numbers are outside of the blocks.
    assert!(held[1] < 0.65 * held[0] && held[2] < 0.4 * held[0], "{held:?}");
}
