#include "kernels.h"

#include <cmath>

// One clone per x86-64 level, chosen when the program starts; the default target stays the baseline.
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace host::kernels {

HOST_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

template <typename T>
HOST_INLINE void rms_norm_forward_body(const T* __restrict x, const T* __restrict weight, T* __restrict y,
                                  float* __restrict rstd, size_t rows, size_t width, float eps) {
  for (size_t i = 0; i < rows; i++, x += width, y += width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < width; j++) sum += load(x[j]) * load(x[j]);
    const float r = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    rstd[i] = r;
    for (size_t j = 0; j < width; j++) store(&y[j], rounded(load(x[j]) * r, x) * load(weight[j]));
  }
}

template <typename T>
HOST_INLINE void rms_norm_backward_body(const T* __restrict dy, const T* __restrict x, const T* __restrict weight,
                                   const float* __restrict rstd, T* __restrict dx, size_t rows, size_t width) {
  for (size_t i = 0; i < rows; i++, dy += width, x += width, dx += width) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (size_t j = 0; j < width; j++) dot += load(dy[j]) * load(weight[j]) * load(x[j]);
    const float r = rstd[i];
    const float c = dot * r * r * r / static_cast<float>(width);
    for (size_t j = 0; j < width; j++) store(&dx[j], load(dy[j]) * load(weight[j]) * r - load(x[j]) * c);
  }
}

template <typename T>
HOST_INLINE void rope_body(const T* __restrict x, size_t x_stride, const float* __restrict cos, const float* __restrict sin,
                      T* __restrict y, size_t rows, size_t heads, size_t head_dim, float sign) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < rows; i++, x += x_stride, cos += half, sin += half) {
    for (size_t n = 0; n < heads; n++, y += head_dim) {
      const T* __restrict a = x + n * head_dim;
      const T* __restrict b = a + half;
      for (size_t j = 0; j < half; j++) {
        const float s = sin[j] * sign;
        store(&y[j], load(a[j]) * cos[j] - load(b[j]) * s);
        store(&y[half + j], load(b[j]) * cos[j] + load(a[j]) * s);
      }
    }
  }
}

template <typename T>
HOST_INLINE void swiglu_forward_body(const T* __restrict gate, size_t gate_stride, const T* __restrict up, size_t up_stride,
                                T* __restrict y, size_t rows, size_t width) {
  for (size_t i = 0; i < rows; i++, gate += gate_stride, up += up_stride, y += width) {
    size_t j = 0;
    for (; j + 16 <= width; j += 16) {
      v16 g, u;
      load16(&g, gate + j);
      load16(&u, up + j);
      v16 s = g;
      sigmoid16(&s);
      store16(y + j, g * s * u);
    }
    for (; j < width; j++) {
      const float g = load(gate[j]);
      store(&y[j], g * sigmoid(g) * load(up[j]));
    }
  }
}

template <typename T>
HOST_INLINE void swiglu_backward_body(const T* __restrict dy, const T* __restrict gate, size_t gate_stride,
                                 const T* __restrict up, size_t up_stride, T* __restrict dgate, T* __restrict dup,
                                 size_t rows, size_t width) {
  for (size_t i = 0; i < rows; i++, gate += gate_stride, up += up_stride, dy += width, dgate += width, dup += width) {
    size_t j = 0;
    for (; j + 16 <= width; j += 16) {
      v16 g, u, d;
      load16(&g, gate + j);
      load16(&u, up + j);
      load16(&d, dy + j);
      v16 s = g;
      sigmoid16(&s);
      const v16 silu = g * s;
      store16(dgate + j, d * u * (s + silu * (1.0f - s)));
      store16(dup + j, d * silu);
    }
    for (; j < width; j++) {
      const float g = load(gate[j]), d = load(dy[j]);
      const float s = sigmoid(g), silu = g * s;
      store(&dgate[j], d * load(up[j]) * (s + silu * (1.0f - s)));
      store(&dup[j], d * silu);
    }
  }
}

// One reading for the maximum, one for the exponentials (kept in `scratch`, which stays in cache), one for the gradient.
template <typename T>
HOST_INLINE float cross_entropy_body(T* __restrict logits, size_t width, size_t label, float* __restrict scratch,
                                bool gradient) {
  const float target = load(logits[label]);
  const size_t whole = width - width % 16;
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (size_t j = 0; j < width; j++) top = load(logits[j]) > top ? load(logits[j]) : top;
  v16 sums = {};
  for (size_t j = 0; j < whole; j += 16) {
    v16 e;
    load16(&e, logits + j);
    e = e - top;
    fast_exp16(&e);
    store16(scratch + j, e);
    sums += e;
  }
  float sum = 0;
  for (size_t j = 0; j < 16; j++) sum += sums[j];
  for (size_t j = whole; j < width; j++) sum += scratch[j] = fast_exp(load(logits[j]) - top);
  if (gradient) {
    const float inverse = 1.0f / sum;
    const float at_label = scratch[label] * inverse - 1.0f;
    for (size_t j = 0; j < whole; j += 16) {
      v16 e;
      load16(&e, scratch + j);
      store16(logits + j, e * inverse);
    }
    for (size_t j = whole; j < width; j++) store(&logits[j], scratch[j] * inverse);
    store(&logits[label], at_label);
  }
  return std::log(sum) + (top - target);
}

