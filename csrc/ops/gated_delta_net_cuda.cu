// SPDX-License-Identifier: GPL-3.0-or-later
// Gated DeltaNet token by token: convolution, gates, delta rule and gated norm in one kernel, for decoding and for the few tokens that
// are verified at once.  One block holds the whole state of a head in registers (64 KiB at 128 x 128): it is read once and written
// once for up to kGroup tokens, and the norm over the head's columns needs no other block.
//
//   state [d_k, d_v]      a warp has 64 rows and 32 columns, a lane 16 rows and 4 columns of these
//   known = Sᵀk, asked = Sᵀq   summed over a lane's rows, over four lanes, over the warps of a column through shared memory
//   o = decay · asked + delta · (k·q), so that one exchange serves both sums
//
// Queries and keys are used as the convolution leaves them; their l2 norms, known by then, multiply sums instead of vectors.
// The value heads of a key head all read its convolution state.  The block that is the last of them to have read it, by a counter,
// replaces it at its end.
//
// Sequences of many tokens are left to gated_delta_net_chunk_cuda.cu where it has kernels for the shape.
#include "ops/gated_delta_net.cuh"

namespace helexa {
namespace {

// Two blocks fit on a multiprocessor: one loads while the other computes.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 8;  // tokens between a read and a write of the state
constexpr int kRows = 16;  // of a lane
constexpr int kCols = 4;
constexpr int kWarpRows = 4 * kRows;

constexpr int kStateDim = static_cast<int>(kMaxStateDim);

struct Shared {
  float q[kGroup][kStateDim], k[kGroup][kStateDim], v[kGroup][kStateDim], o[kGroup][kStateDim];
  float sums[2][2][kWarps * 32];  // of alternating tokens: known, then asked, [row warps, columns] each
  float key_scale[kGroup], query_scale[kGroup], key_query[kGroup], decay[kGroup], beta[kGroup];
  int replaces_keys;  // whether this block writes the convolution state of queries and keys
};

// The channels of a block: queries and keys of its key head, then values of its head.
struct Channels {
  int depth, width, first_query, first_key, first_value;

  __device__ Channels(const DeltaCall& c, int head)
      : depth(c.key_head_dim),
        width(c.value_head_dim),
        first_query(c.key_head(head) * c.key_head_dim),
        first_key(c.key_dim() + first_query),
        first_value(2 * c.key_dim() + head * c.value_head_dim) {}
  __device__ int count() const { return 2 * depth + width; }
  __device__ int operator[](int i) const {
    return i < depth ? first_query + i : i < 2 * depth ? first_key + i - depth : first_value + i - 2 * depth;
  }
};

// The rows of one sequence.
template <class X>
struct Sequence {
  const X* x;         // first row
  float* conv_state;  // of its slot
  int64_t row;
  int conv_dim, past, num_tokens;
  bool is_fresh;

