// SPDX-License-Identifier: GPL-3.0-or-later
// The layout of quantized weights on a device.  A matrix [N, K] becomes ceil(N / 16) tiles of 16 rows, one after the other (missing rows
// are zeros); a tile is ceil(K / unit columns) units, one after the other, and a unit is 16 rows times 256 columns (formats with blocks of
// 256) or 64 columns (formats with blocks of 32; an odd number of blocks is filled up with zeros).  A unit takes the bytes that its
// blocks take in the file, a multiple of 16: the low plane of the codes, the high plane, the scales.
//
// The planes are in the order of the A operand of mma m16n8k32: lane 4g + t of a warp has the rows g and g + 8 (r = 0, 1), and of the 32
// columns of step s the columns 4t + j and 16 + 4t + j (h = 0, 1; j = 0 … 3).  Two steps, 64 columns, are a pair p.
//   low plane, 4 bits   512 bytes per pair; 16 bytes per lane: word 2s + r, byte j, nibble h
//                       (formats with levels: word 2s + r, nibble 4h + j)
//   low plane, 8 bits   512 bytes per step; 16 bytes per lane: word 2h + r, byte j
//   low plane, 2 bits   512 bytes per two pairs; 16 bytes per lane: word 2(p % 2) + s, byte j, bits 2(2r + h) …
//   high plane, 2 bits  the same
//   high plane, 1 bit   4 bytes per lane and pair (the words of a lane's pairs side by side): byte j, bit 4s + 2r + h
// 3-bit codes have low planes of 2 bits and high ones of 1; 5-bit codes 4 and 1; 6-bit codes 4 and 2.  The top bit of codes with a zero
// point is flipped, which makes them two's complement (Q8_0 is so in the file already).
// The scales are the file's bytes, per row, row after row:
//   kSymmetric     4 bytes: f16 d of both blocks
//   kAffine        8 bytes: f16 d, m of the first block, then of the second
//   kSuperMin      16 bytes: d, dmin, 12 bytes of scales
//   kSuper32       8 bytes: d, upper bits, lower nibbles
//   kSuper16       16 bytes of scales per row; behind those of all rows, 2 bytes of d per row
//   kSuper16Bits6  12 bytes of scales per row; then 2 bytes of d per row
//   kSuperMin16    16 bytes of scales per row; then 4 bytes of d, dmin per row
// F32, F16 and BF16 matrices are row-major as in the file.
#pragma once

#include "core/cuda.cuh"
#include "quant/formats.h"

namespace helexa {

constexpr int kDeviceTileRows = 16;

// Sizes of a format's units.
template <class F>
struct Unit {
  static_assert(F::kScales != Scales::kPlain);
  static constexpr int kCols = F::kBlockSize == 256 ? 256 : 64;
  static constexpr int kBlocks = kCols / F::kBlockSize;  // of the file, per row
  static constexpr int kPairs = kCols / 64;
  static constexpr int kSteps = kCols / 32;
  static constexpr int kBytes = kDeviceTileRows * kBlocks * F::kBlockBytes;

  static constexpr int kLowBits = F::kBits == 8 ? 8 : F::kBits >= 4 ? 4 : 2;
  static constexpr int kHighBits = F::kBits - kLowBits;
  static constexpr int kHighOffset = kDeviceTileRows * kCols * kLowBits / 8;
  static constexpr int kScaleOffset = kDeviceTileRows * kCols * F::kBits / 8;
  static constexpr int kScaleRowBytes =  // of the first part of the scales
      F::kScales == Scales::kSymmetric                                  ? 4
      : F::kScales == Scales::kAffine || F::kScales == Scales::kSuper32 ? 8
      : F::kScales == Scales::kSuper16Bits6                             ? 12
                                                                        : 16;
  static constexpr int kSecondScaleOffset = kScaleOffset + kDeviceTileRows * kScaleRowBytes;

