// SPDX-License-Identifier: GPL-3.0-or-later
// Gated DeltaNet for prompts, in chunks of 64 tokens on tensor cores (section 3.3 of the paper).  With G the running sum of the log
// decays of a chunk, q and k l2-normalized, s = d_k^-1/2 and S the state before the chunk:
//
//   T = (I + A)⁻¹,  A_ij = beta_i e^(G_i - G_j) k_i·k_j for j < i
//   R = beta (v - e^G K S),   V = T R
//   O = s e^G Q S + P V,      P_ij = s e^(G_i - G_j) q_i·k_j for j <= i
//   S = e^G_last S + Σ_j e^(G_last - G_j) k_j V_jᵀ
//
//   convolve   convolution, silu, l2 norms; replaces the convolution's state     one warp: 8 tokens of 128 channels
//   system     T, P and the gates of a chunk and head; all chunks at once        one block: a chunk of a head
//   scan       R, V, O and S, chunk after chunk                                  one block: kCols columns of a head's state
//   norm       gated norm of O                                                   one warp: a head of a token
//
// Queries, keys, T and P are float16: none exceeds 1, T because it is made of products of contractions.  What has the size of values
// (v, S, R, V) enters tensor cores as tf32, which has float16's fraction and float32's range, so the products of both are tf32 with
// float16 operands converted exactly in registers.  T is solved in float32, and S stays float32 in registers over all chunks.
// Differences of G are taken before the exponential and are never positive.
#include "ops/gated_delta_net.cuh"

namespace helexa {
namespace {

constexpr int kChunk = static_cast<int>(kDeltaChunk);
constexpr int kTaps = 4;

// --- operands of tensor cores ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float2 halves(uint32_t pair) {
  __half2 values;
  memcpy(&values, &pair, 4);
  return __half22float2(values);
}
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  const __half2 values = __floats2half2_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &values, 4);
  return pair;
}

// 16 x 16 halves of a matrix in shared memory, from `corner`.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], const __half* corner, int stride) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::load_matrices(a, corner + lane % 16 * stride + lane / 16 * 8);
}
// The same of the transposed matrix: 16 columns from `corner` on are the rows.
__device__ __forceinline__ void load_columns(uint32_t (&a)[4], const __half* corner, int stride) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::load_matrices_transposed(a, corner + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
}

// d += a · b for kTiles tiles of 8 columns, where a is 16 x 16 halves and b 16 rows of tf32 values at `b`.  In the order of a
// register's halves, the depth 2t is the t-th of a tf32 product and 2t + 1 the (t + 4)-th.
template <int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], const uint32_t (&a)[4], const uint32_t* b,
                                         int stride) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 top = halves(a[2 * half]), bottom = halves(a[2 * half + 1]);
    const uint32_t left[4] = {__float_as_uint(top.x), __float_as_uint(bottom.x), __float_as_uint(top.y),
                              __float_as_uint(bottom.y)};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t* at = b + (8 * half + 2 * t) * stride + 8 * tile + g;
      const uint32_t right[2] = {at[0], at[stride]};
      ptx::mma_tf32(d[tile], left, right);
    }
  }
}

// A lane's pair of a 16 x 8 result as tf32, in shared memory.
__device__ __forceinline__ void put(uint32_t* at, float x, float y) {
  *reinterpret_cast<uint2*>(at) = make_uint2(ptx::to_tf32(x), ptx::to_tf32(y));
}

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

// --- workspace ---------------------------------------------------------------------------------------------------------------------

template <class X>
struct Workspace {
  __half* qk;      // [T, 2 key_dim], normalized
  X* v;            // [T, value_dim]; O takes its place
  __half* solved;  // [chunks, H_v, 64, 64], T
  __half* masked;  // [chunks, H_v, 64, 64], P
  float* gates;    // [chunks, H_v, 2, 64], G and beta
  int64_t bytes, max_chunks;

