use host_ffi::autograd::{LinearLayer, linear_cross_entropy, linear_cross_entropy_sum};
use tch::{Kind, Tensor};

use crate::reference::{BOTH, compare, normal};

fn labels(seed: i64, rows: i64, vocabulary: i64) -> Tensor {
    let values: Vec<i64> = (0..rows).map(|i| host_ffi::rng::absorb(seed, i).rem_euclid(vocabulary)).collect();
    Tensor::from_slice(&values)
}

fn plain(hidden: &Tensor, head: &Tensor, labels: &Tensor) -> Tensor {
    let logits = hidden.matmul(&head.tr());
    logits.cross_entropy_loss(labels, None::<Tensor>, tch::Reduction::Sum, -100, 0.0)
}

#[test]
fn the_loss_matches_operators_for_every_chunking() {
    for (rows, width, vocabulary) in [(1, 8, 5), (7, 16, 1000), (40, 64, 4099)] {
        let labels = labels(5, rows, vocabulary);
        for chunk in [1, 3, 16, 1000] {
            for (kind, tolerance) in BOTH {
                let head = (normal(2, &[vocabulary, width]) * 0.5).to_kind(kind);
                let layer = LinearLayer::new(&head, None, false).unwrap();
                let exact = head.to_kind(Kind::Double);
                compare(
                    &format!("loss {rows}x{width}x{vocabulary} by {chunk}"),
                    &[normal(1, &[rows, width])],
                    kind,
                    // bf16 rounds each logit, of size 2 to 8 here, before the softmax.
                    if kind == Kind::Float { 2.0 * tolerance } else { 2e-2 },
                    &|v| linear_cross_entropy_sum(&v[0], &layer, &labels, chunk).unwrap(),
                    &|v| plain(&v[0], &exact, &labels),
                );
                // Each row by a factor of its own.
                let factors = normal(3, &[rows]).to_kind(Kind::Float);
                compare(
                    &format!("rows {rows}x{width}x{vocabulary} by {chunk}"),
                    &[normal(1, &[rows, width])],
                    kind,
                    if kind == Kind::Float { 2.0 * tolerance } else { 2e-2 },
                    &|v| linear_cross_entropy(&v[0], &layer, &labels, chunk).unwrap() * &factors,
                    &|v| {
                        let logits = v[0].matmul(&exact.tr());
                        logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::None, -100, 0.0) * &factors
                    },
                );
            }
        }
    }
}

#[test]
fn a_head_that_learns_gets_its_gradient() {
    let (rows, width, vocabulary) = (40, 16, 1000);
    let labels = labels(5, rows, vocabulary);
    let factors = normal(3, &[rows]).to_kind(Kind::Float);
    for chunk in [1, 16, 1000] {
        for (kind, tolerance) in BOTH {
            // As above; and in bf16 the chunks' gradients of the weight are rounded as they are added.
            let tolerance = if kind == Kind::Float { 2.0 * tolerance } else { 2e-2 };
            let inputs = [normal(1, &[rows, width]), normal(2, &[vocabulary, width]) * 0.5];
            let layer = |head: &Tensor| LinearLayer::new(head, None, false).unwrap();
            compare(
                &format!("loss and head by {chunk}"),
                &inputs,
                kind,
                tolerance,
                &|v| linear_cross_entropy_sum(&v[0], &layer(&v[1]), &labels, chunk).unwrap(),
                &|v| plain(&v[0], &v[1], &labels),
            );
            compare(
                &format!("rows and head by {chunk}"),
                &inputs,
                kind,
                tolerance,
                &|v| linear_cross_entropy(&v[0], &layer(&v[1]), &labels, chunk).unwrap() * &factors,
                &|v| {
                    let logits = v[0].matmul(&v[1].tr());
                    logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::None, -100, 0.0) * &factors
                },
            );
        }
    }
}

#[test]
fn ignored_rows_add_nothing() {
    let head = normal(2, &[50, 12]);
    let layer = LinearLayer::new(&head, None, false).unwrap();
    let labels = Tensor::from_slice(&[3i64, -100, 49, -100, 0]);
    let exact = head.to_kind(Kind::Double);
    compare(
        "ignored",
        &[normal(1, &[5, 12])],
        Kind::Float,
        2e-6,
        &|v| linear_cross_entropy_sum(&v[0], &layer, &labels, 2).unwrap(),
        &|v| plain(&v[0], &exact, &labels),
    );
}

#[test]
fn confident_rows_stay_finite_and_exact() {
    let head = Tensor::eye(64, (Kind::Float, tch::Device::Cpu)) * 300.0;
    let layer = LinearLayer::new(&head, None, false).unwrap();
    let exact = head.to_kind(Kind::Double);
    let hidden = Tensor::eye(64, (Kind::Float, tch::Device::Cpu));
    let wrong = Tensor::from_slice(&(0..64).map(|i| (i + 1) % 64).collect::<Vec<i64>>());
    compare(
        "confident",
        &[hidden],
        Kind::Float,
        1e-6,
        &|v| linear_cross_entropy_sum(&v[0], &layer, &wrong, 10).unwrap(),
        &|v| plain(&v[0], &exact, &wrong),
    );
}

#[test]
fn evaluation_and_no_rows_work() {
    let layer = LinearLayer::new(&normal(2, &[50, 12]), None, false).unwrap();
    let hidden = normal(1, &[5, 12]).set_requires_grad(true);
    let labels = labels(1, 5, 50);
    let with = linear_cross_entropy_sum(&hidden, &layer, &labels, 2).unwrap();
    let without = tch::no_grad(|| linear_cross_entropy_sum(&hidden, &layer, &labels, 2).unwrap());
    assert!(with.requires_grad() && !without.requires_grad());
    assert_eq!(with.double_value(&[]), without.double_value(&[]));
    let none = linear_cross_entropy_sum(&hidden.narrow(0, 0, 0), &layer, &labels.narrow(0, 0, 0), 2).unwrap();
    assert_eq!(none.double_value(&[]), 0.0);
    none.backward();
    assert_eq!(hidden.grad().abs().sum(Kind::Double).double_value(&[]), 0.0);
}

#[test]
fn a_label_outside_of_the_vocabulary_is_an_error() {
    let layer = LinearLayer::new(&normal(2, &[50, 12]), None, false).unwrap();
    let hidden = normal(1, &[2, 12]);
    for bad in [50i64, -1] {
        let labels = Tensor::from_slice(&[1, bad]);
        assert_eq!(
            linear_cross_entropy_sum(&hidden, &layer, &labels, 8).unwrap_err().0,
            format!("linear_cross_entropy: label {bad} at row 1 is outside of the vocabulary of 50")
        );
    }
    let labels = Tensor::from_slice(&[1i64, 2]);
    assert!(linear_cross_entropy_sum(&hidden, &layer, &labels, 0).is_err());
    assert!(linear_cross_entropy_sum(&hidden, &layer, &labels.to_kind(Kind::Int), 8).is_err());
}
