// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What the kernels of Gated DeltaNet on CUDA share: the call, the forms of its output, and the functions of one value.
#include "core/cuda.cuh"
#include "ops/activation.cuh"
#include "ops/gated_delta_net.h"

namespace helexa {

// Tokens from which on a sequence goes in chunks: below, one pass over the state per token costs less than the four kernels.
constexpr int kFewestChunkTokens = 16;

// The sizes and pointers of gated_delta_net_cuda, as its kernels take them.
struct DeltaCall {
  const float *conv_weight, *decay, *dt_bias, *norm_weight;
  float *conv_states, *states;
  const int32_t *state_slots, *query_start, *kv_lengths;
  int num_sequences, num_key_heads, num_value_heads, key_head_dim, value_head_dim, num_taps;
  int chunked_from;  // sequences of so many tokens or more go in chunks
  float eps;
  bool tiled, is_settled;

  __host__ __device__ int key_dim() const { return num_key_heads * key_head_dim; }
  __host__ __device__ int value_dim() const { return num_value_heads * value_head_dim; }
  __host__ __device__ int conv_dim() const { return 2 * key_dim() + value_dim(); }
  __host__ __device__ int64_t row() const {
    return static_cast<int64_t>(conv_dim()) + value_dim() + 2 * num_value_heads;
  }
  __device__ int key_head(int head) const {
    return tiled ? head % num_key_heads : head / (num_value_heads / num_key_heads);
  }
  __device__ float* conv_state(int slot) const {
    return conv_states + static_cast<int64_t>(slot) * (num_taps - 1) * conv_dim();
  }
  __device__ float* state(int slot, int head) const {
    return states + (static_cast<int64_t>(slot) * num_value_heads + head) * key_head_dim * value_head_dim;
  }
};

// Where results go.
struct DeltaOutput {
  void* rows;
  DeltaForm form;
};

// A piece of a sequence as the kernels that go in chunks see it.
struct DeltaChunk {
  int sequence, first, count;  // rows first .. first + count of x
  int index;                   // within the sequence
  int num_tokens;              // of the sequence
};

// The chunk with this number, counted over all sequences that go in chunks; its sequence is -1 beyond the last.
__device__ inline DeltaChunk find_chunk(const DeltaCall& c, int number) {
  for (int s = 0; s < c.num_sequences; ++s) {
    const int begin = c.query_start[s], tokens = c.query_start[s + 1] - begin;
    if (tokens < c.chunked_from) continue;
    const int chunks = (tokens + kDeltaChunk - 1) / kDeltaChunk;
    if (number < chunks) {
      const int first = number * kDeltaChunk, left = tokens - first;
      return {s, begin + first, left < kDeltaChunk ? left : static_cast<int>(kDeltaChunk), number, tokens};
    }
    number -= chunks;
  }
  return {-1, 0, 0, 0, 0};
}

// Quotients are exact to 2 units of the last place, and 0 where the divisor exceeds 2^126.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Four neighbouring values; `p` is a multiple of 16 bytes (8 of bfloat16).
__device__ inline float4 load_four(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 load_four(const __nv_bfloat16* p) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(p);
  __nv_bfloat162 low, high;
  memcpy(&low, &pairs.x, 4);
  memcpy(&high, &pairs.y, 4);
  const float2 first = __bfloat1622float2(low), last = __bfloat1622float2(high);
  return make_float4(first.x, first.y, last.x, last.y);
}

// Writes four values of a token from `column` on, by a whole warp: 8 lanes have 32 columns side by side, or all columns beyond the row.
__device__ inline void write_four(const DeltaCall& c, const DeltaOutput& out, int64_t token, int column,
                                  float4 y) {
  if (out.form == DeltaForm::kQ8) {
    quantize_quads(y, static_cast<uint8_t*>(out.rows) + token * activation_row_bytes(c.value_dim()),
                   c.value_dim(), column / 32);
  } else if (column < c.value_dim() && out.form == DeltaForm::kBF16) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
    uint2 bits;
    memcpy(&bits, pairs, 8);
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out.rows) + token * c.value_dim() + column) = bits;
  } else if (column < c.value_dim()) {
    *reinterpret_cast<float4*>(static_cast<float*>(out.rows) + token * c.value_dim() + column) = y;
  }
}

// Writes o · weight / rms · silu(z) of one head and token, by a whole warp.  o [value_head_dim] lies in shared or global memory,
// z in the token's row of x, whose four values are read at once if kAligned.
template <bool kAligned, class O, class X>
__device__ inline void write_gated_norm(const DeltaCall& c, const DeltaOutput& out, int64_t token, int head,
                                        const O* o, const X* z) {
  const int lane = static_cast<int>(threadIdx.x % 32), width = c.value_head_dim;
  float squares = 0.0f;
  for (int i = 4 * lane; i < width; i += 128) {
    const float4 x = load_four(o + i);
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + c.eps);
  const int first = head * width;
  for (int begin = 0; begin < width; begin += 128) {
    const int i = begin + 4 * lane;
    float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i < width) {
      const float4 x = load_four(o + i), w = load_four(c.norm_weight + i);
      const float4 gate =
          kAligned ? load_four(z + i)
                   : make_float4(to_float(z[i]), to_float(z[i + 1]), to_float(z[i + 2]), to_float(z[i + 3]));
      y = make_float4(x.x * scale * w.x * silu(gate.x), x.y * scale * w.y * silu(gate.y),
                      x.z * scale * w.z * silu(gate.z), x.w * scale * w.w * silu(gate.w));
    }
    // Lanes beyond the head say columns far beyond the row.
    write_four(c, out, token, i < width ? first + i : 32 * c.value_dim(), y);
  }
}

// The chunked kernels (gated_delta_net_chunk_cuda.cu).
bool delta_fits_chunks(const DeltaCall& call);
int64_t delta_chunk_workspace(const DeltaCall& call, int64_t num_tokens, int dtype);
void delta_chunks_cuda(const void* x, int dtype, const DeltaCall& call, const DeltaOutput& out,
                       void* workspace, int64_t num_tokens, void* stream);

}  // namespace helexa
