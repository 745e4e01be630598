// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/moe.h"

#include <math.h>

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {

void moe_route_rows(const float* logits, int32_t* ids, float* weights, int64_t num_tokens,
                    int64_t num_experts, int64_t top_k, bool normalize) {
  for (int64_t t = 0; t < num_tokens; ++t, logits += num_experts, ids += top_k, weights += top_k) {
    // The best so far, kept in order: insertion into a short list.
    int64_t count = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (count == top_k && !(logits[e] > weights[top_k - 1])) continue;
      int64_t place = count < top_k ? count++ : top_k - 1;
      for (; place > 0 && logits[e] > weights[place - 1]; --place) {
        weights[place] = weights[place - 1];
        ids[place] = ids[place - 1];
      }
      weights[place] = logits[e];
      ids[place] = static_cast<int32_t>(e);
    }
    const float most = weights[0];
    float total = 0.0f;
    if (!normalize) {
      f32x16 sums = zero();
      int64_t e = 0;
      for (; e + 16 <= num_experts; e += 16) sums += exp(load(logits + e) - set1(most));
      total = reduce_add(sums);
      for (; e < num_experts; ++e) total += expf(logits[e] - most);
    }
    for (int64_t j = 0; j < top_k; ++j) {
      weights[j] = expf(weights[j] - most);
      if (normalize) total += weights[j];
    }
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= total;
  }
}

void moe_add_scaled(const float* x, float factor, float* out, int64_t width, bool accumulate) {
  const f32x16 scale = set1(factor);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    store(out + i, accumulate ? fma(scale, load(x + i), load(out + i)) : scale * load(x + i));
  for (; i < width; ++i) out[i] = (accumulate ? out[i] : 0.0f) + factor * x[i];
}

}  // namespace HELEXA_ISA
}  // namespace helexa
