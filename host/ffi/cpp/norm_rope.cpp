// rms_norm, rope and swiglu as autograd functions: one pass over memory each way on the CPU; elsewhere as few as libtorch's
// operators allow, for a GPU's memory is what these wait for.
// Legend: T tokens, D hidden, N heads, H head dim, F feed-forward.
#include "kernels.h"
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

namespace host {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using kernels::bf16;

// About a hundred microseconds of work for one core: below it a second thread costs more than it brings.
constexpr int64_t kGrainElements = 32 * 1024;

int64_t grain(int64_t row_elements) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_elements)); }

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls `f` with a value of the element type of `t`, which is fp32 or bf16.
template <typename F>
void by_type(const Tensor& t, F&& f) {
  if (t.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    f(bf16{});
  }
}

Tensor rows_contiguous(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_in, const Tensor& weight_in, double eps) {
    Tensor y, x = x_in, rstd, weight = weight_in;
    if (is_cpu_fused(x)) {
      x = x.contiguous();
      weight = weight.contiguous();
      const int64_t rows = x.size(0), width = x.size(1);
      y = at::empty_like(x);
      rstd = at::empty({rows}, x.options().dtype(at::kFloat));
      by_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T *px = data<T>(x), *pw = data<T>(weight);
        T* py = data<T>(y);
        float* pr = data<float>(rstd);
        at::parallel_for(0, rows, grain(width), [=](int64_t begin, int64_t end) {
          kernels::rms_norm_forward(px + begin * width, pw, py + begin * width, pr + begin, end - begin, width,
                                    static_cast<float>(eps));
        });
      });
    } else if (x.is_cuda()) {
      x = x.contiguous();
      // Without the weight: the normed value is rounded before it is multiplied.
      std::tie(y, rstd) = at::_fused_rms_norm(x, {x.size(1)}, std::nullopt, eps);
      y = y * weight;
    } else {
      const Tensor wide = x.to(at::kFloat);
      rstd = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
      y = (wide * rstd).to(x.scalar_type()) * weight;
    }
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    Tensor dx, dweight;
    if (x.is_cuda()) {
      const Tensor dy = grads[0].contiguous();
      std::tie(dx, dweight) = at::_fused_rms_norm_backward(dy, x, {x.size(1)}, rstd, weight,
                                                           {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
      return {dx, dweight, Tensor()};
    }
    if (ctx->needs_input_grad(1)) {
      // Of the value that was multiplied: rounded.
      const Tensor normed = (x.to(at::kFloat) * rstd.view({-1, 1})).to(x.scalar_type());
      dweight = (grads[0].to(at::kFloat) * normed).sum(0).to(weight.scalar_type());
    }
    if (is_cpu_fused(x)) {
      const Tensor dy = grads[0].contiguous();
      const int64_t rows = x.size(0), width = x.size(1);
      dx = at::empty_like(x);
      by_type(x, [&](auto zero) {
        using T = decltype(zero);
        const T *pd = data<T>(dy), *px = data<T>(x), *pw = data<T>(weight);
        T* out = data<T>(dx);
        const float* pr = data<float>(rstd);
        at::parallel_for(0, rows, grain(width), [=](int64_t begin, int64_t end) {
          kernels::rms_norm_backward(pd + begin * width, px + begin * width, pw, pr + begin, out + begin * width,
                                     end - begin, width);
        });
      });
    } else {
      const Tensor g = (grads[0] * weight).to(at::kFloat);
      const Tensor normed = x.to(at::kFloat) * rstd;
      dx = (rstd * (g - normed * (g * normed).mean(-1, true))).to(x.scalar_type());
    }
    return {dx, dweight, Tensor()};
  }
};

// Also its own inverse with `sign` = -1, which is all the backward needs.
Tensor rotate(const Tensor& x_in, const Tensor& cos, const Tensor& sin, double sign) {
  const int64_t rows = x_in.size(0), heads = x_in.size(1), width = x_in.size(2), half = width / 2;
  if (!is_cpu_fused(x_in)) {
    const Tensor a = x_in.narrow(2, 0, half), b = x_in.narrow(2, half, half);
    const Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1) * sign;
    // Sums are fp32 and rounded as they are written.
    const Tensor y = at::empty(x_in.sizes(), x_in.options());
    Tensor ya = y.narrow(2, 0, half), yb = y.narrow(2, half, half);
    at::addcmul_out(ya, a * c, b, s, -1);
    at::addcmul_out(yb, b * c, a, s);
    return y;
  }
  const bool packed = (x_in.stride(2) == 1 || width <= 1) && (x_in.stride(1) == width || heads <= 1);
  const Tensor x = packed ? x_in : x_in.contiguous();
  const Tensor y = at::empty({rows, heads, width}, x.options());
  const int64_t stride = x.stride(0);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* px = data<T>(x);
    const float *pc = data<float>(cos), *ps = data<float>(sin);
    T* py = data<T>(y);
    at::parallel_for(0, rows, grain(heads * width), [=](int64_t begin, int64_t end) {
      kernels::rope(px + begin * stride, stride, pc + begin * half, ps + begin * half, py + begin * heads * width,
                    end - begin, heads, width, static_cast<float>(sign));
    });
  });
  return y;
}

