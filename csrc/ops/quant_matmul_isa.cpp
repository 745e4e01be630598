// SPDX-License-Identifier: GPL-3.0-or-later
// One or two tiles (16 weight rows each, all columns) against groups of tokens.  The codes are unpacked in registers for every group:
// at 6 tokens that is a small part of the work, and the packed tiles stay in the first-level cache.
#include "ops/quant_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/simd_int.h"
#include "quant/packed.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// Accumulators, integer and float, that the vector registers hold: tiles times tokens.  Two tiles at once halve the loads of the
// input, which would otherwise bound the kernel: one broadcast for each product.
#if defined(HELEXA_AVX512)
constexpr int kMaxWidth = 6, kMaxTiles = 2;
#else
constexpr int kMaxWidth = 2, kMaxTiles = 1;
#endif

constexpr int kFloatTokens = kMaxWidth < 4 ? kMaxWidth : 4;

// While decoding, the weights come from memory, and the hardware's own prefetch stops at each 4 KiB page.  Tiles lie one after the
// other, so requests that run ahead cross their borders as well.
constexpr int kStreamWidth = 4;
constexpr int64_t kPrefetchBytes = 4096;

template <int kBytes>
HELEXA_INLINE void prefetch(const uint8_t* p) {
  HELEXA_UNROLL
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + i);
}

// Byte offsets within a record of `W` tokens.
template <int W>
struct Record {
  static constexpr int kScale = 32 * W, kSum = kScale + 4 * W, kNegativeSum = kSum + 4 * W,
                       kNegativeSum16 = kNegativeSum + 4 * W;
  static constexpr int kBytes = kNegativeSum16 + 8 * W;
  static_assert(kBytes == group_record_bytes(W));
};

// Bits of the codes as the dot product sees them.
template <class F>
constexpr int dot_bits() {
  return has_levels<F> ? 8 : F::kBits;
}

template <class F, int j>
HELEXA_INLINE u8x64 low_quad(const uint8_t* codes, u8x64 nibbles) {
  u8x64 quad = mask_bytes(nibbles, 0x0f);
  if constexpr (F::kBits == 5)
    quad = or_bytes(quad, mask_bytes(shift_right<j - 4>(load_bytes(codes + 256)), 0x10));
  if constexpr (F::kBits == 6)
    quad = or_bytes(quad, mask_bytes(shift_right<2 * j - 4>(load_bytes(codes + 256)), 0x30));
  if constexpr (has_levels<F>) quad = look_up(F::kLevels, quad);
  return quad;
}

template <class F, int j>
HELEXA_INLINE u8x64 high_quad(const uint8_t* codes, u8x64 nibbles) {
  u8x64 quad = mask_bytes(shift_right<4>(nibbles), 0x0f);
  if constexpr (F::kBits == 5)
    quad = or_bytes(quad, mask_bytes(shift_right<j>(load_bytes(codes + 256)), 0x10));
  if constexpr (F::kBits == 6)
    quad = or_bytes(quad, mask_bytes(shift_right<2 * j - 4>(load_bytes(codes + 320)), 0x30));
  if constexpr (has_levels<F>) quad = look_up(F::kLevels, quad);
  return quad;
}

// Quad 4 * half + j of 2 or 3 bits, from the half's vector of bit pairs.
template <class F, int half, int j>
HELEXA_INLINE u8x64 pair_quad(const uint8_t* codes, u8x64 pairs) {
  const u8x64 quad = mask_bytes(shift_right<2 * j>(pairs), 0x03);
  if constexpr (F::kBits == 2) return quad;
  return or_bytes(quad, mask_bytes(shift_right<4 * half + j - 2>(load_bytes(codes + 128)), 0x04));
}

// The integer dots of R tiles, whose codes lie `apart` bytes from each other, with W tokens.
template <int R, int W>
struct Dots {
  i32x16 v[R][W];
};

template <class F, int W>
HELEXA_INLINE void dot_quad(u8x64 quad, const uint8_t* record, int index, i32x16 (&dot)[W]) {
  const int8_t* a = reinterpret_cast<const int8_t*>(record) + 4 * index;
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) dot[t] = dot4<dot_bits<F>()>(dot[t], quad, a + 32 * t);
}

