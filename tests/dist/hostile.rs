//! What a guest that means harm leaves behind: a message, and nothing else. What each may not do is in `tests/scripting`;
//! here is what the whole program makes of some of them.

use std::process::Stdio;

use insta::assert_snapshot;

use crate::case::{Case, Ended};

/// The report of a run that must fail, once it is certain that nothing of it is left.
fn harmless(case: &Case, recipe: &str, arguments: &[&str]) -> String {
    let arguments = [arguments, &["save_every_n_steps=1", "output_dir=harm"]].concat();
    let ended = Ended::of(&mut case.run(recipe, &arguments));
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!ended.stderr.contains(control), "{:?}", ended.stderr);
    assert!(!ended.stdout.contains(control), "{:?}", ended.stdout);
    // Steps that were whole may be saved; nothing is half saved.
    for name in case.checkpoints("harm") {
        let files = case.names(&format!("harm/{name}"));
        assert!(files.contains(&"config.json".to_owned()), "{name}: {files:?}");
        assert!(!name.starts_with('.') && !name.contains("tmp"), "{name}");
    }
    // What is measured is written by the host alone.
    for line in std::fs::read_to_string(case.path("harm/logs/log.jsonl")).unwrap_or_default().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["step"].as_u64().unwrap() < 100 && line.get("forged").is_none(), "{line}");
    }
    let _ = std::fs::remove_dir_all(case.path("harm"));
    ended.report()
}

/// A recipe that does something in its second step.
fn second_step(body: &str) -> String {
    format!(
        "let run = host::open();\nlet n = 0;\nfor step in run.steps() {{\n    for batch in step.batches() {{\n        \
         let l = run.model.loss(batch);\n        step.backward(l.sum, l.weight);\n    }}\n    n += 1;\n    \
         if n == 2 {{ {body} }}\n    step.finish();\n}}\n"
    )
}

