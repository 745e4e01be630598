// SPDX-License-Identifier: GPL-3.0-or-later
// Integer vectors for the quantized dot products: 16 rows of int32, and 16 rows of 4 bytes.  See core/simd.h for the float side.
#pragma once

#include <cmath>

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {

#if defined(HELEXA_AVX512)

using i32x16 = __m512i;
using u8x64 = __m512i;

HELEXA_INLINE u8x64 load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
HELEXA_INLINE u8x64 mask_bytes(u8x64 v, uint8_t mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
// table[v] for bytes below 16.
HELEXA_INLINE u8x64 look_up(const uint8_t* table, u8x64 v) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), v);
}
HELEXA_INLINE u8x64 or_bytes(u8x64 a, u8x64 b) { return _mm512_or_si512(a, b); }
// Shifts whole 16-bit lanes: mask afterwards.
template <int n>
HELEXA_INLINE u8x64 shift_right(u8x64 v) {
  if constexpr (n >= 0) return _mm512_srli_epi16(v, n);
  return _mm512_slli_epi16(v, -n);
}
// n = -(sum) << shift in every lane.
template <int shift>
HELEXA_INLINE i32x16 start_dot(const int32_t* negative_sum) {
  return _mm512_slli_epi32(_mm512_set1_epi32(*negative_sum), shift);
}
HELEXA_INLINE i32x16 zero_dot() { return _mm512_setzero_si512(); }
HELEXA_INLINE f32x16 to_float(i32x16 v) { return f32x16{_mm512_cvtepi32_ps(v)}; }
HELEXA_INLINE f32x16 load_scale_u8(const uint8_t* p) {
  return f32x16{
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
HELEXA_INLINE f32x16 load_scale_i8(const uint8_t* p) {
  return f32x16{
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Stores a, rounded to nearest even, as bytes, and returns the integers.
HELEXA_INLINE i32x16 store_rounded(int8_t* p, f32x16 a) {
  const __m512i v = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  return v;
}
HELEXA_INLINE int32_t reduce_add(i32x16 v) { return _mm512_reduce_add_epi32(v); }
HELEXA_INLINE __m512i broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}

// acc[row] += sum over 4 bytes of codes[row][i] * a[i]; kBits bounds the codes.
template <int kBits>
HELEXA_INLINE i32x16 dot4(i32x16 acc, u8x64 codes, const int8_t* a) {
  const __m512i quad = broadcast_quad(a);
#if defined(HELEXA_ISA_avx512vnni)
  return _mm512_dpbusd_epi32(acc, codes, quad);
#else
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (kBits < 8) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, quad), ones));
  } else {
    // maddubs saturates at 16 bits: the top bit of each code goes separately.
    const __m512i low = _mm512_maddubs_epi16(mask_bytes(codes, 0x7f), quad);
    const __m512i high = _mm512_maddubs_epi16(mask_bytes(_mm512_srli_epi16(codes, 7), 1), quad);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, ones));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(128)));
  }
#endif
}

#elif defined(HELEXA_ISA_avx2)

struct i32x16 {
  __m256i half[2];
};
struct u8x64 {
  __m256i half[2];
};

