// SPDX-License-Identifier: GPL-3.0-or-later
// Gated DeltaNet token by token for any shape: convolution, gates, delta rule and gated norm in one kernel, for decoding and for the few
// tokens that are verified at once.  One block has a head, a tile of its columns after the other, so that the norm over the head's
// columns needs no other block.  gated_delta_net_step_cuda.cu has the same for the shape that models have.
//
// The value heads of a key head all read its convolution state.  The block that is the last of them to have read it, by a counter,
// replaces it at its end.
//
// Sequences of many tokens are left to gated_delta_net_chunk_cuda.cu where it has kernels for the shape.
#include "ops/gated_delta_net_step.cuh"

namespace helexa {
namespace {

constexpr int kGroup = 8;  // tokens that are convolved at once
static_assert(kWarps >= kGroup);

using Tile = StateTile<0>;
using Shared = StepShared<static_cast<int>(kMaxStateDim), kGroup>;

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

template <class X>
__global__ void __launch_bounds__(kThreads)
    delta_step_kernel(const X* x,  // [num_tokens, row]
                      DeltaCall c,
                      uint32_t* counters,  // [slots, H_k], zero before and after
                      DeltaOutput out) {
  __shared__ __align__(16) Shared shared;
  const int head = static_cast<int>(blockIdx.x), number = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const Channels channels(c, head);
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
  Tile tile(c);
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
    if (warp < count) {
      prepare_norms(channels.depth, warp, shared);
      if (threadIdx.x % 32 == 0) prepare_gates(c.decay[head], c.dt_bias[head], warp, a, b, shared);
    }
#pragma unroll 1
    for (int column = 0; column < tile.width; column += tile.columns) {
      if (column > 0) {
        tile.load(state, column, start == 0 && sequence.is_fresh);
        __syncthreads();  // before `sums` are written again
      }
#pragma unroll 1
      for (int token = 0; token < count; ++token) {
        tile.read(token, column, shared);
        tile.write(token, column, shared);
      }
      tile.store(state, column);
    }
    if (threadIdx.x == 0) shared.replaces_keys = readers_before == static_cast<uint32_t>(heads_per_key - 1);
    __syncthreads();
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
                          int64_t num_sequences, bool settled, int64_t num_key_heads, int64_t num_value_heads,
                          int64_t key_head_dim, int64_t value_head_dim, int64_t num_taps, int dtype, int form,
                          float eps, bool tiled, void* stream) {
  if (num_tokens == 0 || num_sequences == 0) return;
  DeltaCall call = make_call(num_tokens, num_sequences, num_key_heads, num_value_heads, key_head_dim,
                             value_head_dim, num_taps);
  call.conv_weight = conv_weight, call.decay = decay, call.dt_bias = dt_bias, call.norm_weight = norm_weight;
  call.conv_states = conv_states, call.states = states;
  call.state_slots = state_slots, call.query_start = query_start, call.kv_lengths = kv_lengths;
  call.eps = eps, call.tiled = tiled, call.is_settled = settled;
  const DeltaOutput output{out, static_cast<DeltaForm>(form)};
  const bool is_chunked = call.chunked_from != INT32_MAX;
  if (is_chunked) delta_chunks_cuda(x, dtype, call, output, workspace, num_tokens, stream);
  if (is_chunked && num_sequences == 1) return;
  // Lengths are known on the device only: where some sequences may be short, both ways start and each leaves the others alone.
  const auto launch = [&](const auto* rows) {
    if (is_usual_delta(call)) return usual_delta_step_cuda(rows, call, counters, output, stream);
    launch_kernel(delta_step_kernel<std::decay_t<decltype(*rows)>>,
                  {dim3(static_cast<unsigned>(num_value_heads), static_cast<unsigned>(num_sequences)),
                   dim3(kThreads), stream, 0, true},
                  rows, call, counters, output);
  };
  if (static_cast<DType>(dtype) == DType::kBF16) {
    launch(static_cast<const __nv_bfloat16*>(x));
  } else {
    launch(static_cast<const float*>(x));
  }
}

}  // namespace helexa
