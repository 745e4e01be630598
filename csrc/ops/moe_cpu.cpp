// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "ops/quantized_input.h"
#include "ops/silu_mul.h"
#include "quant/packed.h"

namespace helexa {
namespace {

constexpr int64_t kRouteValues = 16384;  // logits of one claim
constexpr int64_t kSerialValues =
    32768;  // below this many values one thread is faster than two can be set to work
constexpr int64_t kClaimBytes = 256 * 1024;
constexpr int64_t kChunksPerThread = 4;

// The pairs of token and expert, sorted by expert; position p is pair order[p], and expert `active[i]` has the positions
// first[i] .. first[i + 1].
struct Assignment {
  std::vector<int32_t> order, position, active;
  std::vector<int64_t> first;

  void sort(const int32_t* ids, int64_t num_pairs, int64_t num_experts) {
    std::vector<int64_t>& next = counts_;
    next.assign(num_experts + 1, 0);
    for (int64_t p = 0; p < num_pairs; ++p) ++next[ids[p] + 1];
    active.clear();
    first.clear();
    for (int64_t e = 0; e < num_experts; ++e) {
      if (next[e + 1] > 0) {
        active.push_back(static_cast<int32_t>(e));
        first.push_back(next[e]);
      }
      next[e + 1] += next[e];
    }
    first.push_back(num_pairs);
    order.resize(num_pairs);
    position.resize(num_pairs);
    for (int64_t p = 0; p < num_pairs; ++p) {
      const int64_t place = next[ids[p]]++;
      order[place] = static_cast<int32_t>(p);
      position[p] = static_cast<int32_t>(place);
    }
  }

 private:
  std::vector<int64_t> counts_;
};

// The rows of a matmul's input in the order of the experts, as floats and, for quantized weights, in groups of records.
class ExpertInput {
 public:
  // row(position, destination) writes the row at a position.
  template <class Row>
  void fill(const Assignment& pairs, int64_t cols, bool quantize, Row&& row) {
    cols_ = cols;
    values_.resize(pairs.first.back() * cols);
    quantized_.begin(cols);
    for (size_t i = 0; i < pairs.active.size(); ++i) quantized_.add_run(pairs.first[i + 1] - pairs.first[i]);
    quantized_.fill(quantize, [&](int64_t first, int64_t count) {
      float* rows = values_.data() + first * cols;
      for (int64_t i = 0; i < count; ++i) row(first + i, rows + i * cols);
      return rows;
    });
  }

  const float* values(int64_t position) const { return values_.data() + position * cols_; }
  const uint8_t* records(size_t expert) const { return quantized_.records(expert); }

