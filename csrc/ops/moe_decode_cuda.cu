// SPDX-License-Identifier: GPL-3.0-or-later
// Experts for few rows, in three launches: routes; gate and up of the chosen experts and of the shared one; down and the weighted sum.
// Weights are read once per batch of eight tokens whatever the tokens choose.  Each warp streams its part of a tile of 16 rows
// through a ring of its own in shared memory, so that memory stays busy while it multiplies.
#include <algorithm>

#include "ops/activation.cuh"
#include "ops/moe.h"
#include "ops/moe_cuda.cuh"
#include "ops/moe_route_cuda.cuh"
#include "quant/tiles.cuh"

namespace helexa::moe {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kGateUpTiles = 4;  // of a block: gate and up of 32 columns of the hidden rows
constexpr int kGateUpSplits = kWarps / kGateUpTiles;

// Columns of what a warp copies at once.
template <class F>
constexpr int kRunUnits = Unit<F>::kCols == 256 ? 1 : 2;

// One matrix of each expert, or of the shared one.
struct Matrix {
  const uint8_t* data;
  int64_t expert_bytes, tile_bytes;
  int format, rows, cols;
};

// Rows that are multiplied: as int8, and as floats where a matrix is of a float format.
struct Rows {
  const uint8_t* q8;
  const float* x;
  int64_t row_bytes;
  int cols;
};

// The input of one lane: its column of the B operand, and its two columns of the result; null where there is no such token.
struct Tokens {
  const uint8_t *operand, *first, *second;
  const float *x_first, *x_second;
};

__device__ Tokens lane_tokens(const Rows& rows, int64_t operand, int64_t first, int64_t second) {
  auto q8 = [&](int64_t row) { return row < 0 ? nullptr : rows.q8 + row * rows.row_bytes; };
  auto x = [&](int64_t row) { return row < 0 || rows.x == nullptr ? nullptr : rows.x + row * rows.cols; };
  return {q8(operand), q8(first), q8(second), x(first), x(second)};
}

__device__ void copy_to_shared(uint8_t* to, const uint8_t* from, int bytes) {
  for (int at = 16 * static_cast<int>(threadIdx.x % 32); at < bytes; at += 512) ptx::copy_async(to + at, from + at);
}

// Adds one pair of steps: 64 columns.  sums is the warp's 16 x 8 result as mma lays it out.
template <class F, int kPair>
__device__ __forceinline__ void add_pair(const uint8_t* unit, const RowScales<F>& upper, const RowScales<F>& lower,
                                         int64_t group, int cols, const Tokens& tokens, float (&sums)[4]) {
  const int lane = threadIdx.x % 32;
  PairCodes<F> codes;
  codes.load(unit, lane, kPair);
  uint4 operand = {0, 0, 0, 0};
  float4 first = {0, 0, 0, 0}, second = first;  // scale and sum of both steps
  const int64_t scales = activation_padded_cols(cols) + 16 * group;
  if (tokens.operand != nullptr) {
    operand = *reinterpret_cast<const uint4*>(tokens.operand + 64 * group + 16 * (lane % 4));
  }
  if (tokens.first != nullptr) first = *reinterpret_cast<const float4*>(tokens.first + scales);
  if (tokens.second != nullptr) second = *reinterpret_cast<const float4*>(tokens.second + scales);
  auto add_step = [&](auto step, uint32_t b0, uint32_t b1, float2 x0, float2 x1) {
    constexpr int kStep = decltype(step)::value, kIndex = 2 * kPair + kStep;
    uint32_t a[4];
    codes.template operand<kStep>(a);
    auto add = [&](const int(&dots)[4], int half) {
      const float w0 = upper.scale(kIndex, half), w1 = lower.scale(kIndex, half);
      sums[0] = fmaf(static_cast<float>(dots[0]), w0 * x0.x, sums[0]);
      sums[1] = fmaf(static_cast<float>(dots[1]), w0 * x1.x, sums[1]);
      sums[2] = fmaf(static_cast<float>(dots[2]), w1 * x0.x, sums[2]);
      sums[3] = fmaf(static_cast<float>(dots[3]), w1 * x1.x, sums[3]);
    };
    auto add_offsets = [&](int half, float s0, float s1) {
      const float m0 = upper.offset(kIndex, half), m1 = lower.offset(kIndex, half);
      sums[0] = fmaf(m0, s0, sums[0]), sums[1] = fmaf(m0, s1, sums[1]);
      sums[2] = fmaf(m1, s0, sums[2]), sums[3] = fmaf(m1, s1, sums[3]);
    };
    if constexpr (Unit<F>::kHalves == 1) {
      int dots[4] = {};
      ptx::mma_s8(dots, a, {b0, b1});
      add(dots, 0);
      if constexpr (Unit<F>::kHasOffset) add_offsets(0, x0.y, x1.y);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int dots[4] = {};
        const uint32_t b = half == 0 ? b0 : b1;
        ptx::mma_s8(dots, {a[2 * half], a[2 * half + 1]}, b);
        add(dots, half);
        if constexpr (Unit<F>::kHasOffset) {
          int totals[4] = {};  // of the input's codes: the rows sum those of all columns of the half
          ptx::mma_s8(totals, {0x01010101u, 0x01010101u}, b);
          add_offsets(half, static_cast<float>(totals[0]) * x0.x, static_cast<float>(totals[1]) * x1.x);
        }
      }
    }
  };
  add_step(std::integral_constant<int, 0>(), operand.x, operand.y, {first.x, first.y}, {second.x, second.y});
  add_step(std::integral_constant<int, 1>(), operand.z, operand.w, {first.z, first.w}, {second.z, second.w});
}