  // Codes that are two's complement, and by how many bits the operand has them shifted up so that their sign is a byte's.
  static constexpr bool kSigned = F::kZero != 0 && !has_levels<F>;
  static constexpr int kLift = kSigned ? 8 - F::kBits : 0;
  // Scales per step: 2 for formats with a scale per 16 columns, whose steps are multiplied as two halves of 16 columns.
  static constexpr int kHalves = F::kScales == Scales::kSuper16 || F::kScales == Scales::kSuper16Bits6 ||
                                         F::kScales == Scales::kSuperMin16
                                     ? 2
                                     : 1;
  static constexpr bool kHasOffset =
      F::kScales == Scales::kAffine || F::kScales == Scales::kSuperMin || F::kScales == Scales::kSuperMin16;
};

// Bytes of a tile, and of a whole matrix.
template <class F>
__host__ __device__ constexpr int64_t device_tile_bytes(int64_t cols) {
  if constexpr (F::kScales == Scales::kPlain) {
    return kDeviceTileRows * cols * F::kBlockBytes;
  } else {
    return (cols + Unit<F>::kCols - 1) / Unit<F>::kCols * Unit<F>::kBytes;
  }
}

inline int64_t device_bytes(Format format, int64_t rows, int64_t cols) {
  return with_format(format, [&](auto f) -> int64_t {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      return rows * cols * F::kBlockBytes;
    } else {
      return (rows + kDeviceTileRows - 1) / kDeviceTileRows * device_tile_bytes<F>(cols);
    }
  });
}

// Where bit `bit` of the code of (row, col) of a unit lies: byte offset * 8 + bit.  Neighbouring bits of a plane are neighbours.
template <class F>
__host__ __device__ constexpr int code_bit_position(int row, int col, int bit) {
  const int lane = row % 8 * 4 + col % 16 / 4;
  const int r = row / 8, h = col % 32 / 16, j = col % 4, s = col % 64 / 32, p = col / 64;
  const bool low = bit < Unit<F>::kLowBits;
  const int bits = low ? Unit<F>::kLowBits : Unit<F>::kHighBits;
  const int plane = low ? 0 : Unit<F>::kHighOffset;
  const int b = low ? bit : bit - Unit<F>::kLowBits;
  if (bits == 8) return 8 * (512 * (2 * p + s) + 16 * lane + 4 * (2 * h + r) + j) + b;
  if (bits == 4 && has_levels<F>) return 8 * (512 * p + 16 * lane + 4 * (2 * s + r)) + 4 * (4 * h + j) + b;
  if (bits == 4) return 8 * (512 * p + 16 * lane + 4 * (2 * s + r) + j) + 4 * h + b;
  if (bits == 2) {
    return 8 * (plane + 512 * (p / 2) + 16 * lane + 4 * (2 * (p % 2) + s) + j) + 2 * (2 * r + h) + b;
  }
  return 8 * (plane + 4 * (Unit<F>::kPairs * lane + p) + j) + 4 * s + 2 * r + h;
}

namespace tiles {

// Byte i of a word as a float, minus `zero`; exact.
__device__ __forceinline__ float byte_to_float(uint32_t word, int i, float zero = 0.0f) {
  // 2^23 + byte: the byte becomes the end of the fraction.
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650 + i)) - (8388608.0f + zero);
}

__device__ __forceinline__ float half_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// x shifted to the left by n, which may be negative.
template <int n>
__device__ __forceinline__ uint32_t shifted(uint32_t x) {
  if constexpr (n >= 0) {
    return x << n;
  } else {
    return x >> -n;
  }
}

// The levels of IQ4 formats as signed bytes, four to a word.
__host__ __device__ constexpr uint32_t level_word(int i) {
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j) word |= static_cast<uint32_t>(IQ4Levels::kLevels[4 * i + j] ^ 0x80) << (8 * j);
  return word;
}

// The levels of four 4-bit indices in the lower 16 bits of `indices`; bit 2 of each nibble of `upper` says whether the index is 8 or
// more, over 0x3210.
__device__ __forceinline__ uint32_t four_levels(uint32_t indices, uint32_t upper) {
  constexpr uint32_t l0 = level_word(0), l1 = level_word(1), l2 = level_word(2), l3 = level_word(3);
  return __byte_perm(__byte_perm(l0, l1, indices), __byte_perm(l2, l3, indices), upper);
}

}  // namespace tiles