#[test]
fn nothing_is_left_of_a_script() {
    let case = Case::new();
    let report = |body: &str, arguments: &[&str]| {
        case.write("harm.rhai", second_step(body));
        harmless(&case, "harm.rhai", arguments)
    };
    let forged = r#"throw "\x1b[2J\x1b[1;31merror: \r{\"step\": 100, \"forged\": 1}\n\u202egnp";"#;
    assert_snapshot!(report(forged, &[]), @r#"
    exit 1
    error: recipe `harm.rhai` failed at step 2
      --> harm.rhai:9:17
    cause: the script threw �[2J�[1;31merror: �{"step": 100, "forged": 1}��gnp
    "#);
    assert_snapshot!(report("loop { }", &["limits.seconds=0.5"]), @"
    exit 1
    error: recipe `harm.rhai` failed at step 2
      --> harm.rhai:9:22
    cause: the guest computed for more than 0.5 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(report("let m = #{}; loop { m[`${m.len()}`] = m.len(); }", &["limits.seconds=30"]), @"
    exit 1
    error: recipe `harm.rhai` failed at step 2
      --> harm.rhai:9:57
    cause: Size of object map too large
    ");
    assert_snapshot!(report("let a = []; a.pad(4000, 0); let i = 0; loop { let b = []; b.pad(60000, i); a[i] = b; i += 1; }", &[]), @"
    exit 1
    error: recipe `harm.rhai` failed at step 2
      --> harm.rhai:9:94
    cause: the script holds 128 MiB, and may hold 128 MiB, half of its memory of 256 MiB
    hint: let go of what is no longer needed; `limits.memory_mb` raises the limit
    ");
    assert_snapshot!(report("step.finish();", &[]), @"
    exit 1
    error: recipe `harm.rhai` failed at step 3
      --> harm.rhai:10:10
    cause: this step is finished
    hint: take the next one with `run.next_step()`
    ");
    assert_snapshot!(report("return;", &["--nproc", "2"]), @"
    exit 1
    error: recipe `harm.rhai` failed at step 2
    cause: it returned before the run was complete, so the last checkpoint is not written
    hint: take steps until `run.next_step()` gives none
    ");
}

#[test]
fn a_flood_of_lines_is_cut() {
    let case = Case::new();
    let flood = r#"let long = "x"; long.pad(100000, "y"); host::log(long);
        for i in 0..100000 { host::log(`\x1b[31m{"step": 200, "forged": ${i}}\n`); print(i); debug(i); } throw "done";"#;
    case.write("harm.rhai", second_step(flood));
    for (most, arguments) in [(50, &["limits.log_lines=50"][..]), (10_000, &[])] {
        // More than fits a pipe that nobody reads.
        let log = case.path("stderr.txt");
        let mut command = case.run("harm.rhai", arguments);
        let status = command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap()).status().unwrap();
        assert_eq!(status.code(), Some(1));
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'));
        assert!(text.lines().all(|line| line.len() < 1200));
        assert!(text.lines().filter(|line| line.contains("forged")).count() < most);
        let told = format!("{most} lines were logged; the rest is dropped (`limits.log_lines`)");
        assert!(text.contains(&told) && text.ends_with("cause: the script threw done\n"), "{text}");
    }
}

#[test]
fn nothing_is_left_of_a_component() {
    let case = Case::new();
    let report = |what: &str, more: &[&str]| {
        harmless(&case, "guests/hostile.wasm", &[&[format!("recipe.hostile={what}").as_str()], more].concat())
    };
    assert_snapshot!(report("panics", &[]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:27
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/hostile/src/lib.rs:27:13:
    cause: the map has 0 entries�[31m
    ");
    assert_snapshot!(report("loops", &["limits.seconds=0.5"]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:17
    cause: the guest computed for more than 0.5 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(report("hoards_handles", &[]), @"
    exit 1
    error: recipe `guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:37
    cause: 20000 handles are held, and a guest may hold 20000
    hint: drop tensors that are no longer needed before making new ones
    ");
}

#[test]
fn nothing_is_left_of_a_template_or_a_loss() {
    let case = Case::new();
    let template = |text: &str, more: &[&str]| {
        case.write("t.rhai", text);
        harmless(&case, crate::case::WASM, &[&["tokenizer.prompt_template=t.rhai"], more].concat())
    };
    assert_snapshot!(template("fn render(row) { loop {} }", &["limits.seconds=0.5"]), @"
    exit 1
    error: template `t.rhai` failed on row 0
    cause: the guest computed for more than 0.5 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(template("fn render(row) { let a = []; a.pad(60000, user(\"x\")); for i in 0..60000 { a[i] = user(a[i].text + row.input); } a }", &[]), @"
    exit 2
    error: split `train[:80]` of the data set has nothing to learn from: no sample has a token that carries loss
    hint: raise `tokenizer.max_seq_len` if it cuts the answers away; check what the template marks as answer
    ");
    let loss = |text: &str| {
        case.write("l.rhai", text);
        harmless(&case, crate::case::WASM, &["loss={_component_: l.rhai}", "limits.seconds=2"])
    };
    assert_snapshot!(loss("fn loss(logits, labels) { loop {} }"), @"
    exit 1
    error: loss `l.rhai` failed
    cause: the guest computed for more than 2 s without a turn of its loop
    cause: it was at step 1
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(loss("fn loss(logits, labels) { #{ sum: logits.sum() / 0.0, weight: 1 } }"), @"
    exit 1
    error: the loss of step 1 is -inf
    cause: it became so in the batch of samples 39, 29 of the data set, counted from 0
    hint: lower `optimizer.lr`, or train in `dtype: fp32`; the newest checkpoint is untouched
    ");
}

/// Compiling takes what it takes; it is watched, and given up.
#[test]
fn compile_bombs_are_given_up() {
    let case = Case::new();
    let recipe = |module: &str| {
        let text = format!(
            r#"(component (core module $m (func (export "main")) {module}) (core instance $i (instantiate $m))
                (func (export "main") (canon lift (core func $i "main"))))"#
        );
        case.write("bomb.wasm", wat::parse_str(text).unwrap());
    };
    let (loops, locals) = (1500, "i32 ".repeat(1000));
    let opens: String =
        (0..loops).map(|i| format!("(loop (local.set {} (local.get {}))", i * 7 % 1000, i % 1000)).collect();
    let closes: String = (0..loops).map(|i| format!("(br_if 0 (local.get {})))", i % 1000)).collect();
    recipe(&format!("(func (local {locals}) {opens} {closes})"));
    assert_snapshot!(harmless(&case, "bomb.wasm", &["limits.compile_seconds=0.1"]), @"
    exit 2
    error: cannot compile `bomb.wasm`
    cause: it takes more than 0.1 s
    hint: `limits.compile_seconds` raises the limit; a component of someone else's may do this on purpose
    ");
    recipe(&"(func (param i32) (result i32) local.get 0)".repeat(100_000));
    assert_snapshot!(harmless(&case, "bomb.wasm", &["limits.compile_mb=64"]), @"
    exit 2
    error: cannot compile `bomb.wasm`
    cause: it takes more than 64 MiB
    hint: `limits.compile_mb` raises the limit; a component of someone else's may do this on purpose
    ");
}
