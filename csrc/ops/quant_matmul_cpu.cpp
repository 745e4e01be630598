// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/quant_matmul.h"

#include <algorithm>

#include "core/parallel.h"
#include "ops/quantized_input.h"
#include "quant/packed.h"

namespace helexa {
namespace {

// Weight bytes that a thread claims at once while decoding: a stream long enough that its start costs little, and a quarter of each
// thread's share, so that a thread which the system takes off its core leaves little behind.
constexpr int64_t kMostChunkBytes = 256 * 1024;
constexpr int64_t kChunksPerThread = 4;

// Tiles of one claim.
int64_t tiles_per_claim(int64_t num_tokens, int64_t step, int64_t num_tiles, int64_t most_tile_bytes) {
  if (num_tokens > 8) return step;
  const int64_t share = num_tiles / (kChunksPerThread * num_threads());
  return std::max(step, std::min(share, kMostChunkBytes / most_tile_bytes) / step * step);
}

thread_local QuantizedInput quantized_input;

struct TileRun {
  const WeightView* weight;
  int64_t tile_bytes;
  int64_t first_tile;  // over all weights
  int64_t column;      // of out
};

}  // namespace

void quant_matmul_cpu(const float* x, int64_t num_tokens, std::vector<WeightView> weights, float* out) {
  if (num_tokens == 0) return;
  const int64_t cols = weights[0].cols;
  std::vector<TileRun> runs;
  int64_t num_tiles = 0, out_stride = 0, most_tile_bytes = 1;
  bool any_quantized = false;
  for (const WeightView& w : weights) {
    const int64_t bytes = packed_tile_bytes(static_cast<Format>(w.format), cols);
    runs.push_back({&w, bytes, num_tiles, out_stride});
    num_tiles += (w.rows + kTileRows - 1) / kTileRows;
    out_stride += w.rows;
    most_tile_bytes = std::max(most_tile_bytes, bytes);
    any_quantized |= is_quantized(w.format);
  }

  TileCall common{};
  common.x = x;
  common.num_tokens = num_tokens;
  common.cols = cols;
  common.out_stride = out_stride;
  if (any_quantized) {
    quantized_input.begin(cols);
    quantized_input.add_run(num_tokens);
    quantized_input.fill(true, [&](int64_t first, int64_t) { return x + first * cols; });
    common.quantized = quantized_input.records(0);
  }

  // Neighbouring tiles go together, since they share the loads of the input; but a few rows are bound by memory, which is read
  // fastest as one stream.
  const auto kernel = pick_quant_matmul_tiles();
  const int64_t step = num_tokens > 4 ? pick_max_tiles()() : 1;
  const int64_t grain = tiles_per_claim(num_tokens, step, num_tiles, most_tile_bytes);
  parallel_for(num_tiles, grain, [&](int64_t begin, int64_t end) {
    size_t run = 0;
    for (int64_t tile = begin, next; tile < end; tile = next) {
      while (run + 1 < runs.size() && tile >= runs[run + 1].first_tile) ++run;
      const WeightView& w = *runs[run].weight;
      const int64_t local = tile - runs[run].first_tile;
      const int64_t row = local * kTileRows;
      next = std::min({tile + step, end, runs[run].first_tile + (w.rows + kTileRows - 1) / kTileRows});
      TileCall call = common;
      call.format = w.format;
      call.tile = w.packed + local * runs[run].tile_bytes;
      call.bias = w.bias == nullptr ? nullptr : w.bias + row;
      call.num_rows = static_cast<int>(std::min((next - tile) * kTileRows, w.rows - row));
      call.out = out + runs[run].column + row;
      kernel(call);
    }
  });
}

}  // namespace helexa