// The bits of a lane's codes of one pair, as they lie in memory.
template <class F>
struct PairCodes {
  using U = Unit<F>;
  static constexpr int kLowWords = U::kLowBits;  // 64 columns x 2 rows / 8 lanes … in words
  static constexpr int kHighWords = U::kHighBits;
  uint32_t low[kLowWords];
  uint32_t high[kHighWords > 0 ? kHighWords : 1];

  // From the unit at `unit` (global or shared memory, a multiple of 16).
  __device__ __forceinline__ void load(const uint8_t* unit, int lane, int pair) {
    if constexpr (U::kLowBits == 8) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4 v = *reinterpret_cast<const uint4*>(unit + 512 * (2 * pair + s) + 16 * lane);
        low[4 * s] = v.x, low[4 * s + 1] = v.y, low[4 * s + 2] = v.z, low[4 * s + 3] = v.w;
      }
    } else if constexpr (U::kLowBits == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(unit + 512 * pair + 16 * lane);
      low[0] = v.x, low[1] = v.y, low[2] = v.z, low[3] = v.w;
    } else {
      load_bit_pairs(unit, lane, pair, low);
    }
    if constexpr (U::kHighBits == 2) load_bit_pairs(unit + U::kHighOffset, lane, pair, high);
    if constexpr (U::kHighBits == 1) {
      high[0] = *reinterpret_cast<const uint32_t*>(unit + U::kHighOffset + 4 * (U::kPairs * lane + pair));
    }
  }

  // The A operand of the pair's step `kStep` (0, 1): int8 codes, or unsigned ones below 128, shifted up by kLift.
  template <int kStep>
  __device__ __forceinline__ void operand(uint32_t (&a)[4]) const {
    if constexpr (U::kLowBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = low[4 * kStep + i];
    } else {
      fill<kStep, 0>(a[0], a[2]);
      fill<kStep, 1>(a[1], a[3]);
    }
  }

 private:
  static __device__ __forceinline__ void load_bit_pairs(const uint8_t* plane, int lane, int pair,
                                                        uint32_t* words) {
    const uint2 v = *reinterpret_cast<const uint2*>(plane + 512 * (pair / 2) + 16 * lane + 8 * (pair % 2));
    words[0] = v.x, words[1] = v.y;
  }

  // The codes of row g + 8r: `first` of the columns 4t …, `second` of 16 + 4t ….
  template <int s, int r>
  __device__ __forceinline__ void fill(uint32_t& first, uint32_t& second) const {
    constexpr int kLift = U::kLift;
    if constexpr (has_levels<F>) {
      const uint32_t word = low[2 * s + r];
      const uint32_t indices = word & 0x77777777u;
      const uint32_t upper = ((word & 0x88888888u) >> 1) | 0x32103210u;
      first = tiles::four_levels(indices, upper);
      second = tiles::four_levels(indices >> 16, upper >> 16);
    } else if constexpr (U::kLowBits == 4) {
      constexpr uint32_t kMask = 0x0f0f0f0fu << kLift;
      first = tiles::shifted<kLift>(low[2 * s + r]) & kMask;
      second = tiles::shifted<kLift - 4>(low[2 * s + r]) & kMask;
    } else {
      constexpr uint32_t kMask = 0x03030303u << kLift;
      first = tiles::shifted<kLift - 4 * r>(low[s]) & kMask;
      second = tiles::shifted<kLift - 4 * r - 2>(low[s]) & kMask;
    }
    constexpr int kUp = U::kLowBits + kLift;  // where the high plane's bits go
    if constexpr (U::kHighBits == 2) {
      constexpr uint32_t kMask = 0x03030303u << kUp;
      first |= tiles::shifted<kUp - 4 * r>(high[s]) & kMask;
      second |= tiles::shifted<kUp - 4 * r - 2>(high[s]) & kMask;
    } else if constexpr (U::kHighBits == 1) {
      constexpr uint32_t kMask = 0x01010101u << kUp;
      first |= tiles::shifted<kUp - 4 * s - 2 * r>(high[0]) & kMask;
      second |= tiles::shifted<kUp - 4 * s - 2 * r - 1>(high[0]) & kMask;
    }
  }
};

