// SPDX-License-Identifier: GPL-3.0-or-later
// Products of quantized weights with some tens to hundreds of rows in bfloat16, in one launch for all weights: packed tiles are read as
// they are, unpacked in registers and multiplied on the tensor cores.
//
// A block has 32 weight rows per warp (gated: 16 of both weights) and up to 128 rows of the input, which pass through a ring of runs of
// 64 columns that the block shares; bf16_tiles.cuh has the weights' side.  That makes few tiles of outputs, and so the work is dealt
// out in units of a tile times 256 columns: each block gets as many in a row as every other one.  A tile whose columns several blocks
// have is summed up by the one that ends last, in the order of the columns, from what all of them left in memory.  So a result depends on
// the shapes and the device, and not on which block was last.
#include <algorithm>
#include <stdexcept>

#include "ops/bf16_tiles.cuh"
#include "ops/quant_matmul.h"

namespace helexa {
namespace {

using bf16_tiles::kRunCols;

constexpr int kSlots = 2;                // runs of weights that a tile has room for
constexpr int kTileGroup = 4;            // tiles of 8 rows that are multiplied or left out together
constexpr int kMostOutputs = 256 * 128;  // of a block

struct Part {
  const uint8_t* weight;
  const float* bias;  // [rows], or null
  int64_t tile_bytes;
  int format, rows;
  int run_bytes;
  int column;      // of out
  int first_tile;  // of blocks' tiles of weight rows
};

struct Arguments {
  const __nv_bfloat16* x;  // [num_rows, cols]
  int num_rows, cols;
  int block_rows, row_blocks;  // rows of a block, and how many of them there are
  int num_chunks;              // of 256 columns
  int64_t num_units;           // chunks of all tiles
  int slot_bytes, table_bytes;
  void* out;  // [num_rows, out_stride] float32 or bfloat16
  int out_stride;
  bool is_float, is_gated;
  float* partials;  // [blocks, 2, outputs of a block]
  int* arrived;     // [blocks], zeros
  int num_parts;
  Part parts[kMaxMatvecWeights];
};

// The units of the block-th block begin here.
__device__ __forceinline__ int64_t first_unit(const Arguments& a, int64_t block) {
  return block * a.num_units / gridDim.x;
}
__device__ __forceinline__ int block_of(const Arguments& a, int64_t unit) {
  return static_cast<int>(((unit + 1) * gridDim.x - 1) / a.num_units);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <int kWarps,
          int kTiles>  // tiles of 8 rows of the input
struct Shape {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kStages = kTiles == 4 ? 5 : 3;
  static constexpr int kStageBytes = kRows * 128;
  static constexpr int kBlocks = kWarps == 8 ? 1 : kTiles == 16 ? 2 : 3;  // per multiprocessor
  static constexpr int kOutputs = 32 * kWarps * kRows;
  static_assert(kOutputs <= kMostOutputs && kStages <= 5);

  static size_t shared_bytes(const Arguments& a) {
    return kStages * kStageBytes + 2 * kWarps * (kSlots * a.slot_bytes + a.table_bytes);
  }
};

// The sums of a block over some chunks of one tile: sums[m][n] of its m-th tile of weights and the n-th 8 rows.
template <int kWarps, int kTiles>
struct Sums {
  using S = Shape<kWarps, kTiles>;
  float sum[2][kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.0f;
  }

  // Those of the first `rows` rows to memory of the block's own.
  __device__ __forceinline__ void store(float* memory, int rows) const {
    float4* to = reinterpret_cast<float4*>(memory) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= rows) break;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        to[(2 * n + m) * S::kThreads] = make_float4(sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]);
      }
    }
  }
  __device__ __forceinline__ void add(const float* memory, int rows) {
    const float4* from = reinterpret_cast<const float4*>(memory) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= rows) break;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float4 v = __ldcg(from + (2 * n + m) * S::kThreads);
        sum[m][n][0] += v.x, sum[m][n][1] += v.y, sum[m][n][2] += v.z, sum[m][n][3] += v.w;
      }
    }
  }
};

// What a block computes at a time: some chunks of one tile.
struct Segment {
  int64_t tile;
  int first_chunk, end_chunk;
  int first_row, num_rows;  // of the input
  int part, weight_tile;    // the first of the block's tiles of weights: of both parts if gated

