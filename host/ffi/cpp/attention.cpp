// Causal attention within documents that lie one after the other, without padding and without a mask.
// Legend: T tokens, N query heads, K key-value heads (N = K * G), H head dim, L tokens of one document.
#include "attention_kernel.h"
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

namespace host {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The flash kernels of CUDA and ROCm know variable lengths and grouped heads; they take half types only.
bool has_varlen_kernel(const Tensor& q) {
  return q.device().is_cuda() && (q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf);
}

Tensor offsets_tensor(const std::vector<int64_t>& offsets, const Tensor& like) {
  return to_device(at::tensor(offsets, at::TensorOptions().dtype(at::kInt)), like.device());
}

// One piece of work for one core: a document, a key-value head, and some of the query heads that share it.
struct Unit {
  int64_t begin, length, kv_head, first_head, heads, split;
};

// Whole groups share the packing of k and v; where there are few of them, single heads keep all threads busy.
std::vector<Unit> cpu_units(const std::vector<int64_t>& offsets, int64_t kv_heads, int64_t group, int64_t* splits) {
  const int64_t groups = (static_cast<int64_t>(offsets.size()) - 1) * kv_heads;
  *splits = groups >= 4 * at::get_num_threads() ? 1 : group;
  std::vector<Unit> units;
  for (size_t i = 1; i < offsets.size(); i++) {
    const int64_t begin = offsets[i - 1], length = offsets[i] - begin;
    for (int64_t kv = 0; length > 0 && kv < kv_heads; kv++) {
      const int64_t heads = group / *splits;
      for (int64_t part = 0; part < *splits; part++) {
        units.push_back({begin, length, kv, kv * group + part * heads, heads, part});
      }
    }
  }
  // The longest first, so that no thread is left with a long one at the end.
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.length > b.length; });
  return units;
}

int64_t longest(const std::vector<int64_t>& offsets) {
  int64_t most = 0;
  for (size_t i = 1; i < offsets.size(); i++) most = std::max(most, offsets[i] - offsets[i - 1]);
  return most;
}

// [L, N, H] as [K, G, L, H]: key-value heads become the batch, so that grouped heads need no copy of k and v.
Tensor grouped(const Tensor& t, int64_t begin, int64_t length, int64_t kv_heads) {
  const int64_t heads = t.size(1), width = t.size(2);
  return t.narrow(0, begin, length).view({length, kv_heads, heads / kv_heads, width}).permute({1, 2, 0, 3});
}

Tensor shared(const Tensor& t, int64_t begin, int64_t length, int64_t group) {
  return grouped(t, begin, length, t.size(1)).expand({t.size(1), group, length, t.size(2)});
}

// Runs `f(unit, scratch)` for every unit on all threads. `f` must not throw.
template <typename F>
void on_all_threads(const std::vector<Unit>& units, int64_t length, int64_t width, F&& f) {
  const int64_t floats = static_cast<int64_t>(kernels::attention_scratch(length, width));
  const Tensor memory = at::empty({at::get_num_threads(), floats}, at::TensorOptions().dtype(at::kFloat));
  float* base = memory.data_ptr<float>();
  const int64_t count = static_cast<int64_t>(units.size());
#pragma omp parallel for schedule(dynamic, 1) if (!at::in_parallel_region())
  for (int64_t i = 0; i < count; i++) f(units[i], base + omp_get_thread_num() * floats);
}

template <typename T>
T* at_token(const Tensor& t, int64_t token, int64_t head) {
  return static_cast<T*>(t.data_ptr()) + (token * t.size(1) + head) * t.size(2);
}

kernels::AttentionShape kernel_shape(const Unit& unit, const Tensor& q, const Tensor& k, double scale) {
  kernels::AttentionShape shape{};
  shape.length = unit.length;
  shape.width = q.size(2);
  shape.q_stride = q.size(1) * q.size(2);
  shape.kv_stride = k.size(1) * k.size(2);
  shape.lse_stride = q.size(1);
  shape.heads = unit.heads;
  shape.scale = static_cast<float>(scale);
  return shape;
}

template <typename T>
void cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                 const std::vector<int64_t>& offsets, double scale) {
  int64_t splits = 1;
  const auto units = cpu_units(offsets, k.size(1), q.size(1) / k.size(1), &splits);
  on_all_threads(units, longest(offsets), q.size(2), [&](const Unit& u, float* scratch) {
    kernels::attention_forward(kernel_shape(u, q, k, scale), at_token<T>(q, u.begin, u.first_head),
                               at_token<T>(k, u.begin, u.kv_head), at_token<T>(v, u.begin, u.kv_head),
                               at_token<T>(out, u.begin, u.first_head),
                               static_cast<float*>(lse.data_ptr()) + u.begin * q.size(1) + u.first_head, scratch);
  });
}

