// Questions about devices and threads, and the accelerator half of libtorch, loaded at run time.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/headeronly/version.h>

#include <dlfcn.h>

namespace {

c10::DeviceAllocator* allocator(int index) {
  TORCH_CHECK(at::hasCUDA() && index >= 0 && index < at::accelerator::deviceCount(), "there is no device cuda:", index);
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return c10::getDeviceAllocator(c10::DeviceType::CUDA);
}

}  // namespace

// The path of the libtorch_cpu.so this process runs on.
extern "C" char* host_libtorch_cpu_path(char** out) {
  return host::guard([&] {
    Dl_info info{};
    const auto symbol = reinterpret_cast<const void*>(&at::get_cpu_capability);
    TORCH_CHECK(dladdr(symbol, &info) != 0 && info.dli_fname, "the loader does not know libtorch_cpu.so");
    *out = strdup(info.dli_fname);
  });
}

extern "C" char* host_load_library(const char* path) {
  return host::guard([&] {
    if (!dlopen(path, RTLD_NOW | RTLD_GLOBAL)) {
      const char* reason = dlerror();
      TORCH_CHECK(false, "cannot load `", path, "`: ", reason ? reason : "no reason given");
    }
  });
}

extern "C" int host_device_count() {
  return at::hasCUDA() ? static_cast<int>(at::accelerator::deviceCount()) : 0;
}

extern "C" char* host_device_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes) {
  return host::guard([&] {
    const auto [free_now, total] = allocator(index)->getMemoryInfo(static_cast<c10::DeviceIndex>(index));
    *free_bytes = free_now;
    *total_bytes = total;
  });
}

extern "C" char* host_memory_stats(int index, int64_t* active_peak, int64_t* allocated_peak, int64_t* reserved_peak) {
  return host::guard([&] {
    const auto stats = allocator(index)->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *active_peak = stats.active_bytes[all].peak;
    *allocated_peak = stats.allocated_bytes[all].peak;
    *reserved_peak = stats.reserved_bytes[all].peak;
  });
}

extern "C" char* host_reset_peak(int index) {
  return host::guard([&] { allocator(index)->resetPeakStats(static_cast<c10::DeviceIndex>(index)); });
}

extern "C" char* host_to_device(const at::Tensor* tensor, int index, at::Tensor** out) {
  return host::guard([&] {
    const at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(index));
    *out = host::give(host::to_device(*tensor, device));
  });
}

extern "C" char* host_synchronize(int index) {
  return host::guard([&] {
    allocator(index);
    at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index));
  });
}

extern "C" char* host_libtorch_version(char** out) {
  return host::guard([&] { *out = strdup(TORCH_VERSION); });
}

extern "C" char* host_cpu_capability(char** out) {
  return host::guard([&] { *out = strdup(at::get_cpu_capability().c_str()); });
}

// Flushing is a state of each thread, so every worker of the pool is told.
extern "C" char* host_set_flush_denormal(int on, int* supported) {
  return host::guard([&] {
    bool all = at::globalContext().setFlushDenormal(on != 0);
#pragma omp parallel reduction(&& : all)
    all = at::globalContext().setFlushDenormal(on != 0);
    *supported = all;
  });
}

extern "C" int host_num_threads() { return at::get_num_threads(); }

extern "C" char* host_set_num_threads(int count) {
  return host::guard([&] { at::set_num_threads(count); });
}

extern "C" void host_free_string(char* text) { std::free(text); }
