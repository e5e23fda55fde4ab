// Row loops for the CPU, in fp32 and bf16; fp32 arithmetic inside. Each works on a range of rows that one thread owns.
#pragma once

#include "vectors.h"

namespace host::kernels {

#define HOST_FOR_BOTH(M) M(float) M(bf16)

// y = round(x * rstd) * weight with rstd = 1 / sqrt(mean(x^2) + eps), which is stored per row.
#define M(T) \
  void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, size_t rows, size_t width, float eps);
HOST_FOR_BOTH(M)
#undef M

// dx = rstd * (dy * weight) - x * rstd^3 / width * sum(dy * weight * x)
#define M(T)                                                                                                  \
  void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, size_t rows,     \
                         size_t width);
HOST_FOR_BOTH(M)
#undef M

// Half-split rotation; `sign` is 1 forward and -1 backward. `x_stride` is the distance of two tokens in x.
#define M(T)                                                                                                    \
  void rope(const T* x, size_t x_stride, const float* cos, const float* sin, T* y, size_t rows, size_t heads,   \
            size_t head_dim, float sign);
HOST_FOR_BOTH(M)
#undef M

// y = silu(gate) * up; the inputs may be column slices of a wider matrix (strides in elements).
#define M(T)                                                                                                     \
  void swiglu_forward(const T* gate, size_t gate_stride, const T* up, size_t up_stride, T* y, size_t rows,       \
                      size_t width);                                                                             \
  void swiglu_backward(const T* dy, const T* gate, size_t gate_stride, const T* up, size_t up_stride, T* dgate,  \
                       T* dup, size_t rows, size_t width);
HOST_FOR_BOTH(M)
#undef M

// Returns the cross-entropy of one row and, with `gradient`, overwrites the row by softmax - onehot(label).
// `scratch` holds `width` floats.
#define M(T) float cross_entropy_row(T* logits, size_t width, size_t label, float* scratch, bool gradient);
HOST_FOR_BOTH(M)
#undef M

// out[r][c] = keep ? value : 0; see rng.rs for the hash.
#define M(T)                                                                                                    \
  void dropout_mask(const int64_t* keys, T* out, size_t rows, size_t width, uint32_t threshold, bool keep_all,  \
                    float value);
HOST_FOR_BOTH(M)
#undef M

// out[m][j] += sum over t of p[t][m] * y[t][j]: the gradients of LoRA's narrow matrices, in fp32 whatever p and y hold.
// `columns` is a multiple of 16; rows of `out` are `out_stride` apart.
#define M(T)                                                                                                        \
  void outer_sum(const float* p, size_t p_stride, size_t rank, const T* y, size_t y_stride, size_t rows,            \
                 size_t columns, float* out, size_t out_stride);
HOST_FOR_BOTH(M)
#undef M

}  // namespace host::kernels