  __device__ __forceinline__ Segment(const Arguments& a, int64_t unit, int64_t end, int num_warps) {
    tile = unit / a.num_chunks;
    first_chunk = static_cast<int>(unit - tile * a.num_chunks);
    end_chunk = static_cast<int>(min(static_cast<int64_t>(a.num_chunks), first_chunk + end - unit));
    const int block_tile = static_cast<int>(tile / a.row_blocks);
    first_row = static_cast<int>(tile % a.row_blocks) * a.block_rows;
    num_rows = min(a.block_rows, a.num_rows - first_row);
    part = 0;
    while (part + 1 < a.num_parts && !a.is_gated && block_tile >= a.parts[part + 1].first_tile) ++part;
    weight_tile = (block_tile - a.parts[part].first_tile) * num_warps * (a.is_gated ? 1 : 2);
  }
  __device__ __forceinline__ int part_of(const Arguments& a, int m) const { return a.is_gated ? m : part; }
  __device__ __forceinline__ int tile_of(const Arguments& a, int warp, int m) const {
    return weight_tile + (a.is_gated ? warp : 2 * warp + m);
  }
};

template <int kWarps, int kTiles>
__device__ __forceinline__ void multiply(Sums<kWarps, kTiles>& sums, const Arguments& a,
                                         const Segment& segment, uint8_t* stages, bool is_first) {
  using S = Shape<kWarps, kTiles>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  bf16_tiles::Tile<kSlots> weights[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const Part& part = a.parts[segment.part_of(a, m)];
    const int tile = segment.tile_of(a, warp, m), rows = part.rows - tile * kDeviceTileRows;
    uint8_t* own =
        stages + S::kStages * S::kStageBytes + (2 * warp + m) * (kSlots * a.slot_bytes + a.table_bytes);
    weights[m] = {rows > 0 ? part.weight + tile * part.tile_bytes : nullptr,
                  own + a.table_bytes,
                  own,
                  part.format,
                  rows,
                  part.run_bytes,
                  static_cast<int>(part.tile_bytes),
                  a.slot_bytes};
  }
  auto issue_weights = [&](int run) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (weights[m].data != nullptr) weights[m].issue(run);
  };
  const int first_pair = segment.first_chunk * 4;
  const int end_pair = min(segment.end_chunk * 4, (a.cols + 63) / 64);
  const int copied_rows = (segment.num_rows + 8 * kTileGroup - 1) / (8 * kTileGroup) * (8 * kTileGroup);
  // One group of copies per 64 columns; runs of weights go with the columns that come kStages - 1 before they begin.
  auto issue = [&](int pair) {
    if (pair < end_pair) {
      uint8_t* stage = stages + pair % S::kStages * S::kStageBytes;
#pragma unroll
      for (int i = 0; i < S::kRows * 8 / S::kThreads; ++i) {
        const int row = (static_cast<int>(threadIdx.x) + i * S::kThreads) / 8, chunk = threadIdx.x % 8;
        if (row >= copied_rows) break;
        const int col = 64 * pair + 8 * chunk;
        const bool is_there = row < segment.num_rows && col < a.cols;
        const int64_t from = is_there ? static_cast<int64_t>(segment.first_row + row) * a.cols + col : 0;
        ptx::copy_async(stage + bf16_tiles::stage_offset(row, chunk), a.x + from, is_there);
      }
      if (pair % 4 == 0 && pair > first_pair) issue_weights(pair / 4);
    }
    ptx::commit_copies();
  };
  issue_weights(segment.first_chunk);
  if (is_first) ptx::wait_for_producers();  // weights are nobody's product
  for (int pair = first_pair; pair < first_pair + S::kStages - 1; ++pair) issue(pair);
  for (int pair = first_pair; pair < end_pair; ++pair) {
    ptx::wait_for_copies<S::kStages - 2>();
    __syncthreads();
    issue(pair + S::kStages - 1);
    if (weights[0].data == nullptr) continue;
    uint32_t operand[2][4][4] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (weights[m].data == nullptr) continue;
      if (pair % 4 == 0) {
        weights[m].begin_run(pair / 4);
        __syncwarp();
      }
      weights[m].operands(pair, a.cols, operand[m]);
    }
    const uint8_t* stage = stages + pair % S::kStages * S::kStageBytes;
