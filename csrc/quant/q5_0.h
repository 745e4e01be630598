// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// f16 d; 32 fifth bits; 16 bytes of nibbles as in Q4_0.
struct Q5_0 {
  static constexpr int kBlockSize = 32, kBlockBytes = 22, kBits = 5, kZero = 16;
  static constexpr Scales kScales = Scales::kSymmetric;

  static void codes(const uint8_t* block, uint8_t* out) {
    split_nibbles(block + 6, 16, out);
    const uint32_t high = load_u32(block + 2);
    for (int i = 0; i < 32; ++i) out[i] |= ((high >> i) & 1) << 4;
  }

  static void scales(const uint8_t* block, BlockScales& out) { out.d = load_u16(block); }
};

}  // namespace helexa
