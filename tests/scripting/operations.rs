//! Every tensor operation through both fronts, against libtorch called directly: values by the losses, gradients by the
//! weights that a few steps of descent along them lead to. The operations are the same ones, so the numbers are too, bit
//! for bit.

use std::collections::BTreeSet;

use host::config::plan::GuestLimits;
use host::worker::StopFlag;
use host_rank::script::Training;
use serde_json::json;
use tch::{Kind, Tensor};

use crate::support::{Linear, Record, run_with};

/// What a guest does with `x` `[L, V]` and `labels` `[L]`: its name, in Rhai, and in libtorch. `positive` is `x·x + 1`.
type Operation = (&'static str, &'static str, fn(&Tensor, &Tensor, &Tensor) -> Tensor);

const OPERATIONS: &[Operation] = &[
    ("shape", "x * (x.shape[1] + 0.0)", |x, _, _| x * x.size()[1] as f64),
    ("add", "x.add(x * 2.0)", |x, _, _| x + x * 2.0),
    ("sub", "x.sub(positive)", |x, _, positive| x - positive),
    ("mul", "x.mul(x * 2.0)", |x, _, _| x * (x * 2.0)),
    ("div", "x.div(positive)", |x, _, positive| x / positive),
    ("add_scalar", "x.add_scalar(1.5) * x", |x, _, _| (x + 1.5) * x),
    ("mul_scalar", "x.mul_scalar(1.5)", |x, _, _| x * 1.5),
    ("neg", "-x", |x, _, _| -x),
    ("exp", "x.exp()", |x, _, _| x.exp()),
    ("log", "positive.log()", |_, _, positive| positive.log()),
    ("log_sigmoid", "x.log_sigmoid()", |x, _, _| x.log_sigmoid()),
    ("log_softmax", "x.log_softmax(0) * x", |x, _, _| x.log_softmax(0, None::<Kind>) * x),
    ("logsumexp", "x.logsumexp(0)", |x, _, _| x.logsumexp(0, false)),
    ("sum", "(x * x).sum()", |x, _, _| (x * x).sum(None::<Kind>)),
    ("mean", "(x * x).mean()", |x, _, _| (x * x).mean(None::<Kind>)),
    ("sum_dim", "x.sum_dim(0).log_sigmoid()", |x, _, _| x.sum_dim_intlist(0, false, None::<Kind>).log_sigmoid()),
    ("gather", "x.gather(1, labels.unsqueeze(1))", |x, labels, _| x.gather(1, &labels.unsqueeze(1), false)),
    ("unsqueeze", "x.unsqueeze(1) * x", |x, _, _| x.unsqueeze(1) * x),
    ("squeeze", "x.unsqueeze(0).squeeze(0).logsumexp(1)", |x, _, _| x.logsumexp(1, false)),
    ("matmul", "x.matmul(x.unsqueeze(-1))", |x, _, _| x.matmul(&x.unsqueeze(-1))),
    ("to_float", "labels.to_float().unsqueeze(1) * x", |x, labels, _| labels.to_kind(Kind::Float).unsqueeze(1) * x),
    ("detach", "x.detach() * x", |x, _, _| x.detach() * x),
    ("item", "x * (x * x).mean().item()", |x, _, _| x * (x * x).mean(None::<Kind>).double_value(&[])),
];

fn through_rhai(expression: &str) -> Record {
    let script = format!(
        "let run = host::open();
        for step in run.steps() {{
            for batch in step.batches() {{
                let x = run.model.logits(batch);
                let labels = batch.labels();
                let positive = x * x + 1.0;
                step.backward(({expression}).sum(), 100.0);
            }}
            step.finish();
        }}"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.rhai");
    std::fs::write(&path, script).unwrap();
    let training = Linear::new(json!({}));
    run_with(path.to_str().unwrap(), &GuestLimits::default(), training, StopFlag::default()).unwrap()
}

fn through_wasm(name: &str) -> Record {
    let training = Linear::new(json!({ "recipe": { "operation": name } }));
    run_with("target/guests/operations.wasm", &GuestLimits::default(), training, StopFlag::default()).unwrap()
}

fn directly(operation: fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Record {
    let mut training = Linear::new(json!({}));
    while training.next_step().unwrap() {
        while let Some(batch) = training.next_batch().unwrap() {
            let (x, labels) = (training.logits(batch.index).unwrap(), training.labels(batch.index).unwrap());
            let sum = operation(&x, &labels, &(&x * &x + 1.0)).sum(None::<Kind>);
            training.backward(&sum, 100.0).unwrap();
        }
        training.finish_step().unwrap();
    }
    training.record()
}

#[test]
fn every_operation_is_libtorchs_through_both_fronts() {
    for (name, expression, operation) in OPERATIONS {
        let expected = directly(*operation);
        assert!(expected.losses.iter().all(|loss| loss.is_finite()), "`{name}`: {expected:?}");
        assert_eq!(through_rhai(expression), expected, "`{name}` in Rhai");
        assert_eq!(through_wasm(name), expected, "`{name}` in Wasm");
    }
}

#[test]
fn no_operation_is_forgotten() {
    let tested: BTreeSet<_> = OPERATIONS.iter().map(|(name, ..)| name.replace('_', "-")).collect();
    let contract = crate::surface::contract().into_iter().filter(|(of, _)| of == "tensor").map(|(_, name)| name);
    assert_eq!(tested, contract.collect());
}
