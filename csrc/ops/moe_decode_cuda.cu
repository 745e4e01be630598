// SPDX-License-Identifier: GPL-3.0-or-later
// Experts for few rows, in three launches: routes; gate and up of the chosen experts and of the shared one; down and the weighted sum.
// Weights are read once per batch of eight tokens whatever the tokens choose.  Each warp streams its part of tiles of 16 rows
// through a ring of its own in shared memory, so that memory stays busy while it multiplies.  matvec.cuh has the products and says why
// no result depends on the number of tokens.
//
// The last launch begins while the one before it still runs, and fills its rings meanwhile: gate_up does not let it start before the
// routes are complete.  Gate_up also asks for those weights to come to the second-level cache, if they leave room in it.
#include <algorithm>
#include <initializer_list>

#include "ops/moe.h"
#include "ops/moe_choose.cuh"
#include "ops/moe_cuda.cuh"
#include "ops/moe_route_cuda.cuh"
#include "ops/moe_stream.cuh"

namespace helexa::moe {
namespace {

constexpr int kGateUpTiles = 4;  // of a block: gate and up of 32 columns of the hidden rows
constexpr int kGateUpSplits = 2;
constexpr int kGateUpWarps = kGateUpTiles * kGateUpSplits;
constexpr int kDownWarps = 12;
template <bool kIsOne>
constexpr int kTokens = kIsOne ? 1 : kBatch;  // of a batch
template <bool kIsOne>
constexpr int kGateUpBlocks =
    kIsOne ? 3 : 2;  // on a multiprocessor: they have as many registers as there are
// Of shared memory beside the rings: parts of sums, barriers, and a bit.
constexpr int kGateUpStaticBytes =
    4 * kGateUpTiles * kGateUpSplits * kBatch * kTileRows + 8 * kGateUpWarps * kMaxStages + 64;

// What both kernels have of the call.
struct Call {
  Plan plan;            // of several tokens
  const float* logits;  // [num_tokens, num_experts + 1]
  int num_tokens, num_experts, top_k;
  bool normalize, has_shared, has_shared_gate;  // a shared expert is the first item of a batch
};

// An expert with some tokens of a batch.
struct Item {
  bool is_shared;  // then it has all tokens
  int expert, first, count;
};

// Of the experts, then of the shared one.
struct GateUp {
  Rings rings;
  Rows x;
  Matrix matrices[2][2];  // gate and up
  Rows hidden[2];  // [batches * max_pairs, width] in the order of the plans; [num_tokens, shared width]
  Matrix down[2];
  bool prefetches_down;
};

__device__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Asks for this block's share of the matrix that the item's hidden rows will be multiplied with.
__device__ void prefetch_share(const Matrix& matrix, int64_t expert, int block, int num_blocks) {
  const int64_t lines = (static_cast<int64_t>(matrix.rows) / kTileRows * matrix.tile_bytes + 127) / 128;
  const uint8_t* data = matrix.data + expert * matrix.expert_bytes;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * num_blocks + block; i < lines;
       i += static_cast<int64_t>(blockDim.x) * num_blocks) {
    ptx::prefetch(data + 128 * i);
  }
}

// hidden = silu(gate) * up, quantized.  One block to 32 columns of one item.
template <bool kIsOne>  // token
__global__ void __launch_bounds__(32 * kGateUpWarps, kGateUpBlocks<kIsOne>)
    gate_up_kernel(const __grid_constant__ Call call, const __grid_constant__ GateUp layer) {
  __shared__ float parts[kGateUpTiles][kGateUpSplits][kTokens<kIsOne>][kTileRows];
  __shared__ uint64_t barriers[kGateUpWarps * kMaxStages];
  __shared__ int chosen;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = warp / kGateUpSplits, split = warp % kGateUpSplits;
  const int first_token = blockIdx.z * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  const bool is_shared = call.has_shared && blockIdx.y == 0;
  const int index = blockIdx.y - (call.has_shared ? 1 : 0);
  const Matrix& matrix = layer.matrices[is_shared][tile % 2];
  const int width = matrix.rows, num_blocks = (width + 31) / 32;
  if (static_cast<int>(blockIdx.x) >= num_blocks) return;
  const uint8_t* weights =
      matrix.tile(0, min(static_cast<int>(blockIdx.x) * 2 + tile / 2, width / kTileRows - 1));
  Stream stream(layer.rings, dynamic_shared<uint8_t>() + warp * layer.rings.bytes(),
                barriers + warp * kMaxStages);
  TileWalk walk(matrix, weights, split, kGateUpSplits);
  if (is_shared) stream.begin(walk);  // its weights are known before the routes are
  ptx::wait_for_producers();
  ptx::allow_consumers();

  const Plan plan = call.plan.of_batch(blockIdx.z);
  Item item = {true, 0, 0, batch_tokens};
  if (!kIsOne && !is_shared) {
    const Group group = plan.groups[index];
    if (index >= *plan.num_groups) return;
    item = {false, group.expert, group.first, group.count};
  }
  const Tokens tokens{layer.x, kIsOne || is_shared ? nullptr : plan.order + item.first, first_token,
                      call.top_k, item.count};
  Multiplier<kIsOne> multiplier(matrix, tokens, split, kGateUpSplits);
  if (kIsOne && !is_shared) {
    if (warp == 0) {
      const Choice choice = choose(call.logits, call.num_experts, call.top_k, call.normalize);
      if (lane == index) chosen = choice.expert;
    }
    __syncthreads();
    item = {false, chosen, index, 1};
  }
  if (!is_shared) {
    const int64_t offset = item.expert * matrix.expert_bytes;
    weights += offset, walk.from += offset;
    stream.begin(walk);
  }
  if (layer.prefetches_down) prefetch_share(layer.down[is_shared], item.expert, blockIdx.x, num_blocks);
  multiplier.run(matrix.format, weights, stream, walk,
                 [&](int token, int row, float sum) { parts[tile][split][token][row] = sum; });
  __syncthreads();

  // A warp to a token, a lane to a column.
  if (warp >= item.count) return;
  float both[2] = {};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int s = 0; s < kGateUpSplits; ++s) both[m] += parts[lane / 16 * 2 + m][s][warp][lane % 16];
  }
  const int column = blockIdx.x * 32 + lane;
  const float value = column < width ? silu(both[0]) * both[1] : 0.0f;
  const Rows& out = layer.hidden[is_shared];
  const int64_t row =
      warp + (is_shared ? first_token : static_cast<int64_t>(blockIdx.z) * plan.max_pairs + item.first);
  quantize_lanes(value, out.q8 + row * out.row_bytes, width, blockIdx.x);
  if (out.x != nullptr && column < width) out.x[row * width + column] = value;
}