  Workspace(void* memory, const DeltaCall& c, int64_t num_tokens)
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
      for (int i = 0; i < kWide; ++i) to[i] = is_fresh ? 0.0f : conv_state[(kTaps - 1 + t) * conv_dim + i];
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
  float weight[kTaps][kWide], inputs[kTaps - 1 + kConvTokens][kWide] = {};
#pragma unroll
  for (int i = 0; i < kTaps - 1 + kConvTokens; ++i) {
    const int token = begin + i - (kTaps - 1);
    if (token < end) input(offset + token, inputs[i]);
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      weight[tap][i] = c.conv_weight[static_cast<int64_t>(tap) * c.conv_dim() + place + i];
  }
  // The warp that reads the old state is the only one that does, and replaces it at its end: so it takes what follows from there.
  const bool keeps_state = offset + begin == 0;
  float past[kTaps - 1][kWide];
  if (keeps_state) {
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) input(chunk.num_tokens - (kTaps - 1) + i, past[i]);
  }
#pragma unroll
  for (int token = 0; token < kConvTokens; ++token) {
    if (begin + token >= end) break;
    float values[kWide], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sum = fmaf(inputs[token + tap][i], weight[tap][i], sum);
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
  for (int tap = 0; tap < kTaps - 1; ++tap) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) input.conv_state[tap * c.conv_dim() + i] = past[tap][i];
  }
}

// --- system ------------------------------------------------------------------------------------------------------------------------

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
                  const __half* qk,  // [T, 2 key_dim]
                  __half* __restrict__ solved,    // [chunks, H_v, 64, 64]
                  __half* __restrict__ masked,    // [chunks, H_v, 64, 64]
                  float* __restrict__ gates) {    // [chunks, H_v, 2, 64]
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

// --- scan --------------------------------------------------------------------------------------------------------------------------

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kSquareStride = kChunk + 8;

template <int kDepth, int kCols>
struct ScanShared {
  static constexpr int kStride = kDepth + 8;
  // Rows 2t and 2t + 1 of a tf32 operand: with a stride of 4 modulo 16, lanes g and t fall on different banks.
  static constexpr int kNarrow = kCols + 4;
  static_assert(kNarrow % 16 == 4);
  __half k[2][kChunk * kStride], q[kChunk * kStride];
  __half solved[kChunk * kSquareStride], masked[kChunk * kSquareStride];
  uint32_t state[kDepth * kNarrow];
  uint32_t values[kChunk * kNarrow];  // R, then V
  uint32_t faded[kChunk * kNarrow];   // e^(G_last - G) V
  float gates[2][2 * kChunk];         // G, beta
};

// Starts copying `rows` x kCols halves.
template <int kCols>
__device__ __forceinline__ void copy_rows(__half* to, int stride, const __half* from, int64_t from_stride,
                                          int count) {
  constexpr int kPieces = kCols / 8;
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kScanThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    ptx::copy_async(to + row * stride + 8 * piece, from + (row < count ? row * from_stride : 0) + 8 * piece,
                    row < count);
  }
}

