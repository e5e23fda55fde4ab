//! Times every fused function against ordinary operators, forward and backward, interleaved; prints the best of many rounds,
//! which is what a shared machine disturbs least.
//!
//! `cargo run --release -p host-ffi --example ops [part of a name]`, with the sizes of SmolLM2-135M.

use std::time::Instant;

use host_ffi::autograd::{
    LinearLayer, attention_varlen, linear_cross_entropy_sum, lora_linear, rms_norm, rope, swiglu,
};
use host_ffi::backend;
use host_ffi::grad::backward;
use tch::{Device, Kind, Tensor};

const T: i64 = 1024;
const D: i64 = 576;
const F: i64 = 1536;
const N: i64 = 9;
const NKV: i64 = 3;
const H: i64 = 64;
const R: i64 = 8;
const L: i64 = 128;
const V: i64 = 49152;
const ROUNDS: usize = 30;

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    random(shape, kind).set_requires_grad(true)
}

fn best(times: Vec<f64>) -> f64 {
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// A way to compute something, and its name.
type Contender = (&'static str, Box<dyn FnMut() -> Tensor>);

/// Best microseconds of (forward, forward + backward) of each contender, taken in turns.
fn race(contenders: &mut [Contender]) -> Vec<(f64, f64)> {
    let mut times = vec![(vec![], vec![]); contenders.len()];
    for round in 0..ROUNDS + 2 {
        for ((_, run), (forward, both)) in contenders.iter_mut().zip(&mut times) {
            let begun = Instant::now();
            let y = run();
            let middle = begun.elapsed().as_secs_f64() * 1e6;
            if y.requires_grad() {
                // A gradient that differs from element to element, as in a model; making the loss is not timed.
                let loss = (&y * y.detach()).sum(Kind::Float);
                let begun = Instant::now();
                backward(&loss).expect("a backward pass");
                if round >= 2 {
                    both.push(middle + begun.elapsed().as_secs_f64() * 1e6);
                }
            } else if round >= 2 {
                both.push(middle);
            }
            if round >= 2 {
                forward.push(middle);
            }
        }
    }
    times.into_iter().map(|(forward, both)| (best(forward), best(both))).collect()
}

fn report(name: &str, kind: Kind, mut contenders: Vec<Contender>) {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    if !name.contains(&wanted) {
        return;
    }
    let times = race(&mut contenders);
    let base = times.last().expect("a contender").1;
    for ((label, _), (forward, both)) in contenders.iter().zip(&times) {
        println!("{name:<22} {kind:<9?} {label:<22} {forward:>10.0} {both:>10.0} us {:>7.2}x", base / both);
    }
}

fn plain_norm(x: &Tensor, w: &Tensor) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let normed = &wide * (wide.square().mean_dim(&[-1i64][..], true, None::<Kind>) + 1e-5).rsqrt();
    normed.to_kind(x.kind()) * w
}

fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let (a, b) = (wide.narrow(2, 0, H / 2), wide.narrow(2, H / 2, H / 2));
    let (c, s) = (cos.unsqueeze(1), sin.unsqueeze(1));
    Tensor::cat(&[&a * &c - &b * &s, &b * &c + &a * &s], 2).to_kind(x.kind())
}

fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, cu: &[i64]) -> Tensor {
    let part = |x: &Tensor, b: i64, l: i64| x.narrow(0, b, l).transpose(0, 1).unsqueeze(0);
    let documents: Vec<Tensor> = cu
        .windows(2)
        .map(|w| {
            let (b, l) = (w[0], w[1] - w[0]);
            let (q, k, v) = (part(q, b, l), part(k, b, l), part(v, b, l));
            let o = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, 0.125, true);
            o.squeeze_dim(0).transpose(0, 1)
        })
        .collect();
    Tensor::cat(&documents, 0)
}

