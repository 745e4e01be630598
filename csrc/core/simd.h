// SPDX-License-Identifier: GPL-3.0-or-later
// Sixteen floats as one value, so that a kernel in <op>_isa.cpp is written once and compiled for each instruction set: one AVX-512
// register, two AVX2 registers, or an array that the compiler vectorizes as it can.
//
// Only <op>_isa.cpp files include this header.  They keep clear of templates and inline functions of the standard library: the
// linker would merge those with the copies that must run on any machine.  A local array of f32x16 stays in registers only
// if each loop over it is unrolled completely: put HELEXA_UNROLL before it.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float_types.h"

#if defined(HELEXA_ISA_avx2) || defined(HELEXA_ISA_avx512) || defined(HELEXA_ISA_avx512vnni)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 takes the undefined operands in its own AVX-512 header for mistakes of the caller.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
#if defined(HELEXA_ISA_avx512) || defined(HELEXA_ISA_avx512vnni)
#define HELEXA_AVX512 1
#endif

#define HELEXA_INLINE static inline __attribute__((always_inline))
#define HELEXA_UNROLL _Pragma("GCC unroll 32")

namespace helexa {

// Elements of 16-bit tensors, so that load and store are chosen by pointer type.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace HELEXA_ISA {

#if defined(HELEXA_AVX512)

struct f32x16 {
  __m512 v;
};

HELEXA_INLINE f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
HELEXA_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
HELEXA_INLINE f32x16 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
HELEXA_INLINE f32x16 load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// Stores to 16-bit types round to nearest even; NaN stays NaN.
HELEXA_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
HELEXA_INLINE void store(f16* p, f32x16 a) {
  const __m256i half = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
HELEXA_INLINE void store(bf16* p, f32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

HELEXA_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
HELEXA_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
HELEXA_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
HELEXA_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
HELEXA_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where one of the two is NaN, max and min return b.
HELEXA_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
HELEXA_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// a in the lanes where key <= limit, b in the others.
HELEXA_INLINE f32x16 select_le(f32x16 key, f32x16 limit, f32x16 a, f32x16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(key.v, limit.v, _CMP_LE_OQ), b.v, a.v)};
}
HELEXA_INLINE f32x16 round(f32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n; results below the normal range go to zero.
HELEXA_INLINE f32x16 scale_by_power(f32x16 a, f32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

HELEXA_INLINE float reduce_add(f32x16 a) { return _mm512_reduce_add_ps(a.v); }
HELEXA_INLINE float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a.v); }

// Lane i of the result is the sum of the lanes of a[i].
HELEXA_INLINE f32x16 reduce_add_each(const f32x16 (&a)[16]) {
  __m512 pairs[8], quads[4];
  HELEXA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 x = a[2 * i].v, y = a[2 * i + 1].v;
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  HELEXA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // Each 128-bit part of quads[i] holds partial sums of a[4i .. 4i + 3].
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

// Lane j of a[i] and lane i of a[j] change places.
HELEXA_INLINE void transpose(f32x16 (&a)[16]) {
  __m512 t[16];
  HELEXA_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  // a[4g + c] then holds in its 128-bit part p lane 4p + c of the rows 4g .. 4g + 3.
  HELEXA_UNROLL
  for (int i = 0; i < 16; i += 4) {
    HELEXA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const __m512d x = _mm512_castps_pd(t[i + c]), y = _mm512_castps_pd(t[i + c + 2]);
      a[i + 2 * c].v = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * c + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  HELEXA_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512 low_even = _mm512_shuffle_f32x4(a[c].v, a[c + 4].v, 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(a[c].v, a[c + 4].v, 0xdd);
    const __m512 high_even = _mm512_shuffle_f32x4(a[c + 8].v, a[c + 12].v, 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[c + 8].v, a[c + 12].v, 0xdd);
    t[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    t[c + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    t[c + 8] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
    t[c + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
  HELEXA_UNROLL
  for (int i = 0; i < 16; ++i) a[i].v = t[i];
}

#elif defined(HELEXA_ISA_avx2)

struct f32x16 {
  __m256 lo, hi;
};

HELEXA_INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HELEXA_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HELEXA_INLINE f32x16 load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
HELEXA_INLINE f32x16 load(const bf16* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
HELEXA_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
HELEXA_INLINE void store(f16* p, f32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}
HELEXA_INLINE __m256i bf16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
HELEXA_INLINE void store(bf16* p, f32x16 a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));  // in 64-bit parts 0 2 1 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

HELEXA_INLINE f32x16 operator+(f32x16 a, f32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 operator-(f32x16 a, f32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 operator*(f32x16 a, f32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 operator/(f32x16 a, f32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HELEXA_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
HELEXA_INLINE f32x16 select_le(f32x16 key, f32x16 limit, f32x16 a, f32x16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(key.lo, limit.lo, _CMP_LE_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(key.hi, limit.hi, _CMP_LE_OQ))};
}
HELEXA_INLINE f32x16 round(f32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
HELEXA_INLINE __m256 power_of_two(__m256 n) {
  const __m256 clamped = _mm256_max_ps(n, _mm256_set1_ps(-127.0f));
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(clamped), _mm256_set1_epi32(127)), 23));
}
HELEXA_INLINE f32x16 scale_by_power(f32x16 a, f32x16 n) {
  return {_mm256_mul_ps(a.lo, power_of_two(n.lo)), _mm256_mul_ps(a.hi, power_of_two(n.hi))};
}

HELEXA_INLINE __m128 fold(f32x16 a) {
  const __m256 sum = _mm256_add_ps(a.lo, a.hi);
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}
HELEXA_INLINE float reduce_add(f32x16 a) {
  __m128 sum = fold(a);
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
HELEXA_INLINE float reduce_max(f32x16 a) {
  const __m256 both = _mm256_max_ps(a.lo, a.hi);
  __m128 best = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  best = _mm_max_ps(best, _mm_movehl_ps(best, best));
  return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
}
HELEXA_INLINE __m128 fold4(const f32x16* a) {
  return _mm_hadd_ps(_mm_hadd_ps(fold(a[0]), fold(a[1])), _mm_hadd_ps(fold(a[2]), fold(a[3])));
}
HELEXA_INLINE f32x16 reduce_add_each(const f32x16 (&a)[16]) {
  return {_mm256_set_m128(fold4(a + 4), fold4(a)), _mm256_set_m128(fold4(a + 12), fold4(a + 8))};
}

#else

struct f32x16 {
  float v[16];
};

#define HELEXA_EACH_LANE(expression)                       \
  f32x16 result;                                           \
  for (int i = 0; i < 16; ++i) result.v[i] = (expression); \
  return result

HELEXA_INLINE f32x16 set1(float x) { HELEXA_EACH_LANE(x); }
HELEXA_INLINE f32x16 load(const float* p) { HELEXA_EACH_LANE(p[i]); }
HELEXA_INLINE f32x16 load(const f16* p) { HELEXA_EACH_LANE(f16_to_float(p[i].bits)); }
HELEXA_INLINE f32x16 load(const bf16* p) { HELEXA_EACH_LANE(bf16_to_float(p[i].bits)); }
HELEXA_INLINE void store(float* p, f32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
HELEXA_INLINE void store(f16* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_f16(a.v[i]);
}
HELEXA_INLINE void store(bf16* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_bf16(a.v[i]);
}
HELEXA_INLINE f32x16 operator+(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] + b.v[i]); }
HELEXA_INLINE f32x16 operator-(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] - b.v[i]); }
HELEXA_INLINE f32x16 operator*(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] * b.v[i]); }
HELEXA_INLINE f32x16 operator/(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] / b.v[i]); }
HELEXA_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { HELEXA_EACH_LANE(a.v[i] * b.v[i] + c.v[i]); }
HELEXA_INLINE f32x16 max(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HELEXA_INLINE f32x16 min(f32x16 a, f32x16 b) { HELEXA_EACH_LANE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HELEXA_INLINE f32x16 select_le(f32x16 key, f32x16 limit, f32x16 a, f32x16 b) {
  HELEXA_EACH_LANE(key.v[i] <= limit.v[i] ? a.v[i] : b.v[i]);
}
HELEXA_INLINE f32x16 round(f32x16 a) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22, which covers every exponent.
  HELEXA_EACH_LANE((a.v[i] + 12582912.0f) - 12582912.0f);
}
HELEXA_INLINE f32x16 scale_by_power(f32x16 a, f32x16 n) {
  HELEXA_EACH_LANE(
      a.v[i] * bits_to_float(
                   static_cast<uint32_t>(static_cast<int>(n.v[i] > -127.0f ? n.v[i] : -127.0f) + 127) << 23));
}
HELEXA_INLINE float reduce_add(f32x16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
HELEXA_INLINE float reduce_max(f32x16 a) {
  float best = a.v[0];
  for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
HELEXA_INLINE f32x16 reduce_add_each(const f32x16 (&a)[16]) { HELEXA_EACH_LANE(reduce_add(a[i])); }
#undef HELEXA_EACH_LANE

#endif

#if !defined(HELEXA_AVX512)
HELEXA_INLINE void transpose(f32x16 (&a)[16]) {
  float rows[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], a[i]);
  for (int i = 0; i < 16; ++i) {
    float column[16];
    for (int j = 0; j < 16; ++j) column[j] = rows[j][i];
    a[i] = load(column);
  }
}
#endif

// --- the same for every instruction set ---------------------------------------------------------------------------------

HELEXA_INLINE f32x16 zero() { return set1(0.0f); }
HELEXA_INLINE f32x16& operator+=(f32x16& a, f32x16 b) { return a = a + b; }

// The first n < 16 lanes; load_n fills the others with zeros.
template <class T>
HELEXA_INLINE f32x16 load_n(const T* p, int64_t n) {
  T lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
HELEXA_INLINE void store_n(T* p, f32x16 a, int64_t n) {
  T lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// 2^a for a <= 126 within 2 ulp; below -126 it goes to zero.  The polynomial is the minimax one of relative error on [-1/2, 1/2].
HELEXA_INLINE f32x16 exp2(f32x16 a) {
  const f32x16 x = max(set1(-150.0f), a);
  const f32x16 n = round(x);
  const f32x16 f = x - n;
  f32x16 p = set1(1.53453121e-4f);
  p = fma(p, f, set1(1.3399931e-3f));
  p = fma(p, f, set1(9.618489e-3f));
  p = fma(p, f, set1(5.5503286e-2f));
  p = fma(p, f, set1(0.24022646f));
  p = fma(p, f, set1(0.6931472f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// e^a within 2 ulp for -87 <= a <= 88; it goes to zero below and is held at e^88 above.
HELEXA_INLINE f32x16 exp(f32x16 a) {
  const f32x16 x = min(set1(88.0f), max(set1(-104.0f), a));
  const f32x16 n = round(x * set1(1.44269504f));
  // ln 2 in two parts: n times the first is exact.
  f32x16 f = fma(n, set1(-0.693359375f), x);
  f = fma(n, set1(2.12194440e-4f), f);
  f32x16 p = set1(1.3836835e-3f);
  p = fma(p, f, set1(8.374824e-3f));
  p = fma(p, f, set1(4.1668225e-2f));
  p = fma(p, f, set1(0.1666642f));
  p = fma(p, f, set1(0.4999999f));
  p = fma(p, f, set1(1.0f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

}  // namespace HELEXA_ISA
}  // namespace helexa