template <class X, int kDepth, int kCols>
__global__ void __launch_bounds__(kScanThreads, 2)
    scan_kernel(DeltaCall c,
                const __half* qk,      // [T, 2 key_dim]
                X* v,                               // [T, value_dim], replaced by O
                const __half* solved,  // [chunks, H_v, 64, 64]
                const __half* masked,  // [chunks, H_v, 64, 64]
                const float* gates) {  // [chunks, H_v, 2, 64]
  using Shared = ScanShared<kDepth, kCols>;
  constexpr int kTiles = kCols / 8, kNarrow = Shared::kNarrow;
  // A warp has 16 rows of the state and kStateTiles of its tiles of columns; 16 of the 64 rows of V and half of their tiles.
  constexpr int kStateTiles = kTiles * (kDepth / 16) / kScanWarps, kValueTiles = kTiles / 2;
  Shared& shared = *dynamic_shared<Shared>();
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int first_column = static_cast<int>(blockIdx.x) * kCols;
  const int head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int begin = c.query_start[sequence], num_tokens = c.query_start[sequence + 1] - begin;
  if (num_tokens < c.chunked_from || num_tokens <= 0) return;
  int64_t system = 0;  // of the sequence's first chunk
  for (int s = 0; s < sequence; ++s) {
    const int tokens = c.query_start[s + 1] - c.query_start[s];
    if (tokens >= c.chunked_from) system += (tokens + kChunk - 1) / kChunk;
  }
  system = system * c.num_value_heads + head;
  const int num_chunks = (num_tokens + kChunk - 1) / kChunk;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4, t = lane % 4;

  const auto rows_of = [&](int chunk) { return min(kChunk, num_tokens - chunk * kChunk); };
  const auto queries_of = [&](int chunk) {
    return qk + (static_cast<int64_t>(begin) + chunk * kChunk) * 2 * c.key_dim() + c.key_head(head) * kDepth;
  };
  const auto system_of = [&](int chunk) { return system + static_cast<int64_t>(chunk) * c.num_value_heads; };
  const auto copy_keys = [&](int chunk) {
    if (chunk < num_chunks) {
      copy_rows<kDepth>(shared.k[chunk % 2], Shared::kStride, queries_of(chunk) + c.key_dim(),
                        2 * c.key_dim(), rows_of(chunk));
      if (threadIdx.x < 2 * kChunk / 4)
        ptx::copy_async(shared.gates[chunk % 2] + 4 * threadIdx.x,
                        gates + system_of(chunk) * 2 * kChunk + 4 * threadIdx.x);
    }
    ptx::commit_copies();
  };
  const auto copy_queries = [&](int chunk) {
    if (chunk < num_chunks)
      copy_rows<kDepth>(shared.q, Shared::kStride, queries_of(chunk), 2 * c.key_dim(), rows_of(chunk));
    ptx::commit_copies();
  };
  const auto copy_square = [&](__half* to, const __half* from, int chunk) {
    if (chunk < num_chunks)
      copy_rows<kChunk>(to, kSquareStride, from + system_of(chunk) * kChunk * kChunk, kChunk, kChunk);
    ptx::commit_copies();
  };
  copy_keys(0);
  copy_queries(0);
  copy_square(shared.solved, solved, 0);

  const int state_row = 16 * (warp % (kDepth / 16)), state_column = 8 * kStateTiles * (warp / (kDepth / 16));
  float* state = c.state(c.state_slots[sequence], head) +
                 static_cast<int64_t>(state_row + g) * c.value_head_dim + first_column + state_column + 2 * t;
  float sums[kStateTiles][4];
  {
    const bool is_fresh = c.kv_lengths[sequence] == num_tokens;
#pragma unroll
    for (int tile = 0; tile < kStateTiles; ++tile) {
      const float2 top = is_fresh ? make_float2(0.0f, 0.0f) : load_pair(state + 8 * tile);
      const float2 bottom =
          is_fresh ? make_float2(0.0f, 0.0f) : load_pair(state + 8 * c.value_head_dim + 8 * tile);
      sums[tile][0] = top.x, sums[tile][1] = top.y, sums[tile][2] = bottom.x, sums[tile][3] = bottom.y;
    }
  }
  uint32_t* own_state = shared.state + (state_row + g) * kNarrow + state_column + 2 * t;

  for (int chunk = 0; chunk < num_chunks; ++chunk) {
#pragma unroll
    for (int tile = 0; tile < kStateTiles; ++tile) {
      put(own_state + 8 * tile, sums[tile][0], sums[tile][1]);
      put(own_state + 8 * kNarrow + 8 * tile, sums[tile][2], sums[tile][3]);
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
    copy_square(shared.masked, masked, chunk);
    copy_keys(chunk + 1);
    const __half* keys = shared.k[chunk % 2];
    const float* decays = shared.gates[chunk % 2];
    const float* betas = decays + kChunk;
    const float last = decays[kChunk - 1];
    const int count = rows_of(chunk);

    // Q S by the first four warps, K S and R by the others: 16 rows each.
    const int row = 16 * (warp % 4) + g;
    X* value = v + (static_cast<int64_t>(begin) + chunk * kChunk + row) * c.value_dim() +
               head * c.value_head_dim + first_column + 2 * t;
    X* value_below = value + static_cast<int64_t>(8) * c.value_dim();
    float products[kTiles][4] = {};
    {
      const bool is_key = warp >= 4;
      float2 top[kTiles] = {}, bottom[kTiles] = {};
      if (is_key) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (row < count) top[tile] = load_pair(value + 8 * tile);
          if (row + 8 < count) bottom[tile] = load_pair(value_below + 8 * tile);
        }
      }
      const __half* rows = (is_key ? keys : shared.q) + 16 * (warp % 4) * Shared::kStride;
#pragma unroll
      for (int depth = 0; depth < kDepth; depth += 16) {
        uint32_t a[4];
        load_rows(a, rows + depth, Shared::kStride);
        multiply<kTiles>(products, a, shared.state + depth * kNarrow, kNarrow);
      }
      if (is_key) {
        const float decay = expf(decays[row]), decay_below = expf(decays[row + 8]);
        const float beta = betas[row], beta_below = betas[row + 8];
        uint32_t* to = shared.values + row * kNarrow + 2 * t;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float (&p)[4] = products[tile];
          put(to + 8 * tile, beta * (top[tile].x - decay * p[0]), beta * (top[tile].y - decay * p[1]));
          put(to + 8 * kNarrow + 8 * tile, beta_below * (bottom[tile].x - decay_below * p[2]),
              beta_below * (bottom[tile].y - decay_below * p[3]));
        }
      }
    }
    __syncthreads();
    copy_queries(chunk + 1);

    // V = T R; T has nothing right of the diagonal.
    {
      const int rows = 16 * (warp % 4), column = 8 * kValueTiles * (warp / 4);
      float solution[kValueTiles][4] = {};
      for (int j = 0; j <= rows; j += 16) {
        uint32_t a[4];
        load_rows(a, shared.solved + rows * kSquareStride + j, kSquareStride);
        multiply<kValueTiles>(solution, a, shared.values + j * kNarrow + column, kNarrow);
      }
      __syncthreads();
      copy_square(shared.solved, solved, chunk + 1);
      const float fading = expf(last - decays[row]), fading_below = expf(last - decays[row + 8]);
      const int to = (rows + g) * kNarrow + column + 2 * t;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        const float (&s)[4] = solution[tile];
        put(shared.values + to + 8 * tile, s[0], s[1]);
        put(shared.values + to + 8 * kNarrow + 8 * tile, s[2], s[3]);
        put(shared.faded + to + 8 * tile, fading * s[0], fading * s[1]);
        put(shared.faded + to + 8 * kNarrow + 8 * tile, fading_below * s[2], fading_below * s[3]);
      }
    }
    ptx::wait_for_copies<3>();  // P, not what was asked for after it
    __syncthreads();

    if (warp < 4) {
      const float scale = 1.0f / sqrtf(static_cast<float>(kDepth));
      const float decay = scale * expf(decays[row]), decay_below = scale * expf(decays[row + 8]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        products[tile][0] *= decay, products[tile][1] *= decay;
        products[tile][2] *= decay_below, products[tile][3] *= decay_below;
      }
      for (int j = 0; j <= 16 * warp; j += 16) {
        uint32_t a[4];
        load_rows(a, shared.masked + 16 * warp * kSquareStride + j, kSquareStride);
        multiply<kTiles>(products, a, shared.values + j * kNarrow, kNarrow);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (row < count) store_pair(value + 8 * tile, products[tile][0], products[tile][1]);
        if (row + 8 < count) store_pair(value_below + 8 * tile, products[tile][2], products[tile][3]);
      }
    }
    const float decay = expf(last);
