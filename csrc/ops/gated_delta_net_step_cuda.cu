// SPDX-License-Identifier: GPL-3.0-or-later
// Gated DeltaNet token by token for heads of 128 keys and values and a convolution over 4 tokens, as models have them: all in one launch,
// one block to a head of a sequence, nothing read twice.
//
// What costs time here is not work but round trips to memory one after the other, so there are two: the sequence's place, then
// everything else at once.  A thread has one channel of queries or keys and one of values, or of gates where there are no more values,
// and keeps the convolution's window of both in registers, from which it also replaces the convolution's state.
//
// If the states are settled (gated_delta_net.h), only x waits for the kernel before.
#include "ops/gated_delta_net_step.cuh"

namespace helexa {
namespace {

constexpr int kPast = kUsualTaps - 1;
constexpr int kMostTokens = kFewestChunkTokens - 1;
constexpr int kLoads = 4;  // tokens that a thread loads at once
static_assert(kThreads == 2 * kUsualDim);

struct Shared : StepShared<kUsualDim, kMostTokens> {
  float gate[kMostTokens][kUsualDim];  // silu(z) · norm_weight
};

// Where the rows and the states of a block's sequence are.
struct Place {
  int first, num_tokens, slot;
  bool is_here, is_fresh;

  __device__ __forceinline__ Place(const DeltaCall& c, int sequence) {
    first = __ldcg(c.query_start + sequence);
    num_tokens = __ldcg(c.query_start + sequence + 1) - first;
    slot = __ldcg(c.state_slots + sequence);
    is_fresh = __ldcg(c.kv_lengths + sequence) == num_tokens;
    is_here = num_tokens > 0 && num_tokens < c.chunked_from && num_tokens <= kMostTokens;
  }
};

// One channel of the convolution.
struct Window {
  float weights[kUsualTaps], past[kPast];  // the oldest first

  __device__ __forceinline__ void load_weights(const float* weight, int conv_dim) {
#pragma unroll
    for (int i = 0; i < kUsualTaps; ++i) weights[i] = weight[static_cast<int64_t>(i) * conv_dim];
  }
  __device__ __forceinline__ void load(const float* conv_state, int conv_dim, bool is_zero) {
#pragma unroll
    for (int i = 0; i < kPast; ++i)
      past[i] = is_zero ? 0.0f : __ldcg(conv_state + static_cast<int64_t>(i) * conv_dim);
  }
  __device__ __forceinline__ float take(float x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPast; ++i) sum = fmaf(past[i], weights[i], sum);
#pragma unroll
    for (int i = 0; i + 1 < kPast; ++i) past[i] = past[i + 1];
    past[kPast - 1] = x;
    return fmaf(x, weights[kPast], sum);
  }
  __device__ __forceinline__ void store(float* conv_state, int conv_dim) const {
#pragma unroll
    for (int i = 0; i < kPast; ++i) conv_state[static_cast<int64_t>(i) * conv_dim] = past[i];
  }
};

// o · gate / rms(o) of a head and token, by one warp.
__device__ __forceinline__ void write_norm(const DeltaCall& c, const DeltaOutput& out, int64_t token,
                                           int head, const float* o, const float* gate) {
  const int i = 4 * static_cast<int>(threadIdx.x % 32);
  const float4 x = load_four(o + i), g = load_four(gate + i);
  const float squares = warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w);
  const float scale = rsqrtf(squares / static_cast<float>(kUsualDim) + c.eps);
  write_four(c, out, token, head * kUsualDim + i,
             make_float4(x.x * scale * g.x, x.y * scale * g.y, x.z * scale * g.z, x.w * scale * g.w));
}

