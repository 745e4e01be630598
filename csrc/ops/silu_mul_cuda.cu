// SPDX-License-Identifier: GPL-3.0-or-later
// Nothing is reused, so each thread has its columns and no more: eight side by side for bfloat16, with loads and stores of 16 bytes (a
// prefill is bound by memory), one for int8 codes, where a warp has a block of 32 (there are few rows, and latency is all).
#include "core/cuda.cuh"
#include "ops/activation.cuh"
#include "ops/silu_mul.h"

namespace helexa {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 8;  // columns of a thread

__device__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

template <class T>
__device__ void load_eight(const T* from, float (&to)[kSide]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = reinterpret_cast<const float4*>(from)[half];
      to[4 * half] = v.x, to[4 * half + 1] = v.y, to[4 * half + 2] = v.z, to[4 * half + 3] = v.w;
    }
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pairs[i]));
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    silu_mul_to_bf16_kernel(const T* gate_up,  // [num_tokens, 2 * width]; written by others while this runs
                            __nv_bfloat16* __restrict__ bf16,  // [num_tokens, width]
                            int width,
                            bool aligned) {  // whether eight columns of each row lie on 16 bytes
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kSide;
  if (first >= width) return;
  const T* gate = gate_up + static_cast<int64_t>(blockIdx.y) * 2 * width + first;
  __nv_bfloat16* out = bf16 + static_cast<int64_t>(blockIdx.y) * width + first;
  if (!aligned) {
    for (int i = 0; i < min(kSide, width - first); ++i) {
      out[i] = __float2bfloat16_rn(silu_times(to_float(gate[i]), to_float(gate[width + i])));
    }
    return;
  }
  float gates[kSide], ups[kSide];
  load_eight(gate, gates);
  load_eight(gate + width, ups);
  uint32_t pairs[kSide / 2];
#pragma unroll
  for (int i = 0; i < kSide / 2; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(silu_times(gates[2 * i], ups[2 * i]),
                                                     silu_times(gates[2 * i + 1], ups[2 * i + 1]));
    pairs[i] = reinterpret_cast<const uint32_t&>(two);
  }
  *reinterpret_cast<uint4*>(out) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    silu_mul_to_q8_kernel(const T* gate_up,  // [num_tokens, 2 * width]; written by others while this runs
                          uint8_t* __restrict__ q8,  // rows of activation_row_bytes(width)
                          int width) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int column = blockIdx.x * kThreads + threadIdx.x;
  const T* gate = gate_up + static_cast<int64_t>(blockIdx.y) * 2 * width + column;
  const float value = column < width ? silu_times(to_float(gate[0]), to_float(gate[width])) : 0.0f;
  quantize_lanes(value, q8 + blockIdx.y * activation_row_bytes(width), width, column / 32);
}

template <class T>
void launch_silu_mul(const void* gate_up, uint8_t* q8, void* bf16, int64_t num_tokens, int64_t width,
                     void* stream) {
  const int64_t per_block = q8 == nullptr ? kThreads * kSide : kThreads;
  const dim3 grid(static_cast<unsigned>((width + per_block - 1) / per_block),
                  static_cast<unsigned>(num_tokens));
  const Launch launch{grid, dim3(kThreads), stream, 0, true};
  if (q8 == nullptr) {
    launch_kernel(silu_mul_to_bf16_kernel<T>, launch, static_cast<const T*>(gate_up),
                  static_cast<__nv_bfloat16*>(bf16), static_cast<int>(width), width % kSide == 0);
  } else {
    launch_kernel(silu_mul_to_q8_kernel<T>, launch, static_cast<const T*>(gate_up), q8,
                  static_cast<int>(width));
  }
}

}  // namespace

void silu_mul_cuda(const void* gate_up, int dtype, uint8_t* q8, void* bf16, int64_t num_tokens, int64_t width,
                   void* stream) {
  if (num_tokens == 0) return;
  const auto launch =
      static_cast<DType>(dtype) == DType::kF32 ? launch_silu_mul<float> : launch_silu_mul<__nv_bfloat16>;
  launch(gate_up, q8, bf16, num_tokens, width, stream);
}

}  // namespace helexa
