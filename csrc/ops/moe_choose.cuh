// SPDX-License-Identifier: GPL-3.0-or-later
// Which experts a token goes to, by one warp.  Every block that needs to know finds out for itself, which is quicker than being told by
// another one.
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

// Four neighbouring logits in falling order, the lower id first where equal.
struct Quad {
  uint32_t keys[4];
  uint32_t places;  // of the keys among the four, in bytes

  // Of the logits from `first` on; those at and beyond `count` are none.
  __device__ __forceinline__ void load(const float* logits, int first, int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) keys[i] = first + i < count ? __float_as_uint(fresh(logits + first + i)) : 0;
  }
  __device__ __forceinline__ void sort(int first, int count) {
    places = 0x03020100;
#pragma unroll
    for (int i = 0; i < 4; ++i) keys[i] = first + i < count ? order_key(__uint_as_float(keys[i])) : 0;
    order<0>(), order<2>(), order<1>();
    order<0>(), order<2>(), order<1>();
  }
  __device__ __forceinline__ void pop() {
    keys[0] = keys[1], keys[1] = keys[2], keys[2] = keys[3], keys[3] = 0;
    places >>= 8;
  }

 private:
  template <int i>
  __device__ __forceinline__ void order() {
    const uint32_t a = keys[i], b = keys[i + 1];
    const uint32_t swapped = __byte_perm(places, 0, i == 0 ? 0x3201 : i == 1 ? 0x3120 : 0x2310);
    keys[i] = max(a, b), keys[i + 1] = min(a, b);
    if (a < b) places = swapped;
  }
};

// The top_k largest of a token's logits in falling order, the lower id first where equal, and their softmax.  Each lane sorts those
// it has, so that a turn looks at one of each lane.
template <int kQuads>  // of a lane
__device__ __forceinline__ Choice choose_of(const float* logits, int num_experts, int top_k, bool normalize) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, first = 4 * kQuads * lane;
  Quad quads[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) quads[q].load(logits, first + 4 * q, num_experts);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) quads[q].sort(first + 4 * q, num_experts);
  // The largest of those that the lane still has, and which quad it is of.
  uint32_t head;
  int quad;
  auto find_head = [&] {
    head = quads[0].keys[0], quad = 0;
#pragma unroll
    for (int q = 1; q < kQuads; ++q)
      if (quads[q].keys[0] > head) head = quads[q].keys[0], quad = q;
  };
  find_head();
  uint32_t best = __reduce_max_sync(kAll, head);
  const float most = key_value(best);
  float all = 0.0f, mine = 0.0f;
  if (!normalize) {
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const uint32_t key = quads[i / 4].keys[i % 4];
      if (key != 0) all += expf(key_value(key) - most);
    }
  }
  int chosen = 0;
  for (int j = 0;;) {
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAll, head == best))) - 1;
    uint32_t places = quads[0].places;
#pragma unroll
    for (int q = 1; q < kQuads; ++q) places = quad == q ? quads[q].places : places;
    const int id = __shfl_sync(kAll, first + 4 * quad + static_cast<int>(places & 255), owner);
    if (lane == j) mine = key_value(best), chosen = id;
    if (++j == top_k) break;
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (lane == owner && quad == q) quads[q].pop();
    find_head();
    best = __reduce_max_sync(kAll, head);
  }
  const float share = lane < top_k ? expf(mine - most) : 0.0f;
  return {chosen, __fdividef(share, warp_sum(normalize ? share : all))};
}

// Larger ones are functions of their own, out of the way of usual models' code.
template <int kQuads>
__device__ __noinline__ Choice choose_of_many(const float* logits, int num_experts, int top_k,
                                              bool normalize) {
  return choose_of<kQuads>(logits, num_experts, top_k, normalize);
}

__device__ inline Choice choose(const float* logits, int num_experts, int top_k, bool normalize) {
  if (num_experts <= 128) return choose_of<1>(logits, num_experts, top_k, normalize);
  if (num_experts <= 256) return choose_of<2>(logits, num_experts, top_k, normalize);
  if (num_experts <= 512) return choose_of_many<4>(logits, num_experts, top_k, normalize);
  return choose_of_many<8>(logits, num_experts, top_k, normalize);
}

// The weight of the shared expert; one without a logit.
__device__ inline float shared_weight(const float* logit) {
  return logit == nullptr ? 1.0f : 1.0f / (1.0f + expf(-fresh(logit)));
}

}  // namespace helexa::moe
