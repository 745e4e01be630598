// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// f16 d; 32 signed bytes, which become unsigned codes around 128.
struct Q8_0 {
  static constexpr int kBlockSize = 32, kBlockBytes = 34, kBits = 8, kZero = 128;
  static constexpr Scales kScales = Scales::kSymmetric;

  static void codes(const uint8_t* block, uint8_t* out) {
    for (int i = 0; i < 32; ++i) out[i] = block[2 + i] ^ 0x80;
  }

  static void scales(const uint8_t* block, BlockScales& out) { out.d = load_u16(block); }
};

}  // namespace helexa