#pragma unroll
    for (int tile = 0; tile < kStateTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] *= decay;
    }
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      uint32_t a[4];
      load_columns(a, keys + j * Shared::kStride + state_row, Shared::kStride);
      multiply<kStateTiles>(sums, a, shared.faded + j * kNarrow + state_column, kNarrow);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kStateTiles; ++tile) {
    store_pair(state + 8 * tile, sums[tile][0], sums[tile][1]);
    store_pair(state + 8 * c.value_head_dim + 8 * tile, sums[tile][2], sums[tile][3]);
  }
}

// --- norm --------------------------------------------------------------------------------------------------------------------------

constexpr int kNormWarps = 8;

template <class X>
__global__ void __launch_bounds__(kNormWarps * 32) norm_kernel(const X* x,  // [T, row]
                                                               const X* o,  // [T, value_dim]
                                                               DeltaCall c, DeltaOutput out) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const DeltaChunk chunk = find_chunk(c, static_cast<int>(blockIdx.x));
  if (chunk.sequence < 0) return;
  const int head = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x / 32);
  for (int i = warp; i < chunk.count; i += kNormWarps) {
    const int64_t token = chunk.first + i;
    const X* z = x + token * c.row() + c.conv_dim() + head * c.value_head_dim;
    write_gated_norm<true>(c, out, token, head,
                           o + token * c.value_dim() + static_cast<int64_t>(head) * c.value_head_dim, z);
  }
}

