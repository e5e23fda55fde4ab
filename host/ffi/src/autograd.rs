//! Differentiable functions with hand-written backward passes.
//!
//! Each is one `torch::autograd::Function`: on the CPU in fp32 and bf16 one fused pass over memory each way, on any other
//! device the same formula in ordinary operators. Arithmetic is fp32 inside and results are rounded once, unless a line
//! below says otherwise. Second derivatives do not exist. Errors name the function and the shapes it got.

use tch::Tensor;

use crate::{Result, check, new_tensor, sys};

/// Returns the root-mean-square norm of each row times a weight.
///
/// `x` is `[T, D]`, `weight` `[D]` of the same dtype; the result has both. As Llama in torchtune and transformers:
/// `round(x / sqrt(mean(x²) + eps)) * weight`, where `round` is to the dtype of `x` (Zhang and Sennrich 2019,
/// arXiv 1910.07467). A weight that requires a gradient gets one.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    // SAFETY: both pointers are live tensors for the whole call, which copies what it keeps.
    new_tensor(|out| unsafe { sys::host_rms_norm(x.as_ptr(), weight.as_ptr(), eps, out) })
}

/// Returns `x` with rotary position embedding, in the half-split layout of Hugging Face.
///
/// `x` is `[T, N, H]`; `cos` and `sin` are fp32 `[T, H/2]`, one row per token, so that positions restart wherever the
/// caller likes. With `a`, `b` the halves of a head: `(a·cos − b·sin, b·cos + a·sin)` (Su et al. 2021, arXiv 2104.09864).
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    // SAFETY: the pointers are live tensors for the whole call, which copies what it keeps.
    new_tensor(|out| unsafe { sys::host_rope(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

/// Returns `silu(gate) * up` (Shazeer 2020, arXiv 2002.05202), both `[T, F]` of one dtype.
///
/// The two may be column slices of one wider matrix; no copy is made then.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    // SAFETY: both pointers are live tensors for the whole call, which copies what it keeps.
    new_tensor(|out| unsafe { sys::host_swiglu(gate.as_ptr(), up.as_ptr(), out) })
}

/// Returns causal attention within each document of a batch without padding.
///
/// `q` is `[T, N, H]`, `k` and `v` `[T, Nkv, H]`; `Nkv` divides `N` (grouped-query attention). `cu_seqlens` starts with 0,
/// ends with `T` and never falls: document `i` is tokens `cu_seqlens[i]..cu_seqlens[i + 1]`, and may be empty.
/// `softmax(scale · q kᵀ) v` with the flash backward (Dao 2023, arXiv 2307.08691). CUDA and ROCm use libtorch's
/// variable-length kernel for bf16 and fp16.
pub fn attention_varlen(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Result<Tensor> {
    let (offsets, count) = (cu_seqlens.as_ptr(), cu_seqlens.len());
    // SAFETY: the tensors and `count` offsets are live for the whole call, which copies what it keeps.
    new_tensor(|out| unsafe {
        sys::host_attention_varlen(q.as_ptr(), k.as_ptr(), v.as_ptr(), offsets, count, scale, out)
    })
}

/// A linear layer, frozen unless its weight requires a gradient.
///
/// The backward of a frozen one is one product and nothing is saved for it; otherwise the input is. Backward nodes hold the
/// weight themselves, so the layer may be dropped while a graph that used it lives. The weight must not change between a
/// forward and its backward.
#[derive(Debug)]
pub struct LinearLayer {
    raw: *mut sys::LinearLayer,
    weight: Tensor,
}

// SAFETY: the C++ object is immutable after construction and holds reference-counted tensors, whose counts are atomic;
// libtorch reads tensors from several threads freely.
unsafe impl Send for LinearLayer {}

impl LinearLayer {
    /// Builds the layer over a weight `[out, in]` and perhaps a bias `[out]`; the storage is shared, not copied.
    ///
    /// `prepack` keeps two more copies of a CPU weight in oneDNN's own layouts, one for each direction: memory for speed.
    /// It has no effect on other devices. Fails when the shapes do not fit, or to prepack a weight that requires a gradient.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, prepack: bool) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let bias = bias.map_or(std::ptr::null(), |b| b.as_ptr());
        // SAFETY: `weight` is live, `bias` is live or null, and the call keeps references of its own.
        check(unsafe { sys::host_linear_layer_new(weight.as_ptr(), bias, prepack.into(), &mut raw) })?;
        Ok(Self { raw, weight: weight.detach() })
    }

    /// Returns `x Wᵀ (+ bias)`: `[T, in]` to `[T, out]`, in the dtype of the weight, which `x` must have.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // SAFETY: `raw` lives as long as `self`; `x` is live for the call.
        new_tensor(|out| unsafe { sys::host_linear_layer_forward(self.raw, x.as_ptr(), out) })
    }

    /// The plain weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Drop for LinearLayer {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `host_linear_layer_new` and is freed once.
        unsafe { sys::host_linear_layer_free(self.raw) }
    }
}