#pragma unroll
    for (int group = 0; group < kTiles / kTileGroup; ++group) {
      if (8 * kTileGroup * group >= segment.num_rows) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < kTileGroup; ++i) {
          const int n = kTileGroup * group + i;
          uint32_t b[2];
          bf16_tiles::load_input(stage, n, k, b);
          ptx::mma_bf16(sums.sum[0][n], operand[0][k], b);
          ptx::mma_bf16(sums.sum[1][n], operand[1][k], b);
        }
      }
    }
    __syncwarp();  // before the tables are filled again
  }
  ptx::wait_for_copies<0>();
}

// Whether `sums` became those of the whole tile: true in the block that comes last of those which have chunks of it.
template <int kWarps, int kTiles>
__device__ __forceinline__ bool meet(Sums<kWarps, kTiles>& sums, const Arguments& a, const Segment& segment) {
  __shared__ bool is_last;
  const int64_t unit = segment.tile * a.num_chunks;
  const int first = block_of(a, unit), last = block_of(a, unit + a.num_chunks - 1);
  auto memory = [&](int block) {
    const bool begins_here = first_unit(a, block) / a.num_chunks == segment.tile;
    return a.partials + (2 * static_cast<int64_t>(block) + !begins_here) * Shape<kWarps, kTiles>::kOutputs;
  };
  sums.store(memory(blockIdx.x), segment.num_rows);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(a.arrived + first, 1) == last - first;
    if (is_last) a.arrived[first] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  sums.clear();
  for (int block = first; block <= last; ++block) sums.add(memory(block), segment.num_rows);
  return true;
}

template <class T, int kWarps, int kTiles>
__device__ __forceinline__ void write(const Sums<kWarps, kTiles>& sums, const Arguments& a,
                                      const Segment& segment) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  T* out = static_cast<T*>(a.out) + static_cast<int64_t>(segment.first_row) * a.out_stride;
  int col[2][2];  // of the lane's rows of weights, -1 where there is none
  float bias[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Part& part = a.parts[segment.part_of(a, m)];
      const int row = segment.tile_of(a, warp, m) * kDeviceTileRows + lane / 4 + 8 * r;
      col[m][r] = row < part.rows ? part.column + row : -1;
      bias[m][r] = row < part.rows && part.bias != nullptr ? part.bias[row] : 0.0f;
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * n + lane % 4 * 2 + i % 2, r = i / 2;
      if (row >= segment.num_rows) continue;
      T* to = out + static_cast<int64_t>(row) * a.out_stride;
      const float first = sums.sum[0][n][i] + bias[0][r], second = sums.sum[1][n][i] + bias[1][r];
      if (a.is_gated) {
        if (col[0][r] >= 0) to[col[0][r]] = from_float<T>(silu(first) * second);
      } else {
        if (col[0][r] >= 0) to[col[0][r]] = from_float<T>(first);
        if (col[1][r] >= 0) to[col[1][r]] = from_float<T>(second);
      }
    }
  }
}

template <int kWarps, int kTiles>
__global__ void __launch_bounds__(32 * kWarps, Shape<kWarps, kTiles>::kBlocks)
    middle_kernel(const __grid_constant__ Arguments a) {
  uint8_t* stages = dynamic_shared<uint8_t>();
  ptx::allow_consumers();
  const int64_t begin = first_unit(a, blockIdx.x), end = first_unit(a, blockIdx.x + 1);
  for (int64_t unit = begin; unit < end;) {
    const Segment segment(a, unit, end, kWarps);
    unit += segment.end_chunk - segment.first_chunk;
    Sums<kWarps, kTiles> sums;
    sums.clear();
    multiply(sums, a, segment, stages, unit - (segment.end_chunk - segment.first_chunk) == begin);
    __syncthreads();  // the rings are free
    const bool is_whole = segment.end_chunk - segment.first_chunk == a.num_chunks;
    if (!is_whole && !meet(sums, a, segment)) continue;
    if (a.is_float) {
      write<float>(sums, a, segment);
    } else {
      write<__nv_bfloat16>(sums, a, segment);
    }
  }
}

// Shared memory of a multiprocessor, and what a block of it may have.
struct SharedMemory {
  int64_t multiprocessor, block;
};

SharedMemory shared_memory() {
  return {device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(228 * 1024),
          device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(227 * 1024)};
}

constexpr int kReserved = 1024;  // bytes of shared memory that a block takes besides

// Bytes of a counter for each block, of which there are at most three per multiprocessor.
int64_t counter_bytes() { return (3 * num_multiprocessors() * sizeof(int) + 255) / 256 * 256; }

