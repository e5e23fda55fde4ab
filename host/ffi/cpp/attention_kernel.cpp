// Blocks of query rows against all keys they may see: scores, softmax and the products with v stay in the cache, nothing
// of size L x L reaches memory. The backward recomputes the probabilities from the saved log-sum-exp (Dao 2022,
// arXiv 2205.14135). A block of rows skips the keys after its last row, which is half of the work.
#include "attention_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace host::kernels {
namespace {

// A multiple of kTileRows: deep enough for dk and dv, small enough for the second-level cache.
constexpr size_t kBlock = 48;
// Keys per packed panel: one panel of a transposed operand is read front to back.
constexpr size_t kPanel = 64;

constexpr size_t up_to(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Carves the scratch into buffers, each on a cache line.
struct Scratch {
  float* at;
  float* take(size_t count) {
    float* taken = at;
    at += up_to(count, 16);
    return taken;
  }
};

struct Sizes {
  size_t wide;    // head dim, padded to vectors
  size_t tokens;  // padded to panels
  size_t row;     // of a block of scores: one vector more than the keys, so that tiles may run over
  explicit Sizes(size_t length, size_t width)
      : wide(up_to(width, 16)), tokens(up_to(length, kPanel)), row(tokens + 32) {}
};

// Rows of `width` numbers to fp32, padded to `wide` by zeros, times `scale`.
template <typename T>
HOST_INLINE void widen(const T* __restrict from, size_t stride, size_t rows, size_t width, size_t wide, float scale,
                       float* __restrict to) {
  for (size_t i = 0; i < rows; i++, from += stride, to += wide) {
    for (size_t j = 0; j < width; j++) to[j] = load(from[j]) * scale;
    for (size_t j = width; j < wide; j++) to[j] = 0.0f;
  }
}

// [rows][wide] to panels of [wide][kPanel]; columns past the end are zero.
HOST_INLINE void transpose(const float* __restrict from, size_t rows, size_t wide, float* __restrict to) {
  for (size_t begin = 0; begin < rows; begin += kPanel, to += wide * kPanel) {
    const size_t count = std::min(kPanel, rows - begin);
    const float* panel = from + begin * wide;
    for (size_t j = 0; j < wide; j++) {
      for (size_t i = 0; i < count; i++) to[j * kPanel + i] = panel[i * wide + j];
      for (size_t i = count; i < kPanel; i++) to[j * kPanel + i] = 0.0f;
    }
  }
}

// scores[rows][keys] = block[rows][wide] times packed panels.
template <int NR>
HOST_INLINE void scores(const float* block, const float* panels, float* to, const Sizes& size, size_t rows,
                        size_t keys) {
  for (size_t begin = 0; begin < keys; begin += kPanel) {
    const size_t columns = std::min(kPanel, up_to(keys - begin, 16));
    product<NR>(block, size.wide, 1, panels + begin * size.wide, kPanel, to + begin, size.row, rows, columns, size.wide,
                false);
  }
}

// In place to exp(s - max) for the `seen` first keys and zero after; returns the sum and stores the maximum.
HOST_INLINE float softmax_row(float* __restrict s, size_t seen, size_t end, float* top_out) {
  float top = s[0];
#pragma omp simd reduction(max : top)
  for (size_t j = 0; j < seen; j++) top = s[j] > top ? s[j] : top;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t j = 0; j < seen; j++) {
    const float e = fast_exp(s[j] - top);
    s[j] = e;
    sum += e;
  }
  for (size_t j = seen; j < end; j++) s[j] = 0.0f;
  *top_out = top;
  return sum;
}

template <int NR, typename T>
HOST_INLINE void forward_body(const AttentionShape& shape, const T* q, const T* k, const T* v, T* out, float* lse,
                              float* memory) {
  const Sizes size(shape.length, shape.width);
  const size_t length = shape.length, wide = size.wide;
  Scratch scratch{memory};
  float* rows = scratch.take(size.tokens * wide);
  float* k_panels = scratch.take(size.tokens * wide);
  float* block = scratch.take(kBlock * wide);
  float* result = scratch.take(kBlock * wide);
  float* s = scratch.take(kBlock * size.row);

  widen(k, shape.kv_stride, length, shape.width, wide, 1.0f, rows);
  transpose(rows, length, wide, k_panels);
  widen(v, shape.kv_stride, length, shape.width, wide, 1.0f, rows);

  for (size_t head = 0; head < shape.heads; head++) {
    const size_t offset = head * shape.width;
    for (size_t begin = 0; begin < length; begin += kBlock) {
      const size_t count = std::min(kBlock, length - begin), padded = up_to(count, kTileRows);
      const size_t keys = begin + count;
      widen(q + begin * shape.q_stride + offset, shape.q_stride, count, shape.width, wide, shape.scale, block);
      scores<NR>(block, k_panels, s, size, padded, keys);
      float inverse[kBlock];
      for (size_t i = 0; i < count; i++) {
        float top;
        const float sum = softmax_row(s + i * size.row, begin + i + 1, keys, &top);
        inverse[i] = 1.0f / sum;
        lse[(begin + i) * shape.lse_stride + head] = top + std::log(sum);
      }
      product<NR>(s, size.row, 1, rows, wide, result, wide, padded, wide, keys, false);
      for (size_t i = 0; i < count; i++) {
        T* to = out + (begin + i) * shape.q_stride + offset;
        for (size_t j = 0; j < shape.width; j++) store(&to[j], result[i * wide + j] * inverse[i]);
      }
    }
  }
}

template <int NR, typename T>
HOST_INLINE void backward_body(const AttentionShape& shape, const T* dout, const T* q, const T* k, const T* v,
                               const T* out, const float* lse, T* dq, float* dk, float* dv, float* memory) {
  const Sizes size(shape.length, shape.width);
  const size_t length = shape.length, wide = size.wide, width = shape.width;
  Scratch scratch{memory};
  float* k_rows = scratch.take(size.tokens * wide);
  float* k_panels = scratch.take(size.tokens * wide);
  float* v_panels = scratch.take(size.tokens * wide);
  float* dk_sum = scratch.take((size.tokens + kTileRows) * wide);
  float* dv_sum = scratch.take((size.tokens + kTileRows) * wide);
  float* block = scratch.take(kBlock * wide);
  float* dblock = scratch.take(kBlock * wide);
  float* result = scratch.take(kBlock * wide);
  float* p = scratch.take(kBlock * size.row);
  float* ds = scratch.take(kBlock * size.row);

  widen(v, shape.kv_stride, length, width, wide, 1.0f, k_rows);
  transpose(k_rows, length, wide, v_panels);
  widen(k, shape.kv_stride, length, width, wide, 1.0f, k_rows);
  transpose(k_rows, length, wide, k_panels);
  std::memset(dk_sum, 0, (size.tokens + kTileRows) * wide * sizeof(float));
  std::memset(dv_sum, 0, (size.tokens + kTileRows) * wide * sizeof(float));

  for (size_t head = 0; head < shape.heads; head++) {
    const size_t offset = head * width;
    for (size_t begin = 0; begin < length; begin += kBlock) {
      const size_t count = std::min(kBlock, length - begin), padded = up_to(count, kTileRows);
      const size_t keys = begin + count, keys_padded = up_to(keys, kTileRows);
      widen(q + begin * shape.q_stride + offset, shape.q_stride, count, width, wide, shape.scale, block);
      widen(dout + begin * shape.q_stride + offset, shape.q_stride, count, width, wide, 1.0f, dblock);
      scores<NR>(block, k_panels, p, size, padded, keys);
      scores<NR>(dblock, v_panels, ds, size, padded, keys);
      for (size_t i = 0; i < count; i++) {
        const T* o = out + (begin + i) * shape.q_stride + offset;
        float delta = 0;
#pragma omp simd reduction(+ : delta)
        for (size_t j = 0; j < width; j++) delta += dblock[i * wide + j] * load(o[j]);
        const float log_sum = lse[(begin + i) * shape.lse_stride + head];
        float* __restrict pi = p + i * size.row;
        float* __restrict di = ds + i * size.row;
        const size_t seen = begin + i + 1;
        for (size_t j = 0; j < seen; j++) {
          const float e = fast_exp(pi[j] - log_sum);
          pi[j] = e;
          di[j] = e * (di[j] - delta);
        }
        for (size_t j = seen; j < keys_padded; j++) pi[j] = di[j] = 0.0f;
      }
      // dv += p^T dout; dk += ds^T (scale q); dq = scale ds k
      product<NR>(p, 1, size.row, dblock, wide, dv_sum, wide, keys_padded, wide, count, true);
      product<NR>(ds, 1, size.row, block, wide, dk_sum, wide, keys_padded, wide, count, true);
      product<NR>(ds, size.row, 1, k_rows, wide, result, wide, padded, wide, keys, false);
      for (size_t i = 0; i < count; i++) {
        T* to = dq + (begin + i) * shape.q_stride + offset;
        for (size_t j = 0; j < width; j++) store(&to[j], result[i * wide + j] * shape.scale);
      }
    }
  }
  for (size_t i = 0; i < length; i++) {
    std::memcpy(dk + i * shape.kv_stride, dk_sum + i * wide, width * sizeof(float));
    std::memcpy(dv + i * shape.kv_stride, dv_sum + i * wide, width * sizeof(float));
  }
}

// Registers decide the tile: 32 vectors of 16 floats, 16 of 8, or 16 of 4.
enum class Level { v4, v3, baseline };

Level level() {
  static const Level found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                                 ? Level::v4
                             : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::v3
                                                                                               : Level::baseline;
  return found;
}

#define FORWARD_ARGUMENTS(T) \
  const AttentionShape &shape, const T *q, const T *k, const T *v, T *out, float *lse, float *scratch
#define BACKWARD_ARGUMENTS(T)                                                                                    \
  const AttentionShape &shape, const T *dout, const T *q, const T *k, const T *v, const T *out, const float *lse, \
      T *dq, float *dk, float *dv, float *scratch

#define LEVEL(NAME, TARGET, NR, T)                                                    \
  __attribute__((target(TARGET))) void forward_##NAME(FORWARD_ARGUMENTS(T)) {         \
    forward_body<NR>(shape, q, k, v, out, lse, scratch);                              \
  }                                                                                   \
  __attribute__((target(TARGET))) void backward_##NAME(BACKWARD_ARGUMENTS(T)) {       \
    backward_body<NR>(shape, dout, q, k, v, out, lse, dq, dk, dv, scratch);           \
  }
