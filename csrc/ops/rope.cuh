// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What happens to a head of q, k or v between the matmul and the attention, by one warp: the head lies in shared memory between its
// norm and its rotation, since the two values of a pair are read by the same lane but were not normed by it.
#include "ops/activation.cuh"
#include "ops/kv_cache.cuh"
#include "ops/rope.h"

namespace helexa {

// How the heads of a layer are normed and rotated.
struct HeadTransform {
  const float2* table;  // [num_tokens, num_pairs]
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  float eps;
  int num_pairs;
  bool interleaved;
};

// A head of at most 32 * kValues values: normed if there are weights, rotated if there is a row of the table.  Reading is apart from
// computing, so that several heads can be on their way.
template <int kValues>
struct Head {
  static constexpr int kPairs = (kValues + 1) / 2;
  float values[kValues], weights[kValues];
  float2 turns[kPairs];
  bool is_normed, is_rotated;

  template <class X>
  __device__ void read(const X* from, int head_dim, const float* norm, const float2* rotation,
                       int num_pairs) {
    const int lane = threadIdx.x % 32;
    is_normed = norm != nullptr;
    is_rotated = rotation != nullptr;
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      const int i = 32 * k + lane;
      values[k] = i < head_dim ? to_float(from[i]) : 0.0f;
      weights[k] = is_normed && i < head_dim ? norm[i] : 1.0f;
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = 32 * k + lane;
      turns[k] = is_rotated && i < num_pairs ? rotation[i] : make_float2(1.0f, 0.0f);
    }
  }

  // The result is at x in shared memory.
  __device__ void transform(const HeadTransform& how, int head_dim, float* x) const {
    const int lane = threadIdx.x % 32;
    float scale = 1.0f, squares = 0.0f;
    if (is_normed) {
#pragma unroll
      for (float value : values) squares = fmaf(value, value, squares);
      scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(head_dim) + how.eps);
    }
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      if (32 * k + lane < head_dim) x[32 * k + lane] = values[k] * scale * weights[k];
    }
    __syncwarp();
    if (!is_rotated) return;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = 32 * k + lane;
      if (i >= how.num_pairs) break;
      float& a = x[how.interleaved ? 2 * i : i];
      float& b = x[how.interleaved ? 2 * i + 1 : how.num_pairs + i];
      const float turned = fmaf(a, turns[k].x, -(b * turns[k].y));
      b = fmaf(b, turns[k].x, a * turns[k].y);
      a = turned;
    }
    __syncwarp();
  }
};

// Rounds to nearest; what is beyond 448 becomes that.
__device__ inline void assign(__nv_fp8_e4m3& to, float x) { to = __nv_fp8_e4m3(x); }
template <class T>
__device__ void assign(T& to, float x) {
  to = from_float<T>(x);
}

// Writes the head at x as values of a cache, and its scale if it has one.
template <class C>
__device__ void write_head(const float* x, int head_dim, C* values, [[maybe_unused]] float* scale_at) {
  const int lane = threadIdx.x % 32;
  if constexpr (Cache<C>::kScaled) {
    float most = 0.0f;
    for (int i = lane; i < head_dim; i += 32) most = fmaxf(most, q8_magnitude(x[i]));
    for (int bit = 16; bit > 0; bit /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, bit));
    const Q8Scale scale(most);
    for (int i = lane; i < head_dim; i += 32) values[i] = static_cast<C>(scale.code(x[i]));
    if (lane == 0) *scale_at = scale.scale;
  } else {
    for (int i = lane; i < head_dim; i += 32) assign(values[i], x[i]);
  }
}

// The same, in a slot of a cache.
template <class C>
__device__ void append_head(const float* x, int head_dim, C* cache, int num_kv_heads, int kv_head,
                            int64_t slot) {
  C* const page = cache + (slot / kPageTokens * num_kv_heads + kv_head) * Cache<C>::head_stride(head_dim);
  const int64_t offset = slot % kPageTokens;
  float* scale = nullptr;
  if constexpr (Cache<C>::kScaled) scale = scales_of(page, head_dim) + offset;
  write_head(x, head_dim, page + offset * head_dim, scale);
}

}  // namespace helexa
