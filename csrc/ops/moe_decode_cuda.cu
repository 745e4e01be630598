// SPDX-License-Identifier: GPL-3.0-or-later
// Experts for few rows, in three launches: logits; gate and up of the chosen experts and of the shared one; down and the weighted sum.
// Weights are read once per batch of eight tokens whatever the tokens choose.  Each warp streams its part of tiles of 16 rows
// through a ring of its own in shared memory, so that memory stays busy while it multiplies.  matvec.cuh has the products and says why
// no result depends on the number of tokens.
//
// Which experts the logits choose every block finds out for itself (moe_choose.cuh).  The last launch begins while the one before it
// still runs, and fills its rings meanwhile: gate_up does not let it start before the logits are complete.  Gate_up also asks for those
// weights to come to the second-level cache, if they leave room in it.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "ops/moe.h"
#include "ops/moe_choose.cuh"
#include "ops/moe_cuda.cuh"
#include "ops/moe_route_cuda.cuh"
#include "ops/moe_stream.cuh"
#include "quant/formats.h"

namespace helexa::moe {
namespace {

constexpr int kGateUpTiles = 4;  // of a block: gate and up of 32 columns of the hidden rows
constexpr int kGateUpSplits = 2;
constexpr int kGateUpWarps = kGateUpTiles * kGateUpSplits;
constexpr int kDownWarps = 12;
constexpr int kMaxPairs = kBatch * kMaxTopK;  // of a batch
template <bool kIsOne>
constexpr int kTokens = kIsOne ? 1 : kBatch;  // of a batch
template <bool kIsOne>
constexpr int kGateUpBlocks =
    kIsOne ? 3 : 2;  // on a multiprocessor: they have as many registers as there are

// What both kernels have of the call.
struct Call {
  const float* logits;  // [num_tokens, logits_stride(num_experts)]
  int num_tokens, num_experts, top_k;
  bool normalize, has_shared, has_shared_gate;  // a shared expert is the first item of a batch

  __device__ const float* logits_of(int token) const {
    return logits + static_cast<int64_t>(token) * logits_stride(num_experts);
  }
  // What ends the norm of the token's row is left to its products.
  __device__ float factor(int token) const { return fresh(logits_of(token) + num_experts + 1); }
  __device__ int num_slots() const { return top_k + (has_shared ? 1 : 0); }
  __device__ Choice choice(int token) const {
    return choose(logits_of(token), num_experts, top_k, normalize);
  }
  __device__ float shared_share(int token) const {
    return shared_weight(has_shared_gate ? logits_of(token) + num_experts : nullptr);
  }
};

// An expert with some tokens of a batch.
struct Item {
  bool is_shared;  // then it has all tokens
  int expert, first, count;
};

// Who goes where in a batch, in shared memory.  Pairs of a token and an expert are in the order of the experts, and those of an expert are
// a group: an item.
template <bool kIsOne>
struct LocalRoutes {
  static constexpr int kPairs = kIsOne ? kMaxTopK : kMaxPairs;
  int experts[kPairs], firsts[kPairs], counts[kPairs];  // of the groups
  int tokens[kPairs], slots[kPairs];                    // of the positions; a slot counts those of all tokens
  float shares[kPairs + kTokens<kIsOne>];               // of the slots
  float factors[kTokens<kIsOne>];                       // of the tokens
  int num_groups;
  int4 keys[kIsOne ? 1 : kPairs / 4];  // expert * 256 + pair
  int sorted[kIsOne ? 1 : kPairs];
  uint32_t heads[8];  // for each position of a warp whether a group begins there

