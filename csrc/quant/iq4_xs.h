// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"
#include "quant/iq4_nl.h"

namespace helexa {

// f16 d; 8 upper bit pairs of the scales; 8 lower nibbles of them; 16 bytes of nibbles, as in Q4_0, for each run of 32.
struct IQ4_XS : IQ4Levels {
  static constexpr int kBlockSize = 256, kBlockBytes = 136, kBits = 4;
  static constexpr Scales kScales = Scales::kSuper32;

  static void codes(const uint8_t* block, uint8_t* out) {
    for (int run = 0; run < 8; ++run) split_nibbles(block + 8 + 16 * run, 16, out + 32 * run);
  }

  static void scales(const uint8_t* block, BlockScales& out) {
    out.d = load_u16(block);
    const uint16_t high = load_u16(block + 2);
    for (int j = 0; j < 8; ++j) {
      out.scale[j] = ((block[4 + j / 2] >> (4 * (j % 2))) & 15) | (((high >> (2 * j)) & 3) << 4);
    }
  }
};

}  // namespace helexa
