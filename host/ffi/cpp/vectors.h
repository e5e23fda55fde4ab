// Conversions, a vectorisable exponential and the register-blocked product that the kernels are made of.
//
// Everything here is always inlined into a function compiled for one CPU level, so that vector types never cross a call.
#pragma once

#include <cstddef>
#include <cstdint>

#define HOST_INLINE static inline __attribute__((always_inline))

namespace host::kernels {

struct bf16 {
  uint16_t bits;
};

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16_unaligned __attribute__((vector_size(32), aligned(2)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

HOST_INLINE float load(float v) { return v; }
HOST_INLINE float load(bf16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16); }

HOST_INLINE void store(float* to, float v) { *to = v; }
// Round to nearest even; a NaN stays one.
HOST_INLINE void store(bf16* to, float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The value a store and a load would give back.
HOST_INLINE float rounded(float v, const float*) { return v; }
HOST_INLINE float rounded(float v, const bf16*) {
  bf16 t;
  store(&t, v);
  return load(t);
}

HOST_INLINE void load16(v16* to, const float* from) { *to = *reinterpret_cast<const v16_unaligned*>(from); }
HOST_INLINE void load16(v16* to, const bf16* from) {
  const u32x16 wide = __builtin_convertvector(*reinterpret_cast<const u16x16_unaligned*>(from), u32x16) << 16;
  *to = __builtin_bit_cast(v16, wide);
}
HOST_INLINE void store16(float* to, const v16& from) { *reinterpret_cast<v16_unaligned*>(to) = from; }
HOST_INLINE void store16(bf16* to, const v16& from) {
  const u32x16 u = __builtin_bit_cast(u32x16, from);
  const u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u32x16 bits = (u & 0x7fffffffu) > 0x7f800000u ? u32x16{} + 0x7fc0u : rounded;
  *reinterpret_cast<u16x16_unaligned*>(to) = __builtin_convertvector(bits, u16x16);
}

// exp(x) to about one unit in the last place for |x| < 87, saturating outside: Cody-Waite reduction by ln 2 in two
// parts and the polynomial of Cephes' expf. NaN in, NaN out. Written without calls so that loops vectorise.
HOST_INLINE float fast_exp(float x) {
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t scale = (__builtin_bit_cast(uint32_t, shifted) - 0x4b400000u + 127u) << 23;
  return p * __builtin_bit_cast(float, scale);
}

// The same for sixteen at a time, where the compiler's own vectors turn out slower.
HOST_INLINE void fast_exp16(v16* value) {
  v16 x = *value;
  x = x > 87.0f ? v16{} + 87.0f : x;
  x = x < -87.0f ? v16{} - 87.0f : x;
  const v16 shifted = x * 1.44269504088896341f + 12582912.0f;
  const v16 n = shifted - 12582912.0f;
  const v16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const u32x16 scale = (__builtin_bit_cast(u32x16, shifted) - 0x4b400000u + 127u) << 23;
  *value = p * __builtin_bit_cast(v16, scale);
}

HOST_INLINE void sigmoid16(v16* value) {
  v16 e = -*value;
  fast_exp16(&e);
  *value = 1.0f / (e + 1.0f);
}

// C[MR][16 NR] (+)= A[MR][depth] B[depth][16 NR]: one tile held in registers. A is read one scalar at a time, at any
// strides, so that its transpose costs nothing.
template <int MR, int NR, typename B>
HOST_INLINE void tile(const float* __restrict a, size_t a_row, size_t a_step, const B* __restrict b, size_t b_step,
                      float* __restrict c, size_t c_row, size_t depth, bool accumulate) {
  v16 sum[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      if (accumulate) {
        load16(&sum[m][j], c + m * c_row + 16 * j);
      } else {
        sum[m][j] = v16{};
      }
    }
  }
  for (size_t k = 0; k < depth; k++, a += a_step, b += b_step) {
    v16 row[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) load16(&row[j], b + 16 * j);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const float scalar = a[m * a_row];
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) sum[m][j] += row[j] * scalar;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) store16(c + m * c_row + 16 * j, sum[m][j]);
  }
}

// The whole product: `rows` a multiple of kTileRows, `columns` of 16. NR is the widest tile the CPU has registers for.
constexpr size_t kTileRows = 6;

template <int NR, typename B>
HOST_INLINE void product(const float* a, size_t a_row, size_t a_step, const B* b, size_t b_step, float* c, size_t c_row,
                         size_t rows, size_t columns, size_t depth, bool accumulate) {
  for (size_t j = 0; j < columns;) {
    const size_t left = columns - j;
    for (size_t m = 0; m < rows; m += kTileRows) {
      const float* am = a + m * a_row;
      float* cm = c + m * c_row + j;
      if (NR >= 4 && left >= 64) {
        tile<kTileRows, 4>(am, a_row, a_step, b + j, b_step, cm, c_row, depth, accumulate);
      } else if (NR >= 4 && left >= 32) {
        tile<kTileRows, 2>(am, a_row, a_step, b + j, b_step, cm, c_row, depth, accumulate);
      } else {
        tile<kTileRows, 1>(am, a_row, a_step, b + j, b_step, cm, c_row, depth, accumulate);
      }
    }
    j += NR >= 4 && left >= 64 ? 64 : NR >= 4 && left >= 32 ? 32 : 16;
  }
}

}  // namespace host::kernels