template <class F>
__device__ __forceinline__ void add_unit(const uint8_t* unit, int index, int cols, const Tokens& tokens,
                                         float (&sums)[4]) {
  const int row = threadIdx.x % 32 / 4;
  RowScales<F> upper, lower;
  upper.load(unit, row);
  lower.load(unit, row + 8);
  const int64_t group = static_cast<int64_t>(index) * Unit<F>::kPairs;
  add_pair<F, 0>(unit, upper, lower, group, cols, tokens, sums);
  if constexpr (Unit<F>::kPairs == 4) {
    add_pair<F, 1>(unit, upper, lower, group + 1, cols, tokens, sums);
    add_pair<F, 2>(unit, upper, lower, group + 2, cols, tokens, sums);
    add_pair<F, 3>(unit, upper, lower, group + 3, cols, tokens, sums);
  }
}

// Adds this warp's split of a tile's columns; the order of the sum depends on the shape alone.
template <class F, int kStages>
__device__ void add_tile(const uint8_t* tile, int cols, int split, int num_splits, const Tokens& tokens,
                         uint8_t* ring, int stage_bytes, float (&sums)[4]) {
  if constexpr (F::kScales == Scales::kPlain) {
    // Lanes read rows g and g + 8; nobody else's memory is worth a copy.
    using W = std::conditional_t<std::is_same_v<F, F32>, float,
                                 std::conditional_t<std::is_same_v<F, F16>, __half, __nv_bfloat16>>;
    const W* upper = reinterpret_cast<const W*>(tile) + static_cast<int64_t>(threadIdx.x % 32 / 4) * cols;
    const W* lower = upper + 8 * static_cast<int64_t>(cols);
    const int share = (cols + num_splits - 1) / num_splits;
    for (int col = split * share; col < min(cols, (split + 1) * share); ++col) {
      const float w0 = to_float(upper[col]), w1 = to_float(lower[col]);
      const float x0 = tokens.x_first == nullptr ? 0.0f : tokens.x_first[col];
      const float x1 = tokens.x_second == nullptr ? 0.0f : tokens.x_second[col];
      sums[0] = fmaf(w0, x0, sums[0]), sums[1] = fmaf(w0, x1, sums[1]);
      sums[2] = fmaf(w1, x0, sums[2]), sums[3] = fmaf(w1, x1, sums[3]);
    }
  } else {
    constexpr int kUnits = kRunUnits<F>, kRunBytes = kUnits * Unit<F>::kBytes;
    const int num_units = (cols + Unit<F>::kCols - 1) / Unit<F>::kCols;
    const int num_runs = (num_units + kUnits - 1) / kUnits;
    auto issue = [&](int run, int stage) {
      if (run < num_runs) {
        copy_to_shared(ring + stage * stage_bytes, tile + static_cast<int64_t>(run) * kRunBytes,
                       min(kUnits, num_units - run * kUnits) * Unit<F>::kBytes);
      }
      ptx::commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) issue(split + stage * num_splits, stage);
    int stage = 0;
    for (int run = split; run < num_runs; run += num_splits) {
      ptx::wait_for_copies<kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        if (run * kUnits + i < num_units) {
          add_unit<F>(ring + stage * stage_bytes + i * Unit<F>::kBytes, run * kUnits + i, cols, tokens, sums);
        }
      }
      __syncwarp();
      issue(run + kStages * num_splits, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::wait_for_copies<0>();
    __syncwarp();
  }
}

template <int kStages>
__device__ void add_tile(int format, const uint8_t* tile, int cols, int split, int num_splits,
                         const Tokens& tokens, uint8_t* ring, int stage_bytes, float (&sums)[4]) {
  switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: \
    return add_tile<type, kStages>(tile, cols, split, num_splits, tokens, ring, stage_bytes, sums);
#include "quant/formats.def"
#undef HELEXA_FORMAT
  }
}

