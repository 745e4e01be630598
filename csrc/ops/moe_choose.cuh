// SPDX-License-Identifier: GPL-3.0-or-later
// Which experts a token goes to, by one warp.  Of a single token every warp that needs to know finds out for itself, which is quicker
// than being told through memory.
#pragma once

#include "core/cuda.cuh"

namespace helexa::moe {

// What other blocks of the same launch have written, or a launch that has ended while this one was already running.
template <class T>
__device__ T fresh(const T* p) {
  return *static_cast<const volatile T*>(p);
}

// Ordered as the values are; NaN comes last.  Zero is below all.
__device__ inline uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 equals 0
  const uint32_t sign = 0u - (bits >> 31);
  return value == value ? bits ^ (sign | 0x80000000u) : 1;
}
__device__ inline float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// What lane j has of the choice of one token: its j-th expert and that one's weight.
struct Choice {
  int expert;
  float weight;
};

// The top_k largest of a token's logits in falling order, the lower id first where equal, and their softmax.
template <int kPerLane>
__device__ Choice choose(const float* logits, int num_experts, int top_k, bool normalize) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  float values[kPerLane];  // all on their way before any is looked at
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] = fresh(logits + min(lane + 32 * i, num_experts - 1));
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = lane + 32 * i < num_experts ? order_key(values[i]) : 0;
  float all = 0.0f, most = 0.0f, mine = 0.0f;
  uint32_t chosen = 0;
  for (int j = 0; j < top_k; ++j) {
    uint32_t best = 0, id = kAll;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(kAll, best);
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i)
      if (keys[i] == best) id = lane + 32 * i;
    id = __reduce_min_sync(kAll, id);
    if (j == 0) {
      most = key_value(best);
      if (!normalize) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (keys[i] != 0) all += expf(key_value(keys[i]) - most);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (id == static_cast<uint32_t>(lane + 32 * i)) keys[i] = 0;
    if (lane == j) mine = key_value(best), chosen = id;
  }
  const float share = lane < top_k ? expf(mine - most) : 0.0f;
  return {static_cast<int>(chosen), share / warp_sum(normalize ? share : all)};
}

__device__ inline Choice choose(const float* logits, int num_experts, int top_k, bool normalize) {
  if (num_experts <= 128) return choose<4>(logits, num_experts, top_k, normalize);
  if (num_experts <= 256) return choose<8>(logits, num_experts, top_k, normalize);
  if (num_experts <= 512) return choose<16>(logits, num_experts, top_k, normalize);
  return choose<32>(logits, num_experts, top_k, normalize);
}

// The weight of the shared expert; one without a logit.
__device__ inline float shared_weight(const float* logit) {
  return logit == nullptr ? 1.0f : 1.0f / (1.0f + expf(-fresh(logit)));
}

}  // namespace helexa::moe
