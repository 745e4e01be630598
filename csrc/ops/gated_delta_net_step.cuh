// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What the kernels of Gated DeltaNet that go token by token share: the state of a head in the registers of a block.
//
//   state [d_k, d_v]      a warp has 64 rows and 32 columns, a lane 16 rows and 4 columns of these
//   known = Sᵀk, asked = Sᵀq   summed over a lane's rows, over four lanes, over the warps of a column through shared memory
//   o = decay · asked + delta · (k·q), so that one exchange serves both sums
//
// Queries and keys are used as the convolution leaves them; their l2 norms, known by then, multiply sums instead of vectors.
#include "ops/gated_delta_net.cuh"

namespace helexa {

// Two blocks fit on a multiprocessor: one loads while the other computes.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;  // of a lane
constexpr int kCols = 4;
constexpr int kWarpRows = 4 * kRows;

// For so many tokens at once; kDim is the largest of d_k and d_v.
template <int kDim, int kTokens>
struct StepShared {
  float q[kTokens][kDim], k[kTokens][kDim], v[kTokens][kDim], o[kTokens][kDim];
  float sums[2][2][kWarps * 32];  // of alternating tokens: known, then asked, [row warps, columns] each
  float key_scale[kTokens], query_scale[kTokens], key_query[kTokens], decay[kTokens], beta[kTokens];
  int replaces_keys;  // whether this block writes the convolution state of queries and keys
};

// The norms of a token's query and key, by one warp.
template <class Shared>
__device__ __forceinline__ void prepare_norms(int depth, int token, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float queries = 0.0f, keys = 0.0f, products = 0.0f;
#pragma unroll 4
  for (int i = lane; i < depth; i += 32) {
    const float q = shared.q[token][i], k = shared.k[token][i];
    queries = fmaf(q, q, queries);
    keys = fmaf(k, k, keys);
    products = fmaf(q, k, products);
  }
  queries = warp_sum(queries);
  keys = warp_sum(keys);
  products = warp_sum(products);
  if (lane != 0) return;
  const float key_scale = rsqrtf(keys + 1e-6f);
  const float query_scale = rsqrtf((queries + 1e-6f) * static_cast<float>(depth));
  shared.key_scale[token] = key_scale;
  shared.query_scale[token] = query_scale;
  shared.key_query[token] = products * key_scale * query_scale;
}

// The gates of a token, by one thread.
template <class Shared>
__device__ __forceinline__ void prepare_gates(float log_decay, float dt_bias, int token, float a, float b,
                                              Shared& shared) {
  shared.decay[token] = expf(log_decay * softplus(a + dt_bias));
  shared.beta[token] = sigmoid(b);
}

// A lane's part of a tile of the state: as many warps as d_k needs along the rows, the others along columns.  kDim is d_k and d_v, or 0
// for any.
template <int kDim>
struct StateTile {
  int depth, width;              // d_k, d_v
  int row_warps, row_warp, row;  // of the lane
  int column, columns;           // of the lane, of the whole tile
  bool is_idle;                  // a warp that is left over
  float s[kRows][kCols];
  float delta[kCols];

  __device__ __forceinline__ explicit StateTile(const DeltaCall& c)
      : depth(kDim != 0 ? kDim : c.key_head_dim), width(kDim != 0 ? kDim : c.value_head_dim) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    row_warps = (depth + kWarpRows - 1) / kWarpRows;
    columns = kWarps / row_warps * 32;
    row_warp = warp % row_warps;
    row = kWarpRows * row_warp + lane / 8 * 4;
    column = warp / row_warps * 32 + lane % 8 * kCols;
    is_idle = kDim == 0 && column >= columns;
  }

