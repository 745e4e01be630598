// SPDX-License-Identifier: GPL-3.0-or-later
// How keys and values lie in the caches of a device, for the kernels that write and read them.
#pragma once

#include <cuda_fp8.h>

#include "core/cuda.cuh"
#include "ops/attention.h"

namespace helexa {

// A cache of type C is [pages, num_kv_heads, kPageTokens, head_dim].  One of int8 codes has more rows behind these, with the float32
// scales of the page's tokens: value = code * scale; its head_dim is a multiple of 4.
template <class C>
struct Cache {
  using Operand = C;  // in what its values are multiplied, which is the type of q too
  static constexpr bool kScaled = false;
  // From one head's part of a page to the next.
  static __device__ int64_t head_stride(int64_t head_dim) { return kPageTokens * head_dim; }
};

template <>
struct Cache<__nv_fp8_e4m3> : Cache<uint8_t> {
  using Operand = __half;
};

template <>
struct Cache<int8_t> {
  using Operand = __half;
  static constexpr bool kScaled = true;
  static __device__ int64_t head_stride(int64_t head_dim) {
    const int64_t scale_rows = (4 * kPageTokens + head_dim - 1) / head_dim;
    return (kPageTokens + scale_rows) * head_dim;
  }
};

// The scales of a head's part of a page, which begins at `codes`.
template <class T>
__device__ auto scales_of(T* codes, int64_t head_dim) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const float*, float*>>(codes + kPageTokens *
                                                                                                    head_dim);
}

__device__ inline float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ inline float to_float(int8_t x) { return static_cast<float>(x); }

}  // namespace helexa
