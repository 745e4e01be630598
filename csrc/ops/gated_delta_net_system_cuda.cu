// SPDX-License-Identifier: GPL-3.0-or-later
// What chunked Gated DeltaNet computes of all chunks at once: the convolution, and the triangular system of each chunk and head.
// gated_delta_net_chunk_cuda.cu explains the algorithm.
#include "ops/gated_delta_net_chunk.cuh"

namespace helexa {
namespace {

// --- convolve ----------------------------------------------------------------------------------------------------------------------

constexpr int kConvWarps = 8;
constexpr int kConvTokens = kChunk / kConvWarps;  // of a warp, which has all their loads under way at once

template <int kWide, class T>
struct alignas(kWide * sizeof(T)) Vector {
  T values[kWide];
};

template <class X, int kWide>  // channels of a lane
struct ConvInput {
  const X* x;         // first row of the sequence, at the lane's channels
  float* conv_state;  // at the lane's channels
  int64_t row;
  int conv_dim;
  bool is_fresh;

  __device__ void operator()(int t, float (&to)[kWide]) const {
    if (t >= 0) {
      const auto values = *reinterpret_cast<const Vector<kWide, X>*>(x + t * row);
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[i] = to_float(values.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        to[i] = is_fresh ? 0.0f : conv_state[(kChunkedTaps - 1 + t) * conv_dim + i];
    }
  }
};

template <class X, int kDepth>  // d_k; a warp has as many channels
__global__ void __launch_bounds__(kConvWarps * 32) convolve_kernel(const X* x,  // [T, row]
                                                                   DeltaCall c,
                                                                   __half* __restrict__ qk,  // [T, 2 key_dim]
                                                                   X* __restrict__ v) {      // [T, value_dim]
  constexpr int kWide = kDepth / 32;
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const DeltaChunk chunk = find_chunk(c, static_cast<int>(blockIdx.x));
  if (chunk.sequence < 0) return;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int channel = static_cast<int>(blockIdx.y) * kDepth + lane * kWide;
  const bool is_norm = channel < 2 * c.key_dim(), is_inside = channel < c.conv_dim();
  const int begin = warp * kConvTokens, end = min(begin + kConvTokens, chunk.count);
  if (begin >= chunk.count) return;
  const int offset = chunk.index * kChunk;  // of the chunk in its sequence
  const int place = is_inside ? channel : 0;
  const ConvInput<X, kWide> input{x + (chunk.first - offset) * c.row() + place,
                                  c.conv_state(c.state_slots[chunk.sequence]) + place, c.row(), c.conv_dim(),
                                  c.kv_lengths[chunk.sequence] == chunk.num_tokens};
  float weight[kChunkedTaps][kWide], inputs[kChunkedTaps - 1 + kConvTokens][kWide] = {};
#pragma unroll
  for (int i = 0; i < kChunkedTaps - 1 + kConvTokens; ++i) {
    const int token = begin + i - (kChunkedTaps - 1);
    if (token < end) input(offset + token, inputs[i]);
  }
#pragma unroll
  for (int tap = 0; tap < kChunkedTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      weight[tap][i] = c.conv_weight[static_cast<int64_t>(tap) * c.conv_dim() + place + i];
  }
  // The warp that reads the old state is the only one that does, and replaces it at its end: so it takes what follows from there.
  const bool keeps_state = offset + begin == 0;
  float past[kChunkedTaps - 1][kWide];
  if (keeps_state) {
#pragma unroll
    for (int i = 0; i < kChunkedTaps - 1; ++i) input(chunk.num_tokens - (kChunkedTaps - 1) + i, past[i]);
  }
#pragma unroll
  for (int token = 0; token < kConvTokens; ++token) {
    if (begin + token >= end) break;
    float values[kWide], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < kChunkedTaps; ++tap) sum = fmaf(inputs[token + tap][i], weight[tap][i], sum);
      values[i] = sum / (1.0f + __expf(-sum));
      squares = fmaf(values[i], values[i], squares);
    }
    const int64_t row = chunk.first + begin + token;
    if (is_norm) {
      const float scale = 1.0f / sqrtf(warp_sum(squares) + 1e-6f);
      Vector<kWide, __half> normed;
#pragma unroll
      for (int i = 0; i < kWide; ++i) normed.values[i] = __float2half_rn(values[i] * scale);
      *reinterpret_cast<Vector<kWide, __half>*>(qk + row * 2 * c.key_dim() + channel) = normed;
    } else if (is_inside) {
      Vector<kWide, X> kept;
#pragma unroll
      for (int i = 0; i < kWide; ++i) kept.values[i] = from_float<X>(values[i]);
      *reinterpret_cast<Vector<kWide, X>*>(v + row * c.value_dim() + channel - 2 * c.key_dim()) = kept;
    }
  }
  if (!keeps_state || !is_inside) return;
#pragma unroll
  for (int tap = 0; tap < kChunkedTaps - 1; ++tap) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) input.conv_state[tap * c.conv_dim() + i] = past[tap][i];
  }
}

