use host_ffi::autograd::{LinearLayer, lora_linear, rms_norm, rope, swiglu};
use tch::{Kind, Tensor};

use crate::reference::{BOTH, WITH_OPERATORS, compare, normal, relative};

const EPS: f64 = 1e-5;

fn plain_norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let variance = x.square().mean_dim(&[-1i64][..], true, None::<Kind>);
    x * (variance + EPS).rsqrt() * weight
}

#[test]
fn rms_norm_matches_operators() {
    for (t, d) in [(1, 1), (1, 8), (3, 17), (64, 576), (300, 128)] {
        let (x, weight) = (normal(1, &[t, d]), normal(2, &[d]) + 1.0);
        for (kind, tolerance) in WITH_OPERATORS {
            let w = weight.to_kind(kind);
            let exact = w.to_kind(Kind::Double);
            compare(
                &format!("rms_norm {t}x{d}"),
                std::slice::from_ref(&x),
                kind,
                // Two roundings in bf16: the normed value and the product.
                tolerance * 2.0,
                &|v| rms_norm(&v[0], &w, EPS).unwrap(),
                &|v| plain_norm(&v[0], &exact),
            );
        }
    }
}

#[test]
fn rms_norm_trains_its_weight_when_asked() {
    let (x, weight) = (normal(1, &[5, 33]), normal(2, &[33]));
    for (kind, tolerance) in BOTH {
        let inputs = [x.shallow_clone(), weight.shallow_clone()];
        compare("rms_norm weight", &inputs, kind, tolerance * 2.0, &|v| rms_norm(&v[0], &v[1], EPS).unwrap(), &|v| {
            plain_norm(&v[0], &v[1])
        });
    }
}

fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = x.size()[2] / 2;
    let rotated = Tensor::cat(&[-x.narrow(2, half, half), x.narrow(2, 0, half)], 2);
    let table = |t: &Tensor| Tensor::cat(&[t, t], 1).unsqueeze(1).to_kind(Kind::Double);
    x * table(cos) + rotated * table(sin)
}

#[test]
fn rope_matches_operators() {
    for (t, n, h) in [(1, 1, 2), (5, 3, 6), (70, 9, 64)] {
        let angle = normal(3, &[t, h / 2]);
        let (cos, sin) = (angle.cos(), angle.sin());
        for (kind, tolerance) in WITH_OPERATORS {
            compare(
                &format!("rope {t}x{n}x{h}"),
                &[normal(4, &[t, n, h])],
                kind,
                tolerance,
                &|v| rope(&v[0], &cos, &sin).unwrap(),
                &|v| plain_rope(&v[0], &cos, &sin),
            );
        }
    }
}

#[test]
fn rope_takes_slices_of_a_wider_matrix() {
    let (t, n, h) = (11, 4, 8);
    let angle = normal(3, &[t, h / 2]);
    let (cos, sin) = (angle.cos(), angle.sin());
    let slice = |x: &Tensor| x.narrow(1, 16, n * h).view([t, n, h]);
    compare(
        "rope slice",
        &[normal(5, &[t, 16 + n * h + 3])],
        Kind::Float,
        1e-6,
        &|v| rope(&slice(&v[0]), &cos, &sin).unwrap(),
        &|v| plain_rope(&slice(&v[0]), &cos, &sin),
    );
}

#[test]
fn swiglu_matches_operators() {
    for (t, f) in [(1, 1), (7, 19), (130, 1536)] {
        let inputs = [normal(6, &[t, f]) * 4.0, normal(7, &[t, f])];
        for (kind, tolerance) in WITH_OPERATORS {
            compare(&format!("swiglu {t}x{f}"), &inputs, kind, tolerance, &|v| swiglu(&v[0], &v[1]).unwrap(), &|v| {
                v[0].silu() * &v[1]
            });
        }
    }
    let wide = [normal(8, &[9, 64])];
    compare(
        "swiglu slices",
        &wide,
        Kind::Float,
        1e-6,
        &|v| swiglu(&v[0].narrow(1, 0, 32), &v[0].narrow(1, 32, 32)).unwrap(),
        &|v| v[0].narrow(1, 0, 32).silu() * v[0].narrow(1, 32, 32),
    );
}

