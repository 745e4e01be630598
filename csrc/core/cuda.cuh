// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "core/cuda_error.h"
#include "core/float_types.h"
#include "core/ptx.cuh"
#ifdef HELEXA_EMULATED_CUDA
#include "emulation/cuda.h"
#endif

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

// An attribute of the current device, which the thread asks for once; `emulated` where the host stands for one.
template <cudaDeviceAttr kAttribute>
int device_attribute([[maybe_unused]] int emulated) {
#ifdef HELEXA_EMULATED_CUDA
  return emulated;
#else
  static thread_local int known_device = -1, value = 0;
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  if (device != known_device) {
    CUDA_CHECK(cudaDeviceGetAttribute(&value, kAttribute, device));
    known_device = device;
  }
  return value;
#endif
}

// 10 · major + minor of the current device's compute capability, such as 86.
inline int device_capability() {
  return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>(9) +
         device_attribute<cudaDevAttrComputeCapabilityMinor>(0);
}

// The current device's number of multiprocessors.
inline int num_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(4); }

// Whether kernels may start before the ones ahead of them have ended; HELEXA_CUDA_OVERLAP=0 forbids it, which shows in a profile what
// each kernel takes by itself.
inline bool may_overlap() {
  static const bool allowed = [] {
    const char* value = std::getenv("HELEXA_CUDA_OVERLAP");
    return value == nullptr || std::string(value) != "0";
  }();
  return allowed;
}

#ifndef HELEXA_EMULATED_CUDA
// Lets a kernel have so much dynamic shared memory on the current device.  What was allowed once stays so: another thread may be about
// to launch the kernel with more.
inline void allow_shared_bytes(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  most = bytes;
}
#endif

// How a kernel is launched.
struct Launch {
  dim3 grid;
  dim3 block;
  void* stream;
  size_t shared_bytes = 0;  // of dynamic shared memory; a lot of it is asked for as needed
  // Whether it may start while the kernel before it still runs (sm_90 and later).  Such a kernel calls ptx::wait_for_producers()
  // in every block before it touches memory that others write, and before it writes any.
  bool overlap = false;
};

// Launches `kernel` with arguments that convert to its parameters; throws CudaError if the device refuses.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, Arguments&&... arguments) {
#ifdef HELEXA_EMULATED_CUDA
  emulation::run(launch.grid, launch.block, launch.shared_bytes,
                 [=] { kernel(static_cast<std::decay_t<Parameters>>(arguments)...); });
#else
  // 48 KiB are free to use, static shared memory included.
  if (launch.shared_bytes > 32 * 1024) {
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), static_cast<int>(launch.shared_bytes));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = launch.overlap && may_overlap() && device_capability() >= 90 ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<std::decay_t<Parameters>>(arguments)...));
#endif
}

// The dynamic shared memory of the block.
template <class T>
__device__ T* dynamic_shared() {
#ifdef HELEXA_EMULATED_CUDA
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char helexa_dynamic_shared[];
  return reinterpret_cast<T*>(helexa_dynamic_shared);
#endif
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