// Of the experts, then of the shared one.
struct Down {
  Rings rings;
  Rows hidden[2];
  Matrix matrices[2];
  const float* weights;  // [num_tokens, slots], of several tokens
  float* out;            // [num_tokens, cols]
  int split_shift;       // as many splits of an item are powers of two
};

// The routes of a batch in shared memory.
template <bool kIsOne>
struct LocalRoutes {
  static constexpr int kPairs = kTokens<kIsOne> * kMaxTopK;
  int experts[kPairs], firsts[kPairs], counts[kPairs];  // of the groups
  int slots[kPairs];                                    // of the positions: [token, slot]
  float shares[kPairs + kTokens<kIsOne>];               // [token, slot]
  int num_groups;

  // Once the routes are complete; the launch that waits for them may still be running.  All threads take part.
  __device__ void load(const Call& call, const Plan& plan, const float* weights, int first_token,
                       int batch_tokens) {
    const int num_slots = call.top_k + (call.has_shared ? 1 : 0), thread = threadIdx.x;
    if constexpr (kIsOne) {
      if (thread < 32) {
        const Choice choice = choose(call.logits, call.num_experts, call.top_k, call.normalize);
        if (thread < call.top_k) {
          experts[thread] = choice.expert, firsts[thread] = thread, counts[thread] = 1;
          slots[thread] = thread;
          shares[thread] = choice.weight;
        }
        if (thread == 0) num_groups = call.top_k;
        if (thread == 0 && call.has_shared) {
          shares[call.top_k] = shared_weight(call.has_shared_gate ? call.logits + call.num_experts : nullptr);
        }
      }
    } else {
      const int threads = blockDim.x;
      for (int i = thread; i < plan.max_groups; i += threads) {  // what is not there is not looked at
        const Group* group = plan.groups + i;
        experts[i] = fresh(&group->expert), firsts[i] = fresh(&group->first),
        counts[i] = fresh(&group->count);
      }
      for (int i = thread; i < batch_tokens * call.top_k; i += threads) {
        const int pair = fresh(plan.order + i);
        slots[i] = pair / call.top_k * num_slots + pair % call.top_k;
      }
      for (int i = thread; i < batch_tokens * num_slots; i += threads) {
        shares[i] = fresh(weights + static_cast<int64_t>(first_token) * num_slots + i);
      }
      if (thread == 0) num_groups = fresh(plan.num_groups);
    }
    __syncthreads();
  }
};