  // What the convolution reads of token t, which may lie before the first.
  __device__ float input(int t, int channel) const {
    if (t >= 0) return to_float(x[t * row + channel]);
    return is_fresh ? 0.0f : conv_state[static_cast<int64_t>(past + t) * conv_dim + channel];
  }
  // Moves the last inputs of a channel into the state, the oldest first: what moves down is read before it is overwritten.
  __device__ void keep(int channel) const {
    for (int i = 0; i < past; ++i)
      conv_state[static_cast<int64_t>(i) * conv_dim + channel] = input(num_tokens - past + i, channel);
  }
};

template <class X>
__device__ void convolve(const DeltaCall& c, const Sequence<X>& sequence, const Channels& channels, int first,
                         int count, Shared& shared) {
#pragma unroll 1
  for (int i = threadIdx.x; i < channels.count() * count; i += kThreads) {
    const int token = i / channels.count(), place = i - token * channels.count(), channel = channels[place];
    float sum = 0.0f;
#pragma unroll 4
    for (int tap = 0; tap < c.num_taps; ++tap) {
      sum = fmaf(sequence.input(first + token + tap - sequence.past, channel),
                 c.conv_weight[static_cast<int64_t>(tap) * sequence.conv_dim + channel], sum);
    }
    float* to = place < channels.depth       ? shared.q[token] + place
                : place < 2 * channels.depth ? shared.k[token] + place - channels.depth
                                             : shared.v[token] + place - 2 * channels.depth;
    *to = silu(sum);
  }
}

// The norms and gates of a token, by one warp.
__device__ void prepare(const DeltaCall& c, int head, int token, float a, float b, Shared& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float queries = 0.0f, keys = 0.0f, products = 0.0f;
  for (int i = lane; i < c.key_head_dim; i += 32) {
    const float q = shared.q[token][i], k = shared.k[token][i];
    queries = fmaf(q, q, queries);
    keys = fmaf(k, k, keys);
    products = fmaf(q, k, products);
  }
  queries = warp_sum(queries);
  keys = warp_sum(keys);
  products = warp_sum(products);
  if (lane != 0) return;
  const float key_scale = 1.0f / sqrtf(keys + 1e-6f);
  const float query_scale = 1.0f / sqrtf((queries + 1e-6f) * static_cast<float>(c.key_head_dim));
  shared.key_scale[token] = key_scale;
  shared.query_scale[token] = query_scale;
  shared.key_query[token] = products * key_scale * query_scale;
  shared.decay[token] = expf(c.decay[head] * softplus(a + c.dt_bias[head]));
  shared.beta[token] = sigmoid(b);
}

// A lane's part of a tile of the state: as many warps as d_k needs along the rows, the others along columns.  kDim is d_k and d_v, or 0
// for any.
template <int kDim>
struct Tile {
  int depth, width;              // d_k, d_v
  int row_warps, row_warp, row;  // of the lane
  int column, columns;           // of the lane, of the whole tile
  bool is_idle;                  // a warp that is left over
  float s[kRows][kCols];

  __device__ explicit Tile(const DeltaCall& c)
      : depth(kDim != 0 ? kDim : c.key_head_dim), width(kDim != 0 ? kDim : c.value_head_dim) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    row_warps = (depth + kWarpRows - 1) / kWarpRows;
    columns = kWarps / row_warps * 32;
    row_warp = warp % row_warps;
    row = kWarpRows * row_warp + lane / 8 * 4;
    column = warp / row_warps * 32 + lane % 8 * kCols;
    is_idle = kDim == 0 && column >= columns;
  }