// Column quads j and j + 4 of a block share their bytes; `which` is a mask: 1 takes the first, 2 the second.
template <class F, int R, int W, int j, int which>
HELEXA_INLINE void dot_quad_pair(const uint8_t* codes, int64_t apart, const uint8_t* record,
                                 Dots<R, W>& dot) {
  u8x64 nibbles[R];
  for (int r = 0; r < R; ++r) nibbles[r] = load_bytes(codes + r * apart + 64 * j);
  if constexpr ((which & 1) != 0) {
    HELEXA_UNROLL
    for (int r = 0; r < R; ++r) {
      dot_quad<F, W>(low_quad<F, j>(codes + r * apart, nibbles[r]), record, j, dot.v[r]);
    }
  }
  if constexpr ((which & 2) != 0) {
    HELEXA_UNROLL
    for (int r = 0; r < R; ++r) {
      dot_quad<F, W>(high_quad<F, j>(codes + r * apart, nibbles[r]), record, j + 4, dot.v[r]);
    }
  }
}

template <class F, int R, int W, int half, int j>
HELEXA_INLINE void dot_pair_quad(const uint8_t* codes, int64_t apart, const uint8_t* record,
                                 Dots<R, W>& dot) {
  HELEXA_UNROLL
  for (int r = 0; r < R; ++r) {
    const u8x64 pairs = load_bytes(codes + r * apart + 64 * half);
    dot_quad<F, W>(pair_quad<F, half, j>(codes + r * apart, pairs), record, 4 * half + j, dot.v[r]);
  }
}

template <class F, int R, int W, int which = 3>
HELEXA_INLINE void dot_block(const uint8_t* codes, int64_t apart, const uint8_t* record, Dots<R, W>& dot) {
  if constexpr (F::kBits == 8) {
    HELEXA_UNROLL
    for (int q = 0; q < 8; ++q) {
      HELEXA_UNROLL
      for (int r = 0; r < R; ++r) dot_quad<F, W>(load_bytes(codes + r * apart + 64 * q), record, q, dot.v[r]);
    }
  } else if constexpr (F::kBits < 4) {
    static_assert(which != 3);
    dot_pair_quad<F, R, W, which - 1, 0>(codes, apart, record, dot);
    dot_pair_quad<F, R, W, which - 1, 1>(codes, apart, record, dot);
    dot_pair_quad<F, R, W, which - 1, 2>(codes, apart, record, dot);
    dot_pair_quad<F, R, W, which - 1, 3>(codes, apart, record, dot);
  } else {
    dot_quad_pair<F, R, W, 0, which>(codes, apart, record, dot);
    dot_quad_pair<F, R, W, 1, which>(codes, apart, record, dot);
    dot_quad_pair<F, R, W, 2, which>(codes, apart, record, dot);
    dot_quad_pair<F, R, W, 3, which>(codes, apart, record, dot);
  }
}

HELEXA_INLINE const float* floats(const uint8_t* record, int offset) {
  return reinterpret_cast<const float*>(record + offset);
}
HELEXA_INLINE const int32_t* ints(const uint8_t* record, int offset) {
  return reinterpret_cast<const int32_t*>(record + offset);
}

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

HELEXA_INLINE f32x16 load_scale_f16(const uint8_t* p) { return load(reinterpret_cast<const f16*>(p)); }

template <int R, int W>
struct Sums {
  f32x16 v[R][W];
};

// acc += scale * dot * (scale of the input).
template <int R, int W>
HELEXA_INLINE void add_scaled(const Dots<R, W>& dot, const f32x16 (&scale)[R], const uint8_t* record,
                              Sums<R, W>& acc) {
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    const f32x16 input_scale = set1(floats(record, Record<W>::kScale)[t]);
    for (int r = 0; r < R; ++r) acc.v[r][t] = fma(to_float(dot.v[r][t]), scale[r] * input_scale, acc.v[r][t]);
  }
}

// Minus the sums of the input's codes: of a block, or of its half (which = 1, 2).
template <int W, int which>
HELEXA_INLINE const int32_t* negative_sums(const uint8_t* record) {
  if constexpr (which == 3) return ints(record, Record<W>::kNegativeSum);
  return ints(record, Record<W>::kNegativeSum16) + (which - 1) * W;
}

// acc += scale * (code - zero) · x over one block, or half of one (which = 1, 2) with a scale of its own.
template <class F, int R, int W, int which>
HELEXA_INLINE void add_symmetric(const uint8_t* codes, int64_t apart, const f32x16 (&scale)[R],
                                 const uint8_t* record, Sums<R, W>& acc) {
  const int32_t* negative_sum = negative_sums<W, which>(record);
  Dots<R, W> dot;
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    for (int r = 0; r < R; ++r) dot.v[r][t] = start_dot<log2_of(F::kZero)>(negative_sum + t);
  }
  dot_block<F, R, W, which>(codes, apart, record, dot);
  add_scaled<R, W>(dot, scale, record, acc);
}