// The parts of a tile of every item that a warp takes: every num_warps-th, of each its chunks.
template <bool kIsOne>
struct ItemWalk {
  const Call& call;
  const Down& layer;
  const LocalRoutes<kIsOne>& routes;
  int batch_tokens, num_parts, num_warps;
  int part;
  TileWalk tile;

  __device__ __forceinline__ ItemWalk(const Call& call, const Down& layer, const LocalRoutes<kIsOne>& routes,
                                      int batch_tokens, int num_parts, int warp, int num_warps)
      : call(call),
        layer(layer),
        routes(routes),
        batch_tokens(batch_tokens),
        num_parts(num_parts),
        num_warps(num_warps),
        part(warp),
        tile(tile_of(warp)) {}

  __device__ __forceinline__ Item item(int part) const {
    int index = part >> layer.split_shift;
    if (call.has_shared && index-- == 0) return {true, 0, 0, batch_tokens};
    return {false, routes.experts[index], routes.firsts[index], routes.counts[index]};
  }
  __device__ __forceinline__ const Matrix& matrix(const Item& item) const {
    return layer.matrices[item.is_shared];
  }
  __device__ __forceinline__ TileWalk tile_of(int part) const {
    if (part >= num_parts) return {};
    const Item of = item(part);
    const int num_splits = 1 << layer.split_shift;
    return {matrix(of), matrix(of).tile(of.expert, blockIdx.x), part & (num_splits - 1), num_splits};
  }

  // What is fetched runs ahead of what is multiplied, from one item to the next.
  __device__ __forceinline__ Piece next() {
    while (tile.left == 0) {
      part += num_warps;
      if (part >= num_parts) return {nullptr, 0};
      tile = tile_of(part);
    }
    return tile.next();
  }
};

