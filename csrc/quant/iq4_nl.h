// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <type_traits>

#include "quant/block.h"

namespace helexa {

// The codes of IQ4 formats are indices of these levels, which stand 128 above the values that they mean.
struct IQ4Levels {
  static constexpr int kZero = 128;
  alignas(16) static constexpr uint8_t kLevels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                      129, 141, 153, 166, 181, 197, 217, 241};
};

// Whether a format's codes are indices of F::kLevels.
template <class F>
constexpr bool has_levels = std::is_base_of_v<IQ4Levels, F>;

// f16 d; 16 bytes of nibbles as in Q4_0.
struct IQ4_NL : IQ4Levels {
  static constexpr int kBlockSize = 32, kBlockBytes = 18, kBits = 4;
  static constexpr Scales kScales = Scales::kSymmetric;

  static void codes(const uint8_t* block, uint8_t* out) { split_nibbles(block + 2, 16, out); }

  static void scales(const uint8_t* block, BlockScales& out) { out.d = load_u16(block); }
};

}  // namespace helexa