// The scales of one row of a unit: value = scale(step, half) * operand + offset(step, half), where operand is the code as
// PairCodes has it.  Where step and half are compile-time constants no instruction is spent on choosing.
template <class F>
struct RowScales {
  using U = Unit<F>;
  float d, m;                     // of formats with blocks of 256; d with kLift taken off
  float zero;                     // of the codes
  uint32_t scales[4], minima[4];  // bytes; of formats with blocks of 32, the f16 numbers

  // From the unit at `unit` (global or shared memory, a multiple of 16).
  __device__ __forceinline__ void load(const uint8_t* unit, int row) {
    const uint8_t* at = unit + U::kScaleOffset + U::kScaleRowBytes * row;
    const uint8_t* second = unit + U::kSecondScaleOffset;
    if constexpr (F::kScales == Scales::kSymmetric) {
      scales[0] = *reinterpret_cast<const uint32_t*>(at);
    } else if constexpr (F::kScales == Scales::kAffine) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      scales[0] = v.x, scales[1] = v.y;
    } else if constexpr (F::kScales == Scales::kSuperMin) {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      set_d(v.x), m = tiles::half_to_float(v.x >> 16);
      scales[0] = v.y & 0x3f3f3f3fu;
      scales[1] = (v.w & 0x0f0f0f0fu) | ((v.y >> 2) & 0x30303030u);
      minima[0] = v.z & 0x3f3f3f3fu;
      minima[1] = ((v.w >> 4) & 0x0f0f0f0fu) | ((v.z >> 2) & 0x30303030u);
    } else if constexpr (F::kScales == Scales::kSuper32) {
      // The nibbles of the scales 2i, 2i + 1 are in byte i of v.y, the upper bits of scale j at bit 2j of the upper half of v.x.
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      set_d(v.x);
      const uint32_t even = v.y & 0x0f0f0f0fu, odd = (v.y >> 4) & 0x0f0f0f0fu;
      scales[0] = __byte_perm(even, odd, 0x5140) | spread_pairs(v.x >> 16);
      scales[1] = __byte_perm(even, odd, 0x7362) | spread_pairs(v.x >> 24);
    } else if constexpr (F::kScales == Scales::kSuper16) {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      set_d(*reinterpret_cast<const uint16_t*>(second + 2 * row));
      scales[0] = v.x ^ 0x80808080u, scales[1] = v.y ^ 0x80808080u;
      scales[2] = v.z ^ 0x80808080u, scales[3] = v.w ^ 0x80808080u;
    } else if constexpr (F::kScales == Scales::kSuper16Bits6) {
      const uint32_t* v = reinterpret_cast<const uint32_t*>(at);
      set_d(*reinterpret_cast<const uint16_t*>(second + 2 * row));
      scales[0] = (v[0] & 0x0f0f0f0fu) | ((v[2] << 4) & 0x30303030u);
      scales[1] = (v[1] & 0x0f0f0f0fu) | ((v[2] << 2) & 0x30303030u);
      scales[2] = ((v[0] >> 4) & 0x0f0f0f0fu) | (v[2] & 0x30303030u);
      scales[3] = ((v[1] >> 4) & 0x0f0f0f0fu) | ((v[2] >> 2) & 0x30303030u);
    } else {
      static_assert(F::kScales == Scales::kSuperMin16);
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      const uint32_t dm = *reinterpret_cast<const uint32_t*>(second + 4 * row);
      set_d(dm), m = tiles::half_to_float(dm >> 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scales[i] = words[i] & 0x0f0f0f0fu, minima[i] = (words[i] >> 4) & 0x0f0f0f0fu;
      }
    }
  }

  __device__ __forceinline__ float scale(int step, int half = 0) const {
    if constexpr (F::kScales == Scales::kSymmetric) {
      return tiles::half_to_float(scales[0] >> (16 * step)) * kUnlift;
    } else if constexpr (F::kScales == Scales::kAffine) {
      return tiles::half_to_float(step == 0 ? scales[0] : scales[1]);
    } else {
      const int i = U::kHalves * step + half;
      // 2^15 + byte: the byte stands in the middle of the fraction.
      return fmaf(__uint_as_float(__byte_perm(word_at(scales, i), 0x47000000u, 0x7604 + 16 * (i % 4))), d,
                  zero);
    }
  }

  __device__ __forceinline__ float offset(int step, int half = 0) const {
    if constexpr (F::kScales == Scales::kAffine) {
      return tiles::half_to_float((step == 0 ? scales[0] : scales[1]) >> 16);
    } else if constexpr (U::kHasOffset) {
      const int i = U::kHalves * step + half;
      return -(tiles::byte_to_float(word_at(minima, i), i % 4) * m);
    } else {
      return 0.0f;
    }
  }

  // offset(2 * pair + step) = offset_scale() * exact_offset(pair, step), where the latter is a number of at most 11 bits.  In formats with
  // blocks of 32 the unit is the pair.
  __device__ __forceinline__ uint32_t exact_offset(int pair, int step) const {
    static_assert(U::kHasOffset && U::kHalves == 1);
    if constexpr (F::kScales == Scales::kAffine) {
      return __float_as_uint(offset(step));
    } else {
      const uint32_t word = pair < 2 ? minima[0] : minima[1];
      return __float_as_uint(tiles::byte_to_float(word, 2 * (pair % 2) + step));
    }
  }
  __device__ __forceinline__ float offset_scale() const { return F::kScales == Scales::kAffine ? 1.0f : -m; }

 private:
  static constexpr float kUnlift = 1.0f / (1 << U::kLift);

  // Of the scales as bytes.
  static constexpr float kZero = F::kScales == Scales::kSuper16 ? 128.0f
                                 : F::kScales == Scales::kSuper32 || F::kScales == Scales::kSuper16Bits6
                                     ? 32.0f
                                     : 0.0f;

  __device__ __forceinline__ void set_d(uint32_t bits) {
    d = tiles::half_to_float(bits) * kUnlift;
    zero = -(32768.0f + kZero) * d;  // exact, as (byte + 2^15) * d + zero is
  }

  // The word of byte i.  Selections, since an array that is indexed at run time would leave the registers.
  static __device__ __forceinline__ uint32_t word_at(const uint32_t (&words)[4], int i) {
    const uint32_t word = i < 4 ? words[0] : words[1];
    if constexpr (U::kHalves == 1) return word;
    return i < 8 ? word : i < 12 ? words[2] : words[3];
  }

  // The lower four pairs of bits as bits 4 and 5 of four bytes.
  static __device__ __forceinline__ uint32_t spread_pairs(uint32_t x) {
    return (x & 3) << 4 | (x & 0xc) << 10 | (x & 0x30) << 16 | (x & 0xc0) << 22;
  }
};