// out = the sum of the experts' results by their weights.  One block to 16 columns of a batch.
template <bool kIsOne>
__global__ void __launch_bounds__(32 * kDownWarps, kIsOne ? 2 : 1)
    down_kernel(const __grid_constant__ Call call, const __grid_constant__ Down layer) {
  __shared__ LocalRoutes<kIsOne> routes;
  __shared__ uint64_t barriers[kDownWarps * kMaxStages];
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32, num_splits = 1 << layer.split_shift;
  const int num_slots = call.top_k + (call.has_shared ? 1 : 0);
  const int first_token = blockIdx.y * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  uint8_t* rings = dynamic_shared<uint8_t>();
  float* parts = reinterpret_cast<float*>(rings + num_warps * layer.rings.bytes());  // [splits, tokens, slots, 16]
  const Plan plan = call.plan.of_batch(blockIdx.y);
  Stream stream(layer.rings, rings + warp * layer.rings.bytes(), barriers + warp * kMaxStages);
  routes.load(call, plan, layer.weights, first_token, batch_tokens);

  const int num_parts = (routes.num_groups + (call.has_shared ? 1 : 0)) << layer.split_shift;
  ItemWalk<kIsOne> walk(call, layer, routes, batch_tokens, num_parts, warp, num_warps);
  stream.begin(walk);
  ptx::wait_for_producers();
  ptx::allow_consumers();

  for (int part = warp; part < num_parts; part += num_warps) {
    const int split = part & (num_splits - 1);
    const Item item = walk.item(part);
    const Matrix& matrix = walk.matrix(item);
    const int64_t first_row =
        item.is_shared ? first_token : static_cast<int64_t>(blockIdx.y) * plan.max_pairs + item.first;
    const Tokens tokens{layer.hidden[item.is_shared], nullptr, first_row, 1, item.count};
    Multiplier<kIsOne> multiplier(matrix, tokens, split, num_splits);
    multiplier.run(matrix.format, matrix.tile(item.expert, blockIdx.x), stream, walk,
                   [&](int token, int row, float sum) {
                     const int slot =
                         item.is_shared ? token * num_slots + call.top_k : routes.slots[item.first + token];
                     parts[(split * kTokens<kIsOne> * num_slots + slot) * kTileRows + row] = sum;
                   });
  }
  __syncthreads();

  const int token = threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
  if (token >= batch_tokens) return;
  float sum = 0.0f;
  for (int i = token * num_slots; i < (token + 1) * num_slots; ++i) {
    float result = 0.0f;
    for (int split = 0; split < num_splits; ++split) {
      result += parts[(split * kTokens<kIsOne> * num_slots + i) * kTileRows + row];
    }
    sum = fmaf(routes.shares[i], result, sum);
  }
  layer.out[(static_cast<int64_t>(first_token) + token) * layer.matrices[0].rows + blockIdx.x * kTileRows +
            row] = sum;
}

// The matrix of `rows` rows that starts at row first_row of each expert's rows in a stack.
Matrix part_of(const WeightView& stack, int64_t num_experts, int64_t first_row, int64_t rows) {
  return with_format(static_cast<Format>(stack.format), [&](auto f) -> Matrix {
    using F = decltype(f);
    const int64_t tile = device_tile_bytes<F>(stack.cols);
    int chunk = 0;
    if constexpr (F::kScales != Scales::kPlain) chunk = chunk_bytes<F>();
    return {stack.packed + first_row / kTileRows * tile,
            stack.rows / num_experts / kTileRows * tile,
            static_cast<int>(tile),
            chunk,
            chunk == 0 ? 0 : static_cast<int>((tile + chunk - 1) / chunk),
            stack.format,
            static_cast<int>(rows),
            static_cast<int>(stack.cols)};
  });
}

// {gate, up} of one or two stacks.
void set_gate_and_up(Matrix (&matrices)[2], const std::vector<WeightView>& stacks, int64_t num_experts,
                     int64_t width) {
  const bool fused = stacks.size() == 1;
  matrices[0] = part_of(stacks[0], num_experts, 0, width);
  matrices[1] = part_of(stacks[fused ? 0 : 1], num_experts, fused ? width : 0, width);
}

// Everything between the launches.
struct Buffers {
  float* logits;
  Routes routes;
  Rows hidden, shared_hidden;
  int64_t bytes;

