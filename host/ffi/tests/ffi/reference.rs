//! Comparison against ordinary operators: forward values and gradients of every input.

use tch::{Kind, Tensor};

/// A function of several tensors, as a test writes it.
pub type Function<'a> = &'a dyn Fn(&[Tensor]) -> Tensor;

/// A seeded normal tensor. The generator of libtorch is shared by all threads, so values come from our own hash.
pub fn normal(seed: i64, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let uniform = |salt: i64| -> Tensor {
        let values: Vec<f64> = (0..count)
            .map(|i| {
                let bits = host_ffi::rng::absorb(host_ffi::rng::absorb(seed, salt), i) as u64 >> 11;
                (bits as f64 + 0.5) / (1u64 << 53) as f64
            })
            .collect();
        Tensor::from_slice(&values)
    };
    let radius = (uniform(1).log() * -2.0).sqrt();
    let angle = uniform(2) * std::f64::consts::TAU;
    (radius * angle.cos()).to_kind(Kind::Float).reshape(shape)
}

/// Largest difference relative to the largest value of the reference, both in double. Values are of order one here;
/// where the truth is (nearly) zero, as the gradient of a query with one key, one stands in.
pub fn relative(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    if got.numel() == 0 {
        return 0.0;
    }
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference.is_finite(), "not finite");
    difference / scale
}

/// Runs both on leaves of dtype `kind` and compares output and gradients. The reference always computes in double on
/// the rounded inputs, so that bf16 is measured against the truth and not against another rounding.
pub fn compare(name: &str, inputs: &[Tensor], kind: Kind, tolerance: f64, ours: Function, reference: Function) {
    let leaves = |target: Kind| -> Vec<Tensor> {
        inputs.iter().map(|t| t.to_kind(kind).to_kind(target).copy().detach().set_requires_grad(true)).collect()
    };
    let (mine, theirs) = (leaves(kind), leaves(Kind::Double));
    let (got, want) = (ours(&mine), reference(&theirs));
    let mut worst = vec![("output".to_owned(), relative(&got, &want))];
    let upstream = normal(99, &got.size()).to_kind(got.kind());
    (got * &upstream).sum(Kind::Float).backward();
    (want * upstream.to_kind(Kind::Double)).sum(Kind::Double).backward();
    for (i, (a, b)) in mine.iter().zip(&theirs).enumerate() {
        if b.grad().defined() {
            assert!(a.grad().defined(), "{name}: input {i} got no gradient");
            assert_eq!(a.grad().kind(), a.kind());
            worst.push((format!("gradient {i}"), relative(&a.grad(), &b.grad())));
        }
    }
    for (what, error) in worst {
        assert!(error <= tolerance, "{name} {kind:?}: {what} is off by {error:.2e}, allowed {tolerance:.0e}");
    }
}

/// The tolerances of one function: fp32 as the contract asks; bf16 has 8 bits, so one rounding is 2^-8 = 4e-3 of a value.
pub const BOTH: [(Kind, f64); 2] = [(Kind::Float, 1e-6), (Kind::BFloat16, 6e-3)];

/// And those of fp16, 11 bits, which on a CPU takes libtorch's operators as everything does on a GPU.
pub const WITH_OPERATORS: [(Kind, f64); 3] = [BOTH[0], BOTH[1], (Kind::Half, 1e-3)];
