//! The only module that knows which devices there are. Everything else is handed a [`tch::Device`].

use std::path::Path;

use host::config::plan::DevicePlan;
use host::doctor::{Probe, ProbedDevice};
use host::{Error, Result};
use tch::Device;

use crate::script::{self, SDK_VERSION};
use crate::torch::TorchContext;

/// Opens the device a plan names for this local rank; loads the accelerator half of libtorch from `libtorch_lib` first,
/// because the first question about CUDA decides the answer for the life of the process.
pub fn open(plan: DevicePlan, local_rank: usize, libtorch_lib: &Path) -> Result<Device> {
    match plan {
        DevicePlan::Cpu => Ok(Device::Cpu),
        DevicePlan::Cuda => {
            let backend = host_ffi::backend::load_accelerator(libtorch_lib).torch("load the GPU half of libtorch")?;
            let count = host_ffi::backend::device_count();
            if local_rank < count {
                return Ok(Device::Cuda(local_rank));
            }
            let what = match (backend, count) {
                (None, _) => {
                    format!("`device: cuda`, but the libtorch in `{}` has no GPU half", libtorch_lib.display())
                }
                (Some(_), 0) => "`device: cuda`, but no GPU can be used".to_owned(),
                (Some(_), n) => format!("rank {local_rank} of this machine has no GPU: there are {n}"),
            };
            Err(Error::config(what).hint("`host doctor` shows what is there; `device=cpu` runs without a GPU"))
        }
    }
}

/// The library that moves memory between GPUs for the GPU half of libtorch in `libtorch_lib`.
pub fn collectives_library(libtorch_lib: &Path) -> Result<&'static str> {
    let accelerator = host_ffi::backend::load_accelerator(libtorch_lib).torch("load the GPU half of libtorch")?;
    Ok(host_ffi::nccl::library_of(accelerator.as_deref().unwrap_or_default()))
}

/// A device as PyTorch writes it.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// What `host doctor` asks a worker.
pub fn probe(libtorch_lib: &Path) -> Result<Probe> {
    let backend = host_ffi::backend::load_accelerator(libtorch_lib).torch("load the GPU half of libtorch")?;
    let devices = (0..host_ffi::backend::device_count())
        .map(|index| ProbedDevice {
            index,
            library: backend.clone().unwrap_or_default(),
            memory_total: host_ffi::backend::device_memory(index).ok().map(|memory| memory.total),
        })
        .collect();
    Ok(Probe {
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        sdk_version: Some(SDK_VERSION.to_owned()),
        libtorch_version: host_ffi::backend::libtorch_version().torch("ask for libtorch's version")?,
        cpu_capability: host_ffi::backend::cpu_capability().torch("ask for the CPU's instruction set")?,
        threads: host_ffi::backend::num_threads(),
        isolation: script::isolate::layers().into_iter().map(str::to_owned).collect(),
        devices,
    })
}