 private:
  int64_t cols_ = 0;
  std::vector<float> values_;
  QuantizedInput quantized_;
};

struct Buffers {
  Assignment pairs;
  ExpertInput input, hidden;
  std::vector<float> gate_up, results;
};

thread_local Buffers buffers;

// out[p, :] = the matrices of the expert of position p, side by side, times its input row.
void multiply(const Assignment& pairs, const ExpertInput& input, const std::vector<WeightView>& stacks,
              int64_t num_experts, float* out) {
  const auto kernel = pick_quant_matmul_tiles();
  const int64_t cols = stacks[0].cols;
  int64_t tiles_per_expert = 0, out_stride = 0, most_tile_bytes = 1;
  for (const WeightView& w : stacks) {
    tiles_per_expert += w.rows / num_experts / kTileRows;
    out_stride += w.rows / num_experts;
    most_tile_bytes = std::max(most_tile_bytes, packed_tile_bytes(static_cast<Format>(w.format), cols));
  }
  const int64_t num_tiles = tiles_per_expert * static_cast<int64_t>(pairs.active.size());
  const bool is_decode = pairs.first.back() <= 2 * static_cast<int64_t>(pairs.active.size());
  const int64_t step = is_decode ? 1 : pick_max_tiles()();
  const int64_t share = num_tiles / (kChunksPerThread * num_threads());
  const int64_t grain =
      is_decode ? std::max<int64_t>(1, std::min(share, kClaimBytes / most_tile_bytes)) : 2 * step;
  parallel_for(num_tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin, next; tile < end; tile = next) {
      const size_t expert = tile / tiles_per_expert;
      int64_t local = tile % tiles_per_expert, column = 0;
      const WeightView* w = stacks.data();
      for (; local >= w->rows / num_experts / kTileRows; ++w) {
        local -= w->rows / num_experts / kTileRows;
        column += w->rows / num_experts;
      }
      const int64_t rows = w->rows / num_experts, tiles = rows / kTileRows;
      const int64_t count = std::min({step, end - tile, tiles - local});
      next = tile + count;
      TileCall call{};
      call.num_tokens = pairs.first[expert + 1] - pairs.first[expert];
      call.x = input.values(pairs.first[expert]);
      call.quantized = is_quantized(w->format) ? input.records(expert) : nullptr;
      call.cols = cols;
      call.format = w->format;
      call.tile = w->packed + (pairs.active[expert] * tiles + local) *
                                  packed_tile_bytes(static_cast<Format>(w->format), cols);
      call.num_rows = static_cast<int>(count * kTileRows);
      call.out = out + pairs.first[expert] * out_stride + column + local * kTileRows;
      call.out_stride = out_stride;
      kernel(call);
    }
  });
}

bool any_quantized(const std::vector<WeightView>& stacks) {
  return std::any_of(stacks.begin(), stacks.end(),
                     [](const WeightView& w) { return is_quantized(w.format); });
}

}  // namespace

void moe_route_cpu(const float* logits, int32_t* ids, float* weights, int64_t num_tokens, int64_t num_experts,
                   int64_t top_k, bool normalize) {
  const auto rows = pick_moe_route_rows();
  parallel_for(num_tokens, kRouteValues / num_experts + 1, [&](int64_t begin, int64_t end) {
    rows(logits + begin * num_experts, ids + begin * top_k, weights + begin * top_k, end - begin, num_experts,
         top_k, normalize);
  });
}

void moe_mlp_cpu(const float* x, const int32_t* ids, const float* weights, std::vector<WeightView> gate_up,
                 std::vector<WeightView> down, const float* shared, const float* shared_gate, float* out,
                 int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  if (num_tokens == 0) return;
  const int64_t num_pairs = num_tokens * top_k, cols = gate_up[0].cols, width = down[0].cols;
  Buffers& b = buffers;
  b.pairs.sort(ids, num_pairs, num_experts);
  b.input.fill(b.pairs, cols, any_quantized(gate_up), [&](int64_t position, float* row) {
    std::memcpy(row, x + b.pairs.order[position] / top_k * cols, cols * sizeof(float));
  });
  b.gate_up.resize(num_pairs * 2 * width);
  multiply(b.pairs, b.input, gate_up, num_experts, b.gate_up.data());
  const auto silu_mul_rows = pick_silu_mul_rows();
  b.hidden.fill(b.pairs, width, any_quantized(down), [&](int64_t position, float* row) {
    silu_mul_rows(b.gate_up.data() + position * 2 * width, row, 1, width);
  });
  b.results.resize(num_pairs * cols);
  multiply(b.pairs, b.hidden, down, num_experts, b.results.data());

  const auto add_scaled = pick_moe_add_scaled();
  parallel_for(num_tokens, kSerialValues / (top_k * cols) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = out + t * cols;
      for (int64_t j = 0; j < top_k; ++j)
        add_scaled(b.results.data() + b.pairs.position[t * top_k + j] * cols, weights[t * top_k + j], row,
                   cols, j > 0);
      if (shared != nullptr)
        add_scaled(shared + t * cols,
                   shared_gate == nullptr ? 1.0f : 1.0f / (1.0f + std::exp(-shared_gate[t])), row, cols,
                   true);
    }
  });
}

}  // namespace helexa