  // Once the logits are complete.  All threads of the block take part, no fewer than kPairs.
  __device__ void load(const Call& call, int first_token, int batch_tokens) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, num_slots = call.num_slots();
    if constexpr (kIsOne) {
      if (warp == 0) {
        const Choice choice = call.choice(first_token);
        if (lane < call.top_k) {
          experts[lane] = choice.expert, firsts[lane] = lane, counts[lane] = 1;
          tokens[lane] = 0, slots[lane] = lane, shares[lane] = choice.weight;
        }
        if (lane == 0) num_groups = call.top_k;
        if (lane == 0 && call.has_shared) shares[call.top_k] = call.shared_share(first_token);
      }
      __syncthreads();
    } else {
      const int num_pairs = batch_tokens * call.top_k;
      int* key_of = reinterpret_cast<int*>(keys);
      for (int token = warp; token < batch_tokens; token += blockDim.x / 32) {
        const Choice choice = call.choice(first_token + token);
        if (lane < call.top_k) {
          const int pair = token * call.top_k + lane;
          key_of[pair] = choice.expert << 8 | pair;
          shares[token * num_slots + lane] = choice.weight;
        }
        if (lane == 0) {
          factors[token] = call.factor(first_token + token);
          if (call.has_shared)
            shares[token * num_slots + call.top_k] = call.shared_share(first_token + token);
        }
      }
      if (thread < 4 && num_pairs + thread < kPairs) key_of[num_pairs + thread] = 0x7fffffff;
      __syncthreads();
      sort(num_pairs);
      __syncthreads();
      const int key = thread < num_pairs ? sorted[thread] : 0, expert = key >> 8;
      const bool is_head = thread < num_pairs && (thread == 0 || sorted[thread - 1] >> 8 != expert);
      const uint32_t mine = __ballot_sync(0xffffffffu, is_head);
      if (lane == 0 && warp < 8) heads[warp] = mine;
      if (thread < num_pairs) {
        const int token = (key & 255) / call.top_k;
        tokens[thread] = token, slots[thread] = (key & 255) + token * (num_slots - call.top_k);
      }
      __syncthreads();
      if (warp < 8) {
        int group = __popc(mine & ((1u << lane) - 1));
        for (int w = 0; w < warp; ++w) group += __popc(heads[w]);
        if (is_head) {
          int count = 1;
          while (thread + count < num_pairs && sorted[thread + count] >> 8 == expert) ++count;
          experts[group] = expert, firsts[group] = thread, counts[group] = count;
        }
        if (thread == num_pairs - 1) num_groups = group + (is_head ? 1 : 0);
      }
      __syncthreads();
    }
  }

  __device__ Item item(int group) const { return {false, experts[group], firsts[group], counts[group]}; }

 private:
  // Where a key belongs is how many are smaller.
  __device__ void sort(int num_pairs) {
    const int thread = threadIdx.x;
    if (thread >= num_pairs) return;
    const int key = reinterpret_cast<const int*>(keys)[thread];
    int rank = 0;
    for (int i = 0; 4 * i < num_pairs; ++i) {
      const int4 four = keys[i];
      rank += (four.x < key) + (four.y < key) + (four.z < key) + (four.w < key);
    }
    sorted[rank] = key;
  }
};

// Of the experts, then of the shared one.
struct GateUp {
  Rings rings;
  Rows x;
  Matrix matrices[2][2];  // gate and up
  Rows hidden[2];  // [batches, kBatch * top_k, width] in the order of the routes; [num_tokens, shared width]
  Matrix down[2];
  bool prefetches_down;

  __device__ int width(bool is_shared) const { return matrices[is_shared][0].rows; }
  __device__ int num_blocks(bool is_shared) const { return (width(is_shared) + 31) / 32; }
};

__device__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Asks for this block's share of the matrix that the item's hidden rows will be multiplied with.
__device__ void prefetch_share(const Matrix& matrix, int64_t expert, int block, int num_blocks) {
  const int64_t lines = (static_cast<int64_t>(matrix.rows) / kTileRows * matrix.tile_bytes + 127) / 128;
  const uint8_t* data = matrix.data + expert * matrix.expert_bytes;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * num_blocks + block; i < lines;
       i += static_cast<int64_t>(blockDim.x) * num_blocks) {
    ptx::prefetch(data + 128 * i);
  }
}

// The tile of a warp in a block of 32 columns: gate and up by turns.
struct GateUpTile {
  int tile, split;

  __device__ GateUpTile() : tile(threadIdx.x / 32 / kGateUpSplits), split(threadIdx.x / 32 % kGateUpSplits) {}
  __device__ const Matrix& matrix(const GateUp& layer, bool is_shared) const {
    return layer.matrices[is_shared][tile % 2];
  }
  __device__ const uint8_t* weights(const GateUp& layer, bool is_shared, int64_t expert, int block) const {
    const Matrix& m = matrix(layer, is_shared);
    return m.tile(expert, min(2 * block + tile / 2, m.rows / kTileRows - 1));
  }
};

// What the warps of a block of 32 columns have of them.
template <int kRows>  // tokens
using GateUpParts = float[kGateUpTiles][kGateUpSplits][kRows][kTileRows];