// Divides the work into tiles of the shape and launches; false if the device has too little shared memory for it.
template <int kWarps, int kTiles>
bool try_launch(Arguments a, void* stream) {
  using S = Shape<kWarps, kTiles>;
  const SharedMemory memory = shared_memory();
  const int64_t shared_bytes = static_cast<int64_t>(S::shared_bytes(a));
  if (shared_bytes + kReserved > memory.block) return false;
  a.row_blocks = (a.num_rows + S::kRows - 1) / S::kRows;
  a.block_rows = ((a.num_rows + a.row_blocks - 1) / a.row_blocks + 7) / 8 * 8;
  int64_t tiles = 0;
  for (int i = 0; i < (a.is_gated ? 1 : a.num_parts); ++i) {
    const int rows = (a.is_gated ? 16 : 32) * kWarps;
    a.parts[i].first_tile = static_cast<int>(tiles);
    tiles += (a.parts[i].rows + rows - 1) / rows;
  }
  a.num_units = tiles * a.row_blocks * a.num_chunks;
  const int64_t resident =
      std::clamp<int64_t>(memory.multiprocessor / (shared_bytes + kReserved), 1, S::kBlocks);
  const auto blocks = static_cast<unsigned>(std::min(a.num_units, resident * num_multiprocessors()));
  launch_kernel(middle_kernel<kWarps, kTiles>,
                {dim3(blocks), dim3(S::kThreads), stream, static_cast<size_t>(shared_bytes), true}, a);
  return true;
}

}  // namespace

int64_t middle_matmul_workspace_bytes() {
  const int64_t outputs = std::max({2 * Shape<4, 16>::kOutputs, 3 * Shape<4, 8>::kOutputs,
                                    3 * Shape<4, 4>::kOutputs, Shape<8, 16>::kOutputs});
  return num_multiprocessors() * 2 * outputs * static_cast<int64_t>(sizeof(float)) + counter_bytes();
}

void middle_matmul_cuda(const void* x, int64_t num_rows, std::vector<WeightView> weights, bool gated,
                        void* out, int out_dtype, uint8_t* workspace, void* stream) {
  if (num_rows == 0) return;
  if (weights.empty() || weights.size() > kMaxMatvecWeights || (gated && weights.size() != 2)) {
    throw std::invalid_argument("middle_matmul: a number of weights that does not fit one launch");
  }
  Arguments a = {};
  a.x = static_cast<const __nv_bfloat16*>(x);
  a.num_rows = static_cast<int>(num_rows);
  a.cols = static_cast<int>(weights[0].cols);
  a.num_chunks = (a.cols + kRunCols - 1) / kRunCols;
  a.out = out;
  a.is_float = static_cast<DType>(out_dtype) == DType::kF32;
  a.is_gated = gated;
  a.arrived = reinterpret_cast<int*>(workspace);
  a.partials = reinterpret_cast<float*>(workspace + counter_bytes());
  a.num_parts = static_cast<int>(weights.size());
  for (int i = 0; i < a.num_parts; ++i) {
    const WeightView& w = weights[i];
    const bf16_tiles::TileSizes sizes = bf16_tiles::tile_sizes(w.format, w.cols);
    const int column = gated ? 0 : a.out_stride;
    a.parts[i] = {w.packed, w.bias, sizes.tile, w.format, static_cast<int>(w.rows), sizes.run, column, 0};
    a.out_stride = column + a.parts[i].rows;
    a.slot_bytes = std::max(a.slot_bytes, sizes.run);
    a.table_bytes = std::max(a.table_bytes, sizes.table);
  }
  // Blocks of 8 warps read the input half as often; they are worth it where there are enough of them to meet seldom.
  const int64_t row_blocks = (num_rows + 127) / 128;
  const bool is_large = a.out_stride * row_blocks * (gated ? 2 : 1) >= 128 * num_multiprocessors();
  if (num_rows > 64 && is_large && try_launch<8, 16>(a, stream)) return;
  if (num_rows > 64 && try_launch<4, 16>(a, stream)) return;
  if (num_rows > 32 && try_launch<4, 8>(a, stream)) return;
  if (try_launch<4, 4>(a, stream)) return;
  throw std::invalid_argument("middle_matmul: the device has too little shared memory");
}

}  // namespace helexa
