//! Losses as guests: the example in Rhai and in Rust against libtorch called directly, and what is no loss.

use host::config::plan::{GuestLimits, GuestRef};
use host_rank::script::open_loss;
use insta::assert_snapshot;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::support::{guest, tight};

pub const SCRIPT: &str = "examples/own_loss/focal.rhai";
const COMPONENT: &str = "target/guests/focal.wasm";

/// Scores `[5, 7]` with gradient, and labels.
fn batch() -> (Tensor, Tensor) {
    let scores = (Tensor::arange(35, (Kind::Float, Device::Cpu)) * 1.7).sin().view([5, 7]);
    (scores.set_requires_grad(true), Tensor::from_slice(&[0i64, 6, 3, 3, 1]))
}

fn with(path: &str, settings: Value) -> GuestRef {
    GuestRef { settings, ..guest(path) }
}

/// Sum, weight and the gradient of the scores.
pub fn through(path: &str, gamma: f64) -> (f64, f64, Vec<f32>) {
    let mut loss = open_loss(&with(path, json!({ "gamma": gamma })), &GuestLimits::default()).unwrap();
    let (scores, labels) = batch();
    // Twice, as a run does: one call leaves nothing to the next.
    let (first, _) = loss.compute(&scores, &labels).unwrap();
    let (sum, weight) = loss.compute(&scores, &labels).unwrap();
    assert_eq!(first.double_value(&[]), sum.double_value(&[]));
    sum.backward();
    (sum.double_value(&[]), weight, Vec::try_from(scores.grad().flatten(0, -1)).unwrap())
}

#[test]
fn the_example_is_libtorchs_in_both_fronts() {
    for gamma in [0.0, 0.5, 2.0] {
        let (scores, labels) = batch();
        let log_p = scores.log_softmax(-1, None::<Kind>).gather(-1, &labels.unsqueeze(-1), false).squeeze_dim(-1);
        let sum = -((-log_p.exp() + 1.0).pow_tensor_scalar(gamma) * &log_p).sum(None::<Kind>);
        if gamma == 0.0 {
            let plain = scores.cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
            assert!((plain.double_value(&[]) - sum.double_value(&[])).abs() < 1e-6);
        }
        sum.backward();
        let gradient: Vec<f32> = Vec::try_from(scores.grad().flatten(0, -1)).unwrap();
        let expected = (sum.double_value(&[]), 5.0, gradient);
        assert_eq!(through(SCRIPT, gamma), expected, "gamma {gamma} in Rhai");
        assert_eq!(through(COMPONENT, gamma), expected, "gamma {gamma} in Wasm");
    }
}

fn with_text(text: &str) -> Box<dyn host_rank::train::Loss> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loss.rhai");
    std::fs::write(&path, text).unwrap();
    open_loss(&guest(path.to_str().unwrap()), &tight()).unwrap()
}

/// What `text` as a loss with `settings` says to a batch.
fn failure(text: &str, settings: Value) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loss.rhai");
    std::fs::write(&path, text).unwrap();
    let guest = with(path.to_str().unwrap(), settings);
    let (scores, labels) = batch();
    let outcome = open_loss(&guest, &tight())
        .and_then(|mut loss| loss.compute(&scores, &labels).and_then(|_| loss.compute(&scores, &labels)));
    outcome.unwrap_err().to_string().replace(dir.path().to_str().unwrap(), "[DIR]")
}