// dot = code · x over one block or half of one.
template <class F, int R, int W, int which>
HELEXA_INLINE void dot_codes(const uint8_t* codes, int64_t apart, const uint8_t* record, Dots<R, W>& dot) {
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    for (int r = 0; r < R; ++r) dot.v[r][t] = zero_dot();
  }
  dot_block<F, R, W, which>(codes, apart, record, dot);
}

// acc += (scale * code + offset) · x over one block.
template <class F, int R, int W>
HELEXA_INLINE void add_affine(const uint8_t* codes, int64_t apart, const f32x16 (&scale)[R],
                              const f32x16 (&offset)[R], const uint8_t* record, Sums<R, W>& acc) {
  Dots<R, W> dot;
  dot_codes<F, R, W, 3>(codes, apart, record, dot);
  add_scaled<R, W>(dot, scale, record, acc);
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    const f32x16 input_sum = set1(floats(record, Record<W>::kSum)[t]);
    for (int r = 0; r < R; ++r) acc.v[r][t] = fma(offset[r], input_sum, acc.v[r][t]);
  }
}

// acc += (scale * code - min) · x over half a block.
template <class F, int R, int W, int which>
HELEXA_INLINE void add_half_with_min(const uint8_t* codes, int64_t apart, const f32x16 (&scale)[R],
                                     const f32x16 (&min)[R], const uint8_t* record, Sums<R, W>& acc) {
  Dots<R, W> dot;
  dot_codes<F, R, W, which>(codes, apart, record, dot);
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    const f32x16 input_scale = set1(floats(record, Record<W>::kScale)[t]);
    const f32x16 negative = to_float(start_dot<0>(negative_sums<W, which>(record) + t));
    for (int r = 0; r < R; ++r) {
      const f32x16 sum = fma(to_float(dot.v[r][t]), scale[r], min[r] * negative);
      acc.v[r][t] = fma(sum, input_scale, acc.v[r][t]);
    }
  }
}

// n numbers of six bits of 16 rows, as packed -> out[16 * number + row].
template <int n>
HELEXA_INLINE void unpack_six_bits(const uint8_t* packed, uint8_t* out) {
  uint64_t nibbles[n], pairs[n / 2], words[2 * n];
  std::memcpy(nibbles, packed, sizeof nibbles);
  std::memcpy(pairs, packed + sizeof nibbles, sizeof pairs);
  HELEXA_UNROLL
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < n / 2; ++i) {
      const int word = k * n / 2 + i;
      words[word] = ((nibbles[word % n] >> (k / 2 * 4)) & 0x0f0f0f0f0f0f0f0fu) |
                    (((pairs[i] >> (2 * k)) & 0x0303030303030303u) << 4);
    }
  }
  std::memcpy(out, words, sizeof words);
}

// The scales of a unit of 256 columns, as numbers: those of the 16 rows stand together.
template <class F>
struct UnitScales {
  static constexpr bool kHasMins = F::kScales == Scales::kSuperMin || F::kScales == Scales::kSuperMin16;
  uint8_t numbers[F::kScales == Scales::kSuper32 ? 128 : F::kScales == Scales::kSuperMin16 ? 512 : 256];

  __attribute__((always_inline)) void unpack(const uint8_t* unit) {
    if constexpr (F::kScales == Scales::kSuper32) unpack_six_bits<8>(unit + 32, numbers);
    if constexpr (F::kScales == Scales::kSuper16) std::memcpy(numbers, unit + 32, 256);
    if constexpr (F::kScales == Scales::kSuper16Bits6) unpack_six_bits<16>(unit + 32, numbers);
    if constexpr (F::kScales == Scales::kSuperMin) unpack_six_bits<16>(unit + 64, numbers);
    if constexpr (F::kScales == Scales::kSuperMin16) {
      for (int i = 0; i < 256; ++i) {
        numbers[i] = unit[64 + i] & 15;
        numbers[256 + i] = unit[64 + i] >> 4;
      }
    }
  }

  __attribute__((always_inline)) f32x16 scale(int index) const {
    if constexpr (F::kScales == Scales::kSuper16) return load_scale_i8(numbers + 16 * index);
    if constexpr (kHasMins) return load_scale_u8(numbers + 16 * index);
    return load_scale_u8(numbers + 16 * index) - set1(32.0f);
  }
  __attribute__((always_inline)) f32x16 min(int index) const {
    return load_scale_u8(numbers + sizeof numbers / 2 + 16 * index);
  }
};

