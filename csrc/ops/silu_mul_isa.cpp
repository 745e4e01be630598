// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/silu_mul.h"

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

HELEXA_INLINE f32x16 silu_times(f32x16 gate, f32x16 up) {
  return gate / (set1(1.0f) + exp(zero() - gate)) * up;
}

}  // namespace

void silu_mul_rows(const float* gate_up, float* out, int64_t num_tokens, int64_t width) {
  for (int64_t t = 0; t < num_tokens; ++t, gate_up += 2 * width, out += width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(out + i, silu_times(load(gate_up + i), load(gate_up + width + i)));
    const int64_t left = width - i;
    if (left > 0)
      store_n(out + i, silu_times(load_n(gate_up + i, left), load_n(gate_up + width + i, left)), left);
  }
}

}  // namespace HELEXA_ISA
}  // namespace helexa