  Buffers(uint8_t* base, int64_t num_tokens, int64_t num_experts, int64_t top_k, int64_t width,
          bool float_hidden, int64_t shared_width, bool float_shared) {
    Workspace space(base);
    const int slots = static_cast<int>(top_k) + (shared_width > 0 ? 1 : 0);
    logits = space.take<float>(num_tokens * (num_experts + 1));
    int* ids = space.take<int>(num_tokens * top_k);
    float* weights = space.take<float>(num_tokens * slots);
    const int64_t batches = (num_tokens + kBatch - 1) / kBatch;
    routes = {ids, weights, slots, space.take_plan(batches, kBatch * top_k, num_experts, kBatch)};
    auto rows = [&](int64_t count, int64_t cols, bool as_float) -> Rows {
      const int64_t row_bytes = activation_row_bytes(cols);
      uint8_t* q8 = space.take<uint8_t>(count * row_bytes);
      return {q8, as_float ? space.take<float>(count * cols) : nullptr, row_bytes, static_cast<int>(cols)};
    };
    hidden = rows(batches * kBatch * top_k, width, float_hidden);
    shared_hidden = rows(num_tokens, shared_width, float_shared);
    bytes = space.bytes();
  }
};

// Splits of an expert's columns, as a power of two, that keep the warps of a block busy with one token.
int down_split_shift(int64_t slots, int64_t width) {
  int shift = 0;
  while ((2 * slots << shift) <= kDownWarps && (kChunkCols << shift) < width) ++shift;
  return shift;
}

Buffers cut(uint8_t* base, const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  const bool has_shared = !weights.shared_down.empty();
  return Buffers(base, num_tokens, weights.router.rows, top_k, weights.down.cols,
                 is_float(weights.down.format), has_shared ? weights.shared_down[0].cols : 0,
                 has_shared && is_float(weights.shared_down[0].format));
}

// As deep as `blocks` of some warps on a multiprocessor allow, and as a warp's part of `cols` columns asks for; one stage where even a
// single block has little.
Rings make_rings(std::initializer_list<const Matrix*> matrices, int num_warps, int num_splits, int blocks,
                 int64_t other_bytes) {
  Rings rings{1, 0};
  int chunks = 1;  // of a warp
  for (const Matrix* m : matrices) {
    rings.stage_bytes = std::max(rings.stage_bytes, m->chunk_bytes);
    chunks = std::max(chunks, (m->cols + kChunkCols * num_splits - 1) / (kChunkCols * num_splits));
  }
  const int64_t depth = static_cast<int64_t>(num_warps) * std::max(rings.stage_bytes, 1);
  const int64_t wanted = std::max<int64_t>((shared_memory() / blocks - other_bytes) / depth, 2);
  const int64_t possible = (shared_memory() - other_bytes) / depth;
  rings.num_stages = static_cast<int>(
      std::clamp<int64_t>(std::min<int64_t>(wanted, chunks), 1, std::min<int64_t>(possible, kMaxStages)));
  return rings;
}

struct Kernels {
  Call call;
  GateUp gate_up;
  Down down;
  int64_t widest;  // of the hidden rows

