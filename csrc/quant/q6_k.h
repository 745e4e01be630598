// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, f16 d.  Each half of 128 columns is four runs of 32.
struct Q6_K {
  static constexpr int kBlockSize = 256, kBlockBytes = 210, kBits = 6, kZero = 32;
  static constexpr Scales kScales = Scales::kSuper16;

  static void codes(const uint8_t* block, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* low = block + 64 * half;
      const uint8_t* high = block + 128 + 32 * half;
      uint8_t* c = out + 128 * half;
      for (int l = 0; l < 32; ++l) {
        c[l] = (low[l] & 15) | ((high[l] & 3) << 4);
        c[32 + l] = (low[32 + l] & 15) | (((high[l] >> 2) & 3) << 4);
        c[64 + l] = (low[l] >> 4) | (((high[l] >> 4) & 3) << 4);
        c[96 + l] = (low[32 + l] >> 4) | ((high[l] >> 6) << 4);
      }
    }
  }

  static void scales(const uint8_t* block, BlockScales& out) {
    std::memcpy(out.scale, block + 192, 16);
    out.d = load_u16(block + 208);
  }
};

}  // namespace helexa
