use host_ffi::grad::{backward, set_grad};
use host_ffi::optim::{AdamW, fused_adamw};
use tch::{Device, Kind, Tensor};

use crate::reference::{normal, relative};

#[test]
fn gradients_accumulate_into_views_of_a_flat_buffer() {
    let flat = Tensor::zeros([10], (Kind::Float, Device::Cpu));
    let (a, b) = (normal(1, &[2, 3]).set_requires_grad(true), normal(2, &[4]).set_requires_grad(true));
    set_grad(&a, &flat.narrow(0, 0, 6).view([2, 3])).unwrap();
    set_grad(&b, &flat.narrow(0, 6, 4)).unwrap();
    for _ in 0..2 {
        backward(&((&a * 3.0).sum(Kind::Float) + (&b * 5.0).sum(Kind::Float))).unwrap();
    }
    assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 10.0, 10.0, 10.0, 10.0]);
    let _ = flat.shallow_clone().zero_();
    assert_eq!(a.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let leaf = normal(1, &[2, 3]).set_requires_grad(true);
    let error = set_grad(&leaf, &normal(2, &[6])).unwrap_err();
    assert!(error.0.starts_with("set_grad: a Float [2, 3] on cpu cannot take a gradient Float [6]"), "{error}");
    assert!(set_grad(&normal(1, &[2]), &normal(2, &[2])).unwrap_err().0.contains("not a leaf"));
}

#[test]
fn a_backward_pass_can_fail() {
    let error = backward(&normal(1, &[3])).unwrap_err();
    assert!(!error.0.contains('\n') && !error.0.is_empty());
    let error = backward(&normal(1, &[3]).set_requires_grad(true)).unwrap_err();
    assert!(error.0.contains("scalar"), "{error}");
}

#[test]
fn adamw_matches_the_published_algorithm() {
    let settings = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    for n in [1, 17, 5000] {
        let param = normal(1, &[n]);
        let (m, v) = (param.zeros_like(), param.zeros_like());
        let mut want = param.to_kind(Kind::Double);
        let (mut m2, mut v2) = (want.zeros_like(), want.zeros_like());
        for step in 1..=20u64 {
            let grad = normal(100 + step as i64, &[n]);
            fused_adamw(&param, &grad, &m, &v, step, settings).unwrap();
            let g = grad.to_kind(Kind::Double);
            want *= 1.0 - settings.lr * settings.weight_decay;
            m2 = m2 * settings.beta1 + &g * (1.0 - settings.beta1);
            v2 = v2 * settings.beta2 + g.square() * (1.0 - settings.beta2);
            let correct = |beta: f64| 1.0 - beta.powi(step as i32);
            let denominator = (&v2 / correct(settings.beta2)).sqrt() + settings.eps;
            want -= &m2 / correct(settings.beta1) / denominator * settings.lr;
        }
        assert!(relative(&param, &want) < 1e-6, "{}", relative(&param, &want));
        assert!(relative(&v, &v2) < 1e-6);
    }
    let p = normal(1, &[3]);
    assert!(fused_adamw(&p, &normal(1, &[4]), &p, &p, 1, settings).is_err());
}