struct Rope : torch::autograd::Function<Rope> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos_in, const Tensor& sin_in) {
    const Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, 1.0);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], -1.0), Tensor(), Tensor()};
  }
};

struct SwiGlu : torch::autograd::Function<SwiGlu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_in, const Tensor& up_in) {
    if (!is_cpu_fused(gate_in)) {
      ctx->save_for_backward({gate_in, up_in});
      return at::silu(gate_in).mul_(up_in);
    }
    const Tensor gate = rows_contiguous(gate_in), up = rows_contiguous(up_in);
    ctx->save_for_backward({gate, up});
    const int64_t rows = gate.size(0), width = gate.size(1), gs = gate.stride(0), us = up.stride(0);
    const Tensor y = at::empty({rows, width}, gate.options());
    by_type(gate, [&](auto zero) {
      using T = decltype(zero);
      const T *pg = data<T>(gate), *pu = data<T>(up);
      T* py = data<T>(y);
      at::parallel_for(0, rows, grain(width), [=](int64_t begin, int64_t end) {
        kernels::swiglu_forward(pg + begin * gs, gs, pu + begin * us, us, py + begin * width, end - begin, width);
      });
    });
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &gate = saved[0], &up = saved[1];
    if (!is_cpu_fused(gate)) {
      return {at::silu_backward(grads[0] * up, gate), at::silu(gate).mul_(grads[0])};
    }
    const Tensor dy = grads[0].contiguous();
    const int64_t rows = gate.size(0), width = gate.size(1), gs = gate.stride(0), us = up.stride(0);
    const Tensor dgate = at::empty({rows, width}, gate.options()), dup = at::empty({rows, width}, gate.options());
    by_type(gate, [&](auto zero) {
      using T = decltype(zero);
      const T *pd = data<T>(dy), *pg = data<T>(gate), *pu = data<T>(up);
      T *og = data<T>(dgate), *ou = data<T>(dup);
      at::parallel_for(0, rows, grain(width), [=](int64_t begin, int64_t end) {
        kernels::swiglu_backward(pd + begin * width, pg + begin * gs, gs, pu + begin * us, us, og + begin * width,
                                 ou + begin * width, end - begin, width);
      });
    });
    return {dgate, dup};
  }
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() == 2, "rms_norm: x must be [T, D], got ", x.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1), "rms_norm: weight must be [", x.size(1), "], got ",
              weight.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "rms_norm: x is ", x.scalar_type(), " and weight ",
              weight.scalar_type(), "; they must be the same");
  return RmsNorm::apply(x, weight, eps);
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: x must be [T, N, H] with an even H, got ", x.sizes());
  for (const Tensor* table : {&cos, &sin}) {
    TORCH_CHECK(table->dim() == 2 && table->size(0) == x.size(0) && table->size(1) == x.size(2) / 2,
                "rope: cos and sin must be [", x.size(0), ", ", x.size(2) / 2, "], got ", table->sizes());
    TORCH_CHECK(table->scalar_type() == at::kFloat, "rope: cos and sin must be Float, got ", table->scalar_type());
    TORCH_CHECK(!table->requires_grad(), "rope: cos and sin are constants");
  }
  return Rope::apply(x, cos, sin);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  TORCH_CHECK(gate.dim() == 2 && gate.sizes() == up.sizes(), "swiglu: gate and up must be [T, F], got ", gate.sizes(),
              " and ", up.sizes());
  TORCH_CHECK(gate.scalar_type() == up.scalar_type(), "swiglu: gate is ", gate.scalar_type(), " and up ",
              up.scalar_type());
  return SwiGlu::apply(gate, up);
}

}  // namespace
}  // namespace host

extern "C" char* host_rms_norm(const at::Tensor* x, const at::Tensor* weight, double eps, at::Tensor** out) {
  return host::guard([&] { *out = host::give(host::rms_norm(*x, *weight, eps)); });
}

extern "C" char* host_rope(const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin, at::Tensor** out) {
  return host::guard([&] { *out = host::give(host::rope(*x, *cos, *sin)); });
}

extern "C" char* host_swiglu(const at::Tensor* gate, const at::Tensor* up, at::Tensor** out) {
  return host::guard([&] { *out = host::give(host::swiglu(*gate, *up)); });
}