#[test]
fn what_is_no_loss() {
    assert_snapshot!(failure("fn score(a, b) { a }", json!({})), @"
    error: the script `[DIR]/loss.rhai` is not a loss
    cause: it has no function `loss(logits, labels)`, and none with `settings` as third
    hint: it gives back `#{ sum: …, weight: … }`
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { #{ sum: logits.sum(), weight: 1 } }", json!({ "gamma": 2 })), @"
    error: the loss `[DIR]/loss.rhai` takes no settings, and was given `gamma`
    hint: define `fn loss(logits, labels, settings)` to take them, or remove the keys
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { logits.mean() }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: `loss` gave back a value of type Tensor, not a sum and a weight
    hint: give back `#{ sum: …, weight: … }`: a tensor, and a number
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { #{ sum: logits, weight: 1 } }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the sum of a loss is a tensor of one element, not one of shape [5, 7]
    hint: call `.sum()` on it
    ");
    let constant = "fn loss(logits, labels) { #{ sum: logits.detach().sum(), weight: 1 } }";
    assert_snapshot!(failure(constant, json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the sum has no gradient: nothing of the scores went into it
    hint: build it from `logits`, without `detach`
    ");
    // Tokens that none of this batch is of weigh nothing, and are no mistake.
    let mut none = with_text("fn loss(logits, labels) { #{ sum: logits.sum() * 0, weight: 0 } }");
    let (scores, labels) = batch();
    assert_eq!(none.compute(&scores, &labels).unwrap().1, 0.0);
    assert_snapshot!(failure("fn loss(logits, labels) { #{ sum: logits.sum() } }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: `loss` gave back a map without a number `weight`, not a sum and a weight
    hint: give back `#{ sum: …, weight: … }`: a tensor, and a number
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { #{ sum: logits.sum(), weight: -1 } }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the weight of a loss must be a finite number, not below 0, and is -1
    hint: give what the sum is summed over: the number of labels for a loss over label tokens
    ");
    assert_snapshot!(failure("fn loss(logits, labels, settings) { settings.gama }", json!({ "gamma": 2 })), @"
    error: loss `[DIR]/loss.rhai` failed
      --> [DIR]/loss.rhai:1:46
    cause: no property `gama`
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { logits.gather(0, labels) }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
      --> [DIR]/loss.rhai:1:34
    cause: `gather` along dimension 0 of [5, 7] cannot take an index of shape [5]
    hint: the index needs as many dimensions; `unsqueeze(-1)` makes a column of a list
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { let run = host::open(); }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
      --> [DIR]/loss.rhai:1:43
    cause: no function `host::open ()`
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { loop {} }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
}

/// A component that means harm, and a script that does.
#[test]
fn losses_that_mean_harm() {
    let of = |what: &str| {
        let guest = with("target/guests/odd_loss.wasm", json!({ "what": what }));
        let (scores, labels) = batch();
        let outcome = open_loss(&guest, &tight())
            .and_then(|mut loss| loss.compute(&scores, &labels).and_then(|_| loss.compute(&scores, &labels)));
        outcome.err().map_or("no error".into(), |error| error.to_string())
    };
    assert_eq!(of("nothing"), "no error");
    assert_snapshot!(of("loops"), @"
    error: loss `target/guests/odd_loss.wasm` failed
      --> tests/scripting/guests/odd_loss/src/lib.rs
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(of("loops_in_configure"), @"
    error: loss `target/guests/odd_loss.wasm` failed
      --> tests/scripting/guests/odd_loss/src/lib.rs
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    assert_snapshot!(of("traps_in_configure"), @"
    error: loss `target/guests/odd_loss.wasm` failed
      --> tests/scripting/guests/odd_loss/src/lib.rs:26
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/odd_loss/src/lib.rs:26:37:
    cause: it will not be configured�[31m
    ");
    assert_snapshot!(of("weighs_nan"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the weight of a loss must be a finite number, not below 0, and is NaN
    hint: give what the sum is summed over: the number of labels for a loss over label tokens
    ");
    assert_snapshot!(of("weighs_infinity"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the weight of a loss must be a finite number, not below 0, and is inf
    hint: give what the sum is summed over: the number of labels for a loss over label tokens
    ");
    assert_snapshot!(of("weighs_less_than_nothing"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the weight of a loss must be a finite number, not below 0, and is -1
    hint: give what the sum is summed over: the number of labels for a loss over label tokens
    ");
    assert_snapshot!(of("gives_a_row"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the sum of a loss is a tensor of one element, not one of shape [7]
    hint: call `.sum()` on it
    ");
    assert_snapshot!(of("gives_integers"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the sum has no gradient: nothing of the scores went into it
    hint: build it from `logits`, without `detach`
    ");
    assert_snapshot!(of("gives_its_argument"), @"
    error: loss `target/guests/odd_loss.wasm` failed
    cause: the sum of a loss is a tensor of one element, not one of shape [5, 7]
    hint: call `.sum()` on it
    ");
    assert_snapshot!(of("keeps_a_tensor"), @"
    error: loss `target/guests/odd_loss.wasm` failed
      --> tests/scripting/guests/odd_loss/src/lib.rs:50
    cause: this tensor of shape [] went with its step, which is finished
    hint: read what is needed later as a number, with `item()`, before `step.finish()`
    ");
    assert_snapshot!(of("hoards"), @"
    error: loss `target/guests/odd_loss.wasm` failed
      --> tests/scripting/guests/odd_loss/src/lib.rs:56
    cause: the guest asked for 65 MiB of memory, and its limit is 64 MiB
    cause: memory allocation of 1048576 bytes failed
    hint: `limits.memory_mb` raises the limit
    ");
    let nan = "fn loss(logits, labels) { #{ sum: logits.sum(), weight: 0.0 / 0.0 } }";
    assert_snapshot!(failure(nan, json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the weight of a loss must be a finite number, not below 0, and is NaN
    hint: give what the sum is summed over: the number of labels for a loss over label tokens
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { throw \"no\" }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
      --> [DIR]/loss.rhai:1:27
    cause: the script threw no
    ");
    assert_snapshot!(failure("fn loss(logits, labels) { #{ sum: labels.sum(), weight: 1 } }", json!({})), @"
    error: loss `[DIR]/loss.rhai` failed
    cause: the sum has no gradient: nothing of the scores went into it
    hint: build it from `logits`, without `detach`
    ");
}

#[test]
fn guests_of_other_worlds() {
    let open = |path: &str| open_loss(&guest(path), &GuestLimits::default()).err().unwrap().to_string();
    assert_snapshot!(open("templates/summarize.wasm"), @"
    error: `templates/summarize.wasm` is a template, not a loss
    hint: a loss in Rust ends with `host_sdk::loss!(…)`
    ");
    assert_snapshot!(open("recipes/lora_distributed.wasm"), @"
    error: `recipes/lora_distributed.wasm` is a recipe, not a loss
    hint: a loss in Rust ends with `host_sdk::loss!(…)`
    ");
    let settings = with(COMPONENT, json!({ "gamma": "two" }));
    assert_snapshot!(open_loss(&settings, &GuestLimits::default()).err().unwrap(), @"
    error: loss `target/guests/focal.wasm` failed
      --> tests/scripting/guests/focal/src/lib.rs:11
    cause: `gamma` must be a number
    ");
}
