// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/rms_norm.h"

#include <math.h>

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// Calls body(offset, lanes) for each sixteen of `width` values; `lanes` is less than 16 in the last call only.
template <class Body>
HELEXA_INLINE void for_lanes(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) body(i, 16);
  if (i < width) body(i, width - i);
}

HELEXA_INLINE f32x16 load_lanes(const float* p, int64_t lanes) {
  return lanes == 16 ? load(p) : load_n(p, lanes);
}
HELEXA_INLINE void store_lanes(float* p, f32x16 a, int64_t lanes) {
  lanes == 16 ? store(p, a) : store_n(p, a, lanes);
}

// Four chains, since one would wait for each fma's latency.
float sum_of_squares(const float* x, int64_t width) {
  f32x16 sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    HELEXA_UNROLL
    for (int chain = 0; chain < 4; ++chain) {
      const f32x16 value = load(x + i + 16 * chain);
      sums[chain] = fma(value, value, sums[chain]);
    }
  }
  for_lanes(width - i, [&](int64_t offset, int64_t lanes) {
    const f32x16 value = load_lanes(x + i + offset, lanes);
    sums[0] = fma(value, value, sums[0]);
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

void rms_norm_rows(const float* x, const float* weight, float* residual, float* out, int64_t num_tokens,
                   int64_t width, float eps) {
  for (int64_t t = 0; t < num_tokens; ++t, x += width, out += width) {
    const float* row = x;
    if (residual != nullptr) {
      for_lanes(width, [&](int64_t i, int64_t lanes) {
        store_lanes(residual + i, load_lanes(residual + i, lanes) + load_lanes(x + i, lanes), lanes);
      });
      row = residual;
      residual += width;
    }
    const f32x16 scale = set1(1.0f / sqrtf(sum_of_squares(row, width) / static_cast<float>(width) + eps));
    for_lanes(width, [&](int64_t i, int64_t lanes) {
      store_lanes(out + i, load_lanes(row + i, lanes) * scale * load_lanes(weight + i, lanes), lanes);
    });
  }
}

}  // namespace HELEXA_ISA
}  // namespace helexa
