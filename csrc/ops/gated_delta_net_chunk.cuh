// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What the two files of chunked Gated DeltaNet share (gated_delta_net_chunk_cuda.cu explains the algorithm).
#include "ops/gated_delta_net.cuh"

namespace helexa {

constexpr int kChunk = static_cast<int>(kDeltaChunk);
constexpr int kChunkedTaps = 4;

// 16 x 16 halves of a matrix in shared memory, from `corner`.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], const __half* corner, int stride) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::load_matrices(a, corner + lane % 16 * stride + lane / 16 * 8);
}
// Two neighbouring values.
__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* p) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}
__device__ __forceinline__ void store_pair(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* p, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(x, y);
}

// The intermediate results of a call, in memory that the caller gives.
template <class X>
struct DeltaWorkspace {
  __half* qk;      // [T, 2 key_dim], normalized
  X* v;            // [T, value_dim]; O takes its place
  __half* solved;  // [chunks, H_v, 64, 64], T
  __half* masked;  // [chunks, H_v, 64, 64], P
  float* gates;    // [chunks, H_v, 2, 64], G and beta
  int64_t bytes, max_chunks;

  DeltaWorkspace(void* memory, const DeltaCall& c, int64_t num_tokens)
      : bytes(0), max_chunks(num_tokens / kChunk + c.num_sequences) {
    char* base = static_cast<char*>(memory);
    const auto take = [&](int64_t size) {
      char* part = base + bytes;
      bytes += (size + 255) / 256 * 256;
      return part;
    };
    const int64_t systems = max_chunks * c.num_value_heads;
    qk = reinterpret_cast<__half*>(take(num_tokens * 2 * c.key_dim() * sizeof(__half)));
    v = reinterpret_cast<X*>(take(num_tokens * c.value_dim() * sizeof(X)));
    solved = reinterpret_cast<__half*>(take(systems * kChunk * kChunk * sizeof(__half)));
    masked = reinterpret_cast<__half*>(take(systems * kChunk * kChunk * sizeof(__half)));
    gates = reinterpret_cast<float*>(take(systems * 2 * kChunk * sizeof(float)));
  }
};

// Fills the workspace but for O, and replaces the convolution's state (gated_delta_net_system_cuda.cu).
template <class X>
void delta_systems_cuda(const X* x, const DeltaCall& call, const DeltaWorkspace<X>& workspace, void* stream);

}  // namespace helexa
