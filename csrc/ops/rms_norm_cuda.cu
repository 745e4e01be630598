// SPDX-License-Identifier: GPL-3.0-or-later
// One block to a row, which stays in registers between its sum and its scaling, so that it is read once.  A thread takes four columns
// side by side, and the norm leaves in the form that the next matmul reads.  Weights are loaded before the wait for the producer of x.
//
// Of a few rows, latency is all: no more threads than keep two loads of each array in flight in each, since what warps do beside loading
// (shuffles, of which a multiprocessor does one at a time) adds up over them.
#include <algorithm>

#include "core/cuda.cuh"
#include "ops/activation.cuh"
#include "ops/rms_norm.h"

namespace helexa {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kFewestThreads = 256;  // rather than two loads in each

__device__ __forceinline__ float block_sum(float x) {
  __shared__ __align__(16) float warp_sums[kMaxWarps];
  const int num_warps = static_cast<int>(blockDim.x / 32);
  if (threadIdx.x < kMaxWarps && threadIdx.x >= num_warps) warp_sums[threadIdx.x] = 0.0f;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
  __syncthreads();
  // Every warp adds up all of them, which is cheaper than another round trip to tell one warp's result to the others.
  const float4 four = *reinterpret_cast<const float4*>(warp_sums + 4 * (threadIdx.x % 8));
  float sum = (four.x + four.y) + (four.z + four.w);
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

template <int kColumns, class T>
__device__ void load_columns(const T* from, float* to) {
  if constexpr (kColumns == 1) {
    *to = to_float(*from);
  } else if constexpr (sizeof(T) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v.y));
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  }
}

template <int kColumns>
__device__ void store_columns(const float* from, float* to) {
  if constexpr (kColumns == 1) {
    *to = *from;
  } else {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  }
}

template <int kColumns>
__device__ void store_columns(const float* from, __nv_bfloat16* to) {
  if constexpr (kColumns == 1) {
    *to = __float2bfloat16_rn(*from);
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(from[0], from[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(from[2], from[3]);
    *reinterpret_cast<uint2*>(to) =
        make_uint2(reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high));
  }
}

template <class T,       // type of x
          int kColumns,  // that a thread takes side by side: 4, or 1 where rows are not aligned
          int kKept>     // values that a thread holds
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(const T* x,                // [num_tokens, width]; written by others while this runs
                    const float* weight,       // [width]; not __restrict__: such loads sink below the wait
                    float* residual,           // [num_tokens, width] or null
                    uint8_t* __restrict__ q8,  // rows of activation_row_bytes(width), or null
                    __nv_bfloat16* __restrict__ bf16,  // [num_tokens, width] or null
                    float* __restrict__ plain,         // [num_tokens, width] or null
                    int width, float eps) {
  constexpr int kSteps = kKept / kColumns;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  const int first = threadIdx.x * kColumns, stride = blockDim.x * kColumns;
  float scales[kKept] = {}, values[kKept] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int i = first + k * stride;
    if (i < width) load_columns<kColumns>(weight + i, scales + k * kColumns);
  }
  const float inverse_width = 1.0f / static_cast<float>(width);
  ptx::wait_for_producers();
  ptx::allow_consumers();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int i = first + k * stride;
    if (i < width) load_columns<kColumns>(x + row + i, values + k * kColumns);
  }
  if (residual != nullptr) {
    // All loads come before the first store, which the compiler could not let them pass.
    float before[kKept] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int i = first + k * stride;
      if (i < width) load_columns<kColumns>(residual + row + i, before + k * kColumns);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int i = first + k * stride;
      for (int c = 0; c < kColumns; ++c) values[k * kColumns + c] += before[k * kColumns + c];
      if (i < width) store_columns<kColumns>(values + k * kColumns, residual + row + i);
    }
  }
  float squares = 0.0f;
  for (int k = 0; k < kKept; ++k) squares += values[k] * values[k];
  const float scale = rsqrtf(fmaf(block_sum(squares), inverse_width, eps));
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int i = first + k * stride;
    float* y = values + k * kColumns;
    for (int c = 0; c < kColumns; ++c) y[c] *= scale * scales[k * kColumns + c];
    if (i < width) {
      if (plain != nullptr) store_columns<kColumns>(y, plain + row + i);
      if (bf16 != nullptr) store_columns<kColumns>(y, bf16 + row + i);
    }
  }
  if (q8 == nullptr) return;
  uint8_t* codes = q8 + blockIdx.x * activation_row_bytes(width);
  if constexpr (kColumns == 1) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k * stride >= width) break;
      quantize_lanes(values[k], codes, width, (first + k * stride) / 32);
    }
  } else {
    float4 quads[kSteps];
    int64_t blocks[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const float* y = values + k * kColumns;
      quads[k] = make_float4(y[0], y[1], y[2], y[3]);
      blocks[k] = (first + k * stride) / 32;
    }
    quantize_quads(quads, codes, width, blocks);
  }
}

template <class T, int kColumns, int kKept>
void launch_rms_norm(const void* x, const float* weight, float* residual, uint8_t* q8, void* bf16,
                     float* plain, int64_t num_tokens, int64_t width, float eps, void* stream) {
  // As many threads as hold the row, but no fewer than kFewestThreads while there are columns for them.
  const int64_t most = (width + 32 * kColumns - 1) / (32 * kColumns);
  const int64_t needed = (width + 32 * kKept - 1) / (32 * kKept);
  const int64_t warps = std::max(needed, std::min<int64_t>(most, kFewestThreads / 32));
  launch_kernel(
      rms_norm_kernel<T, kColumns, kKept>,
      {dim3(static_cast<unsigned>(num_tokens)), dim3(static_cast<unsigned>(32 * warps)), stream, 0, true},
      static_cast<const T*>(x), weight, residual, q8, static_cast<__nv_bfloat16*>(bf16), plain,
      static_cast<int>(width), eps);
}

template <class T>
void launch_rms_norm_of(const void* x, const float* weight, float* residual, uint8_t* q8, void* bf16,
                        float* plain, int64_t num_tokens, int64_t width, float eps, void* stream) {
  const auto launch = width % 4 != 0               ? launch_rms_norm<T, 1, 16>
                      : width > 8 * kMaxThreads    ? launch_rms_norm<T, 4, 16>
                      : width > 4 * kFewestThreads ? launch_rms_norm<T, 4, 8>
                                                   : launch_rms_norm<T, 4, 4>;
  launch(x, weight, residual, q8, bf16, plain, num_tokens, width, eps, stream);
}

}  // namespace

void rms_norm_cuda(const void* x, int x_dtype, const float* weight, float* residual, uint8_t* q8, void* bf16,
                   float* plain, int64_t num_tokens, int64_t width, float eps, void* stream) {
  if (num_tokens == 0) return;
  const auto launch = static_cast<DType>(x_dtype) == DType::kF32 ? launch_rms_norm_of<float>
                                                                 : launch_rms_norm_of<__nv_bfloat16>;
  launch(x, weight, residual, q8, bf16, plain, num_tokens, width, eps, stream);
}

}  // namespace helexa