/// Returns `x Wᵀ (+ bias) + scale · (x' Aᵀ) Bᵀ` (Hu et al. 2021, arXiv 2106.09685) as one function.
///
/// `x` is `[T, in]`, `a` `[r, in]`, `b` `[out, r]`; `x'` is `dropped_x` (same shape and dtype as `x`) where there is
/// dropout, else `x`. `a` and `b` may be fp32 masters beside a bf16 `x`: they are rounded to the dtype of `x` for the
/// products, and their gradients are summed in fp32 and returned in their own dtype. Saved for the backward: `x'` and
/// `x' Aᵀ`. The layer's own weight gets no gradient. With a dropped input the gradient through the adapter flows into `dropped_x`.
pub fn lora_linear(
    x: &Tensor,
    layer: &LinearLayer,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    dropped_x: Option<&Tensor>,
) -> Result<Tensor> {
    let dropped = dropped_x.map_or(std::ptr::null(), |t| t.as_ptr());
    // SAFETY: all tensors are live (or `dropped` null) for the call, `layer.raw` as long as `layer`.
    new_tensor(|out| unsafe {
        sys::host_lora_linear(x.as_ptr(), layer.raw, a.as_ptr(), b.as_ptr(), scale, dropped, out)
    })
}

/// Returns the summed cross-entropy of `hidden · headᵀ` against `labels`, as an fp32 scalar.
///
/// `hidden` is `[L, D]` in the dtype of the head `[V, D]`; `labels` are int64 `[L]`, each in `0..V` or -100, which adds
/// nothing. Logits are made `chunk_rows` rows at a time in the compute dtype, the softmax is fp32, and the gradient of
/// `hidden` is made in the same pass when one is wanted (the idea of Liger Kernel, arXiv 2410.10989): at most one chunk
/// of logits exists, and the backward only scales. A head that requires a gradient is used again in the backward instead,
/// still one chunk at a time. On the CPU a label outside of the vocabulary is an error.
pub fn linear_cross_entropy_sum(
    hidden: &Tensor,
    head: &LinearLayer,
    labels: &Tensor,
    chunk_rows: i64,
) -> Result<Tensor> {
    cross_entropy(hidden, head, labels, chunk_rows, true)
}

/// Returns the cross-entropy of each row, fp32 `[L]`: the negative log-probability of its label, 0 where that is -100.
/// Otherwise as [`linear_cross_entropy_sum`].
pub fn linear_cross_entropy(hidden: &Tensor, head: &LinearLayer, labels: &Tensor, chunk_rows: i64) -> Result<Tensor> {
    cross_entropy(hidden, head, labels, chunk_rows, false)
}

fn cross_entropy(hidden: &Tensor, head: &LinearLayer, labels: &Tensor, chunk_rows: i64, sum: bool) -> Result<Tensor> {
    // SAFETY: both tensors are live for the call, `head.raw` as long as `head`.
    new_tensor(|out| unsafe {
        sys::host_linear_cross_entropy(hidden.as_ptr(), head.raw, labels.as_ptr(), chunk_rows, sum, out)
    })
}
