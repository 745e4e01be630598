// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <stdexcept>

#include "quant/bf16.h"
#include "quant/f16.h"
#include "quant/f32.h"
#include "quant/iq4_nl.h"
#include "quant/iq4_xs.h"
#include "quant/q2_k.h"
#include "quant/q3_k.h"
#include "quant/q4_0.h"
#include "quant/q4_1.h"
#include "quant/q4_k.h"
#include "quant/q5_0.h"
#include "quant/q5_1.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

namespace helexa {

enum class Format : int {
#define HELEXA_FORMAT(type, name) k##type,
#include "quant/formats.def"
#undef HELEXA_FORMAT
};

// Calls fn(F{}) for the format's type F and returns its result.
template <class Fn>
auto with_format(Format format, Fn&& fn) {
  switch (format) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: return fn(type{});
#include "quant/formats.def"
#undef HELEXA_FORMAT
  }
  throw std::invalid_argument("unknown weight format");
}

}  // namespace helexa