#[test]
fn swiglu_survives_extreme_gates() {
    let gate = Tensor::from_slice(&[-1e4f32, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]).view([1, 7]);
    let up = gate.ones_like();
    assert!(relative(&swiglu(&gate, &up).unwrap(), &gate.silu()) < 1e-6);
}

#[test]
fn a_frozen_layer_matches_and_keeps_its_weight_frozen() {
    for prepack in [false, true] {
        for (t, inner, outer) in [(1, 8, 5), (33, 64, 48), (130, 96, 160)] {
            for (kind, tolerance) in BOTH {
                let (w, bias) = (normal(9, &[outer, inner]).to_kind(kind), normal(10, &[outer]).to_kind(kind));
                let layer = LinearLayer::new(&w, Some(&bias), prepack).unwrap();
                let (w, bias) = (w.to_kind(Kind::Double), bias.to_kind(Kind::Double));
                compare(
                    &format!("frozen {t}x{inner}->{outer} prepack={prepack}"),
                    &[normal(11, &[t, inner])],
                    kind,
                    tolerance,
                    &|v| layer.forward(&v[0]).unwrap(),
                    &|v| v[0].linear(&w, Some(&bias)),
                );
            }
        }
    }
}

#[test]
fn a_layer_trains_its_weight_and_bias_when_they_ask() {
    for (t, inner, outer) in [(1, 8, 5), (33, 64, 48), (130, 96, 160)] {
        for (kind, tolerance) in BOTH {
            for with_bias in [false, true] {
                let inputs = [normal(9, &[t, inner]), normal(10, &[outer, inner]), normal(11, &[outer])];
                compare(
                    &format!("trained {t}x{inner}->{outer} bias={with_bias}"),
                    &inputs[..if with_bias { 3 } else { 2 }],
                    kind,
                    tolerance,
                    &|v| LinearLayer::new(&v[1], v.get(2), false).unwrap().forward(&v[0]).unwrap(),
                    &|v| v[0].linear(&v[1], v.get(2)),
                );
            }
        }
    }
}

#[test]
fn the_graph_outlives_the_layer() {
    let x = normal(1, &[4, 6]).set_requires_grad(true);
    let w = normal(2, &[3, 6]);
    let y = {
        let layer = LinearLayer::new(&w, None, false).unwrap();
        layer.forward(&x).unwrap()
    };
    y.sum(Kind::Float).backward();
    let want = Tensor::ones([4, 3], (Kind::Float, tch::Device::Cpu)).matmul(&w);
    assert!(relative(&x.grad(), &want) < 1e-6);
}

#[test]
fn lora_matches_operators() {
    let scale = 1.75;
    for (t, inner, outer, r) in [(1, 8, 5, 2), (40, 64, 48, 8), (257, 96, 192, 16), (5, 576, 192, 3)] {
        for (kind, tolerance) in BOTH {
            let w = normal(12, &[outer, inner]).to_kind(kind);
            let layer = LinearLayer::new(&w, None, false).unwrap();
            let w = w.to_kind(Kind::Double);
            let inputs = [normal(13, &[t, inner]), normal(14, &[r, inner]), normal(15, &[outer, r])];
            compare(
                &format!("lora {t}x{inner}->{outer} r{r}"),
                &inputs,
                kind,
                // bf16 rounds the base product, x Aᵀ and the sum.
                if kind == Kind::Float { tolerance * 2.0 } else { tolerance * 3.0 },
                &|v| lora_linear(&v[0], &layer, &v[1], &v[2], scale, None).unwrap(),
                &|v| v[0].linear(&w, None::<Tensor>) + v[0].matmul(&v[1].tr()).matmul(&v[2].tr()) * scale,
            );
        }
    }
}

