// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/gated_delta_net.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"

namespace helexa {
namespace {

constexpr int64_t kConvChannels = 256;  // of one claim

// Memory that grows to the largest need seen on this thread and is then reused, aligned to 64 bytes.
class Scratch {
 public:
  float* get(int64_t num_floats) {
    if (static_cast<int64_t>(memory_.size()) < num_floats + 16) memory_.resize(num_floats + 16);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + 63) & ~static_cast<uintptr_t>(63));
  }

 private:
  std::vector<float> memory_;
};

thread_local Scratch conv_rows;
thread_local Scratch head_scratch;

}  // namespace

void gated_delta_net_cpu(const float* x, const float* conv_weight, const float* decay, const float* dt_bias,
                         const float* norm_weight, float* conv_states, float* states,
                         const int32_t* state_slots, const int32_t* query_start, const int32_t* kv_lengths,
                         float* out, int64_t num_tokens, int64_t num_sequences, int64_t num_key_heads,
                         int64_t num_value_heads, int64_t key_head_dim, int64_t value_head_dim,
                         int64_t num_taps, float eps, bool tiled) {
  const DeltaShape shape{conv_weight,  decay,          dt_bias,  norm_weight, num_key_heads, num_value_heads,
                         key_head_dim, value_head_dim, num_taps, eps,         tiled};
  const int64_t conv_dim = shape.conv_dim();
  float* conv = conv_rows.get(num_tokens * conv_dim);
  int64_t most_tokens = 0;
  auto sequence_of = [&](int64_t s) {
    const int64_t first = query_start[s], count = query_start[s + 1] - first, slot = state_slots[s];
    return DeltaSequence{x + first * shape.row(),
                         conv + first * conv_dim,
                         out + first * shape.value_dim(),
                         count,
                         conv_states + slot * (num_taps - 1) * conv_dim,
                         states + slot * num_value_heads * key_head_dim * value_head_dim,
                         kv_lengths[s] == count};
  };
  for (int64_t s = 0; s < num_sequences; ++s)
    most_tokens = std::max<int64_t>(most_tokens, query_start[s + 1] - query_start[s]);

  // Each channel is convolved by one thread alone, which also replaces its part of the state; heads read the results after that.
  const auto convolve = pick_delta_convolve();
  const int64_t blocks = (conv_dim + kConvChannels - 1) / kConvChannels;
  parallel_for(num_sequences * blocks, most_tokens < 4 ? 8 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / blocks, channel = i % blocks * kConvChannels;
      convolve(shape, sequence_of(s), conv + query_start[s] * conv_dim, channel,
               std::min(channel + kConvChannels, conv_dim));
    }
  });
  const auto head = pick_delta_head();
  const int64_t needed = pick_delta_scratch()(shape, most_tokens);
  parallel_for(num_sequences * num_value_heads, 1, [&](int64_t begin, int64_t end) {
    float* scratch = head_scratch.get(needed);
    for (int64_t i = begin; i < end; ++i)
      head(shape, sequence_of(i / num_value_heads), i % num_value_heads, scratch);
  });
}

}  // namespace helexa