// What both kernels have of the call.
struct Call {
  Plan plan;
  int num_tokens, top_k;
  bool has_shared;  // then it is the first item of a batch
  int stage_bytes;
};

// An expert with some tokens of a batch.
struct Item {
  int expert, count;
  const int* pairs;  // null for the shared expert, which has all tokens

  // The pair or, for the shared expert, the token of a column; -1 beyond the last.
  __device__ int column(int n) const { return n >= count ? -1 : pairs == nullptr ? n : pairs[n]; }
};

__device__ Item load_item(const Call& call, const Plan& plan, int index, int batch_tokens) {
  if (call.has_shared && index == 0) return {0, batch_tokens, nullptr};
  const Group group = plan.groups[index - (call.has_shared ? 1 : 0)];
  return {group.expert, group.count, plan.order + group.first};
}

// Of the experts, then of the shared one.
struct GateUp {
  Rows x;
  Matrix matrices[2][2];  // gate and up
  Rows hidden[2];         // [num_tokens * top_k, width], [num_tokens, shared width]
};

// hidden = silu(gate) * up, quantized.  One block to 32 columns of one item.
template <int kStages>
__global__ void __launch_bounds__(kThreads)
    gate_up_kernel(const __grid_constant__ Call call, const __grid_constant__ GateUp layer) {
  __shared__ float parts[kGateUpTiles][kGateUpSplits][kBatch][16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = warp / kGateUpSplits, split = warp % kGateUpSplits;
  const int first_token = blockIdx.z * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const Plan plan = call.plan.of_batch(blockIdx.z);
  if (static_cast<int>(blockIdx.y) >= *plan.num_groups + (call.has_shared ? 1 : 0)) return;
  const Item item = load_item(call, plan, blockIdx.y, batch_tokens);
  const bool is_shared = item.pairs == nullptr;
  const Matrix& matrix = layer.matrices[is_shared][tile % 2];
  if (static_cast<int>(blockIdx.x) * 32 >= matrix.rows) return;
  auto token_of = [&](int n) -> int64_t {
    const int column = item.column(n);
    return column < 0 ? -1 : first_token + (is_shared ? column : column / call.top_k);
  };

  const int row_tile = blockIdx.x * 2 + tile / 2;
  float sums[4] = {};
  if (row_tile * kDeviceTileRows < matrix.rows) {
    const Tokens tokens =
        lane_tokens(layer.x, token_of(lane / 4), token_of(lane % 4 * 2), token_of(lane % 4 * 2 + 1));
    add_tile<kStages>(matrix.format, matrix.data + item.expert * matrix.expert_bytes + row_tile * matrix.tile_bytes,
                      matrix.cols, split, kGateUpSplits, tokens,
                      dynamic_shared<uint8_t>() + warp * kStages * call.stage_bytes, call.stage_bytes, sums);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[tile][split][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[i];
  __syncthreads();

  // A warp to a token, a lane to a column.
  if (warp >= item.count) return;
  float both[2] = {};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int s = 0; s < kGateUpSplits; ++s) both[m] += parts[lane / 16 * 2 + m][s][warp][lane % 16];
  }
  const float value = both[0] / (1.0f + __expf(-both[0])) * both[1];
  const int column = item.column(warp), width = matrix.rows;
  const Rows& out = layer.hidden[is_shared];
  const int64_t row = is_shared ? first_token + column : static_cast<int64_t>(first_token) * call.top_k + column;
  quantize_lanes(value, const_cast<uint8_t*>(out.q8) + row * out.row_bytes, width, blockIdx.x);
  if (out.x != nullptr && static_cast<int>(blockIdx.x) * 32 + lane < width) {
    const_cast<float*>(out.x)[row * width + blockIdx.x * 32 + lane] = value;
  }
}

// Of the experts, then of the shared one.
struct Down {
  Rows hidden[2];
  Matrix matrices[2];
  const float* weights;  // [num_tokens, slots]
  float* out;            // [num_tokens, cols]
  int num_splits;
};

// out = the sum of the experts' results by their weights.  One block to 16 columns of a batch.
template <int kStages>
__global__ void __launch_bounds__(kThreads)
    down_kernel(const __grid_constant__ Call call, const __grid_constant__ Down layer) {
  const int num_splits = layer.num_splits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slots = call.top_k + (call.has_shared ? 1 : 0);
  const int first_token = blockIdx.y * kBatch, batch_tokens = min(kBatch, call.num_tokens - first_token);
  uint8_t* ring = dynamic_shared<uint8_t>() + warp * kStages * call.stage_bytes;
  float* parts = reinterpret_cast<float*>(dynamic_shared<uint8_t>() + kWarps * kStages * call.stage_bytes);
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const Plan plan = call.plan.of_batch(blockIdx.y);
  const int num_items = (*plan.num_groups + (call.has_shared ? 1 : 0)) * num_splits;
  for (int i = warp; i < num_items; i += kWarps) {
    const int split = i % num_splits;
    const Item item = load_item(call, plan, i / num_splits, batch_tokens);
    const bool is_shared = item.pairs == nullptr;
    const Matrix& matrix = layer.matrices[is_shared];
    auto row_of = [&](int n) -> int64_t {
      const int column = item.column(n);
      return column < 0 ? -1 : (is_shared ? first_token : static_cast<int64_t>(first_token) * call.top_k) + column;
    };
    const Tokens tokens = lane_tokens(layer.hidden[is_shared], row_of(lane / 4),
                                      row_of(lane % 4 * 2), row_of(lane % 4 * 2 + 1));
    float sums[4] = {};
    add_tile<kStages>(matrix.format,
                      matrix.data + item.expert * matrix.expert_bytes + blockIdx.x * matrix.tile_bytes,
                      matrix.cols, split, num_splits, tokens, ring, call.stage_bytes, sums);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int column = item.column(lane % 4 * 2 + k % 2);
      if (column < 0) continue;
      const int slot = is_shared ? column * slots + call.top_k
                                 : column / call.top_k * slots + column % call.top_k;
      parts[(split * kBatch * slots + slot) * 16 + lane / 4 + k / 2 * 8] = sums[k];
    }
  }
  __syncthreads();

  const int token = threadIdx.x / 16, row = threadIdx.x % 16;
  if (token >= batch_tokens) return;
  const float* shares = layer.weights + static_cast<int64_t>(first_token + token) * slots;
  float sum = 0.0f;
  for (int slot = 0; slot < slots; ++slot) {
    float result = 0.0f;
    for (int split = 0; split < num_splits; ++split) {
      result += parts[((split * kBatch + token) * slots + slot) * 16 + row];
    }
    sum = fmaf(shares[slot], result, sum);
  }
  layer.out[(static_cast<int64_t>(first_token) + token) * layer.matrices[0].rows + blockIdx.x * 16 + row] = sum;
}