// hidden = silu(gate) * up of the token whose sums are `token`, times `factor`, quantized.  By one warp, a lane to a column.
template <int kRows>
__device__ void finish_hidden(const GateUpParts<kRows>& parts, int token, float factor, const Rows& hidden,
                              int64_t row, int block) {
  const int lane = threadIdx.x % 32;
  float both[2] = {};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int s = 0; s < kGateUpSplits; ++s) both[m] += parts[lane / 16 * 2 + m][s][token][lane % 16];
  }
  const int column = block * 32 + lane;
  const float value = column < hidden.cols ? silu(both[0] * factor) * (both[1] * factor) : 0.0f;
  quantize_lanes(value, hidden.q8 + row * hidden.row_bytes, hidden.cols, block);
  if (hidden.x != nullptr && column < hidden.cols) hidden.x[row * hidden.cols + column] = value;
}

// One token: a block to 32 columns of one item.
template <class F>  // format of all weights; void if there are several
__global__ void __launch_bounds__(32 * kGateUpWarps, kGateUpBlocks<true>)
    gate_up_one_kernel(const __grid_constant__ Call call, const __grid_constant__ GateUp layer) {
  __shared__ GateUpParts<1> parts;
  __shared__ uint64_t barriers[kGateUpWarps * kMaxStages];
  __shared__ int chosen;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
  const bool is_shared = call.has_shared && blockIdx.y == 0;
  const int index = blockIdx.y - (call.has_shared ? 1 : 0);
  if (block >= layer.num_blocks(is_shared)) return;
  const GateUpTile mine;
  const Matrix& matrix = mine.matrix(layer, is_shared);
  const uint8_t* weights = mine.weights(layer, is_shared, 0, block);
  const Tokens tokens{layer.x, nullptr, 0, 1};
  Stream stream(layer.rings, dynamic_shared<uint8_t>() + warp * layer.rings.bytes(),
                barriers + warp * kMaxStages);
  TileWalk walk(matrix, weights, mine.split, kGateUpSplits);
  if (is_shared) stream.begin(walk);  // its weights are known before the logits are
  ptx::wait_for_producers();
  ptx::allow_consumers();

  Multiplier<F, true> multiplier(matrix, tokens, mine.split, kGateUpSplits);
  const float factor = call.factor(0);
  int expert = 0;
  if (!is_shared) {
    if (warp == 0) {
      const Choice choice = call.choice(0);
      if (lane == index) chosen = choice.expert;
    }
    __syncthreads();
    expert = chosen;
    const int64_t offset = expert * matrix.expert_bytes;
    weights += offset, walk.from += offset;
    stream.begin(walk);
  }
  if (layer.prefetches_down) {
    prefetch_share(layer.down[is_shared], expert, block, layer.num_blocks(is_shared));
  }
  multiplier.run(matrix.format, weights, stream, walk,
                 [&](int token, int row, float sum) { parts[mine.tile][mine.split][token][row] = sum; });
  __syncthreads();
  if (warp == 0) finish_hidden<1>(parts, 0, factor, layer.hidden[is_shared], is_shared ? 0 : index, block);
}

// The tiles of one warp in the units of its block: every gridDim.x-th pair of an item and 32 columns, the shared expert's first.
template <class Routes>
struct GateUpUnits {
  const Call& call;
  const GateUp& layer;
  const Routes& routes;
  const GateUpTile& mine;
  int batch_tokens, num_shared, count;

  struct Unit {
    Item item;
    int block;
  };

  __device__ GateUpUnits(const Call& call, const GateUp& layer, const Routes& routes, const GateUpTile& mine,
                         int batch_tokens)
      : call(call),
        layer(layer),
        routes(routes),
        mine(mine),
        batch_tokens(batch_tokens),
        num_shared(call.has_shared ? layer.num_blocks(true) : 0),
        count(num_shared + routes.num_groups * layer.num_blocks(false)) {}
  __device__ __forceinline__ Unit operator[](int i) const {
    if (i < num_shared) return {{true, 0, 0, batch_tokens}, i};
    i -= num_shared;
    const int group = i / layer.num_blocks(false);
    return {routes.item(group), i - group * layer.num_blocks(false)};
  }
  __device__ __forceinline__ TileWalk tile(int i) const {
    const Unit unit = (*this)[i];
    const bool is_shared = unit.item.is_shared;
    return {mine.matrix(layer, is_shared), mine.weights(layer, is_shared, unit.item.expert, unit.block),
            mine.split, kGateUpSplits};
  }
};