  template <bool kIsOne>
  void launch(void* stream) {
    const int slots = call.top_k + (call.has_shared ? 1 : 0);
    const unsigned batches = static_cast<unsigned>((call.num_tokens + kBatch - 1) / kBatch);
    const unsigned items =
        max_groups(std::min(call.num_tokens, kBatch) * call.top_k, call.num_experts, kBatch) +
        (call.has_shared ? 1 : 0);
    const auto& m = gate_up.matrices;
    gate_up.rings = make_rings({&m[0][0], &m[0][1], &m[1][0], &m[1][1]}, kGateUpWarps, kGateUpSplits,
                               kGateUpBlocks<kIsOne>, kGateUpStaticBytes);
    gate_up.prefetches_down = 4 * down_bytes() <= second_level_cache();
    launch_kernel(gate_up_kernel<kIsOne>,
                  {dim3(static_cast<unsigned>((widest + 31) / 32), items, batches), dim3(32 * kGateUpWarps),
                   stream, static_cast<size_t>(kGateUpWarps) * gate_up.rings.bytes(), true},
                  call, gate_up);
    down.split_shift = down_split_shift(slots, widest);
    const int num_splits = 1 << down.split_shift;
    const int num_warps = kIsOne ? std::min(kDownWarps, slots * num_splits) : kDownWarps;
    const int64_t parts =
        static_cast<int64_t>(sizeof(float)) * num_splits * kTokens<kIsOne> * slots * kTileRows;
    // A usual model has a block per multiprocessor, which finds room beside those of gate_up: of one token there are two of these.
    down.rings = make_rings({&down.matrices[0], &down.matrices[1]}, num_warps, num_splits, kIsOne ? 3 : 2,
                            parts + static_cast<int64_t>(sizeof(LocalRoutes<kIsOne>)) +
                                8 * kDownWarps * kMaxStages);
    launch_kernel(
        down_kernel<kIsOne>,
        {dim3(static_cast<unsigned>(down.matrices[0].rows / kTileRows), batches), dim3(32 * num_warps),
         stream, static_cast<size_t>(num_warps * down.rings.bytes() + parts), true},
        call, down);
  }

  // Of the experts that the tokens may choose, and of the shared one.
  int64_t down_bytes() const {
    const int64_t experts = std::min(call.num_tokens * call.top_k, call.num_experts);
    const Matrix& shared = down.matrices[1];
    return experts * down.matrices[0].expert_bytes + (call.has_shared ? shared.expert_bytes : 0);
  }
};

}  // namespace
}  // namespace helexa::moe

namespace helexa {

int64_t moe_few_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  return moe::cut(nullptr, weights, num_tokens, top_k).bytes;
}

void moe_few_cuda(const float* x, const uint8_t* q8, MoeWeights weights, bool normalize, float* out,
                  int32_t* counters, uint8_t* workspace, int64_t num_tokens, int64_t top_k, void* stream) {
  using namespace moe;
  if (num_tokens == 0) return;
  const Buffers buffers = cut(workspace, weights, num_tokens, top_k);
  const WeightView* shared_router = weights.shared_router.empty() ? nullptr : weights.shared_router.data();
  route_few(x, weights.router, shared_router, buffers.logits, counters, buffers.routes, num_tokens, top_k,
            normalize, stream);

  const int64_t num_experts = weights.router.rows, cols = weights.router.cols, width = weights.down.cols;
  const bool has_shared = !weights.shared_down.empty();
  const Rows input{const_cast<uint8_t*>(q8), const_cast<float*>(x), activation_row_bytes(cols),
                   static_cast<int>(cols)};
  Kernels kernels{
      {buffers.routes.plan, buffers.logits, static_cast<int>(num_tokens), static_cast<int>(num_experts),
       static_cast<int>(top_k), normalize, has_shared, shared_router != nullptr},
      {{}, input, {}, {buffers.hidden, buffers.shared_hidden}, {}, false},
      {{}, {buffers.hidden, buffers.shared_hidden}, {}, buffers.routes.weights, out, 0},
      width};
  auto& [call, gate_up, down, widest] = kernels;
  set_gate_and_up(gate_up.matrices[0], weights.gate_up, num_experts, width);
  down.matrices[0] = part_of(weights.down, num_experts, 0, cols);
  if (has_shared) {
    const WeightView& shared = weights.shared_down[0];
    set_gate_and_up(gate_up.matrices[1], weights.shared_gate_up, 1, shared.cols);
    down.matrices[1] = part_of(shared, 1, 0, cols);
    widest = std::max(widest, shared.cols);
  }
  for (int i = 0; i < 2; ++i) gate_up.down[i] = down.matrices[i];
  num_tokens == 1 ? kernels.launch<true>(stream) : kernels.launch<false>(stream);
}

}  // namespace helexa
