//! NCCL and RCCL, loaded at run time: what a [`Group`](crate::dist::Group) moves the memory of a device with.

use std::time::Duration;

use tch::Tensor;

use crate::backend::c_index;
use crate::dist::{c_string, millis};
use crate::{FfiError, Result, check, sys};

/// The library that goes with a GPU half of libtorch, as [`load_accelerator`](crate::backend::load_accelerator) names it.
pub fn library_of(accelerator: &str) -> &'static str {
    if accelerator.contains("hip") { "librccl.so.1" } else { "libnccl.so.2" }
}

/// Loads `library` (a path, or a name that the loader finds), checks that it has every function we call, and returns its
/// version, such as `2.27.3`.
///
/// A library that libtorch's GPU half has loaded already is taken by its name alone.
pub fn version(library: &str) -> Result<String> {
    let path = c_string("the path", library)?;
    let mut version = 0;
    // SAFETY: the path is NUL-terminated and the out-pointer live for the call.
    check(unsafe { sys::host_nccl_version(path.as_ptr(), &mut version) })?;
    // nccl.h: major * 10,000 + minor * 100 + patch, since 2.9.
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// Length of what rank 0 makes and every rank needs to find the others.
const ID_BYTES: usize = 128;

/// Makes the name of a new communicator; one rank does this and tells the others.
pub(crate) fn unique_id(library: &str) -> Result<Vec<u8>> {
    let path = c_string("the path", library)?;
    let mut id = vec![0; ID_BYTES];
    // SAFETY: the path is NUL-terminated; `id` has the 128 bytes that are written.
    check(unsafe { sys::host_nccl_unique_id(path.as_ptr(), id.as_mut_ptr()) })?;
    Ok(id)
}

/// A communicator over the devices of all ranks.
#[derive(Debug)]
pub(crate) struct Nccl {
    raw: *mut sys::Nccl,
}

impl Nccl {
    /// Joins the communicator `id` with `device`; returns when all ranks have come.
    pub(crate) fn join(
        library: &str,
        id: &[u8],
        (rank, world_size): (i32, i32),
        device: usize,
        timeout: Duration,
    ) -> Result<Self> {
        if id.len() != ID_BYTES {
            return Err(FfiError(format!("a communicator's name has {ID_BYTES} bytes, not {}", id.len())));
        }
        let path = c_string("the path", library)?;
        let (device, timeout) = (c_index(device)?, millis(timeout));
        let mut raw = std::ptr::null_mut();
        // SAFETY: path and id are live for the call, the id has its 128 bytes, `raw` receives what this value frees.
        check(unsafe { sys::host_nccl_new(path.as_ptr(), id.as_ptr(), rank, world_size, device, timeout, &mut raw) })?;
        Ok(Self { raw })
    }

    /// Which optimizer step messages are to name from now on.
    pub(crate) fn set_step(&self, step: i64) {
        // SAFETY: the handle is live.
        unsafe { sys::host_nccl_set_step(self.raw, step) }
    }

    /// Fails when a collective has failed or timed out since.
    pub(crate) fn check(&self) -> Result<()> {
        // SAFETY: the handle is live.
        check(unsafe { sys::host_nccl_check(self.raw) })
    }

    pub(crate) fn all_reduce_sum(&self, tensor: &Tensor) -> Result<()> {
        // SAFETY: handle and tensor are live; the memory stays with the stream that frees it.
        check(unsafe { sys::host_nccl_all_reduce_sum(self.raw, tensor.as_ptr()) })
    }

    pub(crate) fn broadcast(&self, tensor: &Tensor, root: i32) -> Result<()> {
        // SAFETY: as above.
        check(unsafe { sys::host_nccl_broadcast(self.raw, tensor.as_ptr(), root) })
    }

    pub(crate) fn all_gather_into(&self, whole: &Tensor, shard: &Tensor) -> Result<NcclWork> {
        let mut work = std::ptr::null_mut();
        // SAFETY: all are live; the work keeps the tensors and the communicator.
        check(unsafe { sys::host_nccl_all_gather_into(self.raw, whole.as_ptr(), shard.as_ptr(), &mut work) })?;
        Ok(NcclWork(work))
    }

    pub(crate) fn reduce_scatter_sum(&self, shard: &Tensor, whole: &Tensor) -> Result<NcclWork> {
        let mut work = std::ptr::null_mut();
        // SAFETY: as above.
        check(unsafe { sys::host_nccl_reduce_scatter_sum(self.raw, shard.as_ptr(), whole.as_ptr(), &mut work) })?;
        Ok(NcclWork(work))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `host_nccl_new` and is freed once; works hold references of their own.
        unsafe { sys::host_nccl_free(self.raw) }
    }
}

/// A collective under way on a stream of its own.
#[derive(Debug)]
pub(crate) struct NcclWork(*mut sys::NcclWork);

impl NcclWork {
    /// Makes the current stream wait for it; the caller goes on.
    pub(crate) fn wait(&self) -> Result<()> {
        // SAFETY: the work is live.
        check(unsafe { sys::host_nccl_wait(self.0) })
    }
}

// SAFETY: the work's event and tensors may be used from any one thread at a time.
unsafe impl Send for NcclWork {}

impl Drop for NcclWork {
    fn drop(&mut self) {
        // SAFETY: came from a collective and is freed once.
        unsafe { sys::host_nccl_work_free(self.0) }
    }
}
