// SPDX-License-Identifier: GPL-3.0-or-later
// One tile (16 weight rows, all columns) against groups of tokens.  The codes are unpacked in registers for every group: at 12 tokens
// that is about a tenth of the work, and the packed tile stays in the first-level cache.
#include "ops/quant_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/simd_int.h"
#include "quant/packed.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// 32 vector registers hold 12 integer and 12 float accumulators; 16 hold 2 of each as pairs.
#if defined(HELEXA_AVX512)
constexpr int kMaxWidth = 12;
#else
constexpr int kMaxWidth = 2;
#endif

constexpr int kFloatTokens = kMaxWidth < 4 ? kMaxWidth : 4;

// Byte offsets within a record of `W` tokens.
template <int W>
struct Record {
  static constexpr int kScale = 32 * W, kSum = kScale + 4 * W, kNegativeSum = kSum + 4 * W, kNegativeSum16 = kNegativeSum + 4 * W;
  static constexpr int kBytes = kNegativeSum16 + 8 * W;
  static_assert(kBytes == group_record_bytes(W));
};

template <int kBits, int j>
HELEXA_INLINE u8x64 low_quad(const uint8_t* codes, u8x64 nibbles) {
  u8x64 quad = mask_bytes(nibbles, 0x0f);
  if constexpr (kBits == 5) quad = or_bytes(quad, mask_bytes(shift_right<j - 4>(load_bytes(codes + 256)), 0x10));
  if constexpr (kBits == 6) quad = or_bytes(quad, mask_bytes(shift_right<2 * j - 4>(load_bytes(codes + 256)), 0x30));
  return quad;
}

template <int kBits, int j>
HELEXA_INLINE u8x64 high_quad(const uint8_t* codes, u8x64 nibbles) {
  u8x64 quad = mask_bytes(shift_right<4>(nibbles), 0x0f);
  if constexpr (kBits == 5) quad = or_bytes(quad, mask_bytes(shift_right<j>(load_bytes(codes + 256)), 0x10));
  if constexpr (kBits == 6) quad = or_bytes(quad, mask_bytes(shift_right<2 * j - 4>(load_bytes(codes + 320)), 0x30));
  return quad;
}

template <int kBits, int W>
HELEXA_INLINE void dot_quad(u8x64 quad, const uint8_t* record, int index, i32x16 (&dot)[W]) {
  const int8_t* a = reinterpret_cast<const int8_t*>(record) + 4 * index;
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) dot[t] = dot4<kBits>(dot[t], quad, a + 32 * t);
}

// Column quads j and j + 4 of a block, which share their bytes.
template <int kBits, int W, int j>
HELEXA_INLINE void dot_quad_pair(const uint8_t* codes, const uint8_t* record, i32x16 (&dot)[W]) {
  const u8x64 nibbles = load_bytes(codes + 64 * j);
  dot_quad<kBits, W>(low_quad<kBits, j>(codes, nibbles), record, j, dot);
  dot_quad<kBits, W>(high_quad<kBits, j>(codes, nibbles), record, j + 4, dot);
}

template <int kBits, int W>
HELEXA_INLINE void dot_block(const uint8_t* codes, const uint8_t* record, i32x16 (&dot)[W]) {
  if constexpr (kBits == 8) {
    HELEXA_UNROLL
    for (int q = 0; q < 8; ++q) dot_quad<8, W>(load_bytes(codes + 64 * q), record, q, dot);
  } else {
    dot_quad_pair<kBits, W, 0>(codes, record, dot);
    dot_quad_pair<kBits, W, 1>(codes, record, dot);
    dot_quad_pair<kBits, W, 2>(codes, record, dot);
    dot_quad_pair<kBits, W, 3>(codes, record, dot);
  }
}

HELEXA_INLINE const float* floats(const uint8_t* record, int offset) { return reinterpret_cast<const float*>(record + offset); }
HELEXA_INLINE const int32_t* ints(const uint8_t* record, int offset) { return reinterpret_cast<const int32_t*>(record + offset); }

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// acc += scale * (code - zero) · x over one block.
template <int kBits, int kZero, int W>
HELEXA_INLINE void add_symmetric_block(const uint8_t* codes, f32x16 scale, const uint8_t* record, f32x16 (&acc)[W]) {
  i32x16 dot[W];
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) dot[t] = start_dot<log2_of(kZero)>(ints(record, Record<W>::kNegativeSum) + t);
  dot_block<kBits, W>(codes, record, dot);
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    acc[t] = fma(to_float(dot[t]), scale * set1(floats(record, Record<W>::kScale)[t]), acc[t]);
  }
}

