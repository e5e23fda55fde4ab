//! The fused optimizer step.

use tch::Tensor;

use crate::{Result, check, sys};

/// The settings of [`fused_adamw`]; names and meaning are those of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; the parameter shrinks by `lr * weight_decay` first.
    pub weight_decay: f64,
}

/// Updates `param` and its moments in place by one AdamW step (Loshchilov and Hutter 2019, arXiv 1711.05101).
///
/// All four tensors have one shape and device, usually one flat buffer each. `step` counts from 1: the number of this
/// update, for the bias corrections. One pass over memory; same numbers as `torch.optim.AdamW(fused=True)`.
pub fn fused_adamw(
    param: &Tensor,
    grad: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    step: u64,
    settings: AdamW,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, eps, weight_decay } = settings;
    // SAFETY: the tensors are live for the call, which writes through them as libtorch's in-place operators do.
    check(unsafe {
        sys::host_fused_adamw(
            param.as_ptr(),
            grad.as_ptr(),
            exp_avg.as_ptr(),
            exp_avg_sq.as_ptr(),
            step as f64,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
        )
    })
}