template <class X>
__global__ void __launch_bounds__(kThreads, 2)
    usual_delta_step_kernel(const X* x,  // [num_tokens, row]
                            DeltaCall c,
                            uint32_t* counters,  // [slots, H_k], zero before and after
                            DeltaOutput out) {
  __shared__ __align__(16) Shared shared;
  if (!c.is_settled) ptx::wait_for_producers();
  const Place place(c, static_cast<int>(blockIdx.z));
  const int key_head = static_cast<int>(blockIdx.x), heads_per_key = static_cast<int>(gridDim.y);
  const int head = c.tiled ? static_cast<int>(blockIdx.y) * c.num_key_heads + key_head
                           : key_head * heads_per_key + static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), column = thread % kUsualDim;
  const int warp = thread / 32, lane = thread % 32;
  const bool is_upper = thread >= kUsualDim;  // of keys and gates; the others are of queries and values
  const int conv_dim = c.conv_dim();
  const int key_channel = (is_upper ? c.key_dim() : 0) + key_head * kUsualDim + column;
  const int value_channel = 2 * c.key_dim() + head * kUsualDim + column;
  const int second = is_upper ? conv_dim + head * kUsualDim + column : value_channel;  // column of x

  Window key, value = {};
  key.load_weights(c.conv_weight + key_channel, conv_dim);
  if (!is_upper) value.load_weights(c.conv_weight + value_channel, conv_dim);
  const float factor = is_upper ? c.norm_weight[column] : 1.0f;
  const float log_decay = c.decay[head], dt_bias = c.dt_bias[head];
  float* conv_state = c.conv_state(place.slot);
  float* state = c.state(place.slot, head);
  StateTile<kUsualDim> tile(c);
  const bool is_zero = place.is_fresh || !place.is_here;
  key.load(conv_state + key_channel, conv_dim, is_zero);
  value.load(conv_state + value_channel, conv_dim, is_zero || is_upper);
  tile.load(state, 0, is_zero);
  if (c.is_settled) ptx::wait_for_producers();
  ptx::allow_consumers();
  if (!place.is_here) return;

  const int num_tokens = place.num_tokens;
  const int64_t stride = c.row();
  const X* first_from = x + place.first * stride + key_channel;
  const X* second_from = x + place.first * stride + second;
  X inputs[2][kLoads];
  const auto load = [&](int start) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (start + i >= num_tokens) break;
      inputs[0][i] = first_from[(start + i) * stride];
      inputs[1][i] = second_from[(start + i) * stride];
    }
  };
  load(0);
  float b = 0.0f, a = 0.0f;
  const bool has_gates = thread / 32 == kWarps - 1 && lane < num_tokens;
  if (has_gates) {
    const X* gates = x + (place.first + lane) * stride + conv_dim + c.value_dim() + head;
    b = to_float(gates[0]);
    a = to_float(gates[c.num_value_heads]);
  }
  float* first_to = (is_upper ? shared.k[0] : shared.q[0]) + column;
  float* second_to = (is_upper ? shared.gate[0] : shared.v[0]) + column;
#pragma unroll 1
  for (int start = 0; start < num_tokens; start += kLoads) {
    if (start > 0) load(start);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (start + i >= num_tokens) break;
      const float other = to_float(inputs[1][i]);
      first_to[(start + i) * kUsualDim] = silu(key.take(to_float(inputs[0][i])));
      second_to[(start + i) * kUsualDim] = factor * silu(is_upper ? other : value.take(other));
    }
  }
  if (!is_upper) value.store(conv_state + value_channel, conv_dim);
  __syncthreads();
  // What the block has used it has read: it counts without a fence, and needs the answer only at its end.
  uint32_t readers_before = 0;
  if (thread == 0)
    readers_before = atomicInc(&counters[place.slot * c.num_key_heads + key_head], heads_per_key - 1);
  if (has_gates) prepare_gates(log_decay, dt_bias, lane, a, b, shared);
  for (int t = warp; t < num_tokens; t += kWarps) prepare_norms(kUsualDim, t, shared);
#pragma unroll 1
  for (int token = 0; token < num_tokens; ++token) {
    tile.read(token, 0, shared);
    if (token + 1 == num_tokens) {  // others go on while a warp has its tokens' norms to do
      __syncthreads();
      for (int t = warp; t < num_tokens; t += kWarps)
        write_norm(c, out, place.first + t, ptx::opaque(head), shared.o[t], shared.gate[t]);
    }
    tile.write(token, 0, shared);
  }
  tile.store(state, 0);
  if (thread == 0) shared.replaces_keys = readers_before == static_cast<uint32_t>(heads_per_key - 1);
  __syncthreads();
  if (shared.replaces_keys) key.store(conv_state + key_channel, conv_dim);
}

}  // namespace

bool is_usual_delta(const DeltaCall& c) {
  // Longer sequences than kMostTokens are nobody's here only if chunks take them.
  return c.key_head_dim == kUsualDim && c.value_head_dim == kUsualDim && c.num_taps == kUsualTaps &&
         delta_fits_chunks(c);
}

template <class X>
void usual_delta_step_cuda(const X* x, const DeltaCall& call, uint32_t* counters, const DeltaOutput& out,
                           void* stream) {
  launch_kernel(usual_delta_step_kernel<X>,
                {dim3(static_cast<unsigned>(call.num_key_heads),
                      static_cast<unsigned>(call.num_value_heads / call.num_key_heads),
                      static_cast<unsigned>(call.num_sequences)),
                 dim3(kThreads), stream, 0, true},
                x, call, counters, out);
}

template void usual_delta_step_cuda(const float*, const DeltaCall&, uint32_t*, const DeltaOutput&, void*);
template void usual_delta_step_cuda(const __nv_bfloat16*, const DeltaCall&, uint32_t*, const DeltaOutput&,
                                    void*);

}  // namespace helexa
