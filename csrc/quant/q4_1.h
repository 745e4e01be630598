// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// f16 d, m; 16 bytes of nibbles as in Q4_0.
struct Q4_1 {
  static constexpr int kBlockSize = 32, kBlockBytes = 20, kBits = 4, kZero = 0;
  static constexpr Scales kScales = Scales::kAffine;

  static void codes(const uint8_t* block, uint8_t* out) { split_nibbles(block + 4, 16, out); }

  static void scales(const uint8_t* block, BlockScales& out) {
    out.d = load_u16(block);
    out.m = load_u16(block + 2);
  }
};

}  // namespace helexa