// Several tokens: as many blocks as run at once, which take the units by turns, their rings running on from one to the next.
template <class F>
__global__ void __launch_bounds__(32 * kGateUpWarps, kGateUpBlocks<false>)
    gate_up_many_kernel(const __grid_constant__ Call call, const __grid_constant__ GateUp layer) {
  using Routes = LocalRoutes<false>;
  __shared__ Routes routes;
  __shared__ GateUpParts<kBatch> parts[2];  // by turns, so that one barrier is enough for a unit
  __shared__ uint64_t barriers[kGateUpWarps * kMaxStages];
  const int warp = threadIdx.x / 32;
  const int first_token = blockIdx.y * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  const int stride = gridDim.x;
  const GateUpTile mine;
  Stream stream(layer.rings, dynamic_shared<uint8_t>() + warp * layer.rings.bytes(),
                barriers + warp * kMaxStages);
  ptx::wait_for_producers();
  ptx::allow_consumers();
  routes.load(call, first_token, batch_tokens);

  const GateUpUnits<Routes> units(call, layer, routes, mine, batch_tokens);
  PartWalk walk(units, blockIdx.x, stride);
  stream.begin(walk);
  int turn = 0;
  for (int i = blockIdx.x; i < units.count; i += stride, turn ^= 1) {
    const auto [item, block] = units[i];
    const bool is_shared = item.is_shared;
    const Matrix& matrix = mine.matrix(layer, is_shared);
    const Tokens tokens{layer.x, is_shared ? nullptr : routes.tokens + item.first, first_token, item.count};
    Multiplier<F, false> multiplier(matrix, tokens, mine.split, kGateUpSplits);
    GateUpParts<kBatch>& sums = parts[turn];
    multiplier.run(matrix.format, mine.weights(layer, is_shared, item.expert, block), stream, walk,
                   [&](int token, int row, float sum) { sums[mine.tile][mine.split][token][row] = sum; });
    __syncthreads();
    if (warp < item.count) {
      const int64_t first = is_shared ? first_token : first_token * call.top_k + item.first;
      const float factor = routes.factors[is_shared ? warp : routes.tokens[item.first + warp]];
      finish_hidden<kBatch>(sums, warp, factor, layer.hidden[is_shared], first + warp, block);
    }
  }
}

// Of the experts, then of the shared one.
struct Down {
  Rings rings;
  Rows hidden[2];
  Matrix matrices[2];
  float* out;       // [num_tokens, cols]
  int split_shift;  // the splits of an item are a power of two
};

// The parts of a block's tile of every item, a split of each.
template <class Routes>
struct DownParts {
  const Call& call;
  const Down& layer;
  const Routes& routes;
  int batch_tokens, count;

  __device__ DownParts(const Call& call, const Down& layer, const Routes& routes, int batch_tokens)
      : call(call),
        layer(layer),
        routes(routes),
        batch_tokens(batch_tokens),
        count((routes.num_groups + (call.has_shared ? 1 : 0)) << layer.split_shift) {}

  __device__ __forceinline__ Item item(int i) const {
    int index = i >> layer.split_shift;
    if (call.has_shared && index-- == 0) return {true, 0, 0, batch_tokens};
    return routes.item(index);
  }
  __device__ __forceinline__ int num_splits() const { return 1 << layer.split_shift; }
  __device__ __forceinline__ int split(int i) const { return i & (num_splits() - 1); }
  __device__ __forceinline__ TileWalk tile(int i) const {
    const Item of = item(i);
    const Matrix& matrix = layer.matrices[of.is_shared];
    return {matrix, matrix.tile(of.expert, blockIdx.x), split(i), num_splits()};
  }
};

