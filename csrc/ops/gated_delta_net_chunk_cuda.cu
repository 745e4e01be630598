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
#include "ops/gated_delta_net_chunk.cuh"

namespace helexa {
namespace {

__device__ __forceinline__ float2 halves(uint32_t pair) {
  __half2 values;
  memcpy(&values, &pair, 4);
  return __half22float2(values);
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
__global__ void __launch_bounds__(kScanThreads, 2) scan_kernel(DeltaCall c,
                                                               const __half* qk,  // [T, 2 key_dim]
                                                               X* v,  // [T, value_dim], replaced by O
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
void launch_scan(const DeltaCall& c, const DeltaWorkspace<X>& w, void* stream) {
  const dim3 grid(static_cast<unsigned>(c.value_head_dim / kCols), static_cast<unsigned>(c.num_value_heads),
                  static_cast<unsigned>(c.num_sequences));
  launch_kernel(scan_kernel<X, kDepth, kCols>,
                {grid, dim3(kScanThreads), stream, sizeof(ScanShared<kDepth, kCols>), true}, c, w.qk, w.v,
                w.solved, w.masked, w.gates);
}

// Wide blocks do less work in all, narrow ones keep more multiprocessors busy and need less shared memory than 100 KiB.
bool prefers_wide(const DeltaCall& c) {
  const int capability = device_capability();
  const bool has_room = capability == 80 || capability / 10 == 9 || capability / 10 == 10;
  const int blocks = c.value_head_dim / 32 * c.num_value_heads * c.num_sequences;
  return has_room && 2 * blocks > num_multiprocessors();
}

template <class X, int kDepth>
void launch_chunks(const X* x, const DeltaCall& c, const DeltaOutput& out, const DeltaWorkspace<X>& w,
                   void* stream) {
  if (prefers_wide(c)) {
    launch_scan<X, kDepth, 32>(c, w, stream);
  } else {
    launch_scan<X, kDepth, 16>(c, w, stream);
  }
  launch_kernel(norm_kernel<X>,
                {dim3(static_cast<unsigned>(w.max_chunks), static_cast<unsigned>(c.num_value_heads)),
                 dim3(kNormWarps * 32), stream, 0, true},
                x, w.v, c, out);
}

template <class X>
void run_chunks(const X* x, const DeltaCall& c, const DeltaOutput& out, void* workspace, int64_t num_tokens,
                void* stream) {
  const DeltaWorkspace<X> w(workspace, c, num_tokens);
  delta_systems_cuda(x, c, w, stream);
  if (c.key_head_dim == 128) {
    launch_chunks<X, 128>(x, c, out, w, stream);
  } else {
    launch_chunks<X, 64>(x, c, out, w, stream);
  }
}

}  // namespace

bool delta_fits_chunks(const DeltaCall& c) {
  return (c.key_head_dim == 128 || c.key_head_dim == 64) && c.value_head_dim % 32 == 0 &&
         c.num_taps == kChunkedTaps && c.num_value_heads % 2 == 0;
}

int64_t delta_chunk_workspace(const DeltaCall& c, int64_t num_tokens, int dtype) {
  if (static_cast<DType>(dtype) == DType::kBF16)
    return DeltaWorkspace<__nv_bfloat16>(nullptr, c, num_tokens).bytes;
  return DeltaWorkspace<float>(nullptr, c, num_tokens).bytes;
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
