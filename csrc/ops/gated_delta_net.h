// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// One Gated DeltaNet layer between its input and output projections (Yang et al. 2024, arXiv 2412.06464, as Qwen3-Next uses it):
// causal depthwise convolution and silu over q, k and v, l2 norms of q and k, gates, delta rule, gated rms norm.
//
// x [num_tokens, 2 * key_dim + 2 * value_dim + 2 * H_v] holds q, k, v, z, b and a side by side, where key_dim = H_k * d_k and
// value_dim = H_v * d_v.  conv_weight [num_taps, 2 * key_dim + value_dim], the newest tap last.  decay [H_v] is -exp(A_log).
// conv_states [slots, num_taps - 1, 2 * key_dim + value_dim], the newest input last; states [slots, H_v, d_k, d_v]; both float32
// and updated in place.  Sequence s has rows query_start[s] .. query_start[s + 1] of x and the states of slot state_slots[s]; if
// these are all of its kv_lengths[s] positions, it starts from zero whatever the slot holds.  Value head h reads key head
// h % H_k if tiled, else h / (H_v / H_k).  out [num_tokens, value_dim].
// d_k and d_v are multiples of 16 of at most kMaxStateDim; num_taps is at least 2.
void gated_delta_net_cpu(const float* x, const float* conv_weight, const float* decay, const float* dt_bias,
                         const float* norm_weight, float* conv_states, float* states,
                         const int32_t* state_slots, const int32_t* query_start, const int32_t* kv_lengths,
                         float* out, int64_t num_tokens, int64_t num_sequences, int64_t num_key_heads,
                         int64_t num_value_heads, int64_t key_head_dim, int64_t value_head_dim,
                         int64_t num_taps, float eps, bool tiled);

// The same on a CUDA device: x is of `dtype` float32 or bfloat16 and `out` in one of the forms below.  `counters` [slots, H_k] are
// zero and are zero again afterwards; `workspace` has as many bytes as gated_delta_net_workspace says.
//
// `settled` allows to read everything but x before the launch before this one has ended, so that reading hides behind it.  It promises
// that a launch which waits for its own producers before it allows consumers (core/ptx.cuh), such as a norm or the mixer of the layer
// before, lies between this one and whatever wrote states, conv_states, state_slots, query_start and kv_lengths.  Why this is enough:
// this kernel starts after every block of the launch before has allowed consumers, so all of these have started, so every block of the
// launch before that one has allowed consumers, and so on back to the launch that waited first.  Its waits are over then, which means
// that everything before it has ended and is visible.
enum class DeltaForm : int {
  kF32,   // [num_tokens, value_dim]
  kBF16,  // [num_tokens, value_dim]
  kQ8,    // rows of codes (ops/activation.cuh); d_v has to be a multiple of 32
};
void gated_delta_net_cuda(const void* x, const float* conv_weight, const float* decay, const float* dt_bias,
                          const float* norm_weight, float* conv_states, float* states,
                          const int32_t* state_slots, const int32_t* query_start, const int32_t* kv_lengths,
                          uint32_t* counters, void* workspace, void* out, int64_t num_tokens,
                          int64_t num_sequences, bool settled, int64_t num_key_heads, int64_t num_value_heads,
                          int64_t key_head_dim, int64_t value_head_dim, int64_t num_taps, int dtype, int form,
                          float eps, bool tiled, void* stream);
int64_t gated_delta_net_workspace(int64_t num_tokens, int64_t num_sequences, int64_t num_key_heads,
                                  int64_t num_value_heads, int64_t key_head_dim, int64_t value_head_dim,
                                  int64_t num_taps, int dtype);

constexpr int64_t kMaxStateDim = 256;
// Tokens of one chunk; sequences with fewer than kRecurrentTokens go token by token.
constexpr int64_t kDeltaChunk = 64;
constexpr int64_t kRecurrentTokens = 8;

// The rows of one sequence, as both passes see them.
struct DeltaSequence {
  const float* x;     // first row
  const float* conv;  // first row of the convolution's output
  float* out;         // first row
  int64_t num_tokens;
  float* conv_state;
  float* state;  // of head 0
  bool is_fresh;
};

struct DeltaShape {
  const float *conv_weight, *decay, *dt_bias, *norm_weight;
  int64_t num_key_heads, num_value_heads, key_head_dim, value_head_dim, num_taps;
  float eps;
  bool tiled;

  int64_t key_dim() const { return num_key_heads * key_head_dim; }
  int64_t value_dim() const { return num_value_heads * value_head_dim; }
  int64_t conv_dim() const { return 2 * key_dim() + value_dim(); }
  int64_t row() const { return conv_dim() + value_dim() + 2 * num_value_heads; }
};

// silu(convolution) of channels begin .. end, and their new conv state; begin and end are multiples of 16.
HELEXA_ISA_KERNEL(void, delta_convolve, const DeltaShape& shape, const DeltaSequence& sequence, float* conv,
                  int64_t begin, int64_t end)
// The delta rule and the gated norm of one value head.
HELEXA_ISA_KERNEL(void, delta_head, const DeltaShape& shape, const DeltaSequence& sequence, int64_t head,
                  float* scratch)
// Floats that delta_head needs for sequences of up to num_tokens; aligned to 64 bytes by the caller.
HELEXA_ISA_KERNEL(int64_t, delta_scratch, const DeltaShape& shape, int64_t num_tokens)

}  // namespace helexa
