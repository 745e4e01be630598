// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// 16 bytes of 4-bit scales and mins; 64 bytes of bit pairs; f16 d, dmin.
struct Q2_K {
  static constexpr int kBlockSize = 256, kBlockBytes = 84, kBits = 2, kZero = 0;
  static constexpr Scales kScales = Scales::kSuperMin16;

  static void codes(const uint8_t* block, uint8_t* out) { split_pairs(block + 16, out); }

  static void scales(const uint8_t* block, BlockScales& out) {
    for (int j = 0; j < 16; ++j) out.scale[j] = block[j] & 15, out.min[j] = block[j] >> 4;
    out.d = load_u16(block + 80);
    out.m = load_u16(block + 82);
  }
};

}  // namespace helexa
