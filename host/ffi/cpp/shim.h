// What every file of the shim shares: the error convention and the tensor handles.
//
// Convention: every exported function returns null, or a malloc'ed message that the Rust side frees. No exception
// leaves the shim. Tensors come in as borrowed pointers and go out as new ones that the Rust side owns.
#pragma once

#include <ATen/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

namespace host {

// The first line of a message; gloo and c10d prepend "[file.cc:123] ", which tells a user nothing.
inline std::string first_line(const std::string& message) {
  std::string line = message.substr(0, message.find('\n'));
  while (!line.empty() && line.front() == '[') {
    const auto close = line.find("] ");
    if (close == std::string::npos || line.find(".c") > close) break;
    line.erase(0, close + 2);
  }
  return line.empty() ? std::string("unknown error in libtorch") : line;
}

inline char* message(const std::string& text) { return strdup(first_line(text).c_str()); }

template <typename F>
char* guard(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return message(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return message(error.what());
  } catch (...) {
    return message("an exception of unknown type");
  }
}

inline at::Tensor* give(at::Tensor tensor) { return new at::Tensor(std::move(tensor)); }

// From pinned memory, so that nothing waits for what the device still computes.
inline at::Tensor to_device(const at::Tensor& host, at::Device device) {
  return device.is_cpu() ? host : host.pin_memory().to(device, /*non_blocking=*/true);
}

inline bool is_cpu_fused(const at::Tensor& t) {
  return t.device().is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16);
}

}  // namespace host