// Bytes that a warp copies at once.
int run_bytes(int format) {
  return with_format(static_cast<Format>(format), [](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      return 0;
    } else {
      return kRunUnits<F> * Unit<F>::kBytes;
    }
  });
}

// Bytes of shared memory that a block may have.
int64_t shared_memory() {
#ifdef HELEXA_EMULATED_CUDA
  return 227 * 1024;
#else
  int device = 0, bytes = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
#endif
}

bool is_float(int format) { return format <= static_cast<int>(Format::kBF16); }

// The matrix of `rows` rows that starts at row first_row of each expert's rows in a stack.
Matrix part_of(const WeightView& stack, int64_t num_experts, int64_t first_row, int64_t rows) {
  const int64_t tile = with_format(static_cast<Format>(stack.format), [&](auto f) {
    return device_tile_bytes<decltype(f)>(stack.cols);
  });
  return {stack.packed + first_row / kDeviceTileRows * tile, stack.rows / num_experts / kDeviceTileRows * tile, tile,
          stack.format, static_cast<int>(rows), static_cast<int>(stack.cols)};
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

  Buffers(uint8_t* base, int64_t num_tokens, int64_t num_experts, int64_t top_k, int64_t width, bool float_hidden,
          int64_t shared_width, bool float_shared) {
    Workspace space(base);
    const int slots = static_cast<int>(top_k) + (shared_width > 0 ? 1 : 0);
    logits = space.take<float>(num_tokens * (num_experts + 1));
    int* ids = space.take<int>(num_tokens * top_k);
    float* weights = space.take<float>(num_tokens * slots);
    const int64_t batches = (num_tokens + kBatch - 1) / kBatch;
    routes = {ids, weights, slots, space.take_plan(batches, kBatch * top_k, num_experts, kBatch)};
    auto rows = [&](int64_t count, int64_t cols, bool as_float) -> Rows {
      const int64_t row_bytes = activation_row_bytes(cols);
      const uint8_t* q8 = space.take<uint8_t>(count * row_bytes);
      return {q8, as_float ? space.take<float>(count * cols) : nullptr, row_bytes, static_cast<int>(cols)};
    };
    hidden = rows(num_tokens * top_k, width, float_hidden);
    shared_hidden = rows(num_tokens, shared_width, float_shared);
    bytes = space.bytes();
  }
};