#[test]
fn lora_with_a_dropped_input_matches_operators() {
    let w = normal(12, &[20, 32]);
    let layer = LinearLayer::new(&w, None, false).unwrap();
    let w = w.to_kind(Kind::Double);
    let inputs = [normal(13, &[9, 32]), normal(14, &[4, 32]), normal(15, &[20, 4]), normal(16, &[9, 32])];
    compare(
        "lora dropped",
        &inputs,
        Kind::Float,
        2e-6,
        &|v| lora_linear(&v[0], &layer, &v[1], &v[2], 0.5, Some(&v[3])).unwrap(),
        &|v| v[0].linear(&w, None::<Tensor>) + v[3].matmul(&v[1].tr()).matmul(&v[2].tr()) * 0.5,
    );
}

#[test]
fn fp32_masters_beside_bf16_activations_get_fp32_gradients() {
    let w = normal(12, &[48, 64]).to_kind(Kind::BFloat16);
    let layer = LinearLayer::new(&w, None, false).unwrap();
    let x = normal(13, &[300, 64]).to_kind(Kind::BFloat16);
    let leaf = |seed, shape: &[i64]| normal(seed, shape).set_requires_grad(true);
    let (a, b) = (leaf(14, &[8, 64]), leaf(15, &[48, 8]));
    let y = lora_linear(&x, &layer, &a, &b, 2.0, None).unwrap();
    assert_eq!(y.kind(), Kind::BFloat16);
    let dy = normal(17, &[300, 48]).to_kind(Kind::BFloat16);
    (y * &dy).sum(Kind::Float).backward();
    assert_eq!((a.grad().kind(), b.grad().kind()), (Kind::Float, Kind::Float));
    let exact = |t: &Tensor| t.detach().to_kind(Kind::BFloat16).to_kind(Kind::Double);
    let (x, a16, b16, dy) = (exact(&x), exact(&a), exact(&b), exact(&dy));
    let da = dy.matmul(&b16).tr().matmul(&x) * 2.0;
    let db = dy.tr().matmul(&x.matmul(&a16.tr())) * 2.0;
    assert!(relative(&a.grad(), &da) < 4e-3, "{}", relative(&a.grad(), &da));
    assert!(relative(&b.grad(), &db) < 4e-3, "{}", relative(&b.grad(), &db));
}

#[test]
fn wrong_shapes_and_dtypes_are_errors_that_name_them() {
    let (x, w) = (normal(1, &[4, 6]), normal(2, &[3, 5]));
    let message = |r: host_ffi::Result<Tensor>| r.unwrap_err().0;
    assert_eq!(message(rms_norm(&x, &w, EPS)), "rms_norm: weight must be [6], got [3, 5]");
    let bf16 = normal(2, &[6]).to_kind(Kind::BFloat16);
    assert_eq!(message(rms_norm(&x, &bf16, EPS)), "rms_norm: x is Float and weight BFloat16; they must be the same");
    let layer = LinearLayer::new(&w, None, false).unwrap();
    assert_eq!(message(layer.forward(&x)), "LinearLayer: x must be [T, 5], got [4, 6]");
    assert_eq!(message(swiglu(&x, &w)), "swiglu: gate and up must be [T, F], got [4, 6] and [3, 5]");
    let odd = normal(3, &[2, 1, 3]);
    assert_eq!(message(rope(&odd, &x, &x)), "rope: x must be [T, N, H] with an even H, got [2, 1, 3]");
    let (a, b) = (normal(4, &[2, 5]), normal(5, &[4, 2]));
    let good = normal(6, &[4, 5]);
    assert_eq!(message(lora_linear(&good, &layer, &a, &b, 1.0, None)), "lora_linear: b must be [3, 2], got [4, 2]");
    assert!(LinearLayer::new(&odd, None, false).is_err());
    assert!(LinearLayer::new(&w.set_requires_grad(true), None, true).is_err());
}
