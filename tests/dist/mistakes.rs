//! Bad input that only a worker finds, each with its exit code and text. Whatever it is, no checkpoint is left.

use std::process::Command;

use insta::assert_snapshot;

use crate::case::{Case, Ended, WASM, rows};

/// What the failing `command` says, without the lines of guests that other tests own.
#[track_caller]
fn report(case: &Case, command: &mut Command) -> String {
    let ended = Ended::of(command);
    assert_eq!(case.checkpoints("out"), [""; 0], "{}", ended.stderr);
    assert!(!ended.stderr.contains("is a bug"), "{}", ended.stderr);
    let report = ended.report();
    let mut parts = report.split("lib.rs:");
    let start = parts.next().unwrap_or_default().to_owned();
    parts.fold(start, |text, part| {
        text + "lib.rs:LINE" + part.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':')
    })
}

#[track_caller]
fn fails(case: &Case, recipe: &str, arguments: &[&str]) -> String {
    report(case, &mut case.run(recipe, arguments))
}

#[test]
fn weights_of_another_shape() {
    let case = Case::new();
    let tensor = r#""model.layers.0.mlp.down_proj.weight":{"dtype":"BF16","shape":"#;
    let from = format!("{tensor}[128,384]");
    case.edit("model/model-00001-of-00002.safetensors", &from, &format!("{tensor}[384,128]"));
    assert_snapshot!(fails(&case, WASM, &["--nproc", "2"]), @"
    exit 2
    error: cannot load `model.layers.0.mlp.down_proj.weight` from `model/model-00001-of-00002.safetensors`
    cause: the file has shape [384, 128], `config.json` makes it [128, 384]
    hint: check that `config.json` and the weights are of the same model
    ");
}

#[test]
fn a_tokenizer_of_another_model() {
    let case = Case::new();
    let more = r#"{"id": 4096, "content": "parser", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false}"#;
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.path("model/tokenizer.json")).unwrap()).unwrap();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(serde_json::from_str(more).unwrap());
    case.write("model/tokenizer.json", tokenizer.to_string());
    assert_snapshot!(fails(&case, WASM, &["--nproc", "2"]), @"
    exit 2
    error: the tokenizer does not belong to this model
    cause: the data has token 4096, the model's vocabulary has 4096 entries
    hint: `tokenizer.path` should be the tokenizer.json in the model's own folder
    ");
    let generate = ["run", "generate", "--config", "generate.yaml"];
    assert_snapshot!(report(&case, &mut case.host(&generate)), @"
    exit 2
    error: the tokenizer does not belong to this model
    cause: the prompt has token 4096, the model's vocabulary has 4096 entries
    hint: `tokenizer.path` should be the tokenizer.json that the model was trained with, in its own folder
    ");
}

#[test]
fn a_prompt_that_training_would_have_cut() {
    let case = Case::new();
    let generate = ["run", "generate", "--config", "generate.yaml", "tokenizer.max_seq_len=8"];
    assert_snapshot!(report(&case, &mut case.host(&generate)), @"
    exit 2
    error: the prompt has 26 tokens, and `tokenizer.max_seq_len` is 8
    hint: shorten the prompt, or raise `tokenizer.max_seq_len` beyond what the model was tuned on
    ");
}

#[test]
fn a_warm_up_without_end_is_told() {
    let case = Case::new();
    let warning = "`lr_scheduler.num_warmup_steps` is 10 and the run has 10 steps";
    for (warmup, is_told) in [("9", false), ("10", true)] {
        let ended = Ended::of(&mut case.run(WASM, &[&format!("lr_scheduler.num_warmup_steps={warmup}")]));
        assert_eq!((ended.code, ended.stderr.contains(warning)), (0, is_told), "{}", ended.stderr);
    }
}

#[test]
fn an_adapter_on_a_layer_that_is_not_there() {
    let case = Case::new();
    case.edit("model/config.json", r#""tie_word_embeddings": false"#, r#""tie_word_embeddings": true"#);
    case.edit("train.yaml", "  lora_attn_modules:", "  apply_lora_to_output: True\n  lora_attn_modules:");
    assert_snapshot!(fails(&case, WASM, &[]), @"
    exit 2
    error: this model's output layer is its embedding, which takes no adapter
      --> train.yaml:4:25
      --> model/config.json
    hint: set `model.apply_lora_to_output: False`
    ");
}

#[test]
fn rows_that_cannot_be_used() {
    let case = Case::new();
    let bad = rows(20).replace(r#""document":"#, r#""other":"#);
    case.write("data/train.jsonl", format!("{}{bad}", rows(4)));
    // Rank 0 reads the rows; the others stop for its sake instead of reporting the same.
    assert_snapshot!(fails(&case, WASM, &["dataset.split=train", "--nproc", "2"]), @"
    exit 2
    error: line 5 of `data/train.jsonl` is a bad row (rank 0)
      --> data/train.jsonl:5
    cause: `document` is missing
    hint: repair the row, or leave such rows out with `dataset.on_bad_row: skip`
    ");
    let skip = ["dataset.split=train[4:]", "dataset.on_bad_row=skip"];
    assert_snapshot!(fails(&case, WASM, &skip), @"
    exit 2
    error: split `train[4:]` of the data set has nothing to learn from: 20 bad rows skipped, 0 left out by the template, none kept
    cause: data/train.jsonl:5: `document` is missing
    cause: data/train.jsonl:6: `document` is missing
    cause: data/train.jsonl:7: `document` is missing
    cause: data/train.jsonl:8: `document` is missing
    cause: data/train.jsonl:9: `document` is missing
    ");
}

#[test]
fn too_few_rows_for_a_step() {
    let case = Case::new();
    assert_snapshot!(fails(&case, WASM, &["--nproc", "2", "dataset.split=train[:15]"]), @"
    exit 2
    error: 15 rows make no step of 16 samples
    hint: lower `gradient_accumulation_steps` or `batch_size`, or take more rows with `dataset.split`
    ");
}

#[test]
fn an_output_folder_that_cannot_be_written() {
    let case = Case::new();
    // The checkpoint's unfinished name is taken: found when it is saved, on rank 0, and both ranks end.
    case.write("taken/.epoch_0.partial", "");
    let ended = Ended::of(&mut case.run(WASM, &["--nproc", "2", "gradient_accumulation_steps=2", "output_dir=taken"]));
    assert_snapshot!(ended.report(), @"
    exit 1
    error: cannot remove the unfinished `taken/.epoch_0.partial` (rank 0)
    cause: Not a directory (os error 20)
    ");
    assert_eq!(case.names("taken"), [".epoch_0.partial", "logs"]);
}

/// A limit on the size of files stands for a full disk: writing fails in the middle of the weights.
#[test]
fn a_disk_that_fills_up() {
    let case = Case::new();
    let run = case.run(WASM, &[]);
    let mut command = Command::new("bash");
    case.prepare(&mut command);
    command
        .args(["-c", r#"trap "" XFSZ; ulimit -f 1024; exec "$@""#, "bash"])
        .arg(run.get_program())
        .args(run.get_args());
    assert_snapshot!(report(&case, &mut command), @"
    exit 1
    error: cannot write `out/.epoch_0.partial/model-00001-of-00001.safetensors`
    cause: I/O error: File too large (os error 27)
    ");
}

#[test]
fn recipes_that_are_none() {
    let case = Case::new();
    assert_snapshot!(fails(&case, "guests/other_world.wasm", &[]), @"
    exit 2
    error: the component `guests/other_world.wasm` is not a recipe of host:sdk
    cause: it exports `hello`, not `main`
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    ");
    assert_snapshot!(fails(&case, "guests/other_sdk.wasm", &[]), @"
    exit 2
    error: recipe wants host:sdk 0.0.2, this host offers 0.0.1
      --> guests/other_sdk.wasm
    hint: build the recipe with the `host-sdk` of this host, or take the host it was built for
    ");
    assert_snapshot!(fails(&case, "guests/wants_files.wasm", &[]), @"
    exit 2
    error: the recipe `guests/wants_files.wasm` wants `wasi:filesystem/types`, which guests do not get
    cause: it imports `wasi:filesystem/types`, `wasi:filesystem/preopens`, `wasi:clocks/wall-clock`
    hint: a guest has no files: remove what uses `std::fs`; data comes as rows, settings from the config
    ");
    assert_snapshot!(fails(&case, "templates/summarize.wasm", &[]), @"
    exit 2
    error: `templates/summarize.wasm` is a template, not a recipe
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    ");
    case.write("cut.rhai", "let run = host::open(;\n");
    assert_snapshot!(fails(&case, "cut.rhai", &[]), @"
    exit 2
    error: cannot read the script `cut.rhai`
      --> cut.rhai:1:22
    cause: Unexpected ';'
    ");
}

#[test]
fn recipes_that_fail() {
    let case = Case::new();
    // It asks for a key that the config lacks, and gives up.
    assert_snapshot!(fails(&case, "guests/hostile.wasm", &["--nproc", "2"]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed before the first step
      --> tests/scripting/guests/hostile/src/lib.rs:LINE
    cause: the config has no key `recipe.hostile`
    ");
    assert_snapshot!(fails(&case, "guests/hostile.wasm", &["recipe.hostile=traps"]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:LINE
    cause: the guest stopped itself (`unreachable`)
    ");
    // 100 GiB, piece by piece.
    assert_snapshot!(fails(&case, "guests/hostile.wasm", &["recipe.hostile=asks_for_memory", "--nproc", "2"]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:LINE
    cause: the guest asked for 1026 MiB of memory, and its limit is 256 MiB
    cause: memory allocation of 1073741824 bytes failed
    ");
    // Too little memory even to start: Wasm traps.
    assert_snapshot!(fails(&case, WASM, &["limits.memory_mb=1"]), @"
    exit 1
    error: recipe `recipes/lora_distributed.wasm` failed before the first step
    cause: the guest asked for 2 MiB of memory, and its limit is 1 MiB
    cause: memory minimum size of 17 pages exceeds memory limits
    ");
    case.write("early.rhai", "let run = host::open();\nfor step in run.steps() { return; }\n");
    assert_snapshot!(fails(&case, "early.rhai", &["--nproc", "2"]), @"
    exit 1
    error: recipe `early.rhai` failed at step 1
    cause: it returned before the run was complete, so the last checkpoint is not written
    hint: take steps until `run.next_step()` gives none
    ");
    case.write("idle.rhai", "let run = host::open();\n");
    assert_snapshot!(fails(&case, "idle.rhai", &["--nproc", "2"]), @"
    exit 1
    error: recipe `idle.rhai` failed before the first step
    cause: it returned without taking a step, so nothing is trained
    hint: take steps until `run.next_step()` gives none
    ");
    let throws = "let run = host::open();\nfor step in run.steps() {\n    throw \"enough\";\n}\n";
    case.write("throws.rhai", throws);
    assert_snapshot!(fails(&case, "throws.rhai", &["--nproc", "2"]), @"
    exit 1
    error: recipe `throws.rhai` failed at step 1
      --> throws.rhai:3:5
    cause: the script threw enough
    ");
    case.write("loops.rhai", "let run = host::open();\nloop { }\n");
    assert_snapshot!(fails(&case, "loops.rhai", &["--nproc", "2", "limits.seconds=0.5"]), @"
    exit 1
    error: recipe `loops.rhai` failed before the first step
      --> loops.rhai:2:6
    cause: the guest computed for more than 0.5 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
}

#[test]
fn templates_that_fail() {
    let case = Case::new();
    let template = "tokenizer.prompt_template=guests/odd_template.wasm";
    let row = serde_json::json!({ "document": "panics", "summary": "none" });
    case.write("data/train.jsonl", format!("{}{row}\n", rows(20)));
    assert_snapshot!(fails(&case, WASM, &[template, "dataset.split=train", "--nproc", "2"]), @"
    exit 1
    error: template `guests/odd_template.wasm` failed on rows 0 to 20 (rank 0)
      --> tests/scripting/guests/odd_template/src/lib.rs:LINE
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/odd_template/src/lib.rs:LINE
    cause: row 20 is odd
    ");
    assert_snapshot!(fails(&case, WASM, &["tokenizer.prompt_template=recipes/lora_distributed.wasm"]), @"
    exit 2
    error: `recipes/lora_distributed.wasm` is a recipe, not a template
    hint: a template in Rust ends with `host_sdk::template!(…)`
    ");
}