// --- system ------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  const __half2 values = __floats2half2_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &values, 4);
  return pair;
}

constexpr int kSystemThreads = 128;
constexpr int kSystemStride = kChunk + 4;  // floats; a multiple of 4

template <int kDepth>
struct SystemShared {
  static constexpr int kStride = kDepth + 8;  // rows of 16 bytes fall on different banks
  float decays[kChunk], betas[kChunk];
  float a[kChunk * kSystemStride];
  union {
    struct {
      __half q[kChunk * kStride], k[kChunk * kStride];
    };
    float solution[kChunk * kChunk];  // once the products are done
  };
};

// G and beta of the chunk by the first warp, two tokens in a lane.
__device__ __forceinline__ void sum_gates(const DeltaCall& c, int head, int count, const float (&b)[2],
                                          const float (&a)[2], float* decays, float* betas) {
  const int lane = static_cast<int>(threadIdx.x);
  float log_decay[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool is_token = 2 * lane + i < count;
    log_decay[i] = is_token ? c.decay[head] * softplus(a[i] + c.dt_bias[head]) : 0.0f;
    betas[2 * lane + i] = is_token ? sigmoid(b[i]) : 0.0f;
  }
  float sum = log_decay[0] + log_decay[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float below = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += below;
  }
  decays[2 * lane] = sum - log_decay[1];
  decays[2 * lane + 1] = sum;
}

// solution = (I + a)⁻¹ by forward substitution, a column of it to each of 64 threads: sixteen rows at a time take all rows above
// them, then one another.
__device__ __forceinline__ void solve(const float* a, float* solution) {
  const int column = static_cast<int>(threadIdx.x);
  for (int first = 0; first < kChunk; first += 16) {
    float rows[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) rows[i] = first + i == column ? 1.0f : 0.0f;
    for (int j = column / 16 * 16; j < first; j += 4) {  // rows above the diagonal are zeros
      const float above[4] = {solution[j * kChunk + column], solution[(j + 1) * kChunk + column],
                              solution[(j + 2) * kChunk + column], solution[(j + 3) * kChunk + column]};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float4 factors = *reinterpret_cast<const float4*>(a + (first + i) * kSystemStride + j);
        rows[i] -= factors.x * above[0] + factors.y * above[1] + factors.z * above[2] + factors.w * above[3];
      }
    }
#pragma unroll
    for (int i = 1; i < 16; ++i) {
#pragma unroll
      for (int j = 0; j < i; ++j)
        rows[i] = fmaf(-a[(first + i) * kSystemStride + first + j], rows[j], rows[i]);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) solution[(first + i) * kChunk + column] = rows[i];
  }
}

