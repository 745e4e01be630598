// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// 32 bytes of third bits, bit j of byte l for column 32 j + l; 64 bytes of bit pairs; 12 bytes of 6-bit scales; f16 d.
struct Q3_K {
  static constexpr int kBlockSize = 256, kBlockBytes = 110, kBits = 3, kZero = 4;
  static constexpr Scales kScales = Scales::kSuper16Bits6;

  static void codes(const uint8_t* block, uint8_t* out) {
    split_pairs(block + 32, out);
    for (int j = 0; j < 8; ++j) {
      for (int l = 0; l < 32; ++l) out[32 * j + l] |= ((block[l] >> j) & 1) << 2;
    }
  }

  // Byte i of 8 holds the low nibbles of the scales i and 8 + i; pair r of byte i of 4, the upper bits of the scale 4 r + i.
  static void scales(const uint8_t* block, BlockScales& out) {
    split_nibbles(block + 96, 8, out.scale);
    for (int j = 0; j < 16; ++j) out.scale[j] |= ((block[104 + j % 4] >> (2 * (j / 4))) & 3) << 4;
    out.d = load_u16(block + 108);
  }
};

}  // namespace helexa
