//! This machine as hardware to plan for: memory from the kernel, rates by rule of thumb.

use std::path::Path;

use crate::config::plan::{DevicePlan, Dtype, HardwarePlan};
use crate::{Error, Result, machine};

/// What a run on this machine would have. Its rates are assumed, not measured.
pub fn at_hand(device: DevicePlan, dtype: Dtype) -> Result<HardwarePlan> {
    let root = Path::new("/");
    let available = machine::memory(root).map_or(0.0, |memory| memory.available as f64 / 1e9);
    match device {
        DevicePlan::Cpu => {
            let cpu = machine::cpu(root);
            Ok(HardwarePlan {
                name: format!("this machine, {} cores of {}", cpu.cores, cpu.model),
                is_cpu: true,
                devices_per_node: 1,
                memory_gb: available,
                host_memory_gb: available,
                tflops: cpu.cores as f64 * per_core(&cpu.features, dtype),
                link_gb_s: 1.0,
                node_link_gb_s: 0.1,
                disk_gb_s: 0.5,
            })
        }
        DevicePlan::Cuda => {
            let gpus = machine::gpus(root);
            let describe =
                "describe it in a file: `--hardware FILE`, or take one that is shipped, such as `--hardware h100x8`";
            let Some(first) = gpus.first() else {
                return Err(Error::config("`device: cuda`, and this machine has no GPU").hint(describe));
            };
            let Some(memory) = first.memory_total else {
                return Err(Error::config(format!("the driver does not say how much memory `{}` has", first.name))
                    .hint(describe));
            };
            Ok(HardwarePlan {
                name: format!("this machine, {}x {}", gpus.len(), first.name),
                is_cpu: false,
                devices_per_node: gpus.len(),
                memory_gb: memory as f64 / 1e9,
                host_memory_gb: available,
                tflops: 70.0,
                link_gb_s: 10.0,
                node_link_gb_s: 3.0,
                disk_gb_s: 1.0,
            })
        }
    }
}

/// TFLOP/s of a core in a whole step, products and all the rest: measured on an EPYC with AVX-512 (`cargo xtask bench`), by
/// the width of its registers elsewhere.
fn per_core(features: &[&str], dtype: Dtype) -> f64 {
    let has = |name: &str| features.contains(&name);
    match dtype {
        Dtype::Bf16 if has("amx_bf16") => 0.4,
        Dtype::Bf16 if has("avx512_bf16") => 0.25,
        _ if has("avx512f") => 0.1,
        _ => 0.05,
    }
}