template <class X, int kDepth>
__global__ void __launch_bounds__(kSystemThreads)
    system_kernel(const X* x,  // [T, row]
                  DeltaCall c,
                  const __half* qk,             // [T, 2 key_dim]
                  __half* __restrict__ solved,  // [chunks, H_v, 64, 64]
                  __half* __restrict__ masked,  // [chunks, H_v, 64, 64]
                  float* __restrict__ gates) {  // [chunks, H_v, 2, 64]
  using Shared = SystemShared<kDepth>;
  Shared& shared = *dynamic_shared<Shared>();
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const DeltaChunk chunk = find_chunk(c, static_cast<int>(blockIdx.x));
  if (chunk.sequence < 0) return;
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const __half* queries =
      qk + static_cast<int64_t>(chunk.first) * 2 * c.key_dim() + c.key_head(head) * kDepth;
  constexpr int kPieces = kDepth / 8;  // of 16 bytes in a row
  for (int i = thread; i < 2 * kChunk * kPieces; i += kSystemThreads) {
    const int row = i / kPieces % kChunk, piece = i % kPieces;
    const bool is_key = i >= kChunk * kPieces, is_token = row < chunk.count;
    const __half* from =
        queries + (is_token ? static_cast<int64_t>(row) * 2 * c.key_dim() : 0) + (is_key ? c.key_dim() : 0);
    ptx::copy_async((is_key ? shared.k : shared.q) + row * Shared::kStride + 8 * piece, from + 8 * piece,
                    is_token);
  }
  ptx::commit_copies();
  if (warp == 0) {
    float b[2] = {}, a[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * lane + i >= chunk.count) continue;
      const X* row = x + (chunk.first + 2 * lane + i) * c.row() + c.conv_dim() + c.value_dim() + head;
      b[i] = to_float(row[0]);
      a[i] = to_float(row[c.num_value_heads]);
    }
    sum_gates(c, head, chunk.count, b, a, shared.decays, shared.betas);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();

  const int64_t system = static_cast<int64_t>(blockIdx.x) * c.num_value_heads + head;
  gates[system * 2 * kChunk + thread] =
      thread < kChunk ? shared.decays[thread] : shared.betas[thread - kChunk];

  // Each warp: 16 rows of Q Kᵀ and of K Kᵀ up to the diagonal.
  float asked[kChunk / 8][4] = {}, known[kChunk / 8][4] = {};
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t q[4], k[4];
    load_rows(q, shared.q + 16 * warp * Shared::kStride + depth, Shared::kStride);
    load_rows(k, shared.k + 16 * warp * Shared::kStride + depth, Shared::kStride);
#pragma unroll
    for (int block = 0; block < kChunk / 16; ++block) {
      if (block > warp) continue;
      // Rows of keys are columns of b: registers 0 and 2 are the first eight of them.
      uint32_t other[4];
      load_rows(other, shared.k + 16 * block * Shared::kStride + depth, Shared::kStride);
      const uint32_t low[2] = {other[0], other[2]}, high[2] = {other[1], other[3]};
      ptx::mma_f16(asked[2 * block], q, low);
      ptx::mma_f16(asked[2 * block + 1], q, high);
      ptx::mma_f16(known[2 * block], k, low);
      ptx::mma_f16(known[2 * block + 1], k, high);
    }
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(kDepth));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = 16 * warp + g + 8 * half;
    const float decay = shared.decays[i], beta = shared.betas[i];
    __half* row = masked + (system * kChunk + i) * kChunk;
#pragma unroll
    for (int tile = 0; tile < kChunk / 8; ++tile) {
      const int j = 8 * tile + 2 * t;
      float p[2], a[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float weight = j + e <= i ? expf(decay - shared.decays[j + e]) : 0.0f;
        p[e] = weight * scale * asked[tile][2 * half + e];
        a[e] = j + e < i ? weight * beta * known[tile][2 * half + e] : 0.0f;
      }
      *reinterpret_cast<uint32_t*>(row + j) = pack_halves(p[0], p[1]);
      store_pair(shared.a + i * kSystemStride + j, a[0], a[1]);
    }
  }
  __syncthreads();
  if (thread < kChunk) solve(shared.a, shared.solution);
  __syncthreads();
  for (int i = thread; i < kChunk * kChunk / 2; i += kSystemThreads) {
    const float2 pair = load_pair(shared.solution + 2 * i);
    *reinterpret_cast<uint32_t*>(solved + system * kChunk * kChunk + 2 * i) = pack_halves(pair.x, pair.y);
  }
}

template <class X, int kDepth>
void launch_systems(const X* x, const DeltaCall& c, const DeltaWorkspace<X>& w, void* stream) {
  const auto chunks = static_cast<unsigned>(w.max_chunks);
  launch_kernel(convolve_kernel<X, kDepth>,
                {dim3(chunks, static_cast<unsigned>((c.conv_dim() + kDepth - 1) / kDepth)),
                 dim3(kConvWarps * 32), stream, 0, true},
                x, c, w.qk, w.v);
  launch_kernel(system_kernel<X, kDepth>,
                {dim3(chunks, static_cast<unsigned>(c.num_value_heads)), dim3(kSystemThreads), stream,
                 sizeof(SystemShared<kDepth>), true},
                x, c, w.qk, w.solved, w.masked, w.gates);
}

}  // namespace

template <class X>
void delta_systems_cuda(const X* x, const DeltaCall& call, const DeltaWorkspace<X>& workspace, void* stream) {
  if (call.key_head_dim == 128) {
    launch_systems<X, 128>(x, call, workspace, stream);
  } else {
    launch_systems<X, 64>(x, call, workspace, stream);
  }
}

template void delta_systems_cuda(const float*, const DeltaCall&, const DeltaWorkspace<float>&, void*);
template void delta_systems_cuda(const __nv_bfloat16*, const DeltaCall&, const DeltaWorkspace<__nv_bfloat16>&,
                                 void*);

}  // namespace helexa
