// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "quant/block.h"

namespace helexa {

// f16 d, dmin; 12 bytes of 6-bit scales and mins; 4 runs of 32 bytes whose low and high halves are two sub-blocks of 32.
struct Q4_K {
  static constexpr int kBlockSize = 256, kBlockBytes = 144, kBits = 4, kZero = 0;
  static constexpr Scales kScales = Scales::kSuperMin;

  static void codes(const uint8_t* block, uint8_t* out) {
    for (int run = 0; run < 4; ++run) split_nibbles(block + 16 + 32 * run, 32, out + 64 * run);
  }

  static void scales(const uint8_t* block, BlockScales& out) {
    out.d = load_u16(block);
    out.m = load_u16(block + 2);
    unpack_k_scales(block + 4, out);
  }
};

}  // namespace helexa
