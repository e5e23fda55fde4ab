//! Bad input that only a worker finds, each with its exit code and text. Whatever it is, no checkpoint is left.

use std::process::Command;

use insta::assert_snapshot;

use crate::case::{Case, Ended, Running, WASM, free_port, rows};

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
      --> train.yaml:7:19
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
fn a_validation_set_without_a_label() {
    let case = Case::new();
    // So long a document that the cut takes the answer.
    let row = serde_json::json!({ "document": "A long text. ".repeat(200), "summary": "text" });
    case.write("data/validation.jsonl", format!("{row}\n{row}\n"));
    assert_snapshot!(fails(&case, WASM, &[]), @"
    exit 2
    error: split `validation` of the data set has nothing to learn from: no sample has a token that carries loss
    cause: these are the validation rows, `dataset_val`
    hint: raise `tokenizer.max_seq_len` if it cuts the answers away; check what the template marks as answer
    ");
}

/// Each part of the config that decides what a checkpoint is of, all in one report.
#[test]
fn a_checkpoint_of_another_run() {
    let case = Case::new();
    case.losses(WASM, "done", &["save_every_n_steps=4"]);
    let resume = |arguments: &[&str]| fails(&case, WASM, &[&["resume_from=done/step_4"], arguments].concat());
    assert_snapshot!(resume(&["model.lora_alpha=32", "dtype=bf16", "shuffle=False", "model.lora_dropout=0.1"]), @"
    exit 2
    error: the checkpoint `done/step_4` is of another run
    cause: `model.lora_alpha`: 16 in the checkpoint, 32 in this run
    cause: `model.lora_dropout`: 0 in the checkpoint, 0.1 in this run
    cause: `dtype`: fp32 in the checkpoint, bf16 in this run
    cause: `shuffle`: True in the checkpoint, False in this run
    hint: `done/step_4/config_resolved.yaml` is the config to resume it with
    hint: or start a new run: leave `resume_from_checkpoint` out and take another `output_dir`
    ");
    // A loss of somebody's own is another one with other settings.
    case.write("mine.rhai", "fn loss(logits, labels, settings) { #{ sum: logits.log_softmax(-1).sum() * settings.gamma, weight: labels.shape[0] } }");
    case.losses(WASM, "mine", &["save_every_n_steps=4", "loss={_component_: mine.rhai, gamma: 2}"]);
    assert_snapshot!(fails(&case, WASM, &["resume_from=mine/step_4", "loss={_component_: mine.rhai, gamma: 3}"]), @r#"
    exit 2
    error: the checkpoint `mine/step_4` is of another run
    cause: the settings of the loss guest, `loss`: {"gamma":2} in the checkpoint, {"gamma":3} in this run
    hint: `mine/step_4/config_resolved.yaml` is the config to resume it with
    hint: or start a new run: leave `resume_from_checkpoint` out and take another `output_dir`
    "#);
    assert_snapshot!(resume(&["batch_size=3"]), @"
    exit 2
    error: the checkpoint `done/step_4` cannot go on with these batches
    cause: its steps have 8 samples, `batch_size` × ranks is 3
    hint: set `batch_size` so that batch_size × ranks divides the samples of a step
    ");
    assert_snapshot!(resume(&["max_steps_per_epoch=3"]), @"
    exit 2
    error: the checkpoint is 4 steps into an epoch that now has 3
    hint: raise `max_steps_per_epoch`, or resume from an `epoch_N` folder with `resume_from`
    ");

    // Other weights of the same shapes, and other rows.
    let name = "model/model-00002-of-00002.safetensors";
    let mut bytes = std::fs::read(case.path(name)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header] ^= 1;
    case.write(name, bytes);
    let report = resume(&["dataset.split=train[80:160]"]);
    assert_eq!(report.matches("cause: ").count(), 2, "{report}");
    assert!(report.contains("cause: the model in `checkpointer.checkpoint_dir`: of fingerprint "), "{report}");
    assert!(report.contains("cause: the tokens of `dataset`: 80 rows of digest "), "{report}");
}

/// The loss is finite, its gradient is not: nothing is updated or saved.
#[test]
fn a_gradient_that_is_no_number() {
    let case = Case::new();
    let script = "let run = host::open();
for step in run.steps() {
    for batch in step.batches() {
        let loss = run.model.loss(batch);
        let nothing = loss.sum - loss.sum.detach();
        step.backward(loss.sum + nothing * 1e30 * 1e30, loss.weight);
    }
    step.finish();
}
";
    case.write("steep.rhai", script);
    assert_snapshot!(fails(&case, "steep.rhai", &["--nproc", "2", "save_every_n_steps=1"]), @"
    exit 1
    error: the gradient norm of step 1 is NaN
    hint: lower `optimizer.lr`, or train in `dtype: fp32`; the newest checkpoint is untouched
    ");
    assert_eq!(case.log("out"), [0.0; 0]);
}

/// A loss that is no number on one rank: that rank and its samples are named.
#[test]
fn a_loss_that_is_no_number() {
    let case = Case::new();
    // The first batch of rank 1 has other labels than those of rank 0.
    let told = "fn loss(logits, labels) { throw `${labels.numbers(\"local\")}` }";
    case.write("tells.rhai", told);
    let told = fails(&case, WASM, &["--nproc", "2", "loss={_component_: tells.rhai}", "~dataset_val"]);
    let labels = told.lines().find_map(|line| line.split_once("threw ")).expect(&told).1.to_owned();
    case.write(
        "nan.rhai",
        format!(
            "fn loss(logits, labels) {{
    let bad = if `${{labels.numbers(\"local\")}}` == \"{labels}\" {{ 1e30 }} else {{ 0.0 }};
    let zero = (logits - logits).sum();
    #{{ sum: logits.logsumexp(-1).sum() + zero / (zero + 1.0 - (bad / 1e30)), weight: labels.shape[0] }}
}}"
        ),
    );
    let report = fails(&case, WASM, &["--nproc", "2", "loss={_component_: nan.rhai}", "~dataset_val"]);
    // Which rank told its labels first is a race.
    let (before, rest) = report.split_once("of samples ").expect(&report);
    let (samples, after) = rest.split_once(" of the data set").unwrap();
    assert!(samples.split(", ").all(|sample| sample.parse::<u32>().unwrap() < 80), "{samples}");
    let report = format!("{before}of samples S of the data set{after}");
    assert_snapshot!(report.replace("(rank 1)", "(rank R)").replace("(rank 0)", "(rank R)"), @"
    exit 1
    error: the loss of step 1 is NaN (rank R)
    cause: it became so in the batch of samples S of the data set, counted from 0
    hint: lower `optimizer.lr`, or train in `dtype: fp32`; the newest checkpoint is untouched
    ");
}

/// What one rank opened differs from what rank 0 did, as on a machine with another copy of things.
#[test]
fn ranks_that_open_different_things() {
    let (case, other) = (Case::new(), Case::new());
    let both = |first: &[&str], second: &[&str]| {
        let port = free_port();
        let ranks = [case.join(0, port, first), other.join(1, port, second)];
        let ended = ranks.map(|mut command| Running::start(&mut command)).map(Running::wait);
        for case in [&case, &other] {
            assert_eq!(case.checkpoints("out"), [""; 0]);
        }
        ended.map(|ended| ended.report()).join("\n\n")
    };
    assert_snapshot!(both(&[], &["optimizer.lr=2e-2", "epochs=2"]), @"
    exit 1
    error: stopped because rank 1 opened something else than rank 0 (rank 0)

    exit 2
    error: rank 1 opened something else than rank 0 (rank 1)
    cause: `epochs`: 1 on rank 0, 2 here
    cause: `optimizer.lr`: 0.01 on rank 0, 0.02 here
    hint: start every rank with the same config and overrides, over the same files, with the same build of `host`
    ");

    other.edit("data/train.jsonl", "The small parser", "The large parser");
    let report = both(&[], &[]);
    assert!(report.contains("\ncause: the tokens of `dataset`: 80 rows of digest "), "{report}");
    assert_eq!(report.matches("cause: ").count(), 1, "{report}");
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
    error: recipe wants host:sdk 0.0.1, this host offers 0.1.0
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
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    ");
    // 100 GiB, piece by piece.
    assert_snapshot!(fails(&case, "guests/hostile.wasm", &["recipe.hostile=asks_for_memory", "--nproc", "2"]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:LINE
    cause: the guest asked for 1026 MiB of memory, and its limit is 256 MiB
    cause: memory allocation of 1073741824 bytes failed
    hint: `limits.memory_mb` raises the limit
    ");
    // Too little memory even to start: Wasm traps.
    assert_snapshot!(fails(&case, WASM, &["limits.memory_mb=1"]), @"
    exit 1
    error: recipe `recipes/lora_distributed.wasm` failed before the first step
    cause: the guest asked for 2 MiB of memory, and its limit is 1 MiB
    cause: memory minimum size of 17 pages exceeds memory limits
    hint: `limits.memory_mb` raises the limit
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

/// What one rank alone runs into is reported with that rank; the other ends without a word of its own.
#[test]
fn a_recipe_that_fails_on_one_rank() {
    let case = Case::new();
    let script = |check: &str| {
        format!(
            "let run = host::open();
for step in run.steps() {{
    for batch in step.batches() {{
        let labels = batch.labels().to_float().sum().item(\"local\");
        {check}
        let loss = run.model.loss(batch);
        step.backward(loss.sum, loss.weight);
    }}
    step.finish();
}}
"
        )
    };
    // Ranks have other samples, so other labels: the first run tells those of one.
    case.write("tells.rhai", script("throw `labels ${labels}`;"));
    let told = fails(&case, "tells.rhai", &["--nproc", "2"]);
    let labels = told.lines().find_map(|line| line.split_once("threw labels ")).expect(&told).1;
    case.write("fails.rhai", script(&format!("if labels == {labels} {{ throw \"not these labels\"; }}")));
    let report = fails(&case, "fails.rhai", &["--nproc", "2"]);
    assert_snapshot!(report.replace("(rank 1)", "(rank R)").replace("(rank 0)", "(rank R)"), @"
    exit 1
    error: recipe `fails.rhai` failed at step 1 (rank R)
      --> fails.rhai:5:32
    cause: the script threw not these labels
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
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:LINE)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:LINE)
    ");
    assert_snapshot!(fails(&case, WASM, &["tokenizer.prompt_template=recipes/lora_distributed.wasm"]), @"
    exit 2
    error: `recipes/lora_distributed.wasm` is a recipe, not a template
    hint: a template in Rust ends with `host_sdk::template!(…)`
    ");
}
