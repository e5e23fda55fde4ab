//! What a component must not do, and what its author reads about it.

use host::worker::StopFlag;
use serde_json::json;

use crate::support::{Linear, run_with, tight};

/// The report of the guest `hostile` doing `what`, without what differs between builds.
fn hostile(what: &str) -> String {
    let training = Linear::new(json!({ "recipe": { "hostile": what } }));
    match run_with("target/guests/hostile.wasm", &tight(), training, StopFlag::default()) {
        Ok(_) => "no error".into(),
        Err(error) => error.to_string(),
    }
}

macro_rules! reports {
    ($($name:ident: $report:literal;)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(hostile(stringify!($name)), @$report);
        }
    )*};
}

reports! {
    loops: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:17
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    "#;
    asks_for_memory: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:22
    cause: the guest asked for 1026 MiB of memory, and its limit is 64 MiB
    cause: memory allocation of 1073741824 bytes failed
    hint: `limits.memory_mb` raises the limit
    "#;
    panics: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:27
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/hostile/src/lib.rs:27:13:
    cause: the map has 0 entries�[31m
    "#;
    traps: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:29
    cause: the guest stopped itself (`unreachable`)
    hint: an exception that a JavaScript or Python guest does not catch ends so: catch it, and give back a failure
    "#;
    recurses: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:143
    cause: it touched memory that it does not have; a recursion without end comes to this
    cause: in `deeper` (tests/scripting/guests/hostile/src/lib.rs:143)
    cause: in `deeper` (tests/scripting/guests/hostile/src/lib.rs:144)
    "#;
    hoards_handles: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:37
    cause: 2000 handles are held, and a guest may hold 2000
    hint: drop tensors that are no longer needed before making new ones
    "#;
    hoards_models: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:43
    cause: 2000 handles are held, and a guest may hold 2000
    hint: drop tensors that are no longer needed before making new ones
    "#;
    broadcasts: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:56
    cause: `add` would make a tensor of shape [11, 11, 11, 11, 11, 11, 11, 11, 11, 11], and a guest's may have at most 2147483648 elements
    "#;
    keeps_a_tensor: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:64
    cause: this tensor of shape [] went with its step, which is finished
    hint: read what is needed later as a number, with `item()`, before `step.finish()`
    "#;
    bad_weight: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:68
    cause: the weight of a loss must be a finite number above 0, not NaN
    hint: pass what the sum is summed over: `batch.num_labels` for a loss over label tokens
    "#;
    no_gradient: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:72
    cause: the sum has no gradient: no trained value went into it
    hint: build it from `model.loss(batch)` or `model.logits(batch)`, without `detach`
    "#;
    no_sum: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:74
    cause: `backward` takes a sum, a tensor of one element, not one of shape [7, 11]
    hint: call `.sum()` on it
    "#;
    wrong_shapes: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:77
    cause: `matmul`: shapes [7, 11] and [7, 11] cannot be multiplied
    hint: the last dimension of the first must be as long as the second last of the second
    "#;
    finishes_early: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:79
    cause: the step has batches that were not taken
    hint: take batches until `step.next_batch()` gives none, then finish
    "#;
    leaves_early: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
    cause: it returned before the run was complete, so the last checkpoint is not written
    hint: take steps until `run.next_step()` gives none
    "#;
    steps_twice: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:82
    cause: the step before this one is not finished
    hint: call `step.finish()` when all its batches are done
    "#;
    opens_twice: r#"
    error: recipe `target/guests/hostile.wasm` failed at step 1
      --> tests/scripting/guests/hostile/src/lib.rs:85
    cause: the run is open already
    hint: call `open` once
    "#;
}

#[test]
fn a_loop_that_ignores_a_stop_is_ended() {
    let mut training = Linear::new(json!({ "recipe": { "hostile": "loops" } }));
    training.stops_itself = true;
    let error = run_with("target/guests/hostile.wasm", &tight(), training, StopFlag::default()).unwrap_err();
    assert_eq!(error.exit_code(), 130);
}

#[test]
fn a_flood_of_lines_ends_nothing() {
    // The guest leaves early afterwards, which is the error.
    let report = hostile("floods");
    assert!(report.contains("returned before the run was complete"), "{report}");
}