HOST_INLINE uint32_t finalise(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

template <typename T>
HOST_INLINE void dropout_mask_body(const int64_t* __restrict keys, T* __restrict out, size_t rows, size_t width,
                              uint32_t threshold, bool keep_all, float value) {
  for (size_t i = 0; i < rows; i++, out += width) {
    const uint32_t low = static_cast<uint32_t>(keys[i]);
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(keys[i]) >> 32);
    for (size_t j = 0; j < width; j++) {
      const uint32_t column = static_cast<uint32_t>(j) * 0x9e3779b9u;
      const uint32_t h = finalise(finalise(low ^ column) ^ high);
      store(&out[j], (keep_all || h < threshold) ? value : 0.0f);
    }
  }
}

template <int RANK, int NR, typename T>
HOST_INLINE void outer_sum_tile(const float* p, size_t p_stride, const T* y, size_t y_stride, size_t rows, float* out,
                                size_t out_stride) {
  tile<RANK, NR>(p, 1, p_stride, y, y_stride, out, out_stride, rows, true);
}

template <typename T>
HOST_INLINE void outer_sum_body(const float* p, size_t p_stride, size_t rank, const T* y, size_t y_stride, size_t rows,
                                size_t columns, float* out, size_t out_stride) {
  for (size_t m = 0; m < rank;) {
    const size_t step = rank - m >= 8 ? 8 : rank - m >= 4 ? 4 : 1;
    for (size_t j = 0; j < columns;) {
      float* to = out + m * out_stride + j;
      const bool pair = columns - j >= 32 && step == 8;
      if (pair) {
        outer_sum_tile<8, 2>(p + m, p_stride, y + j, y_stride, rows, to, out_stride);
      } else if (step == 8) {
        outer_sum_tile<8, 1>(p + m, p_stride, y + j, y_stride, rows, to, out_stride);
      } else if (step == 4) {
        outer_sum_tile<4, 1>(p + m, p_stride, y + j, y_stride, rows, to, out_stride);
      } else {
        outer_sum_tile<1, 1>(p + m, p_stride, y + j, y_stride, rows, to, out_stride);
      }
      j += pair ? 32 : 16;
    }
    m += step;
  }
}

#define M(T)                                                                                                      \
  CLONES void outer_sum(const float* p, size_t p_stride, size_t rank, const T* y, size_t y_stride, size_t rows,   \
                        size_t columns, float* out, size_t out_stride) {                                          \
    outer_sum_body(p, p_stride, rank, y, y_stride, rows, columns, out, out_stride);                               \
  }                                                                                                               \
  CLONES void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, size_t rows, size_t width,         \
                               float eps) {                                                                       \
    rms_norm_forward_body(x, weight, y, rstd, rows, width, eps);                                                  \
  }                                                                                                               \
  CLONES void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, size_t rows,  \
                                size_t width) {                                                                   \
    rms_norm_backward_body(dy, x, weight, rstd, dx, rows, width);                                                 \
  }                                                                                                               \
  CLONES void rope(const T* x, size_t x_stride, const float* cos, const float* sin, T* y, size_t rows,            \
                   size_t heads, size_t head_dim, float sign) {                                                   \
    rope_body(x, x_stride, cos, sin, y, rows, heads, head_dim, sign);                                             \
  }                                                                                                               \
  CLONES void swiglu_forward(const T* gate, size_t gate_stride, const T* up, size_t up_stride, T* y, size_t rows, \
                             size_t width) {                                                                      \
    swiglu_forward_body(gate, gate_stride, up, up_stride, y, rows, width);                                        \
  }                                                                                                               \
  CLONES void swiglu_backward(const T* dy, const T* gate, size_t gate_stride, const T* up, size_t up_stride,      \
                              T* dgate, T* dup, size_t rows, size_t width) {                                      \
    swiglu_backward_body(dy, gate, gate_stride, up, up_stride, dgate, dup, rows, width);                          \
  }                                                                                                               \
  CLONES float cross_entropy_row(T* logits, size_t width, size_t label, float* scratch, bool gradient) {          \
    return cross_entropy_body(logits, width, label, scratch, gradient);                                           \
  }                                                                                                               \
  CLONES void dropout_mask(const int64_t* keys, T* out, size_t rows, size_t width, uint32_t threshold,            \
                           bool keep_all, float value) {                                                          \
    dropout_mask_body(keys, out, rows, width, threshold, keep_all, value);                                        \
  }
HOST_FOR_BOTH(M)
#undef M

}  // namespace host::kernels
