//! Every tensor operation through both fronts, against libtorch called directly: values by the losses, gradients by the
//! weights that a few steps of descent along them lead to. The operations are the same ones, so the numbers are too, bit
//! for bit.

use std::collections::BTreeSet;

use host::config::plan::GuestLimits;
use host::worker::StopFlag;
use host_rank::script::Training;
use host_rank::train::Which;
use proptest::prelude::*;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::support::{Linear, Record, run_with};

/// What a guest does with `x` `[L, V]` and `labels` `[L]`: its name, in Rhai, and in libtorch. `positive` is `x·x + 1`.
type Operation = (&'static str, &'static str, fn(&Tensor, &Tensor, &Tensor) -> Tensor);

pub const OPERATIONS: &[Operation] = &[
    ("shape", "x * (x.shape[1] + 0.0)", |x, _, _| x * x.size()[1] as f64),
    ("add", "x.add(x * 2.0)", |x, _, _| x + x * 2.0),
    ("sub", "x.sub(positive)", |x, _, positive| x - positive),
    ("mul", "x.mul(x * 2.0)", |x, _, _| x * (x * 2.0)),
    ("div", "x.div(positive)", |x, _, positive| x / positive),
    ("minimum", "x.minimum(x * 2.0)", |x, _, _| x.minimum(&(x * 2.0))),
    ("maximum", "x.maximum(x * 2.0)", |x, _, _| x.maximum(&(x * 2.0))),
    ("add_scalar", "x.add_scalar(1.5) * x", |x, _, _| (x + 1.5) * x),
    ("mul_scalar", "x.mul_scalar(1.5)", |x, _, _| x * 1.5),
    ("sub_scalar", "(x - 1.5) * x", |x, _, _| (x - 1.5) * x),
    ("rsub_scalar", "(2 - x) * (1.5 * x)", |x, _, _| (-x + 2.0) * (x * 1.5)),
    ("div_scalar", "x / 4 + 0.0", |x, _, _| x / 4.0),
    ("pow_scalar", "positive.pow_scalar(1.5)", |_, _, positive| positive.pow_tensor_scalar(1.5)),
    ("clamp", "x.clamp(-0.1, 0.2)", |x, _, _| x.clamp(-0.1, 0.2)),
    ("neg", "-x", |x, _, _| -x),
    ("abs", "x.abs()", |x, _, _| x.abs()),
    ("sign", "x.sign() * x", |x, _, _| x.sign() * x),
    ("sqrt", "positive.sqrt()", |_, _, positive| positive.sqrt()),
    ("reciprocal", "positive.reciprocal()", |_, _, positive| positive.reciprocal()),
    ("exp", "x.exp()", |x, _, _| x.exp()),
    ("expm1", "x.expm1()", |x, _, _| x.expm1()),
    ("log", "positive.log()", |_, _, positive| positive.log()),
    ("log1p", "positive.log1p()", |_, _, positive| positive.log1p()),
    ("relu", "x.relu()", |x, _, _| x.relu()),
    ("sigmoid", "x.sigmoid()", |x, _, _| x.sigmoid()),
    ("log_sigmoid", "x.log_sigmoid()", |x, _, _| x.log_sigmoid()),
    ("softplus", "x.softplus()", |x, _, _| x.softplus()),
    ("tanh", "x.tanh()", |x, _, _| x.tanh()),
    ("softmax", "x.softmax(0) * x", |x, _, _| x.softmax(0, None::<Kind>) * x),
    ("log_softmax", "x.log_softmax(0) * x", |x, _, _| x.log_softmax(0, None::<Kind>) * x),
    ("logsumexp", "x.logsumexp(0)", |x, _, _| x.logsumexp(0, false)),
    ("sum", "(x * x).sum()", |x, _, _| (x * x).sum(None::<Kind>)),
    ("mean", "(x * x).mean()", |x, _, _| (x * x).mean(None::<Kind>)),
    ("max", "x.max()", |x, _, _| x.max()),
    ("min", "x.min()", |x, _, _| x.min()),
    ("sum_dim", "x.sum_dim(0).log_sigmoid()", |x, _, _| x.sum_dim_intlist(0, false, None::<Kind>).log_sigmoid()),
    ("mean_dim", "x.mean_dim(0).log_sigmoid()", |x, _, _| x.mean_dim(0, false, None::<Kind>).log_sigmoid()),
    ("max_dim", "x.max_dim(1)", |x, _, _| x.amax(1, false)),
    ("min_dim", "x.min_dim(1)", |x, _, _| x.amin(1, false)),
    ("argmax", "x.argmax(1).to_float().unsqueeze(1) * x", |x, _, _| {
        x.argmax(1, false).to_kind(Kind::Float).unsqueeze(1) * x
    }),
    ("segment_sum", "x.segment_sum(labels, 11).logsumexp(0)", |x, labels, _| {
        Tensor::zeros([11, x.size()[1]], (Kind::Float, Device::Cpu)).index_add(0, labels, x).logsumexp(0, false)
    }),
    (
        "set_grad_enabled",
        "{ let on = host::set_grad_enabled(false); let y = x * x; host::set_grad_enabled(on); y * x }",
        |x, _, _| tch::no_grad(|| x * x) * x,
    ),
    ("cumsum", "x.cumsum(0) * x", |x, _, _| x.cumsum(0, None::<Kind>) * x),
    ("matmul", "x.matmul(x.unsqueeze(-1))", |x, _, _| x.matmul(&x.unsqueeze(-1))),
    ("gather", "x.gather(1, labels.unsqueeze(1))", |x, labels, _| x.gather(1, &labels.unsqueeze(1), false)),
    ("index_select", "x.index_select(1, (labels + 1) * 2 - labels - 2)", |x, labels, _| x.index_select(1, labels)),
    ("select", "x.select(1, -2)", |x, _, _| x.select(1, -2)),
    ("narrow", "x.narrow(1, -3, 2)", |x, _, _| x.narrow(1, -3, 2)),
    ("cat", "x.cat(positive, 1)", |x, _, positive| Tensor::cat(&[x, positive], 1)),
    ("unsqueeze", "x.unsqueeze(1) * x", |x, _, _| x.unsqueeze(1) * x),
    ("squeeze", "x.unsqueeze(0).squeeze(0).logsumexp(1)", |x, _, _| x.logsumexp(1, false)),
    ("reshape", "x.reshape([-1, 1]) * x.flatten()", |x, _, _| x.reshape([-1, 1]) * x.flatten(0, -1)),
    ("expand", "x.unsqueeze(0).expand([2, x.shape[0], x.shape[1]])", |x, _, _| {
        x.unsqueeze(0).expand([2, x.size()[0], x.size()[1]], false)
    }),
    ("transpose", "x.transpose(0, 1).logsumexp(0)", |x, _, _| x.transpose(0, 1).logsumexp(0, false)),
    ("flatten", "x.flatten().logsumexp(0)", |x, _, _| x.flatten(0, -1).logsumexp(0, false)),
    ("eq", "x.eq(x.relu()).to_float() * x", |x, _, _| x.eq_tensor(&x.relu()).to_kind(Kind::Float) * x),
    ("ne", "x.ne(x.relu()).to_float() * x", |x, _, _| x.ne_tensor(&x.relu()).to_kind(Kind::Float) * x),
    ("lt", "x.lt(x * 2.0).to_float() * x", |x, _, _| x.lt_tensor(&(x * 2.0)).to_kind(Kind::Float) * x),
    ("le", "x.le(x * 2.0).to_float() * x", |x, _, _| x.le_tensor(&(x * 2.0)).to_kind(Kind::Float) * x),
    ("gt", "x.gt(x * 2.0).to_float() * x", |x, _, _| x.gt_tensor(&(x * 2.0)).to_kind(Kind::Float) * x),
    ("ge", "x.ge(x * 2.0).to_float() * x", |x, _, _| x.ge_tensor(&(x * 2.0)).to_kind(Kind::Float) * x),
    ("eq_scalar", "x.sign().eq_scalar(1).to_float() * x", |x, _, _| x.sign().eq(1.0).to_kind(Kind::Float) * x),
    ("lt_scalar", "x.lt_scalar(0.1).to_float() * x", |x, _, _| x.lt(0.1).to_kind(Kind::Float) * x),
    ("gt_scalar", "x.gt_scalar(0.1).to_float() * x", |x, _, _| x.gt(0.1).to_kind(Kind::Float) * x),
    ("logical_and", "x.gt_scalar(0).logical_and(x.lt_scalar(0.2)).to_float() * x", |x, _, _| {
        x.gt(0.0).logical_and(&x.lt(0.2)).to_kind(Kind::Float) * x
    }),
    ("logical_or", "x.lt_scalar(0).logical_or(x.gt_scalar(0.2)).to_float() * x", |x, _, _| {
        x.lt(0.0).logical_or(&x.gt(0.2)).to_kind(Kind::Float) * x
    }),
    ("logical_not", "x.gt_scalar(0).logical_not().to_float() * x", |x, _, _| {
        x.gt(0.0).logical_not().to_kind(Kind::Float) * x
    }),
    ("choose", "x.gt_scalar(0).choose(x, positive)", |x, _, positive| x.where_self(&x.gt(0.0), positive)),
    ("masked_fill", "x.masked_fill(x.gt_scalar(0.1), 0.5)", |x, _, _| x.masked_fill(&x.gt(0.1), 0.5)),
    ("to_float", "labels.to_float().unsqueeze(1) * x", |x, labels, _| labels.to_kind(Kind::Float).unsqueeze(1) * x),
    ("to_int", "(x * 10.0).to_int().to_float() * x", |x, _, _| {
        (x * 10.0).to_kind(Kind::Int64).to_kind(Kind::Float) * x
    }),
    ("to_bool", "labels.to_bool().to_float().unsqueeze(1) * x", |x, labels, _| {
        labels.to_kind(Kind::Bool).to_kind(Kind::Float).unsqueeze(1) * x
    }),
    ("detach", "x.detach() * x", |x, _, _| x.detach() * x),
    ("item", "x * (x * x).mean().item(\"local\")", |x, _, _| x * (x * x).mean(None::<Kind>).double_value(&[])),
    ("numbers", "x * x.numbers(\"local\")[1]", |x, _, _| x * x.double_value(&[0, 1])),
    ("full", "host::full([x.shape[0], 1], 0.5) * x", |x, _, _| x * 0.5),
    ("arange", "host::arange(x.shape[1]).to_float() * x", |x, _, _| {
        Tensor::arange(x.size()[1], (Kind::Float, Device::Cpu)) * x
    }),
    ("from_numbers", "host::from_numbers([0.5, 1]).sum() * x", |x, _, _| x * 1.5),
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

pub fn directly(operation: fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Record {
    let mut training = Linear::new(json!({}));
    while training.next_step().unwrap() {
        while let Some(batch) = training.next_batch().unwrap() {
            let (x, labels) =
                (training.logits(batch.index, Which::Trained).unwrap(), training.labels(batch.index).unwrap());
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
    let is_of_tensors =
        |(of, name): &(String, String)| of == "tensor" || (of == "host" && name != "open" && name != "log");
    let contract = crate::surface::contract().into_iter().filter(is_of_tensors).map(|(_, name)| name);
    assert_eq!(tested, contract.collect());
}

/// What the operations of a random program take besides the tensor they are methods of.
const SHAPES: &[(&str, &[&str])] = &[
    (
        "t",
        &[
            "add",
            "sub",
            "mul",
            "div",
            "minimum",
            "maximum",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "logical_and",
            "logical_or",
            "matmul",
        ],
    ),
    (
        "f",
        &[
            "add_scalar",
            "mul_scalar",
            "sub_scalar",
            "rsub_scalar",
            "div_scalar",
            "pow_scalar",
            "eq_scalar",
            "lt_scalar",
            "gt_scalar",
        ],
    ),
    ("ff", &["clamp"]),
    (
        "",
        &[
            "neg",
            "abs",
            "sign",
            "sqrt",
            "reciprocal",
            "exp",
            "expm1",
            "log",
            "log1p",
            "relu",
            "sigmoid",
            "log_sigmoid",
            "softplus",
            "tanh",
            "logical_not",
            "to_float",
            "to_int",
            "to_bool",
            "detach",
            "flatten",
            "sum",
            "mean",
            "max",
            "min",
        ],
    ),
    (
        "i",
        &[
            "softmax",
            "log_softmax",
            "logsumexp",
            "sum_dim",
            "mean_dim",
            "max_dim",
            "min_dim",
            "argmax",
            "cumsum",
            "unsqueeze",
            "squeeze",
        ],
    ),
    ("it", &["gather", "index_select"]),
    ("ti", &["cat"]),
    ("ii", &["select", "transpose"]),
    ("iii", &["narrow"]),
    ("l", &["reshape", "expand"]),
    ("tt", &["choose"]),
    ("tf", &["masked_fill"]),
];

/// One step of a program: an operation, what it takes, and a number for each of its arguments, its own tensor's first.
type Instruction = (&'static str, &'static str, Vec<u32>);

fn programs() -> impl Strategy<Value = Vec<Instruction>> {
    let of = |(shape, names): &(&'static str, &'static [&'static str])| {
        let shape = *shape;
        names.iter().map(move |name| (*name, shape)).collect::<Vec<_>>()
    };
    let operations: Vec<_> = SHAPES.iter().flat_map(of).collect();
    let step = (prop::sample::select(operations), prop::collection::vec(any::<u32>(), 4));
    prop::collection::vec(step.prop_map(|((name, shape), numbers)| (name, shape, numbers)), 1..7)
}

/// A program as the Wasm guest reads it, and as Rhai.
fn written(program: &[Instruction]) -> (String, String) {
    let (mut lines, mut script) = (vec![], String::new());
    for (made, (name, shape, numbers)) in (3u32..).zip(program) {
        // The newest most often, for shapes and kinds that only chains of operations have.
        let tensor = |number: u32| if number.is_multiple_of(3) { number / 3 % made } else { made - 1 };
        let mut words = vec![(*name).to_owned(), format!("t{}", tensor(numbers[0]))];
        let mut arguments = vec![];
        for (kind, &number) in shape.chars().zip(&numbers[1..]) {
            let value = match kind {
                't' => tensor(number).to_string(),
                'i' => (i64::from(number % 5) - 2).to_string(),
                'f' => format!("{:?}", [-1.5, 0.0, 0.25, 2.0][number as usize % 4]),
                _ => ["-1,1", "11,-1", "3,7,11", "1,-2"][number as usize % 4].to_owned(),
            };
            arguments.push(match kind {
                't' => format!("t{value}"),
                'l' => format!("[{value}]"),
                _ => value.clone(),
            });
            words.push(format!("{kind}{value}"));
        }
        script += &format!("let t{made} = {}.{name}({});\n", words[1], arguments.join(", "));
        lines.push(words.join(" "));
    }
    (lines.join("; "), script)
}

/// What came of a program: the run's numbers, of which NaN equals NaN, or why it ended.
fn outcome(result: host::Result<Record>) -> String {
    result.map_or_else(|error| format!("{:?} {:?}", error.causes, error.hints), |record| format!("{record:?}"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random programs come to equal numbers, or to equal errors, through both fronts.
    #[test]
    fn programs_do_the_same_in_both(program in programs()) {
        let (lines, script) = written(&program);
        let last = 2 + program.len();
        let script = format!(
            "let run = host::open();
            for step in run.steps() {{
                for batch in step.batches() {{
                    let t0 = run.model.logits(batch);
                    let t1 = batch.labels();
                    let t2 = t0 * t0 + 1.0;
                    {script}
                    step.backward(t{last}.to_float().sum() + (t0 * 0.0).sum(), 100.0);
                }}
                step.finish();
            }}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.rhai");
        std::fs::write(&path, &script).unwrap();
        let limits = GuestLimits::default();
        let rhai = run_with(path.to_str().unwrap(), &limits, Linear::new(json!({})), StopFlag::default());
        let training = Linear::new(json!({ "recipe": { "program": lines } }));
        let wasm = run_with("target/guests/operations.wasm", &limits, training, StopFlag::default());
        prop_assert_eq!(outcome(rhai), outcome(wasm), "{}", lines);
    }
}
