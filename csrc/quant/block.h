// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>
#include <cstring>

namespace helexa {

// How the scales of a quantized format lie, in the file and in the packed layout.
enum class Scales {
  kPlain,         // the block is a run of floats: no codes
  kSymmetric,     // per 32 columns: f16 d;     value = d * (code - zero)
  kAffine,        // per 32 columns: f16 d, m;  value = d * code + m
  kSuper32,       // per 256 columns: f16 d; per 32: 6-bit scale;  value = d * (scale - 32) * (code - zero)
  kSuper16,       // per 256 columns: f16 d; per 16: i8 scale;  value = d * scale * (code - zero)
  kSuper16Bits6,  // per 256 columns: f16 d; per 16: 6-bit scale;  value = d * (scale - 32) * (code - zero)
  kSuperMin,  // per 256 columns: f16 d, dmin; per 32: 6-bit scale, min;  value = d * scale * code - dmin * min
  kSuperMin16,  // per 256 columns: f16 d, dmin; per 16: 4-bit scale, min;  value = d * scale * code - dmin * min
};

// The scales of one block of a file, unpacked.
struct BlockScales {
  uint16_t d = 0;  // f16 bits
  uint16_t m = 0;  // f16 bits: m of kAffine, dmin of kSuperMin and kSuperMin16
  uint8_t scale[16] = {};
  uint8_t min[16] = {};
};

static inline uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

static inline uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Codes of a run of 2 * n nibbles: the low halves come first, then the high halves.
static inline void split_nibbles(const uint8_t* nibbles, int n, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = nibbles[i] & 15, codes[n + i] = nibbles[i] >> 4;
}

// The 256 codes of 64 bytes of bit pairs.  Each half of 32 bytes is four runs of 32 columns; pair r of a byte belongs to run r.
static inline void split_pairs(const uint8_t* pairs, uint8_t* codes) {
  for (int i = 0; i < 256; ++i) codes[i] = (pairs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3;
}

// The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit mins.  Sub-blocks 0..3 take the low 6 bits of bytes 0..3
// (scale) and 4..7 (min); sub-blocks 4..7 take nibbles of bytes 8..11 and their upper two bits from the tops of the others.
static inline void unpack_k_scales(const uint8_t* packed, BlockScales& out) {
  for (int j = 0; j < 4; ++j) {
    out.scale[j] = packed[j] & 63;
    out.min[j] = packed[4 + j] & 63;
    out.scale[4 + j] = (packed[8 + j] & 15) | ((packed[j] >> 6) << 4);
    out.min[4 + j] = (packed[8 + j] >> 4) | ((packed[4 + j] >> 6) << 4);
  }
}

}  // namespace helexa
