// Linear layers and LoRA: what a frozen weight does not need is neither computed nor saved.
#include "kernels.h"
#include "linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace host {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor reorder(const Tensor& weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                             .typed<Tensor(const Tensor&, std::optional<int64_t>)>();
  // The operator wants a batch size only to let oneDNN choose a layout; the layout serves every batch size.
  return op.call(weight, 1024);
}

// oneDNN's product with a packed or a plain weight, at any strides.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, Scalars,
                        std::optional<std::string_view>)>();
  return op.call(x, weight, bias, "none", Scalars(), std::nullopt);
}

bool has_onednn(const Tensor& x, const Tensor& weight) {
  return is_cpu_fused(weight) && at::globalContext().userEnabledMkldnn() && x.numel() > 0;
}

std::optional<Tensor> maybe(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

// `saved_data` and not `save_for_backward`: packed weights have no storage, and plain ones change between steps alone.
void save_layer(AutogradContext* ctx, const LinearLayer& layer) {
  ctx->saved_data["weight"] = layer.weight;
  if (layer.packed_t.defined()) ctx->saved_data["packed_t"] = layer.packed_t;
}

LinearLayer load_layer(AutogradContext* ctx) {
  LinearLayer layer;
  layer.weight = ctx->saved_data["weight"].toTensor();
  const auto packed = ctx->saved_data.find("packed_t");
  if (packed != ctx->saved_data.end()) layer.packed_t = packed->second.toTensor();
  return layer;
}

void check_input(const char* name, const Tensor& x, const LinearLayer& layer) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == layer.in_features(), name, ": x must be [T, ", layer.in_features(),
              "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == layer.weight.scalar_type(), name, ": x is ", x.scalar_type(), " and the weight ",
              layer.weight.scalar_type(), "; they must be the same");
}

struct Linear : torch::autograd::Function<Linear> {
  // Weight and bias are given apart from their layer for autograd to see.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const LinearLayer* layer) {
    save_layer(ctx, *layer);
    ctx->saved_data["has_bias"] = bias.has_value();
    if (weight.requires_grad()) ctx->save_for_backward({x});
    return layer->forward(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& dy = grads[0];
    const LinearLayer layer = load_layer(ctx);
    Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) dx = layer.backward(dy);
    if (ctx->needs_input_grad(1)) dweight = layer.weight_gradient(dy, ctx->get_saved_variables()[0]);
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) dbias = dy.sum(0);
    return {dx, dweight, dbias, Tensor()};
  }
};

// scale * p^T y in fp32, [r, n] from [T, r] and [T, n]: the narrow gradients. No wide matrix is converted or copied.
Tensor narrow_gradient(const Tensor& p, const Tensor& y_in, double scale) {
  const int64_t rows = p.size(0), rank = p.size(1), columns = y_in.size(1);
  // Products of bf16 are exact in fp32. ROCm's half of libtorch refuses this one.
  if (y_in.is_cuda() && y_in.scalar_type() == at::kBFloat16 && !at::globalContext().hasROCM()) {
    return at::mm(p.t(), y_in, at::kFloat).mul_(scale);
  }
  if (!is_cpu_fused(y_in) || columns % 16 != 0) {
    return at::mm(p.to(at::kFloat).t(), y_in.to(at::kFloat)).mul_(scale);
  }
  const Tensor left = p.to(at::kFloat).contiguous(), y = y_in.contiguous();
  Tensor sum = at::zeros({rank, columns}, left.options());
  const auto run = [&](const auto* base) {
    // Two cache lines of columns at a time; each thread reads all rows of its own columns.
    const int64_t strip = columns % 64 == 0 ? 64 : 16;
    at::parallel_for(0, columns / strip, 1 + 32768 / (rows * strip + 1), [&, base](int64_t begin, int64_t end) {
      kernels::outer_sum(left.const_data_ptr<float>(), rank, rank, base + begin * strip, columns, rows,
                         (end - begin) * strip, sum.data_ptr<float>() + begin * strip, columns);
    });
  };
  if (y.scalar_type() == at::kFloat) {
    run(static_cast<const float*>(y.data_ptr()));
  } else {
    run(static_cast<const kernels::bf16*>(y.data_ptr()));
  }
  return sum.mul_(scale);
}

// [T, in] with a narrow [r, in], fp32 through oneDNN like the wide products.
Tensor narrow_linear(const Tensor& x, const Tensor& narrow) {
  return has_onednn(x, narrow) ? onednn_linear(x.contiguous(), narrow, std::nullopt) : at::linear(x, narrow);
}

