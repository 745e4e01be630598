// SPDX-License-Identifier: GPL-3.0-or-later
// Experts for many rows: pairs sorted by expert, then two products of groups of up to 64 tokens with tiles of weights, which each warp
// unpacks to bfloat16 in registers, then each token's weighted sum.  Weights are read as they are packed and nothing is unpacked to
// memory, so that a prompt of a few hundred tokens, of which every expert gets some, costs little more than reading them.
//
// The tokens' rows pass through a ring of runs of 64 columns which the block shares; every warp has two tiles of 16 rows, whose runs of
// 256 columns pass through a ring of its own.  Devices with little shared memory have half as many warps, which wait for their runs.
#include <algorithm>
#include <type_traits>

#include "ops/bf16_tiles.cuh"
#include "ops/moe.h"
#include "ops/moe_cuda.cuh"
#include "ops/moe_route_cuda.cuh"
#include "quant/tiles.cuh"

namespace helexa::moe {
namespace {

using bf16_tiles::Float, bf16_tiles::kRowEntries, bf16_tiles::kUnitsPerRun;
using bf16_tiles::load_float_operands, bf16_tiles::pack_bf16, bf16_tiles::stage_offset;

constexpr int kGroup = 64;  // tokens
constexpr int kTokenTiles = kGroup / 8;
constexpr int kStages = 3;  // of the tokens' ring
constexpr int kStageBytes = kGroup * 128;

// One matrix of each expert.
struct Matrix {
  const uint8_t* data;
  int64_t expert_bytes, tile_bytes;
  int format, rows;
  int run_bytes;    // of 256 columns of a tile; 0 for float formats, which are read where they are
  int table_bytes;  // of the scales of a run as floats
};

// A product of the groups' rows with two matrices (gate and up) or one.
struct Product {
  Plan plan;
  Matrix matrices[2];
  const __nv_bfloat16* x;  // [rows, cols]
  __nv_bfloat16* out;      // [num_pairs, width]: hidden rows at their positions, or results at their pairs
  int cols, width, top_k;
  int slot_bytes, table_bytes;  // of a run in a warp's ring
};

// Where the scales of a row's index-th columns are: in different banks for different rows.
template <class F>
__device__ __forceinline__ int table_place(int row, int index) {
  return row * kRowEntries<F> + (index ^ (row & 7));
}

// The scales of a run as floats, {scale, offset} of each row's steps or halves of steps, by one warp.
template <class F>
__device__ void fill_table(const uint8_t* run, int num_units, float2* table) {
  using U = Unit<F>;
  constexpr int kPerUnit = U::kSteps * U::kHalves;
  const int row = threadIdx.x % 32 / 2, part = threadIdx.x % 2;
  if constexpr (kUnitsPerRun<F> == 1) {
    RowScales<F> scales;
    scales.load(run, row);
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) {
      const float2 entry = {scales.scale(i / U::kHalves, i % U::kHalves),
                            scales.offset(i / U::kHalves, i % U::kHalves)};
      if (i % 2 == part) table[table_place<F>(row, i)] = entry;
    }
  } else {
    for (int unit = part; unit < num_units; unit += 2) {
      RowScales<F> scales;
      scales.load(run + unit * U::kBytes, row);
#pragma unroll
      for (int i = 0; i < kPerUnit; ++i) {
        table[table_place<F>(row, unit * kPerUnit + i)] = {scales.scale(i / U::kHalves, i % U::kHalves),
                                                           scales.offset(i / U::kHalves, i % U::kHalves)};
      }
    }
  }
}

// Four codes as two registers of the A operand: the columns 4t, 4t + 1 and 4t + 2, 4t + 3, which take the places 2t, 2t + 1 and
// 8 + 2t, 8 + 2t + 1 of the instruction; the tokens' columns do the same.
template <bool kHasOffset>
__device__ __forceinline__ void unpack_codes(uint32_t codes, float2 scale, uint32_t& first,
                                             uint32_t& second) {
  const uint32_t biased = codes ^ 0x80808080u;
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float code = tiles::byte_to_float(biased, j, 128.0f);
    v[j] = kHasOffset ? fmaf(code, scale.x, scale.y) : code * scale.x;
  }
  first = pack_bf16(v[0], v[1]);
  second = pack_bf16(v[2], v[3]);
}

