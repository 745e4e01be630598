// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/sigmoid_mul.h"

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

HELEXA_INLINE f32x16 gated(f32x16 x, f32x16 gate) { return x / (set1(1.0f) + exp(zero() - gate)); }

}  // namespace

void sigmoid_mul_values(float* x, const float* gate, int64_t num_values) {
  int64_t i = 0;
  for (; i + 16 <= num_values; i += 16) store(x + i, gated(load(x + i), load(gate + i)));
  const int64_t left = num_values - i;
  if (left > 0) store_n(x + i, gated(load_n(x + i, left), load_n(gate + i, left)), left);
}

}  // namespace HELEXA_ISA
}  // namespace helexa
