// Cross-entropy over an LM head, chunk by chunk, so that one chunk of logits is all that ever exists (the idea of Liger
// Kernel's fused linear cross-entropy). Under a frozen head the gradient of the hidden states is made in the forward pass;
// one that learns computes its logits again in the backward pass, where the factor of each row is known.
#include "kernels.h"
#include "linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace host {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kIgnore = -100;

// Writes the loss of each row of a chunk; with `gradient` the logits become d(sum)/d(logits).
void chunk_cpu(Tensor& logits, const int64_t* labels, double* losses, bool gradient) {
  const int64_t rows = logits.size(0), width = logits.size(1);
  const auto run = [&](auto* base) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(width);
      for (int64_t i = begin; i < end; i++) {
        losses[i] = 0.0;
        if (labels[i] == kIgnore) {
          if (gradient) std::memset(static_cast<void*>(base + i * width), 0, width * sizeof(*base));
          continue;
        }
        losses[i] = kernels::cross_entropy_row(base + i * width, width, labels[i], scratch.data(), gradient);
      }
    });
  };
  if (logits.scalar_type() == at::kFloat) {
    run(static_cast<float*>(logits.data_ptr()));
  } else {
    run(static_cast<kernels::bf16*>(logits.data_ptr()));
  }
}

Tensor chunk_composite(Tensor& logits, const Tensor& labels, bool gradient) {
  const Tensor kept = labels != kIgnore;
  const Tensor index = labels.clamp_min(0).unsqueeze(1);
  Tensor log_probs = at::log_softmax(logits, 1, at::kFloat);
  const Tensor losses = -(log_probs.gather(1, index).squeeze(1) * kept);
  if (gradient) {
    Tensor probs = log_probs.exp_();
    probs.scatter_add_(1, index, at::full_like(index, -1.0, probs.options()));
    at::mul_out(logits, probs, kept.unsqueeze(1));
  }
  return losses;
}

// Losses of each row; with `gradient` the logits of each chunk become d(sum)/d(logits) and go to `use`.
template <typename F>
Tensor each_chunk(const Tensor& hidden, const Tensor& labels, const LinearLayer& head, int64_t chunk_rows, bool gradient,
                  F&& use) {
  const int64_t rows = hidden.size(0);
  const bool fused = is_cpu_fused(hidden);
  Tensor losses = at::empty({rows}, hidden.options().dtype(fused ? at::kDouble : at::kFloat));
  for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows - begin);
    Tensor logits = head.forward(hidden.narrow(0, begin, count));
    const Tensor chunk_labels = labels.narrow(0, begin, count);
    if (fused) {
      chunk_cpu(logits, static_cast<const int64_t*>(chunk_labels.data_ptr()),
                static_cast<double*>(losses.data_ptr()) + begin, gradient);
    } else {
      losses.narrow(0, begin, count).copy_(chunk_composite(logits, chunk_labels, gradient));
    }
    if (gradient) use(begin, count, logits);
  }
  return losses;
}

// The gradient of a loss is fp32; the product is rounded once.
Tensor scaled(const Tensor& x, const Tensor& factor) { return x.to(at::kFloat).mul(factor).to(x.scalar_type()); }

// Of each row the cross-entropy (fp32), or their sum.
struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                        const LinearLayer* head, int64_t chunk_rows, bool sum, bool gradient) {
    const bool learns = weight.requires_grad();
    Tensor dhidden;
    if (gradient && !learns) dhidden = at::empty(hidden.sizes(), hidden.options());
    const Tensor losses = each_chunk(hidden, labels, *head, chunk_rows, gradient && !learns,
                                     [&](int64_t begin, int64_t count, const Tensor& dlogits) {
                                       dhidden.narrow(0, begin, count).copy_(head->backward(dlogits));
                                     });
    ctx->saved_data["learns"] = learns;
    if (gradient && learns) {
      ctx->save_for_backward({hidden, labels});
      ctx->saved_data["weight"] = weight;
      ctx->saved_data["chunk_rows"] = chunk_rows;
    } else if (gradient) {
      ctx->save_for_backward({dhidden});
    }
    return (sum ? losses.sum() : losses).to(at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor factor = grads[0].dim() == 0 ? grads[0] : grads[0].unsqueeze(1);
    Tensor dhidden, dweight;
    if (!ctx->saved_data["learns"].toBool()) {
      dhidden = scaled(saved[0], factor);
    } else {
      LinearLayer head;
      head.weight = ctx->saved_data["weight"].toTensor();
      const Tensor &hidden = saved[0], &labels = saved[1];
      dhidden = at::empty(hidden.sizes(), hidden.options());
      const auto use = [&](int64_t begin, int64_t count, const Tensor& dlogits_of_sum) {
        const Tensor dlogits = scaled(dlogits_of_sum, factor.dim() == 0 ? factor : factor.narrow(0, begin, count));
        dhidden.narrow(0, begin, count).copy_(head.backward(dlogits));
        const Tensor part = head.weight_gradient(dlogits, hidden.narrow(0, begin, count));
        dweight = dweight.defined() ? dweight.add_(part) : part;
      };
      each_chunk(hidden, labels, head, ctx->saved_data["chunk_rows"].toInt(), true, use);
    }
    return {dhidden, dweight, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor linear_cross_entropy(const Tensor& hidden, const LinearLayer& head, const Tensor& labels_in,
                            int64_t chunk_rows, bool sum) {
  const char* name = "linear_cross_entropy";
  TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == head.in_features(), name, ": hidden must be [L, ",
              head.in_features(), "], got ", hidden.sizes());
  TORCH_CHECK(hidden.scalar_type() == head.weight.scalar_type(), name, ": hidden is ", hidden.scalar_type(),
              " and the head ", head.weight.scalar_type());
  TORCH_CHECK(labels_in.dim() == 1 && labels_in.size(0) == hidden.size(0) && labels_in.scalar_type() == at::kLong, name,
              ": labels must be Long [", hidden.size(0), "], got ", labels_in.scalar_type(), " ", labels_in.sizes());
  TORCH_CHECK(chunk_rows > 0, name, ": chunk_rows must be positive, got ", chunk_rows);
  const Tensor labels = labels_in.to(hidden.device()).contiguous();
  if (labels.device().is_cpu()) {
    const auto* label = static_cast<const int64_t*>(labels.data_ptr());
    for (int64_t i = 0; i < labels.size(0); i++) {
      TORCH_CHECK(label[i] == kIgnore || (label[i] >= 0 && label[i] < head.out_features()), name, ": label ", label[i],
                  " at row ", i, " is outside of the vocabulary of ", head.out_features());
    }
  }
  const bool gradient = at::GradMode::is_enabled() && (hidden.requires_grad() || head.weight.requires_grad());
  return LinearCrossEntropy::apply(hidden, head.weight, labels, &head, chunk_rows, sum, gradient);
}

}  // namespace
}  // namespace host

extern "C" char* host_linear_cross_entropy(const at::Tensor* hidden, const host::LinearLayer* head,
                                           const at::Tensor* labels, int64_t chunk_rows, bool sum, at::Tensor** out) {
  return host::guard(
      [&] { *out = host::give(host::linear_cross_entropy(*hidden, *head, *labels, chunk_rows, sum)); });
}