// The A operands of 64 columns: a[2 * step + half].
template <class F>
__device__ __forceinline__ void load_operands(const uint8_t* run, int pair, const float2* table,
                                              uint32_t (&a)[4][4]) {
  using U = Unit<F>;
  const int lane = threadIdx.x % 32, row = lane / 4;
  PairCodes<F> codes;
  codes.load(run + pair / U::kPairs * U::kBytes, lane, pair % U::kPairs);
  auto unpack_step = [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    uint32_t operand[4];
    codes.template operand<kStep>(operand);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (2 * pair + kStep) * U::kHalves + (U::kHalves == 2 ? half : 0);
      uint32_t (&to)[4] = a[2 * kStep + half];
      unpack_codes<U::kHasOffset>(operand[2 * half], table[table_place<F>(row, index)], to[0], to[2]);
      unpack_codes<U::kHasOffset>(operand[2 * half + 1], table[table_place<F>(row + 8, index)], to[1], to[3]);
    }
  };
  unpack_step(std::integral_constant<int, 0>());
  unpack_step(std::integral_constant<int, 1>());
}

// A warp's tile of weights with its ring.
template <int kSlots>
struct Tile {
  const uint8_t* data;  // null where the matrix has no such tile
  uint8_t* ring;        // [kSlots, slot_bytes]
  float2* table;
  int format, run_bytes, bytes, slot_bytes;

  __device__ uint8_t* slot(int run) const { return ring + run % kSlots * slot_bytes; }

  __device__ void issue(int run) const {
    const int begin = run * run_bytes, count = min(run_bytes, bytes - begin);
    for (int at = 16 * static_cast<int>(threadIdx.x % 32); at < count; at += 512) {
      ptx::copy_async(slot(run) + at, data + begin + at);
    }
  }

  // Once a run has come, before its operands are taken.
  __device__ void begin_run(int run) const {
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: return begin_run_of<type>(run);
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  }

