// SPDX-License-Identifier: GPL-3.0-or-later
// One block to a row, so that a row is read from memory once for its sum and found in the cache when it is scaled.  Each thread
// takes every kThreads-th value: neighbouring threads touch neighbouring addresses whatever the width.
#include "core/cuda.cuh"
#include "ops/rms_norm.h"

namespace helexa {
namespace {

// Enough loads in flight to hide memory's latency for one row of a few thousand values, which is all that a decode step has.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ float block_sum(float x) {
  __shared__ float warp_sums[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
  __syncthreads();
  // Every warp adds up all partial sums: that is cheaper than another round trip to tell one warp's result to the others.
  return warp_sum(threadIdx.x % 32 < kWarps ? warp_sums[threadIdx.x % 32] : 0.0f);
}

template <class T,                                                       // type of x, residual and out
          bool kResidual>                                                // whether the residual is there
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const T* x,  // [num_tokens, width]; may be out
                                                            const float* __restrict__ weight,  // [width]
                                                            T* residual,  // [num_tokens, width]
                                                            T* out,       // [num_tokens, width]
                                                            int64_t width, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    float value = to_float(x[row + i]);
    if (kResidual) {
      // The sum is rounded to T before it is squared, since that is what later layers read.
      const T sum = from_float<T>(to_float(residual[row + i]) + value);
      residual[row + i] = sum;
      value = to_float(sum);
    }
    squares += value * value;
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(width) + eps);
  const T* from = kResidual ? residual : x;
  // A thread reads back only what it wrote itself, so no barrier is needed.
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    out[row + i] = from_float<T>(to_float(from[row + i]) * scale * weight[i]);
  }
}

}  // namespace

void rms_norm_cuda(const void* x, const float* weight, void* residual, void* out, int64_t num_tokens,
                   int64_t width, int dtype, float eps, void* stream) {
  if (num_tokens == 0) return;
  with_dtype(static_cast<DType>(dtype), [&](auto value) {
    using T = decltype(value);
    const auto kernel = residual == nullptr ? rms_norm_kernel<T, false> : rms_norm_kernel<T, true>;
    launch_kernel(kernel, {dim3(static_cast<unsigned>(num_tokens)), dim3(kThreads), stream},
                  static_cast<const T*>(x), weight, static_cast<T*>(residual), static_cast<T*>(out), width,
                  eps);
  });
}

}  // namespace helexa