// acc += (scale * code + offset) · x over one block.
template <int kBits, int W>
HELEXA_INLINE void add_affine_block(const uint8_t* codes, f32x16 scale, f32x16 offset, const uint8_t* record, f32x16 (&acc)[W]) {
  i32x16 dot[W];
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) dot[t] = zero_dot();
  dot_block<kBits, W>(codes, record, dot);
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    acc[t] = fma(to_float(dot[t]), scale * set1(floats(record, Record<W>::kScale)[t]), acc[t]);
    acc[t] = fma(offset, set1(floats(record, Record<W>::kSum)[t]), acc[t]);
  }
}

// Half a block (column quads 4 * half .. 4 * half + 3) with a scale of its own.
template <int kBits, int kZero, int half, int W>
HELEXA_INLINE void add_half_block(const uint8_t* codes, f32x16 scale, const uint8_t* record, f32x16 (&acc)[W]) {
  i32x16 dot[W];
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    dot[t] = start_dot<log2_of(kZero)>(ints(record, Record<W>::kNegativeSum16) + half * W + t);
  }
  if constexpr (half == 0) {
    dot_quad<kBits, W>(low_quad<kBits, 0>(codes, load_bytes(codes)), record, 0, dot);
    dot_quad<kBits, W>(low_quad<kBits, 1>(codes, load_bytes(codes + 64)), record, 1, dot);
    dot_quad<kBits, W>(low_quad<kBits, 2>(codes, load_bytes(codes + 128)), record, 2, dot);
    dot_quad<kBits, W>(low_quad<kBits, 3>(codes, load_bytes(codes + 192)), record, 3, dot);
  } else {
    dot_quad<kBits, W>(high_quad<kBits, 0>(codes, load_bytes(codes)), record, 4, dot);
    dot_quad<kBits, W>(high_quad<kBits, 1>(codes, load_bytes(codes + 64)), record, 5, dot);
    dot_quad<kBits, W>(high_quad<kBits, 2>(codes, load_bytes(codes + 128)), record, 6, dot);
    dot_quad<kBits, W>(high_quad<kBits, 3>(codes, load_bytes(codes + 192)), record, 7, dot);
  }
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    acc[t] = fma(to_float(dot[t]), scale * set1(floats(record, Record<W>::kScale)[t]), acc[t]);
  }
}

HELEXA_INLINE f32x16 load_scale_f16(const uint8_t* p) { return load(reinterpret_cast<const f16*>(p)); }

// acc += unit · x over one repeating unit of the packed layout.
template <class F, int W>
HELEXA_INLINE void add_unit(const uint8_t* unit, const uint8_t* records, f32x16 (&acc)[W]) {
  const f32x16 d = load_scale_f16(unit);
  if constexpr (F::kScales == Scales::kSymmetric) {
    add_symmetric_block<F::kBits, F::kZero, W>(unit + 32, d, records, acc);
  } else if constexpr (F::kScales == Scales::kAffine) {
    add_affine_block<F::kBits, W>(unit + 64, d, load_scale_f16(unit + 32), records, acc);
  } else if constexpr (F::kScales == Scales::kSuperMin) {
    const f32x16 minus_dmin = load_scale_f16(unit + 32) * set1(-1.0f);
    for (int b = 0; b < 8; ++b) {
      const f32x16 scale = d * load_scale_u8(unit + 64 + 16 * b);
      const f32x16 offset = minus_dmin * load_scale_u8(unit + 192 + 16 * b);
      add_affine_block<F::kBits, W>(unit + codes_offset<F>(b), scale, offset, records + b * Record<W>::kBytes, acc);
    }
  } else {
    for (int b = 0; b < 8; ++b) {
      const uint8_t* record = records + b * Record<W>::kBytes;
      const uint8_t* codes = unit + codes_offset<F>(b);
      add_half_block<F::kBits, F::kZero, 0, W>(codes, d * load_scale_i8(unit + 32 + 32 * b), record, acc);
      add_half_block<F::kBits, F::kZero, 1, W>(codes, d * load_scale_i8(unit + 48 + 32 * b), record, acc);
    }
  }
}

HELEXA_INLINE void store_rows(f32x16 value, const TileCall& c, float* out) {
  if (c.num_rows == 16 && c.bias == nullptr) return store(out, value);
  float lanes[16];
  store(lanes, value);
  for (int r = 0; r < c.num_rows; ++r) out[r] = lanes[r] + (c.bias == nullptr ? 0.0f : c.bias[r]);
}