  // The A operands of the pair-th 64 columns of `cols`.
  __device__ void operands(int pair, int cols, uint32_t (&a)[4][4]) const {
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: return operands_of<type>(pair, cols, a);
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void begin_run_of(int run) const {
    if constexpr (F::kScales != Scales::kPlain) {
      fill_table<F>(slot(run), min(run_bytes, bytes - run * run_bytes) / Unit<F>::kBytes, table);
    }
  }
  template <class F>
  __device__ __forceinline__ void operands_of(int pair, int cols, uint32_t (&a)[4][4]) const {
    if constexpr (F::kScales != Scales::kPlain) {
      load_operands<F>(slot(pair / 4), pair % 4, table, a);
    } else {
      load_float_operands<Float<F>>(data, kDeviceTileRows, 64 * pair, cols, a);
    }
  }
};

// hidden = silu(gate) * up of a group's tokens and 16 columns per warp, or their results in 32 columns per warp.
template <bool kGateUp, int kWarps,
          int kSlots>  // runs of weights that a warp has room for
__global__ void __launch_bounds__(32 * kWarps, 2) product_kernel(const __grid_constant__ Product product) {
  constexpr int kThreads = 32 * kWarps;
  constexpr int kBlockCols = kGateUp ? 16 * kWarps : 32 * kWarps;
  constexpr int kOutStride = kBlockCols + 8;
  __shared__ int rows[kGroup], pairs[kGroup];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* stages = dynamic_shared<uint8_t>();
  ptx::wait_for_producers();
  ptx::allow_consumers();
  if (static_cast<int>(blockIdx.y) >= *product.plan.num_groups) return;
  const Group group = product.plan.groups[blockIdx.y];
  const int cols = product.cols, num_pairs = (cols + 63) / 64;
  const int token_tiles = (group.count + 7) / 8;
  if (threadIdx.x < kGroup) {
    const int position = group.first + static_cast<int>(threadIdx.x);
    const bool is_there = static_cast<int>(threadIdx.x) < group.count;
    const int pair = is_there ? product.plan.order[position] : -1;
    pairs[threadIdx.x] = pair;
    rows[threadIdx.x] = !is_there ? -1 : kGateUp ? pair / product.top_k : position;
  }
  __syncthreads();

  Tile<kSlots> weights[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const Matrix& matrix = product.matrices[kGateUp ? m : 0];
    const int tile = kGateUp ? blockIdx.x * kWarps + warp : (blockIdx.x * kWarps + warp) * 2 + m;
    uint8_t* own =
        stages + kStages * kStageBytes + (2 * warp + m) * (kSlots * product.slot_bytes + product.table_bytes);
    const bool is_there = tile * kDeviceTileRows < matrix.rows;
    weights[m] = {
        is_there ? matrix.data + group.expert * matrix.expert_bytes + tile * matrix.tile_bytes : nullptr,
        own + product.table_bytes,
        reinterpret_cast<float2*>(own),
        matrix.format,
        matrix.run_bytes,
        static_cast<int>(matrix.tile_bytes),
        product.slot_bytes};
  }

  auto issue_weights = [&](int run) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (weights[m].data != nullptr) weights[m].issue(run);
  };
  // One group of copies per 64 columns; runs of weights go with the columns that come kStages - 1 before they begin.
  auto issue = [&](int pair) {
    if (pair < num_pairs) {
#pragma unroll
      for (int i = 0; i < kGroup * 8 / kThreads; ++i) {
        const int token = (threadIdx.x + i * kThreads) / 8, chunk = threadIdx.x % 8;
        if (token >= 8 * token_tiles) continue;
        const int row = rows[token], col = 64 * pair + 8 * chunk;
        const bool is_there = row >= 0 && col < cols;
        ptx::copy_async(stages + pair % kStages * kStageBytes + stage_offset(token, chunk),
                        product.x + (is_there ? static_cast<int64_t>(row) * cols + col : 0), is_there);
      }
      if (kSlots > 1 && pair % 4 == 0) issue_weights(pair / 4);
    }
    ptx::commit_copies();
  };
  float sums[2][kTokenTiles][4] = {};
  for (int pair = 0; pair < kStages - 1; ++pair) issue(pair);
  for (int pair = 0; pair < num_pairs; ++pair) {
    ptx::wait_for_copies<kStages - 2>();
    __syncthreads();
    if (kSlots == 1 && pair % 4 == 0) issue_weights(pair / 4);
    issue(pair + kStages - 1);
    if (weights[0].data == nullptr) continue;
    if (kSlots == 1 && pair % 4 == 0) {
      ptx::wait_for_copies<0>();
      __syncwarp();
    }
    uint32_t a[2][4][4] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (weights[m].data == nullptr) continue;
      if (pair % 4 == 0) {
        weights[m].begin_run(pair / 4);
        __syncwarp();
      }
      weights[m].operands(pair, cols, a[m]);
    }
    const uint8_t* stage = stages + pair % kStages * kStageBytes + lane % 2 * 8;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (n >= token_tiles) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint2 v =
            *reinterpret_cast<const uint2*>(stage + stage_offset(8 * n + lane / 4, 2 * k + lane % 4 / 2));
        const uint32_t b[2] = {v.x, v.y};
        ptx::mma_bf16(sums[0][n], a[0][k], b);
        ptx::mma_bf16(sums[1][n], a[1][k], b);
      }
    }
    __syncwarp();  // before the tables are filled again
  }

  // Through shared memory, so that a token's columns are written side by side.
  ptx::wait_for_copies<0>();
  __syncthreads();
  __nv_bfloat16* staged = reinterpret_cast<__nv_bfloat16*>(stages);
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      __nv_bfloat16* to = staged + (8 * n + lane % 4 * 2 + i % 2) * kOutStride;
      if constexpr (kGateUp) {
        const float gate = sums[0][n][i];
        to[16 * warp + row] = __float2bfloat16_rn(gate / (1.0f + __expf(-gate)) * sums[1][n][i]);
      } else {
        to[32 * warp + row] = __float2bfloat16_rn(sums[0][n][i]);
        to[32 * warp + 16 + row] = __float2bfloat16_rn(sums[1][n][i]);
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = kBlockCols / 8;
  for (int i = threadIdx.x; i < group.count * kChunks; i += kThreads) {
    const int token = i / kChunks, col = i % kChunks * 8, first_col = blockIdx.x * kBlockCols;
    if (first_col + col >= product.width) continue;
    const int64_t row = kGateUp ? group.first + token : pairs[token];
    *reinterpret_cast<uint4*>(product.out + row * product.width + first_col + col) =
        *reinterpret_cast<const uint4*>(staged + token * kOutStride + col);
  }
}

