//! The shipped recipes and the hand-written cross-entropy, through both fronts.

use host::config::plan::GuestLimits;
use host::error::Kind;
use host::worker::StopFlag;
use serde_json::json;

use crate::support::{Linear, run, run_with, script_error};

#[test]
fn wasm_and_rhai_give_the_same_bits() {
    let wasm = run("recipes/lora_distributed.wasm").unwrap();
    let rhai = run("recipes/lora_distributed.rhai").unwrap();
    assert_eq!(wasm.losses.len(), 15);
    assert_eq!(wasm, rhai);
    assert!(wasm.losses[14] < wasm.losses[2], "it learns: {:?}", wasm.losses);
}

/// What a recipe can ask of a run, in both fronts: equal numbers, and no function forgotten.
#[test]
fn every_function_of_a_run_is_the_same_in_both() {
    let config = json!({ "teacher_model": 7 });
    let by =
        |path: &str| run_with(path, &GuestLimits::default(), Linear::new(config.clone()), StopFlag::default()).unwrap();
    let (wasm, rhai) = (by("target/guests/surface.wasm"), by("target/guests/surface.rhai"));
    assert_eq!(wasm.losses.len(), 15);
    assert_eq!(wasm.metrics.len(), 5 * (3 + 4));
    assert_eq!(wasm, rhai);
    // Three ranks that are all like this one.
    let of = |name: &str| wasm.metrics.iter().find(|(found, ..)| found == name).unwrap().1;
    assert!((of("total/sum") - 3.0 * of("total/local")).abs() < 1e-3 * of("total/local").abs());
    for path in ["tests/scripting/guests/surface.rhai", "tests/scripting/guests/surface/src/lib.rs"] {
        let text = std::fs::read_to_string(crate::support::root().join(path)).unwrap();
        for (of, name) in crate::surface::contract() {
            let name = name.replace('-', "_");
            let is_pulled = ["next_step", "next_batch"].contains(&name.as_str());
            let is_used = [".", "::", " "].iter().any(|before| text.contains(&format!("{before}{name}")));
            assert!(of == "tensor" || of == "host" || is_pulled || is_used, "{path} does not use `{of}.{name}`");
        }
    }
}

#[test]
fn a_hand_written_cross_entropy_is_the_hosts() {
    let host = run("recipes/lora_distributed.wasm").unwrap();
    let wasm = run("target/guests/by_hand.wasm").unwrap();
    let rhai = run("target/guests/by_hand.rhai").unwrap();
    assert_eq!(wasm, rhai);
    assert_eq!(wasm.losses.len(), host.losses.len());
    for (by_hand, host) in wasm.losses.iter().zip(&host.losses) {
        assert!((by_hand - host).abs() <= 1e-6 * host.abs(), "{by_hand} is not {host}");
    }
}

#[test]
fn the_hand_written_recipe_is_short() {
    let text = std::fs::read_to_string(crate::support::root().join("tests/scripting/guests/by_hand.rhai")).unwrap();
    assert!(text.lines().count() <= 20);
}

#[test]
fn a_failure_of_the_run_comes_out_unchanged() {
    for path in ["recipes/lora_distributed.wasm", "recipes/lora_distributed.rhai"] {
        let mut training = Linear::new(json!({}));
        training.fails_at = Some(2);
        let error = run_with(path, &GuestLimits::default(), training, StopFlag::default()).unwrap_err();
        assert_eq!(error.to_string(), "error: rank 3 is gone\ncause: its connection was closed");
        assert_eq!(error.kind, Kind::Run);
    }
}

#[test]
fn a_script_cannot_catch_a_failure_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.rhai");
    let text = "let run = host::open();
        fn end(step) { step.finish(); }
        for step in run.steps() {
            for batch in step.batches() { let l = run.model.loss(batch); step.backward(l.sum, l.weight); }
            try { end(step); } catch (e) { host::log(`caught ${e}`); }
        }";
    std::fs::write(&path, text).unwrap();
    let mut training = Linear::new(json!({}));
    training.fails_at = Some(1);
    let error = run_with(path.to_str().unwrap(), &GuestLimits::default(), training, StopFlag::default()).unwrap_err();
    assert_eq!(error.message, "rank 3 is gone");
}

#[test]
fn a_stop_is_answered_at_the_next_step() {
    for path in ["recipes/lora_distributed.wasm", "recipes/lora_distributed.rhai"] {
        let stop = StopFlag::default();
        stop.set();
        let record = run_with(path, &GuestLimits::default(), Linear::new(json!({})), stop).unwrap();
        assert!(record.losses.is_empty());
    }
}

#[test]
fn a_script_reads_the_config() {
    let text = |body: &str| format!("let run = host::open(); {body}");
    assert_eq!(
        script_error(&text("if run.config(\"optimizer.lr\") == 0.5 { throw \"read\" }")).lines().nth(2).unwrap(),
        "cause: the script threw read"
    );
    insta::assert_snapshot!(script_error(&text("run.config(\"optimizer\")")), @r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:29
    cause: config key `optimizer` is a section, not a single value
    hint: name a key below it, such as `optimizer.…`
    "#);
    insta::assert_snapshot!(script_error(&text("run.config(\"optimizer.rate\")")), @r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:29
    cause: the config has no key `optimizer.rate`
    "#);
}

#[test]
fn a_guest_may_handle_its_mistakes() {
    let text = "let run = host::open();
        for step in run.steps() {
            for batch in step.batches() {
                let l = run.model.loss(batch);
                let code = ();
                try { step.backward(l.sum, -1); } catch (e) { code = e.code; }
                if code != \"invalid\" { throw `no error: ${code}`; }
                try { step.finish(); throw \"finished early\"; } catch (e) { if e.code != \"invalid\" { throw e; } }
                break;
            }
            while step.next_batch() != () {}
            step.finish();
        }";
    // `break` left batches; the steps are finished all the same once they are taken.
    assert_eq!(script_error(text), "no error");
}