template <class F, int W>
void tile_times_group(const TileCall& c, const uint8_t* records, int64_t first_token) {
  f32x16 acc[W];
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) acc[t] = zero();
  const int64_t units = c.cols / unit_cols<F>();
  constexpr int kRecordBytes = F::kBlockSize / 32 * Record<W>::kBytes;
  for (int64_t u = 0; u < units; ++u) add_unit<F, W>(c.tile + u * unit_bytes<F>(), records + u * kRecordBytes, acc);
  const int64_t tokens = std::min<int64_t>(W, c.num_tokens - first_token);
  for (int64_t t = 0; t < tokens; ++t) store_rows(acc[t], c, c.out + (first_token + t) * c.out_stride);
}

template <class F>
void quantized_tile(const TileCall& c) {
  const int64_t blocks = c.cols / 32;
  const uint8_t* records = c.quantized;
  for (int64_t first = 0; first < c.num_tokens;) {
    const int width = token_group_width(c.num_tokens - first);
    switch (width) {
      case 1: tile_times_group<F, 1>(c, records, first); break;
      case 2: tile_times_group<F, 2>(c, records, first); break;
#if defined(HELEXA_AVX512)
      case 4: tile_times_group<F, 4>(c, records, first); break;
      case 8: tile_times_group<F, 8>(c, records, first); break;
      case 12: tile_times_group<F, 12>(c, records, first); break;
#endif
    }
    records += blocks * group_record_bytes(width);
    first += width;
  }
}

template <class F>
HELEXA_INLINE f32x16 load_plain(const uint8_t* p) {
  if constexpr (F::kBlockBytes == 4) return load(reinterpret_cast<const float*>(p));
  if constexpr (std::is_same_v<F, F16>) return load(reinterpret_cast<const f16*>(p));
  return load(reinterpret_cast<const bf16*>(p));
}

template <class F, int W>
void plain_tokens(const TileCall& c, int64_t first) {
  f32x16 acc[W];
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) acc[t] = zero();
  const float* x = c.x + first * c.cols;
  for (int64_t k = 0; k < c.cols; ++k) {
    const f32x16 w = load_plain<F>(c.tile + k * unit_bytes<F>());
    for (int t = 0; t < W; ++t) acc[t] = fma(w, set1(x[t * c.cols + k]), acc[t]);
  }
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) store_rows(acc[t], c, c.out + (first + t) * c.out_stride);
}

template <class F>
void plain_tile(const TileCall& c) {
  int64_t first = 0;
  for (; first + kFloatTokens <= c.num_tokens; first += kFloatTokens) plain_tokens<F, kFloatTokens>(c, first);
  for (; first < c.num_tokens; ++first) plain_tokens<F, 1>(c, first);
}

// Rounds to the nearest integer, ties to even, by adding 1.5 * 2^23: the integer is then in the low bits.
HELEXA_INLINE int32_t round_to_int(float x) {
  const float shifted = x + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

void quantize_block(const float* x, int token, int width, uint8_t* record) {
  float most = 0.0f, poison = 0.0f;
  for (int i = 0; i < 32; ++i) {
    most = std::max(most, std::fabs(x[i]));
    poison += x[i] * 0.0f;  // NaN if any input is NaN or infinite: it must not turn into a harmless code
  }
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  int8_t* codes = reinterpret_cast<int8_t*>(record) + 32 * token;
  int32_t sums[2] = {0, 0};
  for (int half = 0; half < 2; ++half) {
    int32_t sum = 0;
    for (int i = 16 * half; i < 16 * half + 16; ++i) {
      const int32_t code = round_to_int(x[i] * inverse);
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    sums[half] = sum;
  }
  const float scale = most / 127.0f + poison;
  float* scales = reinterpret_cast<float*>(record + 32 * width);
  int32_t* negative = reinterpret_cast<int32_t*>(record + 40 * width);
  scales[token] = scale;
  scales[width + token] = scale * static_cast<float>(sums[0] + sums[1]);
  negative[token] = -(sums[0] + sums[1]);
  negative[width + token] = -sums[0];
  negative[2 * width + token] = -sums[1];
}

}  // namespace

int token_group_width(int64_t remaining) {
  for (const int width : {1, 2, 4, 8}) {
    if (width >= kMaxWidth || remaining <= width) return std::min(width, kMaxWidth);
  }
  return kMaxWidth;
}

void quantize_group(const float* x, int64_t num_tokens, int width, int64_t cols, uint8_t* records) {
  const int64_t blocks = cols / 32;
  if (num_tokens < width) std::memset(records, 0, blocks * group_record_bytes(width));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t b = 0; b < blocks; ++b) {
      quantize_block(x + t * cols + 32 * b, static_cast<int>(t), width, records + b * group_record_bytes(width));
    }
  }
}

void quant_matmul_tile(const TileCall& call) {
  with_format(static_cast<Format>(call.format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      plain_tile<F>(call);
    } else {
      quantized_tile<F>(call);
    }
  });
}

}  // namespace HELEXA_ISA
}  // namespace helexa