#define LEVELS(T)                          \
  LEVEL(v4, "arch=x86-64-v4", 4, T)        \
  LEVEL(v3, "arch=x86-64-v3", 1, T)        \
  LEVEL(baseline, "arch=x86-64", 1, T)
LEVELS(float)
LEVELS(bf16)

}  // namespace

size_t attention_scratch(size_t length, size_t width) {
  const Sizes size(length, width);
  return 5 * (size.tokens + kPanel) * size.wide + 3 * kBlock * size.wide + 2 * kBlock * size.row + 16 * 16;
}

#define EXPORT(T)                                                                                      \
  void attention_forward(FORWARD_ARGUMENTS(T)) {                                                       \
    switch (level()) {                                                                                 \
      case Level::v4: return forward_v4(shape, q, k, v, out, lse, scratch);                            \
      case Level::v3: return forward_v3(shape, q, k, v, out, lse, scratch);                            \
      case Level::baseline: return forward_baseline(shape, q, k, v, out, lse, scratch);                \
    }                                                                                                  \
  }                                                                                                    \
  void attention_backward(BACKWARD_ARGUMENTS(T)) {                                                     \
    switch (level()) {                                                                                 \
      case Level::v4: return backward_v4(shape, dout, q, k, v, out, lse, dq, dk, dv, scratch);         \
      case Level::v3: return backward_v3(shape, dout, q, k, v, out, lse, dq, dk, dv, scratch);         \
      case Level::baseline: return backward_baseline(shape, dout, q, k, v, out, lse, dq, dk, dv, scratch); \
    }                                                                                                  \
  }
EXPORT(float)
EXPORT(bf16)

}  // namespace host::kernels