// acc += half a block · x, `index` counting the halves of a unit.
template <class F, int R, int W, int which>
HELEXA_INLINE void add_half(const uint8_t* codes, int64_t apart, const UnitScales<F> (&scales)[R],
                            const f32x16 (&d)[R], const f32x16 (&dmin)[R], int index, const uint8_t* record,
                            Sums<R, W>& acc) {
  f32x16 scale[R], min[R];
  for (int r = 0; r < R; ++r) scale[r] = d[r] * scales[r].scale(index);
  if constexpr (UnitScales<F>::kHasMins) {
    for (int r = 0; r < R; ++r) min[r] = dmin[r] * scales[r].min(index);
    add_half_with_min<F, R, W, which>(codes, apart, scale, min, record, acc);
  } else {
    add_symmetric<F, R, W, which>(codes, apart, scale, record, acc);
  }
}

// acc += unit · x over a unit of 256 columns, for R tiles.
template <class F, int R, int W>
HELEXA_INLINE void add_super_unit(const uint8_t* unit, int64_t apart, const uint8_t* records,
                                  Sums<R, W>& acc) {
  constexpr bool kHalves = F::kScales != Scales::kSuper32 && F::kScales != Scales::kSuperMin;
  UnitScales<F> scales[R];
  f32x16 d[R], dmin[R], scale[R], offset[R];
  for (int r = 0; r < R; ++r) {
    scales[r].unpack(unit + r * apart);
    d[r] = load_scale_f16(unit + r * apart);
    if constexpr (UnitScales<F>::kHasMins) dmin[r] = load_scale_f16(unit + r * apart + 32);
  }
  for (int b = 0; b < 8; ++b) {
    const uint8_t* record = records + b * Record<W>::kBytes;
    const uint8_t* codes = unit + codes_offset<F>(b);
    if constexpr (kHalves) {
      add_half<F, R, W, 1>(codes, apart, scales, d, dmin, 2 * b, record, acc);
      add_half<F, R, W, 2>(codes, apart, scales, d, dmin, 2 * b + 1, record, acc);
    } else {
      for (int r = 0; r < R; ++r) scale[r] = d[r] * scales[r].scale(b);
      if constexpr (UnitScales<F>::kHasMins) {
        for (int r = 0; r < R; ++r) offset[r] = zero() - dmin[r] * scales[r].min(b);
        add_affine<F, R, W>(codes, apart, scale, offset, record, acc);
      } else {
        add_symmetric<F, R, W, 3>(codes, apart, scale, record, acc);
      }
    }
  }
}

// acc += unit · x over one repeating unit of the packed layout, for R tiles.
template <class F, int R, int W>
HELEXA_INLINE void add_unit(const uint8_t* unit, int64_t apart, const uint8_t* records, Sums<R, W>& acc) {
  if constexpr (F::kBlockSize == 256) {
    add_super_unit<F, R, W>(unit, apart, records, acc);
  } else {
    f32x16 d[R], offset[R];
    for (int r = 0; r < R; ++r) d[r] = load_scale_f16(unit + r * apart);
    if constexpr (F::kScales == Scales::kSymmetric) {
      add_symmetric<F, R, W, 3>(unit + 32, apart, d, records, acc);
    } else {
      for (int r = 0; r < R; ++r) offset[r] = load_scale_f16(unit + r * apart + 32);
      add_affine<F, R, W>(unit + 64, apart, d, offset, records, acc);
    }
  }
}

// Stores the rows of tile r that exist.
HELEXA_INLINE void store_rows(f32x16 value, const TileCall& c, int r, float* out) {
  const int rows = std::min(kTileRows, c.num_rows - kTileRows * r);
  out += kTileRows * r;
  if (rows == kTileRows && c.bias == nullptr) return store(out, value);
  float lanes[kTileRows];
  store(lanes, value);
  for (int i = 0; i < rows; ++i) out[i] = lanes[i] + (c.bias == nullptr ? 0.0f : c.bias[kTileRows * r + i]);
}