// --- launches ----------------------------------------------------------------------------------------------------------------------

template <class X, int kDepth, int kCols>
void launch_scan(const DeltaCall& c, const Workspace<X>& w, void* stream) {
  const dim3 grid(static_cast<unsigned>(c.value_head_dim / kCols), static_cast<unsigned>(c.num_value_heads),
                  static_cast<unsigned>(c.num_sequences));
  launch_kernel(scan_kernel<X, kDepth, kCols>,
                {grid, dim3(kScanThreads), stream, sizeof(ScanShared<kDepth, kCols>), true}, c, w.qk, w.v,
                w.solved, w.masked, w.gates);
}

// Wide blocks do less work in all, narrow ones keep more multiprocessors busy and need less shared memory than 100 KiB.
template <class X, int kDepth>
bool prefers_wide(const DeltaCall& c) {
  const int capability = device_capability();
  const bool has_room = capability == 80 || capability / 10 == 9 || capability / 10 == 10;
  const int blocks = c.value_head_dim / 32 * c.num_value_heads * c.num_sequences;
  return has_room && 2 * blocks > num_multiprocessors();
}

template <class X, int kDepth>
void launch_chunks(const X* x, const DeltaCall& c, const DeltaOutput& out, const Workspace<X>& w,
                   void* stream) {
  const auto chunks = static_cast<unsigned>(w.max_chunks);
  const dim3 heads(chunks, static_cast<unsigned>(c.num_value_heads));
  launch_kernel(convolve_kernel<X, kDepth>,
                {dim3(chunks, static_cast<unsigned>((c.conv_dim() + kDepth - 1) / kDepth)),
                 dim3(kConvWarps * 32), stream, 0, true},
                x, c, w.qk, w.v);
  launch_kernel(system_kernel<X, kDepth>,
                {heads, dim3(kSystemThreads), stream, sizeof(SystemShared<kDepth>), true}, x, c, w.qk,
                w.solved, w.masked, w.gates);
  if (prefers_wide<X, kDepth>(c)) {
    launch_scan<X, kDepth, 32>(c, w, stream);
  } else {
    launch_scan<X, kDepth, 16>(c, w, stream);
  }
  launch_kernel(norm_kernel<X>, {heads, dim3(kNormWarps * 32), stream, 0, true}, x, w.v, c, out);
}

template <class X>
void run_chunks(const X* x, const DeltaCall& c, const DeltaOutput& out, void* workspace, int64_t num_tokens,
                void* stream) {
  const Workspace<X> w(workspace, c, num_tokens);
  if (c.key_head_dim == 128) {
    launch_chunks<X, 128>(x, c, out, w, stream);
  } else {
    launch_chunks<X, 64>(x, c, out, w, stream);
  }
}

}  // namespace

bool delta_fits_chunks(const DeltaCall& c) {
  return (c.key_head_dim == 128 || c.key_head_dim == 64) && c.value_head_dim % 32 == 0 &&
         c.num_taps == kTaps && c.num_value_heads % 2 == 0;
}

int64_t delta_chunk_workspace(const DeltaCall& c, int64_t num_tokens, int dtype) {
  if (static_cast<DType>(dtype) == DType::kBF16)
    return Workspace<__nv_bfloat16>(nullptr, c, num_tokens).bytes;
  return Workspace<float>(nullptr, c, num_tokens).bytes;
}

void delta_chunks_cuda(const void* x, int dtype, const DeltaCall& call, const DeltaOutput& out,
                       void* workspace, int64_t num_tokens, void* stream) {
  if (static_cast<DType>(dtype) == DType::kBF16) {
    run_chunks(static_cast<const __nv_bfloat16*>(x), call, out, workspace, num_tokens, stream);
  } else {
    run_chunks(static_cast<const float*>(x), call, out, workspace, num_tokens, stream);
  }
}

}  // namespace helexa
