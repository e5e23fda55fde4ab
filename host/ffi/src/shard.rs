//! What sharded weights and recomputed activations are made of: memory that comes and goes under a tensor, and steps of a
//! backward pass that are the caller's.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use crate::sys::{self, In, Message, Out};
use crate::{Result, check, new_tensor};

/// Gives the memory under `tensor` back. Every view of it follows: they keep their shapes and may not be read or written
/// before [`take_storage`].
pub fn free_storage(tensor: &Tensor) -> Result<()> {
    // SAFETY: the tensor is live; storages are reference-counted, and this one's content is declared gone.
    check(unsafe { sys::host_storage_free(tensor.as_ptr()) })
}

/// Takes the memory again that [`free_storage`] gave back, with any content; nothing to do where it was not.
///
/// `tensor` is the one that the storage was made for, or reaches as far.
pub fn take_storage(tensor: &Tensor) -> Result<()> {
    // SAFETY: the tensor is live; the new memory is as long as the tensor reaches.
    check(unsafe { sys::host_storage_take(tensor.as_ptr()) })
}

/// Exchanges the memory under two tensors that have storages of their own, on one device. Every view follows, and so does
/// whether there is memory at all.
pub fn swap_storage(one: &Tensor, other: &Tensor) -> Result<()> {
    // SAFETY: both tensors are live, their storages reference-counted; each keeps exactly one owner of each memory.
    check(unsafe { sys::host_storage_swap(one.as_ptr(), other.as_ptr()) })
}

/// What a [`node`] does in a backward pass: from the gradient of its output to that of its input, where it has one.
type Backward = Box<dyn FnMut(&Tensor) -> Result<Option<Tensor>>>;

/// Returns `output`, to autograd a function of `x` whose backward is `backward`.
///
/// `output` was computed without a graph and is shared, not copied; it may be `x` itself, to hook a step into the
/// backward pass. The result requires a gradient even where `x` does not: `backward` may give gradients to leaves of its
/// own. It runs on the thread of the backward pass, while the thread that asked for it waits, at most once for each pass;
/// an error ends the pass and comes out of it. Autograd is off inside, as in every backward.
pub fn node(
    x: &Tensor,
    output: &Tensor,
    backward: impl FnMut(&Tensor) -> Result<Option<Tensor>> + 'static,
) -> Result<Tensor> {
    let boxed: Box<Backward> = Box::new(Box::new(backward));
    let data = Box::into_raw(boxed).cast::<c_void>();
    // SAFETY: both tensors are live; `data` is taken over and freed by `drop_backward`, once. libtorch calls `call_backward`
    // from one thread at a time, the caller of backward waiting, so that the closure never runs beside its owner.
    new_tensor(|out| unsafe { sys::host_node(x.as_ptr(), output.as_ptr(), call_backward, drop_backward, data, out) })
}

/// # Safety
/// `data` came from [`node`]; `grad` is live or undefined, `out` takes a tensor that the caller owns.
unsafe extern "C" fn call_backward(data: *mut c_void, grad: In, out: Out) -> Message {
    // SAFETY: `data` is the box of `node`, not yet freed, and used by one thread at a time.
    let backward = unsafe { &mut *data.cast::<Backward>() };
    // SAFETY: a shallow copy of a live tensor, which this value frees.
    let grad = unsafe { Tensor::clone_from_ptr(grad.cast_mut()) };
    let outcome = catch_unwind(AssertUnwindSafe(|| backward(&grad)));
    let text = match outcome {
        Ok(Ok(made)) => {
            if let Some(made) = made {
                // SAFETY: `out` is live for the call; the tensor is a new handle that the C++ side frees.
                unsafe { *out = std::mem::ManuallyDrop::new(made).as_mut_ptr() };
            }
            return std::ptr::null_mut();
        }
        Ok(Err(error)) => error.0,
        Err(_) => "a step of the backward pass panicked".to_owned(),
    };
    // SAFETY: the text is live for the call, which copies it.
    unsafe { sys::host_message(text.as_ptr().cast::<c_char>(), text.len()) }
}

/// # Safety
/// `data` came from [`node`] and is not used again.
unsafe extern "C" fn drop_backward(data: *mut c_void) {
    // SAFETY: as the caller promises.
    drop(unsafe { Box::from_raw(data.cast::<Backward>()) });
}
