// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "core/cuda_error.h"
#include "core/float_types.h"

// Evaluates a CUDA runtime call and throws CudaError, which names the call and where it stands, unless it succeeded.
#define CUDA_CHECK(call)                                              \
  do {                                                                \
    const cudaError_t status_ = (call);                               \
    if (status_ != cudaSuccess) {                                     \
      ::helexa::throw_cuda_error(status_, #call, __FILE__, __LINE__); \
    }                                                                 \
  } while (false)

namespace helexa {

[[noreturn]] inline void throw_cuda_error(cudaError_t status, const char* call, const std::string& file,
                                          int line) {
  const int code = static_cast<int>(status);
  throw CudaError(code, std::string(cudaGetErrorName(status)) + " (" + std::to_string(code) +
                            "): " + cudaGetErrorString(status) + "; " + call + " at " +
                            file.substr(file.rfind('/') + 1) + ":" + std::to_string(line));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls f with a value of the type that `dtype` stands for.
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32: return f(float());
    case DType::kF16: return f(__half());
    case DType::kBF16: return f(__nv_bfloat16());
  }
}

// The sum over a whole warp, in every lane.
__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace helexa