template <class F, int R, int W>
void tiles_times_group(const TileCall& c, const uint8_t* records, int64_t first_token) {
  Sums<R, W> acc;
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    for (int r = 0; r < R; ++r) acc.v[r][t] = zero();
  }
  const int64_t units = c.cols / unit_cols<F>(), apart = units * unit_bytes<F>();
  constexpr int kRecordBytes = F::kBlockSize / 32 * Record<W>::kBytes;
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t* unit = c.tile + u * unit_bytes<F>();
    if constexpr (W <= kStreamWidth) prefetch<unit_bytes<F>()>(unit + kPrefetchBytes);
    add_unit<F, R, W>(unit, apart, records + u * kRecordBytes, acc);
  }
  const int64_t tokens = std::min<int64_t>(W, c.num_tokens - first_token);
  HELEXA_UNROLL
  for (int t = 0; t < W; ++t) {
    if (t >= tokens) break;
    for (int r = 0; r < R; ++r) store_rows(acc.v[r][t], c, r, c.out + (first_token + t) * c.out_stride);
  }
}

template <class F, int R>
void quantized_tiles(const TileCall& c) {
  const int64_t blocks = c.cols / 32;
  const uint8_t* records = c.quantized;
  for (int64_t first = 0; first < c.num_tokens;) {
    const int width = token_group_width(c.num_tokens - first);
    switch (width) {
      case 1: tiles_times_group<F, R, 1>(c, records, first); break;
      case 2: tiles_times_group<F, R, 2>(c, records, first); break;
#if defined(HELEXA_AVX512)
      case 4: tiles_times_group<F, R, 4>(c, records, first); break;
      case 6: tiles_times_group<F, R, 6>(c, records, first); break;
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
  for (int t = 0; t < W; ++t) store_rows(acc[t], c, 0, c.out + (first + t) * c.out_stride);
}

template <class F>
void plain_tile(const TileCall& c) {
  int64_t first = 0;
  for (; first + kFloatTokens <= c.num_tokens; first += kFloatTokens) plain_tokens<F, kFloatTokens>(c, first);
  for (; first < c.num_tokens; ++first) plain_tokens<F, 1>(c, first);
}

void quantize_block(const float* x, int token, int width, uint8_t* record) {
  const f32x16 low = load(x), high = load(x + 16);
  const float most = reduce_max(max(max(low, zero() - low), max(high, zero() - high)));
  const f32x16 inverse = set1(most > 0.0f ? 127.0f / most : 0.0f);
  int8_t* codes = reinterpret_cast<int8_t*>(record) + 32 * token;
  const int32_t low_sum = reduce_add(store_rounded(codes, low * inverse));
  const int32_t high_sum = reduce_add(store_rounded(codes + 16, high * inverse));
  // NaN if any input is NaN or infinite: it must not turn into a harmless code.
  const float poison = reduce_add((low + high) * zero());
  const float scale = most / 127.0f + poison;
  float* scales = reinterpret_cast<float*>(record + 32 * width);
  int32_t* negative = reinterpret_cast<int32_t*>(record + 40 * width);
  scales[token] = scale;
  scales[width + token] = scale * static_cast<float>(low_sum + high_sum);
  negative[token] = -(low_sum + high_sum);
  negative[width + token] = -low_sum;
  negative[2 * width + token] = -high_sum;
}

}  // namespace

int token_group_width(int64_t remaining) {
  for (const int width : {1, 2, 4}) {
    if (width >= kMaxWidth || remaining <= width) return std::min(width, kMaxWidth);
  }
  return kMaxWidth;
}

void quantize_group(const float* x, int64_t num_tokens, int width, int64_t cols, uint8_t* records) {
  const int64_t blocks = cols / 32;
  if (num_tokens < width) std::memset(records, 0, blocks * group_record_bytes(width));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t b = 0; b < blocks; ++b) {
      quantize_block(x + t * cols + 32 * b, static_cast<int>(t), width,
                     records + b * group_record_bytes(width));
    }
  }
}

int max_tiles() { return kMaxTiles; }

void quant_matmul_tiles(const TileCall& call) {
  with_format(static_cast<Format>(call.format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      TileCall one = call;
      for (; one.num_rows > 0; one.num_rows -= kTileRows) {
        plain_tile<F>(one);
        one.tile += one.cols * unit_bytes<F>();
        one.out += kTileRows;
        if (one.bias != nullptr) one.bias += kTileRows;
      }
    } else if (kMaxTiles > 1 && call.num_rows > kTileRows) {
      quantized_tiles<F, kMaxTiles>(call);
    } else {
      quantized_tiles<F, 1>(call);
    }
  });
}

}  // namespace HELEXA_ISA
}  // namespace helexa
