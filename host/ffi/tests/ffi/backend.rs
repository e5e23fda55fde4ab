use std::path::Path;

use host_ffi::FfiError;
use host_ffi::{backend::*, nccl};
use tch::Device;

#[test]
fn a_cpu_has_no_peaks_and_no_devices_to_ask() {
    assert_eq!(memory_stats(Device::Cpu), Ok(None));
    assert_eq!(reset_peak(Device::Cpu), Ok(()));
    assert_eq!(synchronize(Device::Cpu), Ok(()));
    let missing = device_count() + 7;
    assert_eq!(device_memory(missing), Err(FfiError(format!("there is no device cuda:{missing}"))));
    assert!(memory_stats(Device::Cuda(missing)).is_err());
}

#[test]
fn no_accelerator_in_a_folder_without_one() {
    assert_eq!(load_accelerator(Path::new("/nonexistent")), Ok(None));
}

#[test]
fn an_accelerator_of_another_libtorch_is_refused() {
    let dir = std::env::temp_dir().join(format!("host-ffi-accelerator-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("libtorch_cuda.so"), b"not a library").unwrap();
    let error = load_accelerator(&dir).unwrap_err();
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(error.0.contains("belongs to another libtorch"), "{error}");
}

/// The library of PyPI's wheel, which `cargo xtask test` fetches: without a GPU it still has every function and a version.
#[test]
fn nccl_has_every_function() {
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.libtorch/nccl/lib/libnccl.so.2");
    if library.exists() {
        let version = nccl::version(library.to_str().unwrap()).unwrap();
        assert!(version.starts_with("2."), "{version}");
    } else {
        println!("skipped: there is no NCCL in .libtorch; `cargo xtask test` fetches it");
    }
    let error = nccl::version("libnothing.so.7").unwrap_err();
    assert!(error.0.starts_with("cannot load `libnothing.so.7`"), "{error}");
    let error = nccl::version(libtorch_cpu_path().unwrap().to_str().unwrap()).unwrap_err();
    assert!(error.0.ends_with("has no function ncclGetVersion"), "{error}");
}

#[test]
fn threads_and_flags_answer() {
    let before = num_threads();
    set_num_threads(1).unwrap();
    assert_eq!(num_threads(), 1);
    set_num_threads(before).unwrap();
    assert!(set_num_threads(0).is_err());
    assert!(set_flush_denormal(true).is_ok());
    assert!(set_flush_denormal(false).is_ok());
    assert!(!cpu_capability().unwrap().is_empty());
    assert!(libtorch_cpu_path().unwrap().ends_with("libtorch_cpu.so"));
}
