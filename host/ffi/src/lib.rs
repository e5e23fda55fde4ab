//! The C++ shim over libtorch, and every `unsafe` block of `host`.
//!
//! Owns the calls that `tch` lacks: fused autograd functions, gradients into a flat buffer, the fused optimizer, c10d,
//! loading the accelerator half of libtorch, memory maps; and the process's allocator, which counts. Everything public is safe: shapes and dtypes are checked on
//! the C++ side, exceptions come back as [`FfiError`], and handles free themselves. It knows nothing of models, configs
//! or data. The decision to question: kernels for the CPU are written here and vectorised per x86-64 level at start-up,
//! while every other device runs the same formula as ordinary operators.
//!
//! Shape legend, used throughout: `T` tokens, `D` hidden, `N` heads, `Nkv` key-value heads, `H` head dim, `F` feed-forward,
//! `L` label positions, `V` vocabulary, `r` LoRA rank.
#![deny(missing_docs)]

pub mod alloc;
pub mod autograd;
pub mod backend;
pub mod dist;
pub mod grad;
pub mod mmap;
pub mod nccl;
pub mod optim;
pub mod process;
pub mod rng;
pub mod shard;
mod sys;

use std::ffi::{CStr, c_char};

/// A failure inside libtorch, c10d or the operating system: one line that says what was wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FfiError(pub String);

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, FfiError>;

impl FfiError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl From<tch::TchError> for FfiError {
    /// Keeps the first line: the rest is a C++ backtrace.
    fn from(error: tch::TchError) -> Self {
        Self(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// Turns the shim's error convention (null, or a message to free) into a `Result`.
fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    Err(FfiError(take_string(message)))
}

/// Copies a string the shim allocated and frees it.
fn take_string(text: *mut c_char) -> String {
    // SAFETY: the shim hands over a NUL-terminated string it allocated and forgets it.
    let owned = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: `text` came from the shim's `strdup` and is not used again.
    unsafe { sys::host_free_string(text) };
    owned
}

/// Calls a shim function that returns one new tensor.
fn new_tensor(call: impl FnOnce(*mut *mut torch_sys::C_tensor) -> *mut c_char) -> Result<tch::Tensor> {
    let mut out = std::ptr::null_mut();
    check(call(&mut out))?;
    assert!(!out.is_null(), "the shim reported success without a tensor");
    // SAFETY: on success `out` is a tensor the shim allocated with `new` and gave away; `Tensor` frees it.
    Ok(unsafe { tch::Tensor::from_ptr(out) })
}

/// The number libtorch knows a dtype by (`c10::ScalarType`), or an error for the exotic ones.
fn scalar_type(kind: tch::Kind) -> Result<i32> {
    use tch::Kind::*;
    Ok(match kind {
        Uint8 => 0,
        Int8 => 1,
        Int16 => 2,
        Int => 3,
        Int64 => 4,
        Half => 5,
        Float => 6,
        Double => 7,
        Bool => 11,
        BFloat16 => 15,
        other => return Err(FfiError::new(format!("dtype {other:?} is not supported here"))),
    })
}