HELEXA_INLINE u8x64 load_bytes(const uint8_t* p) {
  return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))}};
}
HELEXA_INLINE u8x64 mask_bytes(u8x64 v, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {{_mm256_and_si256(v.half[0], m), _mm256_and_si256(v.half[1], m)}};
}
HELEXA_INLINE u8x64 look_up(const uint8_t* table, u8x64 v) {
  const __m256i rows = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {{_mm256_shuffle_epi8(rows, v.half[0]), _mm256_shuffle_epi8(rows, v.half[1])}};
}
HELEXA_INLINE u8x64 or_bytes(u8x64 a, u8x64 b) {
  return {{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}
template <int n>
HELEXA_INLINE u8x64 shift_right(u8x64 v) {
  if constexpr (n >= 0) return {{_mm256_srli_epi16(v.half[0], n), _mm256_srli_epi16(v.half[1], n)}};
  return {{_mm256_slli_epi16(v.half[0], -n), _mm256_slli_epi16(v.half[1], -n)}};
}
template <int shift>
HELEXA_INLINE i32x16 start_dot(const int32_t* negative_sum) {
  const __m256i v = _mm256_slli_epi32(_mm256_set1_epi32(*negative_sum), shift);
  return {{v, v}};
}
HELEXA_INLINE i32x16 zero_dot() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
HELEXA_INLINE f32x16 to_float(i32x16 v) {
  return f32x16{_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])};
}
HELEXA_INLINE f32x16 load_scale_u8(const uint8_t* p) {
  return to_float({{_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                    _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))}});
}
HELEXA_INLINE f32x16 load_scale_i8(const uint8_t* p) {
  return to_float({{_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                    _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))}});
}
HELEXA_INLINE i32x16 store_rounded(int8_t* p, f32x16 a) {
  const i32x16 v = {{_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}};
  int32_t lanes[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v.half[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 8), v.half[1]);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
  return v;
}
HELEXA_INLINE int32_t reduce_add(i32x16 v) {
  const __m256i sum = _mm256_add_epi32(v.half[0], v.half[1]);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
template <int kBits>
HELEXA_INLINE __m256i dot4_half(__m256i acc, __m256i codes, __m256i quad) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kBits < 8) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, quad), ones));
  } else {
    // maddubs saturates at 16 bits: the top bit of each code goes separately.
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), quad);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
    const __m256i high = _mm256_maddubs_epi16(top, quad);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, ones));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(128)));
  }
}
template <int kBits>
HELEXA_INLINE i32x16 dot4(i32x16 acc, u8x64 codes, const int8_t* a) {
  int32_t bits;
  std::memcpy(&bits, a, 4);
  const __m256i quad = _mm256_set1_epi32(bits);
  return {{dot4_half<kBits>(acc.half[0], codes.half[0], quad),
           dot4_half<kBits>(acc.half[1], codes.half[1], quad)}};
}

#else

struct i32x16 {
  int32_t lane[16];
};
struct u8x64 {
  uint8_t byte[64];
};

HELEXA_INLINE u8x64 load_bytes(const uint8_t* p) {
  u8x64 v;
  std::memcpy(v.byte, p, 64);
  return v;
}
HELEXA_INLINE u8x64 mask_bytes(u8x64 v, uint8_t mask) {
  for (auto& b : v.byte) b &= mask;
  return v;
}
HELEXA_INLINE u8x64 look_up(const uint8_t* table, u8x64 v) {
  for (auto& b : v.byte) b = table[b];
  return v;
}
HELEXA_INLINE u8x64 or_bytes(u8x64 a, u8x64 b) {
  for (int i = 0; i < 64; ++i) a.byte[i] |= b.byte[i];
  return a;
}
template <int n>
HELEXA_INLINE u8x64 shift_right(u8x64 v) {
  for (auto& b : v.byte) {
    if constexpr (n >= 0) {
      b = static_cast<uint8_t>(b >> n);
    } else {
      b = static_cast<uint8_t>(b << -n);
    }
  }
  return v;
}
template <int shift>
HELEXA_INLINE i32x16 start_dot(const int32_t* negative_sum) {
  i32x16 v;
  for (auto& lane : v.lane) lane = *negative_sum * (1 << shift);
  return v;
}
HELEXA_INLINE i32x16 zero_dot() { return {}; }
HELEXA_INLINE f32x16 to_float(i32x16 v) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(v.lane[i]);
  return load(lanes);
}
HELEXA_INLINE f32x16 load_scale_u8(const uint8_t* p) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v.lane[i] = p[i];
  return to_float(v);
}
HELEXA_INLINE f32x16 load_scale_i8(const uint8_t* p) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v.lane[i] = static_cast<int8_t>(p[i]);
  return to_float(v);
}
HELEXA_INLINE i32x16 store_rounded(int8_t* p, f32x16 a) {
  float lanes[16];
  store(lanes, round(a));
  i32x16 v;
  for (int i = 0; i < 16; ++i) {
    v.lane[i] =
        std::abs(lanes[i]) < 128.0f ? static_cast<int32_t>(lanes[i]) : 0;  // NaN and infinity have no integer
    p[i] = static_cast<int8_t>(v.lane[i]);
  }
  return v;
}
HELEXA_INLINE int32_t reduce_add(i32x16 v) {
  int32_t sum = 0;
  for (const int32_t lane : v.lane) sum += lane;
  return sum;
}
template <int kBits>
HELEXA_INLINE i32x16 dot4(i32x16 acc, u8x64 codes, const int8_t* a) {
  for (int row = 0; row < 16; ++row) {
    for (int i = 0; i < 4; ++i) acc.lane[row] += codes.byte[4 * row + i] * a[i];
  }
  return acc;
}

#endif

}  // namespace HELEXA_ISA
}  // namespace helexa