// The operand that a code of a unit stands for; for decoding single rows and for what is not hot, as is what follows.
template <class F>
__device__ inline int code_operand(int code) {
  if constexpr (has_levels<F>) {
    constexpr uint32_t l0 = tiles::level_word(0), l1 = tiles::level_word(1), l2 = tiles::level_word(2),
                       l3 = tiles::level_word(3);
    const uint32_t word = code < 4 ? l0 : code < 8 ? l1 : code < 12 ? l2 : l3;
    return static_cast<int8_t>(word >> (8 * (code % 4)));
  } else if constexpr (Unit<F>::kSigned) {
    return static_cast<int8_t>(code << Unit<F>::kLift);
  } else {
    return code;
  }
}

// The operand of one element of a unit, and its value.
template <class F>
__device__ inline int unit_operand(const uint8_t* unit, int row, int col) {
  const int low = code_bit_position<F>(row, col, 0);
  int code = (unit[low / 8] >> (low % 8)) & ((1 << Unit<F>::kLowBits) - 1);
  if constexpr (Unit<F>::kHighBits > 0) {
    const int high = code_bit_position<F>(row, col, Unit<F>::kLowBits);
    code |= ((unit[high / 8] >> (high % 8)) & ((1 << Unit<F>::kHighBits) - 1)) << Unit<F>::kLowBits;
  }
  return code_operand<F>(code);
}

template <class F>
__device__ inline float unit_value(const uint8_t* unit, int row, int col) {
  RowScales<F> scales;
  scales.load(unit, row);
  const int step = col / 32, half = Unit<F>::kHalves == 2 ? col % 32 / 16 : 0;
  const float product = scales.scale(step, half) * static_cast<float>(unit_operand<F>(unit, row, col));
  return Unit<F>::kHasOffset ? product + scales.offset(step, half) : product;
}

}  // namespace helexa