template <typename T>
variable_list cpu_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                           const Tensor& lse, const std::vector<int64_t>& offsets, double scale) {
  int64_t splits = 1;
  const auto units = cpu_units(offsets, k.size(1), q.size(1) / k.size(1), &splits);
  const Tensor dq = at::empty(q.sizes(), q.options());
  // fp32 and one slice per split: no two units write the same place, and one rounding at the end.
  const Tensor dkv = at::empty({2, splits, k.size(0), k.size(1), k.size(2)}, k.options().dtype(at::kFloat));
  on_all_threads(units, longest(offsets), q.size(2), [&](const Unit& u, float* scratch) {
    const int64_t place = (u.begin * k.size(1) + u.kv_head) * k.size(2);
    float* dk = static_cast<float*>(dkv.data_ptr()) + u.split * k.numel() + place;
    kernels::attention_backward(kernel_shape(u, q, k, scale), at_token<T>(dout, u.begin, u.first_head),
                                at_token<T>(q, u.begin, u.first_head), at_token<T>(k, u.begin, u.kv_head),
                                at_token<T>(v, u.begin, u.kv_head), at_token<T>(out, u.begin, u.first_head),
                                static_cast<float*>(lse.data_ptr()) + u.begin * q.size(1) + u.first_head,
                                at_token<T>(dq, u.begin, u.first_head), dk, dk + splits * k.numel(), scratch);
  });
  const Tensor summed = (splits == 1 ? dkv.squeeze(1) : dkv.sum(1)).to(k.scalar_type());
  return {dq, summed[0], summed[1], Tensor(), Tensor()};
}

struct Varlen : torch::autograd::Function<Varlen> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::vector<int64_t>& offsets, double scale) {
    ctx->saved_data["offsets"] = offsets;
    ctx->saved_data["scale"] = scale;
    if (has_varlen_kernel(q)) {
      const Tensor cu = offsets_tensor(offsets, q);
      const int64_t most = longest(offsets);
      auto [out, lse, rng, unused, debug] =
          at::_flash_attention_forward(q, k, v, cu, cu, most, most, 0.0, /*is_causal=*/true, false, scale);
      ctx->save_for_backward({q, k, v, out, lse, rng, unused, cu});
      return out;
    }
    const Tensor out = at::empty(q.sizes(), q.options());
    const Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
    if (q.scalar_type() == at::kFloat) {
      cpu_forward<float>(q, k, v, out, lse, offsets, scale);
    } else {
      cpu_forward<kernels::bf16>(q, k, v, out, lse, offsets, scale);
    }
    ctx->save_for_backward({q, k, v, out, lse});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const auto offsets = ctx->saved_data["offsets"].toIntVector();
    const double scale = ctx->saved_data["scale"].toDouble();
    const Tensor dout = grads[0].contiguous();
    if (has_varlen_kernel(q)) {
      const int64_t most = longest(offsets);
      auto [dq, dk, dv] = at::_flash_attention_backward(dout, q, k, v, out, lse, saved[7], saved[7], most, most, 0.0,
                                                        true, saved[5], saved[6], scale);
      return {dq, dk, dv, Tensor(), Tensor()};
    }
    return q.scalar_type() == at::kFloat ? cpu_backward<float>(dout, q, k, v, out, lse, offsets, scale)
                                         : cpu_backward<kernels::bf16>(dout, q, k, v, out, lse, offsets, scale);
  }
};

// Any other device or dtype: one document at a time, ordinary operators, ordinary autograd.
Tensor composite(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& offsets,
                 double scale) {
  const int64_t kv_heads = k.size(1), group = q.size(1) / kv_heads;
  std::vector<Tensor> parts;
  for (size_t i = 1; i < offsets.size(); i++) {
    const int64_t begin = offsets[i - 1], length = offsets[i] - begin;
    if (length == 0) continue;
    const Tensor o = at::scaled_dot_product_attention(
        grouped(q, begin, length, kv_heads), shared(k, begin, length, group), shared(v, begin, length, group),
        std::nullopt, 0.0, /*is_causal=*/true, scale);
    parts.push_back(o.permute({2, 0, 1, 3}).reshape({length, q.size(1), q.size(2)}));
  }
  return parts.empty() ? at::zeros_like(q) : at::cat(parts);
}

Tensor attention_varlen(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                        const std::vector<int64_t>& offsets, double scale) {
  const char* name = "attention_varlen";
  TORCH_CHECK(q_in.dim() == 3 && k_in.dim() == 3, name, ": q and k must be [T, N, H], got ", q_in.sizes(), " and ",
              k_in.sizes());
  TORCH_CHECK(k_in.sizes() == v_in.sizes(), name, ": k ", k_in.sizes(), " and v ", v_in.sizes(), " differ");
  TORCH_CHECK(k_in.size(0) == q_in.size(0) && k_in.size(2) == q_in.size(2), name, ": q ", q_in.sizes(), " and k ",
              k_in.sizes(), " differ in tokens or head size");
  TORCH_CHECK(k_in.size(1) > 0 && q_in.size(1) % k_in.size(1) == 0, name, ": ", q_in.size(1),
              " query heads cannot share ", k_in.size(1), " key-value heads");
  TORCH_CHECK(q_in.scalar_type() == k_in.scalar_type() && q_in.scalar_type() == v_in.scalar_type(), name,
              ": q, k and v differ in dtype");
  TORCH_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == q_in.size(0), name,
              ": cu_seqlens must run from 0 to the ", q_in.size(0), " tokens");
  TORCH_CHECK(std::is_sorted(offsets.begin(), offsets.end()), name, ": cu_seqlens must not fall");
  if (q_in.size(0) == 0) return q_in * 1.0;
  const Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  if (has_varlen_kernel(q) || is_cpu_fused(q)) return Varlen::apply(q, k, v, offsets, scale);
  return composite(q, k, v, offsets, scale);
}

}  // namespace
}  // namespace host

extern "C" char* host_attention_varlen(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v,
                                       const int64_t* offsets, size_t num_offsets, double scale, at::Tensor** out) {
  return host::guard([&] {
    const std::vector<int64_t> list(offsets, offsets + num_offsets);
    *out = host::give(host::attention_varlen(*q, *k, *v, list, scale));
  });
}