constexpr int kCombineThreads = 128;

// out = the weighted sum of each token's results and of the shared expert's.  Two columns per thread.
template <class S, class O>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __nv_bfloat16* results,  // [num_tokens, top_k, cols]
                   const float* weights,          // [num_tokens, slots]
                   const S* shared,               // [num_tokens, cols], or null
                   O* out, int cols, int top_k, int slots) {
  const int64_t token = blockIdx.y;
  const int col = 2 * (blockIdx.x * kCombineThreads + threadIdx.x);
  ptx::wait_for_producers();
  ptx::allow_consumers();
  if (col >= cols) return;
  const float* shares = weights + token * slots;
  float2 sum = {0.0f, 0.0f};
  for (int j = 0; j < top_k; ++j) {
    const float2 v = __bfloat1622float2(
        *reinterpret_cast<const __nv_bfloat162*>(results + (token * top_k + j) * cols + col));
    sum.x = fmaf(shares[j], v.x, sum.x), sum.y = fmaf(shares[j], v.y, sum.y);
  }
  if (shared != nullptr) {
    sum.x = fmaf(shares[top_k], to_float(shared[token * cols + col]), sum.x);
    sum.y = fmaf(shares[top_k], to_float(shared[token * cols + col + 1]), sum.y);
  }
  out[token * cols + col] = from_float<O>(sum.x);
  out[token * cols + col + 1] = from_float<O>(sum.y);
}

Matrix part_of(const WeightView& stack, int64_t num_experts, int64_t first_row, int64_t rows) {
  return with_format(static_cast<Format>(stack.format), [&](auto f) -> Matrix {
    using F = decltype(f);
    const int64_t tile = device_tile_bytes<F>(stack.cols);
    int run = 0, table = 0;
    if constexpr (F::kScales != Scales::kPlain) {
      run = kUnitsPerRun<F> * Unit<F>::kBytes;
      table = kDeviceTileRows * kRowEntries<F> * static_cast<int>(sizeof(float2));
    }
    return {stack.packed + first_row / kDeviceTileRows * tile,
            stack.rows / num_experts / kDeviceTileRows * tile,
            tile,
            stack.format,
            static_cast<int>(rows),
            run,
            table};
  });
}

template <bool kGateUp, int kWarps, int kSlots>
struct ProductLaunch {
  static constexpr int kBlockCols = (kGateUp ? 16 : 32) * kWarps;

  static int64_t shared_bytes(const Product& product) {
    const int64_t rings =
        kStages * kStageBytes + 2 * kWarps * (kSlots * product.slot_bytes + product.table_bytes);
    const int64_t staged = kGroup * (kBlockCols + 8) * static_cast<int64_t>(sizeof(__nv_bfloat16));
    return std::max(rings, staged);
  }
  static void launch(const Product& product, void* stream) {
    const dim3 grid((product.width + kBlockCols - 1) / kBlockCols,
                    static_cast<unsigned>(product.plan.max_groups));
    launch_kernel(product_kernel<kGateUp, kWarps, kSlots>,
                  {grid, dim3(32 * kWarps), stream, static_cast<size_t>(shared_bytes(product)), true},
                  product);
  }
};

