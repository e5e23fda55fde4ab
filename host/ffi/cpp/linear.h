// The linear layer that lora_linear and the loss share.
#pragma once

#include "shim.h"

#include <optional>

namespace host {

// y = x W^T (+ bias). `packed` and `packed_t` are oneDNN's own layouts of W and W^T; undefined when not prepacked.
// A value type on purpose: backward nodes keep a copy (reference counts), so the handle may go first.
struct LinearLayer {
  at::Tensor weight, bias, packed, packed_t;

  int64_t in_features() const { return weight.size(1); }
  int64_t out_features() const { return weight.size(0); }
  // None records a graph.
  at::Tensor forward(const at::Tensor& x) const;
  at::Tensor backward(const at::Tensor& dy) const;
  // dy^T x, [out, in].
  at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x) const;
};

}  // namespace host