fn main() {
    println!("cpu {}, {} threads", backend::cpu_capability().unwrap(), backend::num_threads());
    for kind in [Kind::BFloat16, Kind::Float] {
        let (x, w) = (leaf(&[T, D], kind), random(&[D], kind));
        let (x2, w2) = (x.shallow_clone(), w.shallow_clone());
        report(
            "rms_norm",
            kind,
            vec![
                ("fused", Box::new(move || rms_norm(&x, &w, 1e-5).unwrap())),
                ("operators", Box::new(move || plain_norm(&x2, &w2))),
            ],
        );

        let x = leaf(&[T, N, H], kind);
        let angle = random(&[T, H / 2], Kind::Float);
        let (cos, sin) = (angle.cos(), angle.sin());
        let (x2, cos2, sin2) = (x.shallow_clone(), cos.shallow_clone(), sin.shallow_clone());
        report(
            "rope",
            kind,
            vec![
                ("fused", Box::new(move || rope(&x, &cos, &sin).unwrap())),
                ("operators", Box::new(move || plain_rope(&x2, &cos2, &sin2))),
            ],
        );

        let (gate, up) = (leaf(&[T, F], kind), leaf(&[T, F], kind));
        let (gate2, up2) = (gate.shallow_clone(), up.shallow_clone());
        report(
            "swiglu",
            kind,
            vec![
                ("fused", Box::new(move || swiglu(&gate, &up).unwrap())),
                ("operators", Box::new(move || gate2.silu() * &up2)),
            ],
        );

        for (label, cu) in [
            ("attention 8x128", (0..=8).map(|i| i * 128).collect::<Vec<i64>>()),
            ("attention mixed", vec![0, 50, 170, 260, 560, 700, 1024]),
            ("attention 1x1024", vec![0, 1024]),
        ] {
            let (q, k, v) = (leaf(&[T, N, H], kind), leaf(&[T, NKV, H], kind), leaf(&[T, NKV, H], kind));
            let (q2, k2, v2) = (q.shallow_clone(), k.shallow_clone(), v.shallow_clone());
            let cu2 = cu.clone();
            report(
                label,
                kind,
                vec![
                    ("varlen", Box::new(move || attention_varlen(&q, &k, &v, &cu, 0.125).unwrap())),
                    ("SDPA per document", Box::new(move || plain_attention(&q2, &k2, &v2, &cu2))),
                ],
            );
        }

        for (inner, outer) in [(D, F), (F, D), (D, D), (D, NKV * H)] {
            let (x, w) = (leaf(&[T, inner], kind), random(&[outer, inner], kind));
            let (packed, plain) =
                (LinearLayer::new(&w, None, true).unwrap(), LinearLayer::new(&w, None, false).unwrap());
            let (x2, x3) = (x.shallow_clone(), x.shallow_clone());
            report(
                &format!("linear {inner}->{outer}"),
                kind,
                vec![
                    ("prepacked", Box::new(move || packed.forward(&x).unwrap())),
                    ("plain", Box::new(move || plain.forward(&x2).unwrap())),
                    ("operators", Box::new(move || x3.linear(&w, None::<Tensor>))),
                ],
            );
        }

        let (x, w) = (leaf(&[T, D], kind), random(&[D, D], kind));
        let (a, b) = (leaf(&[R, D], Kind::Float), leaf(&[D, R], Kind::Float));
        let layer = LinearLayer::new(&w, None, false).unwrap();
        let (x2, a2, b2) = (x.shallow_clone(), a.shallow_clone(), b.shallow_clone());
        report(
            "lora 576->576 r8",
            kind,
            vec![
                ("fused", Box::new(move || lora_linear(&x, &layer, &a, &b, 2.0, None).unwrap())),
                (
                    "operators",
                    Box::new(move || {
                        let (a, b) = (a2.to_kind(x2.kind()), b2.to_kind(x2.kind()));
                        x2.linear(&w, None::<Tensor>) + x2.matmul(&a.tr()).matmul(&b.tr()) * 2.0
                    }),
                ),
            ],
        );

        let (x, w) = (leaf(&[L, D], kind), random(&[V, D], kind) * 0.05);
        let labels = Tensor::randint(V, [L], (Kind::Int64, Device::Cpu));
        let (head, packed) = (LinearLayer::new(&w, None, false).unwrap(), LinearLayer::new(&w, None, true).unwrap());
        let (x2, x3, labels2, labels3) =
            (x.shallow_clone(), x.shallow_clone(), labels.shallow_clone(), labels.shallow_clone());
        report(
            "linear_cross_entropy",
            kind,
            vec![
                ("fused, prepacked", Box::new(move || linear_cross_entropy_sum(&x3, &packed, &labels3, 128).unwrap())),
                ("fused", Box::new(move || linear_cross_entropy_sum(&x, &head, &labels, 128).unwrap())),
                (
                    "operators",
                    Box::new(move || {
                        let logits = x2.linear(&w, None::<Tensor>).to_kind(Kind::Float);
                        logits.cross_entropy_loss(&labels2, None::<Tensor>, tch::Reduction::Sum, -100, 0.0)
                    }),
                ),
            ],
        );

        let (x, w) = (random(&[T, D], kind), random(&[F, D], kind));
        report("GEMM 1024x576->1536", kind, vec![("linear", Box::new(move || x.linear(&w, None::<Tensor>)))]);
    }
}
