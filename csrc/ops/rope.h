// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// table[t, i] = (cos, sin) of the float32 angle positions[t] * inv_freq[i], times magnitude; table [num_tokens, num_pairs, 2].
void rope_table_cpu(const int32_t* positions, const float* inv_freq, float* table, int64_t num_tokens,
                    int64_t num_pairs, float magnitude);

// Splits qkv [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] into heads, norms q and k per head where q_norm, k_norm
// [head_dim] are not null, rotates the first 2 * num_pairs values of each by the token's row of table, writes q to q_out
// [num_tokens, num_heads, head_dim] and k, v to slot slots[t] of the caches [pages, num_kv_heads, 256, head_dim] of
// cache_dtype.  A token with a negative slot is not written to the caches.  head_dim <= kMaxHeadDim.
// Rotated pairs are (i, i + num_pairs), or (2i, 2i + 1) if interleaved.
void rope_append_cpu(const float* qkv, const float* table, const int32_t* slots, void* k_cache, void* v_cache,
                     int cache_dtype, float* q_out, const float* q_norm, const float* k_norm, float eps,
                     int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                     int64_t num_pairs, bool interleaved);

// The same on a CUDA device.  qkv is float32 or bfloat16, as qkv_dtype says; its rows are qkv_stride values apart; q_out is
// of cache_dtype, float16 for kE4M3 and kInt8.
void rope_table_cuda(const int32_t* positions, const float* inv_freq, float* table, int64_t num_tokens,
                     int64_t num_pairs, float magnitude, void* stream);
void rope_append_cuda(const void* qkv, int qkv_dtype, int64_t qkv_stride, const float* table,
                      const int32_t* slots, void* k_cache, void* v_cache, int cache_dtype, void* q_out,
                      const float* q_norm, const float* k_norm, float eps, int64_t num_tokens,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_pairs,
                      bool interleaved, void* stream);

constexpr int64_t kMaxHeadDim = 512;

struct RopeAppend {
  const float* qkv;
  const float* table;
  const int32_t* slots;
  void* k_cache;
  void* v_cache;
  int cache_dtype;
  float* q_out;
  const float* q_norm;
  const float* k_norm;
  float eps;
  int64_t num_heads, num_kv_heads, head_dim, num_pairs;
  bool interleaved;
};

HELEXA_ISA_KERNEL(void, rope_append_rows, const RopeAppend& call, int64_t begin, int64_t end)

}  // namespace helexa