  // Past the first-level cache, which may know an older state.
  __device__ __forceinline__ void load(const float* state, int first_column, bool is_zero) {
    const float* from = state + row * width + first_column + column;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) s[i][j] = 0.0f;
    if (is_zero) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!has(first_column, i)) continue;
      const float4 values = __ldcg(reinterpret_cast<const float4*>(from + below(i) * width));
      s[i][0] = values.x, s[i][1] = values.y, s[i][2] = values.z, s[i][3] = values.w;
    }
  }
  __device__ __forceinline__ void store(float* state, int first_column) const {
    float* to = state + row * width + first_column + column;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (has(first_column, i))
        *reinterpret_cast<float4*>(to + below(i) * width) = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
    }
  }

  // Writes a token's o and keeps its delta for `write`.  Norms and gates may be prepared just before, as a barrier lies between.
  template <class Shared>
  __device__ __forceinline__ void read(int token, int first_column, Shared& shared) {
    const int parity = token % 2;
    float sums[2][kCols] = {};
#pragma unroll
    for (int part = 0; part < kRows; part += 4) {
      float k[4], q[4];
      take(shared.k[token] + row_of(part), k);
      take(shared.q[token] + row_of(part), q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          sums[0][j] = fmaf(k[i], s[part + i][j], sums[0][j]);
          sums[1][j] = fmaf(q[i], s[part + i][j], sums[1][j]);
        }
      }
    }
    // Of the eight sums, each of the four lanes that share columns ends with two: half of what it has goes over at each step.
    const int lane = static_cast<int>(threadIdx.x % 32), kind = lane / 16, half = lane / 8 % 2;
    float kept[kCols], pair[2];
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      kept[j] =
          (kind ? sums[1][j] : sums[0][j]) + __shfl_xor_sync(0xffffffffu, kind ? sums[0][j] : sums[1][j], 16);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      pair[j] =
          (half ? kept[2 + j] : kept[j]) + __shfl_xor_sync(0xffffffffu, half ? kept[j] : kept[2 + j], 8);
    if (!is_idle)
      *reinterpret_cast<float2*>(&shared.sums[parity][kind][row_warp * columns + column + 2 * half]) =
          make_float2(pair[0], pair[1]);
    __syncthreads();
    // The next token writes the other half of `sums`, and the one after it only after another barrier.
    if (is_beyond(first_column)) return;
    const float decay = shared.decay[token], beta = shared.beta[token], key_scale = shared.key_scale[token];
    const float4 known = total(shared.sums[parity][0]);
    const float4 value = *reinterpret_cast<const float4*>(shared.v[token] + first_column + column);
    const float memory = decay * key_scale;
    delta[0] = (value.x - memory * known.x) * beta, delta[1] = (value.y - memory * known.y) * beta;
    delta[2] = (value.z - memory * known.z) * beta, delta[3] = (value.w - memory * known.w) * beta;
    if (row == 0) {
      const float4 asked = total(shared.sums[parity][1]);
      const float read = decay * shared.query_scale[token], written = shared.key_query[token];
      *reinterpret_cast<float4*>(shared.o[token] + first_column + column) =
          make_float4(read * asked.x + written * delta[0], read * asked.y + written * delta[1],
                      read * asked.z + written * delta[2], read * asked.w + written * delta[3]);
    }
  }

  // Replaces the state by the one after the token that was read last.
  template <class Shared>
  __device__ __forceinline__ void write(int token, int first_column, const Shared& shared) {
    if (is_beyond(first_column)) return;
    const float decay = shared.decay[token], key_scale = shared.key_scale[token];
#pragma unroll
    for (int part = 0; part < kRows; part += 4) {
      float k[4];
      take(shared.k[token] + row_of(part), k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          s[part + i][j] = fmaf(k[i] * key_scale, delta[j], decay * s[part + i][j]);
      }
    }
  }

 private:
  // Four neighbouring rows at a time, so that the four lanes of a column read different banks.
  __device__ __forceinline__ static int below(int i) { return i / 4 * 16 + i % 4; }
  __device__ __forceinline__ int row_of(int i) const { return row + below(i); }
  __device__ __forceinline__ bool is_beyond(int first_column) const {
    return kDim == 0 && (is_idle || first_column + column >= width);
  }
  __device__ __forceinline__ bool has(int first_column, int i) const {
    return !is_beyond(first_column) && (kDim != 0 || row_of(i) < depth);
  }
  __device__ __forceinline__ static void take(const float* from, float (&to)[4]) {
    const float4 values = *reinterpret_cast<const float4*>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
  __device__ __forceinline__ float4 total(const float* sums) const {
    float4 sum = *reinterpret_cast<const float4*>(sums + column);
#pragma unroll
    for (int w = 1; w < row_warps; ++w) {
      const float4 other = *reinterpret_cast<const float4*>(sums + w * columns + column);
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    return sum;
  }
};

// The kernel of the shape that models have (gated_delta_net_step_cuda.cu).
constexpr int kUsualDim = 128;
constexpr int kUsualTaps = 4;
bool is_usual_delta(const DeltaCall& call);
template <class X>
void usual_delta_step_cuda(const X* x, const DeltaCall& call, uint32_t* counters, const DeltaOutput& out,
                           void* stream);

}  // namespace helexa
