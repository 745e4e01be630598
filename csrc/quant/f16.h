// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "core/float_types.h"
#include "quant/block.h"

namespace helexa {

struct F16 {
  static constexpr int kBlockSize = 1, kBlockBytes = 2, kBits = 0, kZero = 0;
  static constexpr Scales kScales = Scales::kPlain;
  static float decode(const uint8_t* value) { return f16_to_float(load_u16(value)); }
};

}  // namespace helexa
