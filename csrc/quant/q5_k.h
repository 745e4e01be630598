// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j of byte l belongs to column l of sub-block j.
struct Q5_K {
  static constexpr int kBlockSize = 256, kBlockBytes = 176, kBits = 5, kZero = 0;
  static constexpr Scales kScales = Scales::kSuperMin;

  static void codes(const uint8_t* block, uint8_t* out) {
    const uint8_t* high = block + 16;
    for (int run = 0; run < 4; ++run) split_nibbles(block + 48 + 32 * run, 32, out + 64 * run);
    for (int j = 0; j < 8; ++j) {
      for (int l = 0; l < 32; ++l) out[32 * j + l] |= ((high[l] >> j) & 1) << 4;
    }
  }

  static void scales(const uint8_t* block, BlockScales& out) {
    out.d = load_u16(block);
    out.m = load_u16(block + 2);
    unpack_k_scales(block + 4, out);
  }
};

}  // namespace helexa
