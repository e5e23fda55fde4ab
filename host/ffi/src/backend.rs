//! Devices, threads and the accelerator half of libtorch.
//!
//! The device is called `cuda` on ROCm too, as in PyTorch. [`load_accelerator`] has to come before any other question
//! about devices: libtorch remembers the answer "no".

use std::ffi::CString;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

use crate::{FfiError, Result, check, new_tensor, sys, take_string};

/// The accelerator libraries looked for, CUDA first.
const ACCELERATORS: [&str; 2] = ["libtorch_cuda.so", "libtorch_hip.so"];

/// Highest memory use of a device since the start or the last [`reset_peak`], in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPeaks {
    /// Blocks in use, counting those a stream still holds (torchtune's `peak_memory_active`).
    pub active: u64,
    /// Memory handed out to tensors (`peak_memory_alloc`).
    pub allocated: u64,
    /// Memory taken from the driver (`peak_memory_reserved`).
    pub reserved: u64,
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Free at the moment, all processes considered.
    pub free: u64,
    /// Installed.
    pub total: u64,
}

/// Loads the accelerator half of libtorch from `lib_dir` and returns its file name, or `None` when there is none.
///
/// Fails when the library cannot be loaded, or when it lies in another folder than the `libtorch_cpu.so` this process
/// runs on: halves of two builds must not meet. Symbolic links are followed before comparing.
pub fn load_accelerator(lib_dir: &Path) -> Result<Option<String>> {
    let Some(path) = ACCELERATORS.iter().map(|name| lib_dir.join(name)).find(|path| path.exists()) else {
        return Ok(None);
    };
    let half = real_path(&path)?;
    let cpu = real_path(&libtorch_cpu_path()?)?;
    if half.parent() != cpu.parent() {
        return Err(FfiError::new(format!(
            "`{}` belongs to another libtorch than `{}`, which this process runs on",
            half.display(),
            cpu.display()
        )));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let c_path = CString::new(half.as_os_str().as_encoded_bytes())
        .map_err(|_| FfiError::new(format!("the path `{}` holds a NUL byte", half.display())))?;
    // SAFETY: `c_path` is NUL-terminated. Loading runs the library's constructors, which libtorch means to be run so.
    check(unsafe { sys::host_load_library(c_path.as_ptr()) })?;
    Ok(Some(name))
}

fn real_path(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|e| FfiError::new(format!("cannot find `{}`: {e}", path.display())))
}

/// Returns the path of the `libtorch_cpu.so` this process runs on, as the loader found it.
pub fn libtorch_cpu_path() -> Result<PathBuf> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` receives a string that `take_string` frees.
    check(unsafe { sys::host_libtorch_cpu_path(&mut out) })?;
    Ok(PathBuf::from(take_string(out)))
}

/// Returns how many accelerator devices there are; 0 without an accelerator or a driver.
pub fn device_count() -> usize {
    // SAFETY: no arguments; the call does not throw.
    let count = unsafe { sys::host_device_count() };
    usize::try_from(count).unwrap_or(0)
}

/// Returns free and total memory of accelerator device `index`. Fails when there is no such device.
pub fn device_memory(index: usize) -> Result<DeviceMemory> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both out-pointers are live for the call.
    check(unsafe { sys::host_device_memory(c_index(index)?, &mut free, &mut total) })?;
    Ok(DeviceMemory { free, total })
}

/// Returns the peaks of a device's allocator; `None` for the CPU, where libtorch keeps none.
pub fn memory_stats(device: Device) -> Result<Option<MemoryPeaks>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut active, mut allocated, mut reserved) = (0, 0, 0);
    // SAFETY: the three out-pointers are live for the call.
    check(unsafe { sys::host_memory_stats(c_index(index)?, &mut active, &mut allocated, &mut reserved) })?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(Some(MemoryPeaks { active: bytes(active), allocated: bytes(allocated), reserved: bytes(reserved) }))
}

/// Starts the peaks of [`memory_stats`] again from what is in use now; nothing to do on the CPU.
pub fn reset_peak(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // SAFETY: no pointers.
    check(unsafe { sys::host_reset_peak(c_index(index)?) })
}

/// The same tensor of host memory on `device`, without waiting for what the device still computes.
pub fn to_device(tensor: &Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(index) = device else { return Ok(tensor.shallow_clone()) };
    let index = c_index(index)?;
    // SAFETY: the tensor is live for the call; the copy keeps its pinned memory until it is done.
    new_tensor(|out| unsafe { sys::host_to_device(tensor.as_ptr(), index, out) })
}

/// Waits until everything queued on a device is done; nothing to do on the CPU.
pub fn synchronize(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // SAFETY: no pointers.
    check(unsafe { sys::host_synchronize(c_index(index)?) })
}

/// Returns the version of libtorch this was compiled against, such as `2.11.0`.
pub fn libtorch_version() -> Result<String> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` receives a string that `take_string` frees.
    check(unsafe { sys::host_libtorch_version(&mut out) })?;
    Ok(take_string(out))
}

/// Returns the instruction set libtorch uses on this CPU, such as `AVX512`.
pub fn cpu_capability() -> Result<String> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` receives a string that `take_string` frees.
    check(unsafe { sys::host_cpu_capability(&mut out) })?;
    Ok(take_string(out))
}

/// Makes every computing thread treat denormal numbers as zero, or not; returns whether the CPU can.
///
/// A property of threads: call it again after [`set_num_threads`].
pub fn set_flush_denormal(on: bool) -> Result<bool> {
    let mut supported = 0;
    // SAFETY: the out-pointer is live for the call.
    check(unsafe { sys::host_set_flush_denormal(on.into(), &mut supported) })?;
    Ok(supported != 0)
}

/// Returns how many threads one operator uses.
pub fn num_threads() -> usize {
    // SAFETY: no arguments; the call does not throw.
    let count = unsafe { sys::host_num_threads() };
    usize::try_from(count).unwrap_or(1)
}

/// Sets how many threads one operator uses. Fails for zero.
pub fn set_num_threads(count: usize) -> Result<()> {
    let count = i32::try_from(count).map_err(|_| FfiError::new(format!("{count} threads are too many")))?;
    // SAFETY: no pointers.
    check(unsafe { sys::host_set_num_threads(count) })
}

pub(crate) fn c_index(index: usize) -> Result<i32> {
    i32::try_from(index).map_err(|_| FfiError::new(format!("there is no device cuda:{index}")))
}
