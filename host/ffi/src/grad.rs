//! Gradients: where they accumulate, and a backward pass that can fail.

use tch::Tensor;

use crate::{Result, check, sys};

/// Makes `view` the gradient of `leaf`, so that every backward pass adds into it in place.
///
/// With views of one flat buffer, zeroing, clipping and reducing all gradients are single operations. Fails unless
/// `leaf` is a leaf that requires a gradient and `view` has its shape, dtype and device.
pub fn set_grad(leaf: &Tensor, view: &Tensor) -> Result<()> {
    // SAFETY: both tensors are live; the leaf keeps a reference to the view.
    check(unsafe { sys::host_set_grad(leaf.as_ptr(), view.as_ptr()) })
}

/// Runs the backward pass of `output` from `grad`, the gradient of it: same shape and dtype.
pub fn backward_from(output: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both tensors are live for the call.
    check(unsafe { sys::host_backward_from(output.as_ptr(), grad.as_ptr()) })
}

/// Whether operations of this thread record a graph.
pub fn is_enabled() -> bool {
    // SAFETY: no arguments; the call does not throw.
    unsafe { sys::host_grad_enabled() != 0 }
}

/// Runs the backward pass of a scalar; gradients are added to those already there.
pub fn backward(loss: &Tensor) -> Result<()> {
    // SAFETY: `loss` is live for the call.
    check(unsafe { sys::host_backward(loss.as_ptr()) })
}