  __device__ void load(const float* state, int first_column, bool is_fresh) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (!is_fresh && has(first_column, i))
        values = *reinterpret_cast<const float4*>(state + offset(first_column, i));
      s[i][0] = values.x, s[i][1] = values.y, s[i][2] = values.z, s[i][3] = values.w;
    }
  }
  __device__ void store(float* state, int first_column) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (has(first_column, i))
        *reinterpret_cast<float4*>(state + offset(first_column, i)) =
            make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
    }
  }

  __device__ void step(int token, int first_column, Shared& shared) {
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
    if (kDim == 0 && (is_idle || first_column + column >= width)) return;
    const float decay = shared.decay[token], beta = shared.beta[token], key_scale = shared.key_scale[token];
    const float4 known = total(shared.sums[parity][0]);
    const float4 value = *reinterpret_cast<const float4*>(shared.v[token] + first_column + column);
    const float memory = decay * key_scale;
    const float delta[kCols] = {(value.x - memory * known.x) * beta, (value.y - memory * known.y) * beta,
                                (value.z - memory * known.z) * beta, (value.w - memory * known.w) * beta};
    if (row == 0) {
      const float4 asked = total(shared.sums[parity][1]);
      const float read = decay * shared.query_scale[token], written = shared.key_query[token];
      *reinterpret_cast<float4*>(shared.o[token] + first_column + column) =
          make_float4(read * asked.x + written * delta[0], read * asked.y + written * delta[1],
                      read * asked.z + written * delta[2], read * asked.w + written * delta[3]);
    }
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
  __device__ int row_of(int i) const { return row + i / 4 * 16 + i % 4; }
  __device__ bool has(int first_column, int i) const {
    return kDim != 0 || (!is_idle && row_of(i) < depth && first_column + column < width);
  }
  __device__ int offset(int first_column, int i) const { return row_of(i) * width + first_column + column; }
  __device__ static void take(const float* from, float (&to)[4]) {
    const float4 values = *reinterpret_cast<const float4*>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
  __device__ float4 total(const float* sums) const {
    float4 sum = *reinterpret_cast<const float4*>(sums + column);
#pragma unroll
    for (int w = 1; w < row_warps; ++w) {
      const float4 other = *reinterpret_cast<const float4*>(sums + w * columns + column);
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    return sum;
  }
};

// Asks for the state and the parameters of a block while the kernel before this one still writes x.
__device__ void prefetch_inputs(const DeltaCall& c, int sequence, int head, const Channels& channels) {
  const int slot = c.state_slots[sequence];
  if (slot < 0 || slot >= c.num_slots) return;  // not yet written, perhaps
  const char* state = reinterpret_cast<const char*>(c.state(slot, head));
  for (int i = threadIdx.x * 128; i < c.key_head_dim * c.value_head_dim * 4; i += kThreads * 128)
    ptx::prefetch(state + i);
  for (int i = threadIdx.x; i < channels.count(); i += kThreads) {
    if (threadIdx.x % 32 != 0) continue;
    for (int tap = 0; tap < c.num_taps; ++tap)
      ptx::prefetch(c.conv_weight + static_cast<int64_t>(tap) * c.conv_dim() + channels[i]);
    for (int tap = 1; tap < c.num_taps; ++tap)
      ptx::prefetch(c.conv_state(slot) + static_cast<int64_t>(tap - 1) * c.conv_dim() + channels[i]);
  }
}

template <class X,   // of x
          int kDim>  // d_k and d_v, or 0: any
__global__ void __launch_bounds__(kThreads, 2)
    delta_step_kernel(const X* x,  // [num_tokens, row]
                      DeltaCall c,
                      uint32_t* counters,  // [slots, H_k], zero before and after
                      DeltaOutput out) {
  __shared__ __align__(16) Shared shared;
  const int head = static_cast<int>(blockIdx.x), number = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const Channels channels(c, head);
  prefetch_inputs(c, number, head, channels);
  ptx::wait_for_producers();
  ptx::allow_consumers();

  const int first = c.query_start[number], num_tokens = c.query_start[number + 1] - first;
  const int slot = c.state_slots[number];
  if (num_tokens <= 0 || num_tokens >= c.chunked_from) return;
  const Sequence<X> sequence{x + first * c.row(),
                             c.conv_state(slot),
                             c.row(),
                             c.conv_dim(),
                             c.num_taps - 1,
                             num_tokens,
                             c.kv_lengths[number] == num_tokens};
  const int heads_per_key = c.num_value_heads / c.num_key_heads;
  float* state = c.state(slot, head);
  Tile<kDim> tile(c);
  uint32_t readers_before = 0;

  // Rows of the tile beyond the head's keys meet zeros.
  for (int i = threadIdx.x; i < kGroup * (tile.row_warps * kWarpRows - tile.depth); i += kThreads) {
    const int place = tile.depth + i / kGroup;
    shared.q[i % kGroup][place] = shared.k[i % kGroup][place] = 0.0f;
  }
#pragma unroll 1
  for (int start = 0; start < num_tokens; start += kGroup) {
    const int count = min(kGroup, num_tokens - start);
    tile.load(state, 0, start == 0 && sequence.is_fresh);
    float b = 0.0f, a = 0.0f;
    if (warp < count) {
      const X* gates = sequence.x + (start + warp) * sequence.row + c.conv_dim() + c.value_dim() + head;
      b = to_float(gates[0]);
      a = to_float(gates[c.num_value_heads]);
    }
    convolve(c, sequence, channels, start, count, shared);
    __syncthreads();
    // What the block has used it has read: it counts without a fence, and needs the answer only at its end.
    if (start + count == num_tokens && threadIdx.x == 0)
      readers_before = atomicInc(&counters[slot * c.num_key_heads + c.key_head(head)], heads_per_key - 1);
    if (warp < count) prepare(c, head, warp, a, b, shared);
    __syncthreads();
#pragma unroll 1
    for (int column = 0; column < tile.width; column += tile.columns) {
      if (column > 0) {
        tile.load(state, column, start == 0 && sequence.is_fresh);
        __syncthreads();  // before `sums` are written again
      }
#pragma unroll 1
      for (int token = 0; token < count; ++token) tile.step(token, column, shared);
      tile.store(state, column);
    }
    if (threadIdx.x == 0) shared.replaces_keys = readers_before == static_cast<uint32_t>(heads_per_key - 1);
    __syncthreads();
    static_assert(kWarps >= kGroup);
    if (warp < count)
      write_gated_norm<false>(
          c, out, first + start + warp, head, shared.o[warp],
          sequence.x + (start + warp) * sequence.row + c.conv_dim() + head * c.value_head_dim);
    __syncthreads();
  }
  for (int i = threadIdx.x + (shared.replaces_keys ? 0 : 2 * channels.depth); i < channels.count();
       i += kThreads)
    sequence.keep(channels[i]);
}

DeltaCall make_call(int64_t num_tokens, int64_t num_sequences, int64_t num_key_heads, int64_t num_value_heads,
                    int64_t key_head_dim, int64_t value_head_dim, int64_t num_taps) {
  DeltaCall call = {};
  call.num_sequences = static_cast<int>(num_sequences);
  call.num_key_heads = static_cast<int>(num_key_heads);
  call.num_value_heads = static_cast<int>(num_value_heads);
  call.key_head_dim = static_cast<int>(key_head_dim);
  call.value_head_dim = static_cast<int>(value_head_dim);
  call.num_taps = static_cast<int>(num_taps);
  // Of several sequences, each has a token at least.
  const bool is_chunked = num_tokens - num_sequences + 1 >= kFewestChunkTokens && delta_fits_chunks(call);
  call.chunked_from = !is_chunked ? INT32_MAX : num_sequences == 1 ? 1 : kFewestChunkTokens;
  return call;
}

}  // namespace

int64_t gated_delta_net_workspace(int64_t num_tokens, int64_t num_sequences, int64_t num_key_heads,
                                  int64_t num_value_heads, int64_t key_head_dim, int64_t value_head_dim,
                                  int64_t num_taps, int dtype) {
  const DeltaCall call = make_call(num_tokens, num_sequences, num_key_heads, num_value_heads, key_head_dim,
                                   value_head_dim, num_taps);
  return call.chunked_from == INT32_MAX ? 0 : delta_chunk_workspace(call, num_tokens, dtype);
}

void gated_delta_net_cuda(const void* x, const float* conv_weight, const float* decay, const float* dt_bias,
                          const float* norm_weight, float* conv_states, float* states,
                          const int32_t* state_slots, const int32_t* query_start, const int32_t* kv_lengths,
                          uint32_t* counters, void* workspace, void* out, int64_t num_tokens,
                          int64_t num_sequences, int64_t num_slots, int64_t num_key_heads,
                          int64_t num_value_heads, int64_t key_head_dim, int64_t value_head_dim,
                          int64_t num_taps, int dtype, int form, float eps, bool tiled, void* stream) {
  if (num_tokens == 0 || num_sequences == 0) return;
  DeltaCall call = make_call(num_tokens, num_sequences, num_key_heads, num_value_heads, key_head_dim,
                             value_head_dim, num_taps);
  call.conv_weight = conv_weight, call.decay = decay, call.dt_bias = dt_bias, call.norm_weight = norm_weight;
  call.conv_states = conv_states, call.states = states;
  call.state_slots = state_slots, call.query_start = query_start, call.kv_lengths = kv_lengths;
  call.num_slots = static_cast<int>(num_slots);
  call.eps = eps, call.tiled = tiled;
  const DeltaOutput output{out, static_cast<DeltaForm>(form)};
  const bool is_chunked = call.chunked_from != INT32_MAX;
  if (is_chunked) delta_chunks_cuda(x, dtype, call, output, workspace, num_tokens, stream);
  // Lengths are known on the device only: where some sequences may be short, both ways start and each leaves the others alone.
  const auto launch = [&](auto kernel, const auto* rows) {
    launch_kernel(kernel,
                  {dim3(static_cast<unsigned>(num_value_heads), static_cast<unsigned>(num_sequences)),
                   dim3(kThreads), stream, 0, true},
                  rows, call, counters, output);
  };
  if (is_chunked && num_sequences == 1) return;
  const bool is_usual = key_head_dim == 128 && value_head_dim == 128;
  if (static_cast<DType>(dtype) == DType::kBF16) {
    launch(is_usual ? delta_step_kernel<__nv_bfloat16, 128> : delta_step_kernel<__nv_bfloat16, 0>,
           static_cast<const __nv_bfloat16*>(x));
  } else {
    launch(is_usual ? delta_step_kernel<float, 128> : delta_step_kernel<float, 0>,
           static_cast<const float*>(x));
  }
}

}  // namespace helexa