template <bool kGateUp>
void launch_product(Product product, void* stream) {
  for (const Matrix& m : product.matrices) {
    product.slot_bytes = std::max(product.slot_bytes, m.run_bytes);
    product.table_bytes = std::max(product.table_bytes, m.table_bytes);
  }
  using Large = ProductLaunch<kGateUp, 8, 2>;
  if (Large::shared_bytes(product) + 1024 <= shared_memory()) {
    Large::launch(product, stream);
  } else {
    ProductLaunch<kGateUp, 4, 1>::launch(product, stream);
  }
}

// Everything between the launches.
struct Buffers {
  Routes routes;
  __nv_bfloat16 *hidden, *results;
  int64_t bytes;

  Buffers(uint8_t* base, const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
    Workspace space(base);
    const int64_t num_pairs = num_tokens * top_k;
    const int slots = static_cast<int>(top_k) + 1;
    int* ids = space.take<int>(num_pairs);
    float* shares = space.take<float>(num_tokens * slots);
    routes = {ids, shares, slots, space.take_plan(num_pairs, weights.router.rows, kGroup)};
    hidden = space.take<__nv_bfloat16>(num_pairs * weights.down.cols);
    results = space.take<__nv_bfloat16>(num_pairs * weights.router.cols);
    bytes = space.bytes();
  }
};

}  // namespace
}  // namespace helexa::moe

namespace helexa {

int64_t moe_many_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k) {
  return moe::Buffers(nullptr, weights, num_tokens, top_k).bytes;
}

void moe_many_cuda(const void* x, const float* logits, const float* shared_logits, MoeWeights weights,
                   bool normalize, const void* shared, int shared_dtype, void* out, int out_dtype,
                   uint8_t* workspace, int64_t num_tokens, int64_t top_k, void* stream) {
  using namespace moe;
  if (num_tokens == 0) return;
  const int64_t num_experts = weights.router.rows, cols = weights.router.cols, width = weights.down.cols;
  const Buffers buffers(workspace, weights, num_tokens, top_k);
  const Plan& plan = buffers.routes.plan;
  route_many(logits, shared_logits, buffers.routes, num_tokens, num_experts, top_k, normalize, kGroup,
             stream);

  const bool fused = weights.gate_up.size() == 1;
  const Matrix gate = part_of(weights.gate_up[0], num_experts, 0, width);
  const Matrix up = part_of(weights.gate_up[fused ? 0 : 1], num_experts, fused ? width : 0, width);
  const Matrix down = part_of(weights.down, num_experts, 0, cols);
  launch_product<true>({plan,
                        {gate, up},
                        static_cast<const __nv_bfloat16*>(x),
                        buffers.hidden,
                        static_cast<int>(cols),
                        static_cast<int>(width),
                        static_cast<int>(top_k),
                        0,
                        0},
                       stream);
  launch_product<false>({plan,
                         {down, down},
                         buffers.hidden,
                         buffers.results,
                         static_cast<int>(width),
                         static_cast<int>(cols),
                         static_cast<int>(top_k),
                         0,
                         0},
                        stream);
  const dim3 grid(static_cast<unsigned>((cols / 2 + kCombineThreads - 1) / kCombineThreads),
                  static_cast<unsigned>(num_tokens));
  with_dtype(static_cast<DType>(shared_dtype), [&](auto s) {
    with_dtype(static_cast<DType>(out_dtype), [&](auto o) {
      launch_kernel(combine_kernel<decltype(s), decltype(o)>, {grid, dim3(kCombineThreads), stream, 0, true},
                    buffers.results, buffers.routes.weights, static_cast<const decltype(s)*>(shared),
                    static_cast<decltype(o)*>(out), cols, top_k, buffers.routes.slots);
    });
  });
}

}  // namespace helexa
