// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/rope.h"

#include <cmath>

#include "core/parallel.h"

namespace helexa {
namespace {

// Values per claimed range: some microseconds of work.  Smaller inputs stay on the calling thread.
constexpr int64_t kGrainAngles = 1024;
constexpr int64_t kGrainValues = 32768;

}  // namespace

void rope_table_cpu(const int32_t* positions, const float* inv_freq, float* table, int64_t num_tokens,
                    int64_t num_pairs, float magnitude) {
  parallel_for(num_tokens, kGrainAngles / num_pairs + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = table + 2 * t * num_pairs;
      for (int64_t i = 0; i < num_pairs; ++i) {
        const float angle = static_cast<float>(positions[t]) * inv_freq[i];
        row[2 * i] = std::cos(angle) * magnitude;
        row[2 * i + 1] = std::sin(angle) * magnitude;
      }
    }
  });
}

void rope_append_cpu(const float* qkv, const float* table, const int32_t* slots, void* k_cache, void* v_cache,
                     int cache_dtype, float* q_out, const float* q_norm, const float* k_norm, float eps,
                     int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                     int64_t num_pairs, bool interleaved) {
  const RopeAppend call{qkv,    table, slots,     k_cache,      v_cache,  cache_dtype, q_out,      q_norm,
                        k_norm, eps,   num_heads, num_kv_heads, head_dim, num_pairs,   interleaved};
  const auto rope_append_rows = pick_rope_append_rows();
  const int64_t token_values = (num_heads + 2 * num_kv_heads) * head_dim;
  parallel_for(num_tokens, kGrainValues / token_values + 1,
               [&](int64_t begin, int64_t end) { rope_append_rows(call, begin, end); });
}

}  // namespace helexa