// out = the sum of the experts' results by their weights.  One block to 16 columns of a batch.
template <class F, bool kIsOne>
__global__ void __launch_bounds__(32 * kDownWarps, kIsOne ? 2 : 1)
    down_kernel(const __grid_constant__ Call call, const __grid_constant__ Down layer) {
  using Routes = LocalRoutes<kIsOne>;
  __shared__ Routes routes;
  __shared__ uint64_t barriers[kDownWarps * kMaxStages];
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32, num_slots = call.num_slots();
  const int first_token = blockIdx.y * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  uint8_t* rings = dynamic_shared<uint8_t>();
  float* sums =
      reinterpret_cast<float*>(rings + num_warps * layer.rings.bytes());  // [splits, tokens, slots, 16]
  Stream stream(layer.rings, rings + warp * layer.rings.bytes(), barriers + warp * kMaxStages);
  routes.load(call, first_token, batch_tokens);

  const DownParts<Routes> parts(call, layer, routes, batch_tokens);
  PartWalk walk(parts, warp, num_warps);
  stream.begin(walk);
  ptx::wait_for_producers();
  ptx::allow_consumers();

  const int split_floats = kTokens<kIsOne> * num_slots * kTileRows;
  for (int part = warp; part < parts.count; part += num_warps) {
    const Item item = parts.item(part);
    const Matrix& matrix = layer.matrices[item.is_shared];
    const int64_t first_row = item.is_shared ? first_token : first_token * call.top_k + item.first;
    const Tokens tokens{layer.hidden[item.is_shared], nullptr, first_row, item.count};
    Multiplier<F, kIsOne> multiplier(matrix, tokens, parts.split(part), parts.num_splits());
    multiplier.run(matrix.format, matrix.tile(item.expert, blockIdx.x), stream, walk,
                   [&](int token, int row, float sum) {
                     const int slot =
                         item.is_shared ? token * num_slots + call.top_k : routes.slots[item.first + token];
                     sums[parts.split(part) * split_floats + slot * kTileRows + row] = sum;
                   });
  }
  __syncthreads();

  const int token = threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
  if (token >= batch_tokens) return;
  float sum = 0.0f;
  for (int i = token * num_slots; i < (token + 1) * num_slots; ++i) {
    float result = 0.0f;
    for (int split = 0; split < parts.num_splits(); ++split) {
      result += sums[split * split_floats + i * kTileRows + row];
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
  Rows hidden, shared_hidden;
  int64_t bytes;

  Buffers(uint8_t* base, const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
    Workspace space(base);
    logits = space.take<float>(num_tokens * logits_stride(static_cast<int>(weights.router.rows)));
    auto rows = [&](int64_t count, const WeightView& next) -> Rows {
      const int64_t row_bytes = activation_row_bytes(next.cols);
      uint8_t* q8 = space.take<uint8_t>(count * row_bytes);
      return {q8, is_float(next.format) ? space.take<float>(count * next.cols) : nullptr, row_bytes,
              static_cast<int>(next.cols)};
    };
    hidden = rows(num_tokens * top_k, weights.down);
    shared_hidden = weights.shared_down.empty() ? Rows{} : rows(num_tokens, weights.shared_down[0]);
    bytes = space.bytes();
  }
};

// Splits of an expert's columns, as a power of two, that keep the warps of a block busy with one token.
int down_split_shift(int64_t slots, int64_t width) {
  int shift = 0;
  while ((2 * slots << shift) <= kDownWarps && (kChunkCols << shift) < width) ++shift;
  return shift;
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

// Calls f with the format that some matrices have in common, if it is a usual one, else with void.
template <class T>
struct Tag {
  using type = T;
};
template <class Function>
void with_common_format(std::initializer_list<const Matrix*> matrices, Function&& f) {
  int common = -1;
  for (const Matrix* m : matrices) {
    if (m->data == nullptr) continue;
    if (common >= 0 && common != m->format) return f(Tag<void>());
    common = m->format;
  }
  switch (static_cast<Format>(common)) {
    case Format::kQ4_K: return f(Tag<Q4_K>());
    case Format::kQ5_K: return f(Tag<Q5_K>());
    case Format::kQ6_K: return f(Tag<Q6_K>());
    case Format::kQ8_0: return f(Tag<Q8_0>());
    default: return f(Tag<void>());
  }
}

struct Kernels {
  Call call;
  GateUp gate_up;
  Down down;
  int64_t widest;  // of the hidden rows

  template <bool kIsOne>
  void launch(void* stream) {
    launch_gate_up<kIsOne>(stream);
    launch_down<kIsOne>(stream);
  }

 private:
  unsigned num_slots() const { return call.top_k + (call.has_shared ? 1 : 0); }
  unsigned num_batches() const { return static_cast<unsigned>((call.num_tokens + kBatch - 1) / kBatch); }

  template <bool kIsOne>
  void launch_gate_up(void* stream) {
    const auto& m = gate_up.matrices;
    const std::initializer_list<const Matrix*> matrices = {&m[0][0], &m[0][1], &m[1][0], &m[1][1]};
    const int64_t static_bytes =
        8 * kGateUpWarps * kMaxStages + 64 +
        (kIsOne ? sizeof(GateUpParts<1>) : 2 * sizeof(GateUpParts<kBatch>) + sizeof(LocalRoutes<false>));
    constexpr int kBlocks = kGateUpBlocks<kIsOne>;
    gate_up.rings = make_rings(matrices, kGateUpWarps, kGateUpSplits, kBlocks, static_bytes);
    gate_up.prefetches_down = kIsOne && 4 * down_bytes() <= second_level_cache();
    const unsigned columns = static_cast<unsigned>((widest + 31) / 32);
    // Of several tokens, no more blocks than run at once.
    const unsigned units = columns * (std::min(call.num_tokens, kBatch) * call.top_k + 1);
    const unsigned at_once = std::max(1u, kBlocks * num_multiprocessors() / num_batches());
    const dim3 grid = kIsOne ? dim3(columns, num_slots()) : dim3(std::min(units, at_once), num_batches());
    with_common_format(matrices, [&](auto tag) {
      using F = typename decltype(tag)::type;
      launch_kernel(kIsOne ? gate_up_one_kernel<F> : gate_up_many_kernel<F>,
                    {grid, dim3(32 * kGateUpWarps), stream,
                     static_cast<size_t>(kGateUpWarps) * gate_up.rings.bytes(), true},
                    call, gate_up);
    });
  }

  template <bool kIsOne>
  void launch_down(void* stream) {
    const std::initializer_list<const Matrix*> matrices = {&down.matrices[0], &down.matrices[1]};
    down.split_shift = down_split_shift(num_slots(), widest);
    const int num_splits = 1 << down.split_shift;
    const int num_warps =
        kIsOne ? std::min<int>(kDownWarps, static_cast<int>(num_slots()) * num_splits) : kDownWarps;
    const int64_t sums =
        static_cast<int64_t>(sizeof(float)) * num_splits * kTokens<kIsOne> * num_slots() * kTileRows;
    // A usual model has a block per multiprocessor, which finds room beside those of gate_up: of one token there are two of these.
    down.rings = make_rings(
        matrices, num_warps, num_splits, kIsOne ? 3 : 2,
        sums + static_cast<int64_t>(sizeof(LocalRoutes<kIsOne>)) + 8 * kDownWarps * kMaxStages + 64);
    const dim3 grid(static_cast<unsigned>(down.matrices[0].rows / kTileRows), num_batches());
    with_common_format(matrices, [&](auto tag) {
      using F = typename decltype(tag)::type;
      launch_kernel(down_kernel<F, kIsOne>,
                    {grid, dim3(32 * num_warps), stream,
                     static_cast<size_t>(num_warps * down.rings.bytes() + sums), true},
                    call, down);
    });
  }

  // Of the experts that a token chooses, and of the shared one.
  int64_t down_bytes() const {
    return call.top_k * down.matrices[0].expert_bytes + (call.has_shared ? down.matrices[1].expert_bytes : 0);
  }
};

}  // namespace
}  // namespace helexa::moe

namespace helexa {

int64_t moe_few_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  return moe::Buffers(nullptr, weights, num_tokens, top_k).bytes;
}

void moe_few_cuda(const float* x, const uint8_t* q8, const float* squares, float eps, MoeWeights weights,
                  bool normalize, float* out, uint8_t* workspace, int64_t num_tokens, int64_t top_k,
                  void* stream) {
  using namespace moe;
  if (num_tokens == 0) return;
  const Buffers buffers(workspace, weights, num_tokens, top_k);
  const WeightView* shared_router = weights.shared_router.empty() ? nullptr : weights.shared_router.data();
  route_few(x, squares, eps, weights.router, shared_router, buffers.logits, num_tokens, stream);

  const int64_t num_experts = weights.router.rows, cols = weights.router.cols, width = weights.down.cols;
  const bool has_shared = !weights.shared_down.empty();
  const Rows input{const_cast<uint8_t*>(q8), const_cast<float*>(x), activation_row_bytes(cols),
                   static_cast<int>(cols)};
  Kernels kernels{{buffers.logits, static_cast<int>(num_tokens), static_cast<int>(num_experts),
                   static_cast<int>(top_k), normalize, has_shared, shared_router != nullptr},
                  {{}, input, {}, {buffers.hidden, buffers.shared_hidden}, {}, false},
                  {{}, {buffers.hidden, buffers.shared_hidden}, {}, out, 0},
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
