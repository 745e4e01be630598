// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// f16 d; 16 bytes of nibbles: low halves are columns 0..15, high halves 16..31.
struct Q4_0 {
  static constexpr int kBlockSize = 32, kBlockBytes = 18, kBits = 4, kZero = 8;
  static constexpr Scales kScales = Scales::kSymmetric;

  static void codes(const uint8_t* block, uint8_t* out) { split_nibbles(block + 2, 16, out); }

  static void scales(const uint8_t* block, BlockScales& out) { out.d = load_u16(block); }
};

}  // namespace helexa