// Splits of an expert's columns that keep the warps of a block busy with one token.
int down_splits(int64_t slots, int64_t width) {
  int splits = 1;
  while (2 * splits * slots <= kWarps && 256 * splits < width) splits *= 2;
  return splits;
}

Buffers cut(uint8_t* base, const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  const bool has_shared = !weights.shared_down.empty();
  return Buffers(base, num_tokens, weights.router.rows, top_k, weights.down.cols, is_float(weights.down.format),
                 has_shared ? weights.shared_down[0].cols : 0,
                 has_shared && is_float(weights.shared_down[0].format));
}

template <int kStages>
void run_experts(const Call& call, const MoeWeights& weights, const Buffers& buffers, const Rows& x, float* out,
                 void* stream) {
  const int64_t num_experts = weights.router.rows, width = weights.down.cols;
  GateUp gate_up{x, {}, {buffers.hidden, buffers.shared_hidden}};
  Down down{{buffers.hidden, buffers.shared_hidden}, {}, buffers.routes.weights, out, 0};
  int64_t widest = width;
  set_gate_and_up(gate_up.matrices[0], weights.gate_up, num_experts, width);
  down.matrices[0] = part_of(weights.down, num_experts, 0, weights.down.rows / num_experts);
  if (call.has_shared) {
    const WeightView& shared = weights.shared_down[0];
    set_gate_and_up(gate_up.matrices[1], weights.shared_gate_up, 1, shared.cols);
    down.matrices[1] = part_of(shared, 1, 0, shared.rows);
    widest = std::max(widest, shared.cols);
  }
  down.num_splits = down_splits(buffers.routes.slots, widest);
  const unsigned batches = static_cast<unsigned>((call.num_tokens + kBatch - 1) / kBatch);
  const unsigned items = max_groups(std::min(call.num_tokens, kBatch) * call.top_k, num_experts, kBatch) +
                         (call.has_shared ? 1 : 0);
  const size_t ring = static_cast<size_t>(kWarps) * kStages * call.stage_bytes;
  launch_kernel(gate_up_kernel<kStages>,
                {dim3(static_cast<unsigned>((widest + 31) / 32), items, batches), dim3(kThreads), stream, ring, true},
                call, gate_up);
  const size_t parts = static_cast<size_t>(down.num_splits) * kBatch * buffers.routes.slots * 16 * sizeof(float);
  launch_kernel(down_kernel<kStages>,
                {dim3(static_cast<unsigned>(down.matrices[0].rows / kDeviceTileRows), batches), dim3(kThreads), stream,
                 ring + parts, true},
                call, down);
}

}  // namespace
}  // namespace helexa::moe

namespace helexa {

int64_t moe_few_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  return moe::cut(nullptr, weights, num_tokens, top_k).bytes;
}

void moe_few_cuda(const float* x, const uint8_t* q8, MoeWeights weights, bool normalize, float* out,
                  int32_t* counters, uint8_t* workspace, int64_t num_tokens, int64_t top_k, void* stream) {
  if (num_tokens == 0) return;
  const moe::Buffers buffers = moe::cut(workspace, weights, num_tokens, top_k);
  moe::route_few(x, weights.router, weights.shared_router.empty() ? nullptr : weights.shared_router.data(), buffers.logits,
                 counters, buffers.routes, num_tokens, top_k, normalize, stream);
  moe::Call call{buffers.routes.plan, static_cast<int>(num_tokens), static_cast<int>(top_k),
                 !weights.shared_down.empty(), 0};
  for (const auto* stacks : {&weights.gate_up, &weights.shared_gate_up, &weights.shared_down}) {
    for (const WeightView& w : *stacks) call.stage_bytes = std::max(call.stage_bytes, moe::run_bytes(w.format));
  }
  call.stage_bytes = std::max(call.stage_bytes, moe::run_bytes(weights.down.format));
  const int64_t cols = weights.router.cols;
  const moe::Rows input{q8, x, activation_row_bytes(cols), static_cast<int>(cols)};
  // Two runs under way per warp, unless the device has too little shared memory.
  if (2 * moe::kWarps * call.stage_bytes + 24 * 1024 <= moe::shared_memory()) {
    moe::run_experts<2>(call, weights, buffers, input, out, stream);
  } else {
    moe::run_experts<1>(call, weights, buffers, input, out, stream);
  }
}

}  // namespace helexa