// y = x W^T + s (x' A^T) B^T. Saved: x' and x' A^T (r columns); the base weight is shared.
struct Lora : torch::autograd::Function<Lora> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b,
                        const std::optional<Tensor>& dropped, double scale, const LinearLayer* layer) {
    const Tensor low_in = dropped.has_value() ? *dropped : x;
    const Tensor low = narrow_linear(low_in, a.to(x.scalar_type()));
    Tensor y = layer->forward(x);
    y.addmm_(low, b.to(x.scalar_type()).t(), 1.0, scale);
    save_layer(ctx, *layer);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["separate"] = dropped.has_value();
    ctx->save_for_backward({low_in, low, a, b});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &low_in = saved[0], &low = saved[1], &a = saved[2], &b = saved[3];
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool separate = ctx->saved_data["separate"].toBool();
    const Tensor dy = grads[0].contiguous();
    const auto dtype = dy.scalar_type();

    const Tensor dlow = narrow_linear(dy, b.to(dtype).t());
    Tensor da, db, dx, ddropped;
    if (ctx->needs_input_grad(1)) da = narrow_gradient(dlow, low_in, scale).to(a.scalar_type());
    if (ctx->needs_input_grad(2)) db = narrow_gradient(low, dy, scale).t().contiguous().to(b.scalar_type());
    const LinearLayer layer = load_layer(ctx);
    if (ctx->needs_input_grad(0)) {
      dx = layer.backward(dy);
      if (!separate) dx.addmm_(dlow, a.to(dtype), 1.0, scale);
    }
    if (separate && ctx->needs_input_grad(3)) ddropped = at::mm(dlow, a.to(dtype)).mul_(scale);
    return {dx, da, db, ddropped, Tensor(), Tensor()};
  }
};

Tensor lora_linear(const Tensor& x, const LinearLayer& layer, const Tensor& a, const Tensor& b, double scale,
                   const std::optional<Tensor>& dropped) {
  check_input("lora_linear", x, layer);
  TORCH_CHECK(a.dim() == 2 && a.size(1) == layer.in_features(), "lora_linear: a must be [r, ", layer.in_features(),
              "], got ", a.sizes());
  TORCH_CHECK(b.dim() == 2 && b.size(0) == layer.out_features() && b.size(1) == a.size(0), "lora_linear: b must be [",
              layer.out_features(), ", ", a.size(0), "], got ", b.sizes());
  if (dropped.has_value()) {
    TORCH_CHECK(dropped->sizes() == x.sizes() && dropped->scalar_type() == x.scalar_type(),
                "lora_linear: the dropped input must look like x ", x.sizes(), ", got ", dropped->sizes());
  }
  return Lora::apply(x, a, b, dropped, scale, &layer);
}

}  // namespace

// fp32 is the reference, so its forward pass takes BLAS and sums over blocks of inputs: rounding grows with the length of a
// sum. SmolLM2's logits are then 5.6e-5 from fp64 at most, summed at once 8.0e-5, through oneDNN 1.3e-4 (`xtask interop`
// allows 1e-4). The backward pass takes oneDNN, twice as fast on AMD.
Tensor LinearLayer::forward(const Tensor& x) const {
  if (!has_onednn(x, weight)) return at::linear(x, weight, maybe(bias));
  if (weight.scalar_type() != at::kFloat) {
    return onednn_linear(x.contiguous(), packed.defined() ? packed : weight, maybe(bias));
  }
  constexpr int64_t block = 64;
  const int64_t inputs = in_features();
  Tensor y = at::linear(x.slice(1, 0, block), weight.slice(1, 0, block), maybe(bias));
  for (int64_t begin = block; begin < inputs; begin += block) {
    y.addmm_(x.slice(1, begin, begin + block), weight.slice(1, begin, begin + block).t());
  }
  return y;
}

Tensor LinearLayer::backward(const Tensor& dy) const {
  if (!has_onednn(dy, weight)) return at::mm(dy, weight);
  return onednn_linear(dy.contiguous(), packed_t.defined() ? packed_t : weight.t(), std::nullopt);
}

Tensor LinearLayer::weight_gradient(const Tensor& dy, const Tensor& x) const {
  if (!has_onednn(dy, weight)) return at::mm(dy.t(), x);
  return onednn_linear(dy.t().contiguous(), x.t(), std::nullopt);
}

}  // namespace host

extern "C" char* host_linear_layer_new(const at::Tensor* weight, const at::Tensor* bias, int prepack,
                                        host::LinearLayer** out) {
  return host::guard([&] {
    TORCH_CHECK(weight->dim() == 2, "LinearLayer: weight must be [out, in], got ", weight->sizes());
    auto layer = std::make_unique<host::LinearLayer>();
    layer->weight = *weight;
    if (bias) {
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight->size(0), "LinearLayer: bias must be [", weight->size(0),
                  "], got ", bias->sizes());
      layer->bias = *bias;
    }
    if (prepack && weight->device().is_cpu()) {
      TORCH_CHECK(!weight->requires_grad(), "LinearLayer: a weight that changes cannot be prepacked");
      const at::NoGradGuard no_grad;
      layer->packed = host::reorder(layer->weight.contiguous());
      layer->packed_t = host::reorder(layer->weight.t().contiguous());
    }
    *out = layer.release();
  });
}

extern "C" void host_linear_layer_free(host::LinearLayer* layer) { delete layer; }

extern "C" char* host_linear_layer_forward(const host::LinearLayer* layer, const at::Tensor* x, at::Tensor** out) {
  return host::guard([&] {
    host::check_input("LinearLayer", *x, *layer);
    *out = host::give(host::Linear::apply(*x, layer->weight, host::maybe(layer->bias), layer));
  });
}

extern "C" char* host_lora_linear(const at::Tensor* x, const host::LinearLayer* layer, const at::Tensor* a,
                                  const at::Tensor* b, double scale, const at::Tensor* dropped, at::Tensor** out) {
  return host::guard([&] {
    *out = host::give(host::lora_linear(*x, *layer, *a, *b, scale,
                                       dropped ? std::optional<at::Tensor>(*dropped) : std::nullopt));
  });
}
