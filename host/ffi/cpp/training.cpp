// Gradients into a flat buffer, the fused optimizer, dropout masks and tensors from bytes.
#include "kernels.h"
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cstring>

extern "C" char* host_set_grad(const at::Tensor* leaf, const at::Tensor* grad) {
  return host::guard([&] {
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "set_grad: the tensor is not a leaf that requires a gradient");
    TORCH_CHECK(leaf->sizes() == grad->sizes() && leaf->scalar_type() == grad->scalar_type() &&
                    leaf->device() == grad->device(),
                "set_grad: a ", leaf->scalar_type(), " ", leaf->sizes(), " on ", leaf->device(),
                " cannot take a gradient ", grad->scalar_type(), " ", grad->sizes(), " on ", grad->device());
    leaf->mutable_grad() = *grad;
  });
}

extern "C" char* host_backward_from(const at::Tensor* output, const at::Tensor* grad) {
  return host::guard([&] { output->backward(*grad); });
}

extern "C" int host_grad_enabled() { return at::GradMode::is_enabled(); }

extern "C" char* host_backward(const at::Tensor* loss) {
  return host::guard([&] { loss->backward(); });
}

extern "C" char* host_fused_adamw(const at::Tensor* param, const at::Tensor* grad, const at::Tensor* exp_avg,
                                  const at::Tensor* exp_avg_sq, double step, double lr, double beta1, double beta2,
                                  double eps, double weight_decay) {
  return host::guard([&] {
    for (const at::Tensor* t : {grad, exp_avg, exp_avg_sq}) {
      TORCH_CHECK(t->sizes() == param->sizes(), "fused_adamw: the parameter is ", param->sizes(), " but a state is ",
                  t->sizes());
    }
    const at::NoGradGuard no_grad;
    const at::Tensor count = at::full({}, step, param->options().dtype(at::kFloat));
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {count}, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

extern "C" char* host_dropout_mask_cpu(const at::Tensor* keys, int64_t width, uint32_t threshold, int keep_all,
                                       float value, int dtype, at::Tensor** out) {
  return host::guard([&] {
    const at::Tensor rows = keys->contiguous();
    TORCH_CHECK(rows.device().is_cpu() && rows.dim() == 1 && rows.scalar_type() == at::kLong,
                "dropout_mask: row keys must be Long [T] on the CPU, got ", rows.scalar_type(), " ", rows.sizes());
    const auto type = static_cast<at::ScalarType>(dtype);
    const at::Tensor mask = at::empty({rows.size(0), width}, at::TensorOptions().dtype(type));
    const auto* key = static_cast<const int64_t*>(rows.data_ptr());
    const auto run = [&](auto* base) {
      at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)),
                       [=](int64_t begin, int64_t end) {
                         host::kernels::dropout_mask(key + begin, base + begin * width, end - begin, width, threshold,
                                                     keep_all != 0, value);
                       });
    };
    if (type == at::kFloat) {
      run(static_cast<float*>(mask.data_ptr()));
    } else {
      TORCH_CHECK(type == at::kBFloat16, "dropout_mask: the fused mask is Float or BFloat16");
      run(static_cast<host::kernels::bf16*>(mask.data_ptr()));
    }
    *out = host::give(mask);
  });
}

// The random bits are rng.rs's `absorb` of (key, place).
extern "C" char* host_round_stochastic_cpu(const at::Tensor* from, const at::Tensor* into, int64_t key, int64_t first) {
  return host::guard([&] {
    const at::Tensor source = from->contiguous();
    TORCH_CHECK(into->is_contiguous(), "round_stochastic: the result must be contiguous");
    const auto* wide = reinterpret_cast<const uint32_t*>(source.data_ptr());
    auto* narrow = reinterpret_cast<uint16_t*>(into->data_ptr());
    at::parallel_for(0, source.numel(), 1 << 14, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        uint64_t x = static_cast<uint64_t>(key) + (static_cast<uint64_t>(first + i) + 1) * 0x9e3779b97f4a7c15ULL;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        x ^= x >> 31;
        const bool finite = (wide[i] & 0x7f800000u) != 0x7f800000u;
        // Infinity stays, and a NaN that is all cut-off bits keeps one.
        const uint32_t cut = finite ? wide[i] + static_cast<uint32_t>(x & 0xffff) : wide[i] | ((wide[i] & 0xffff) ? 0x10000u : 0u);
        narrow[i] = static_cast<uint16_t>(cut >> 16);
      }
    });
  });
}

extern "C" char* host_tensor_from_bytes(const void* bytes, int source, const int64_t* shape, size_t num_dims, int target,
                                        at::Tensor** out) {
  return host::guard([&] {
    const at::IntArrayRef sizes(shape, num_dims);
    const auto from = static_cast<at::ScalarType>(source), to = static_cast<at::ScalarType>(target);
    const at::Tensor result = at::empty(sizes, at::TensorOptions().dtype(to));
    const size_t unit = c10::elementSize(from), total = unit * result.numel();
    if (from == to) {
      auto* destination = static_cast<char*>(result.data_ptr());
      at::parallel_for(0, total, 1 << 20, [=](int64_t begin, int64_t end) {
        std::memcpy(destination + begin, static_cast<const char*>(bytes) + begin, end - begin);
      });
    } else if (reinterpret_cast<uintptr_t>(bytes) % unit == 0) {
      // `copy_` reads the source only, so that casting the constness away is sound.
      result.copy_(at::from_blob(const_cast<void*>(bytes), sizes, at::TensorOptions().dtype(from)));
    } else {
      const at::Tensor aligned = at::empty(sizes, at::TensorOptions().dtype(from));
      std::memcpy(aligned.data_ptr(), bytes, total);
      result.copy_(aligned);
    }
    *out = host::give(result);
  });
}
