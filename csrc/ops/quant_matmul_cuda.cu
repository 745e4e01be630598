// SPDX-License-Identifier: GPL-3.0-or-later
// Products of quantized weights with 1 to 16 rows, which memory's bandwidth bounds.
//
// A block has one or a few tiles of 16 weight rows of one weight (gated: 32 rows of both) and all of K: its warps take the chunks of 256
// columns in turn, so that even a small matrix keeps many of them busy, each of them a chunk of all tiles before the next, so that
// activations are read and prepared once.  Their sums meet in shared memory.  Each warp streams its chunks, which are contiguous runs
// of bytes whatever the format, through a ring in shared memory that it fills by itself: no barrier stands between a warp and its next
// bytes, and the bytes in flight do not depend on registers.  The ring is filled before the kernel waits for its
// input, so that weights arrive while the kernels before this one still run; with a few thousand columns that is all of a block's
// weights.
//
// matvec.cuh has the products.  1 row takes kSplit 8, 2 to 4 rows kSplit 2, 5 to 8 rows kSplit 1; beyond, there are 2 tiles of 8 rows,
// and more than 16 rows are launched 16 at a time.  Weights of float formats, which are small or rare, are multiplied by a plain
// loop of each warp over whole rows.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "ops/matvec.cuh"
#include "ops/quant_matmul.h"

namespace helexa {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 4;
// Blocks for which registers and rings leave room: where there are fewer, the blocks of many a matrix come in two rounds, but what does
// not fit into the registers goes through the caches, and costs more.
constexpr int blocks_per_multiprocessor(int num_tokens) {
  return num_tokens == 1 ? 3 : num_tokens <= 8 ? 2 : 1;
}
constexpr int kMaxTokens = 16;  // of a launch; of more the sums of a warp do not fit into its registers
constexpr int kTileRows = kDeviceTileRows;
constexpr int kMaxBlockTiles = 4;
constexpr int kMinBlocksPerMultiprocessor = 6;  // of a block with several tiles
constexpr int kGatedRows = 32;  // outputs of a gated block: one block of columns of the next matmul
constexpr int kGatedTiles = 4;
constexpr int kNormRows = 32;  // outputs of a block that a norm follows: the same
constexpr int kNormTiles = 2;
constexpr int kMaxNormWarps = 16, kFewestNormWarps = 8;  // so that each of 8 input rows has a warp

struct Part {
  const uint8_t* weight;
  const float* bias;  // [rows], or null
  int format, rows;
  int column;       // of out
  int first_block;  // of the grid
  int tile_bytes, chunk_bytes;
};

struct Arguments {
  const uint8_t* q8;  // [num_tokens, activation_row_bytes(cols)]
  const float* x;     // [num_tokens, cols], or null
  // [num_tokens, activation_squares(cols)] of rows that are to be divided by their root mean square, or null
  const float* squares;
  float eps;
  int num_tokens, cols;
  int num_parts, num_chunks;      // chunks of 256 columns
  int warp_chunks, extra_chunks;  // num_chunks over and modulo the number of warps
  int num_stages, stage_bytes;
  int block_tiles;  // of a block that is not gated
  int out_stride;
  float* out;      // [num_tokens, out_stride]; null if gated
  uint8_t* gated;  // [num_tokens, activation_row_bytes(parts[0].rows)], or null
  Part parts[kMaxMatvecWeights];
};

__device__ __forceinline__ bool is_float(int format) { return format <= static_cast<int>(Format::kBF16); }

// The tiles that a block computes: of one weight, but those of a gated block are by turns gate's and up's.  Tiles of one format are a
// group, whose chunks are taken together: all, or gate's and up's where these differ.
struct BlockTiles {
  int first_part, first_tile, count, num_groups;
  bool is_gated;

  __device__ __forceinline__ explicit BlockTiles(const Arguments& a) : is_gated(a.gated != nullptr) {
    const int block = static_cast<int>(blockIdx.x);
    first_part = 0;
    num_groups = 1;
    if (is_gated) {
      first_tile = 2 * block;
      count = (first_tile + 1) * kTileRows < a.parts[0].rows ? 4 : 2;
      if (a.parts[0].format != a.parts[1].format) num_groups = 2;
    } else {
      while (first_part + 1 < a.num_parts && block >= a.parts[first_part + 1].first_block) ++first_part;
      const Part& part = a.parts[first_part];
      first_tile = (block - part.first_block) * a.block_tiles;
      count = min(a.block_tiles, (part.rows + kTileRows - 1) / kTileRows - first_tile);
    }
  }
  __device__ __forceinline__ int part(int i) const { return is_gated ? i % 2 : first_part; }
  __device__ __forceinline__ int tile(int i) const { return first_tile + (is_gated ? i / 2 : i); }
  // Tile i is followed by tile i + num_groups of its group.
  __device__ __forceinline__ int group_size() const { return num_groups == 2 ? count / 2 : count; }
};

// The ring of one warp: the stages, each of which is filled anew once it was used, and the chunks that come next.  Lane i knows where
// those of tile i are.  Where there are bulk copies it starts one for a chunk, else all lanes copy 16 bytes at a time.
struct Ring {
  uint8_t* memory;
  uint64_t* barriers;   // one for each stage
  int stage = 0;        // that is used next
  uint32_t parity = 0;  // of the phase in which the stages' copies are waited for
  int group = -1;       // that is being fetched
  int tile = 0;         // of it that comes next
  int left = 0;         // chunks of the group to be fetched
  // Of the lane's tile: its next chunk, its bytes from there on, and those of a chunk.
  const uint8_t* from = nullptr;
  int tile_bytes = 0, bytes = 0;

  __device__ __forceinline__ void start(const Arguments& a, const BlockTiles& tiles, uint8_t* stages,
                                        uint64_t* stage_barriers, int warp, int num_warps, int lane) {
    memory = stages;
    barriers = stage_barriers;
    if (lane < tiles.count) {
      const Part& part = a.parts[tiles.part(lane)];
      bytes = part.chunk_bytes;
      tile_bytes = part.tile_bytes - warp * bytes;
      from = part.weight + (static_cast<int64_t>(tiles.tile(lane)) * part.tile_bytes + warp * bytes);
    }
    if (ptx::has_bulk_copies()) {
      if (lane < kMaxStages) ptx::make_copy_barrier(barriers + lane);
      __syncwarp();
    }
    for (int i = 0; i < a.num_stages; ++i) fetch(a, tiles, i, warp, num_warps, lane);
  }

  // The next chunk to use, once it is there.
  __device__ __forceinline__ const uint8_t* wait(const Arguments& a) {
    if (ptx::has_bulk_copies()) {
      ptx::wait_for_bulk(barriers + stage, parity);
    } else {
      switch (a.num_stages) {
        case 1: ptx::wait_for_copies<0>(); break;
        case 2: ptx::wait_for_copies<1>(); break;
        case 3: ptx::wait_for_copies<2>(); break;
        default: ptx::wait_for_copies<3>(); break;
      }
      __syncwarp();
    }
    return memory + stage * a.stage_bytes;
  }

  // Done with that chunk: its stage is filled with another one.
  __device__ __forceinline__ void next(const Arguments& a, const BlockTiles& tiles, int warp, int num_warps,
                                       int lane) {
    __syncwarp();  // all lanes are done with it
    fetch(a, tiles, stage, warp, num_warps, lane);
    if (++stage == a.num_stages) stage = 0, parity ^= 1;
  }

 private:
  __device__ __forceinline__ void fetch(const Arguments& a, const BlockTiles& tiles, int into, int warp,
                                        int num_warps, int lane) {
    while (left == 0 && group + 1 < tiles.num_groups) {
      tile = ++group;
      if (!is_float(a.parts[tiles.part(group)].format)) {
        left = (a.warp_chunks + (warp < a.extra_chunks)) * tiles.group_size();
      }
    }
    if (left > 0) {
      --left;
      uint8_t* to = memory + into * a.stage_bytes;
      const int size = min(bytes, tile_bytes);
      if (ptx::has_bulk_copies()) {
        if (lane == tile) ptx::copy_bulk(to, from, size, barriers + into);
        __syncwarp();
      } else {
        const auto source = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(from), tile);
        const int all = __shfl_sync(0xffffffffu, size, tile);
        for (int i = 16 * lane; i < all; i += 512)
          ptx::copy_async(to + i, reinterpret_cast<const uint8_t*>(source) + i);
      }
      if (lane == tile) from += num_warps * bytes, tile_bytes -= num_warps * bytes;
      tile += tiles.num_groups;
      if (tile >= tiles.count) tile = group;
    }
    if (!ptx::has_bulk_copies()) ptx::commit_copies();  // also of nothing: the groups are counted
  }
};
static_assert(kMaxStages == 4, "Ring::wait");

// The activations that a warp multiplies by: those of a chunk, each of which makes room for that of the next chunk after its last use.
template <int kSplit, int kTiles>
struct Input {
  LaneActivations<kSplit> x[kTiles];
  const uint8_t* rows[kTiles];
  int padded_cols;

  __device__ __forceinline__ Input(const Arguments& a, int lane) {
    const InputRows all(a.q8, a.num_tokens, a.cols);
    padded_cols = all.padded_cols;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      rows[n] = kSplit == 8 ? a.q8 : all.row(8 * n + LaneColumns<kSplit>::operand_row(lane >> 2));
    }
  }

  __device__ __forceinline__ void start(int lane, int chunk) {
    const int first_pair = chunk * kChunkPairs, num_pairs = padded_cols / 64 - first_pair;
    if (num_pairs <= 0) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      x[n].template load<false>(rows[n], padded_cols, lane, first_pair, num_pairs);
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_codes(int lane, int chunk, int j) {
    const int first_pair = chunk * kChunkPairs, num_pairs = padded_cols / 64 - first_pair;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      x[n].template load_codes<kWhole>(rows[n], lane, first_pair, num_pairs, j);
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_scales(int lane, int chunk) {
    const int first_pair = chunk * kChunkPairs, num_pairs = padded_cols / 64 - first_pair;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      x[n].template load_scales<kWhole>(rows[n], padded_cols, lane, first_pair, num_pairs);
  }

  // The scales of the chunk whose scales were loaded.
  struct Scales {
    LaneScales<kSplit> of[kTiles];
  };
  template <int... n>
  __device__ __forceinline__ Scales scales(int lane, std::integer_sequence<int, n...>) const {
    return {{LaneScales<kSplit>(x[n], lane)...}};
  }
};

// This warp's chunks of a group of tiles.  `input` has the activations of the first, and of the first again in the end.  sums: the warp's,
// of the block's first tile; those of the next one are sums_stride floats behind them.
template <class F, int kSplit, int kTiles>
__device__ __forceinline__ void multiply_group(float* sums, int sums_stride, const Arguments& a,
                                               Input<kSplit, kTiles>& input, Ring& ring,
                                               const BlockTiles& tiles, int group, int warp, int num_warps,
                                               int lane) {
  constexpr bool kWhole = Unit<F>::kPairs == kChunkPairs;
  for (int chunk = warp; chunk < a.num_chunks; chunk += num_warps) {
    const int num_pairs = min(kChunkPairs, input.padded_cols / 64 - chunk * kChunkPairs);
    const int next = chunk + num_warps < a.num_chunks ? chunk + num_warps : warp;
    const auto scales = input.scales(lane, std::make_integer_sequence<int, kTiles>());
    input.template load_scales<kWhole>(lane, next);
    for (int i = group; i < tiles.count; i += tiles.num_groups) {
      const bool is_last = i + tiles.num_groups >= tiles.count;
      const uint8_t* stage = ring.wait(a);
      LaneSums chunk_sums[kTiles];
      multiply_chunk<F>(chunk_sums, stage, lane, num_pairs, input.x, scales.of, [&](int j) {
        if (is_last) input.template load_codes<kWhole>(lane, next, j);
      });
      ring.next(a, tiles, warp, num_warps, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        SumsInMemory<kSplit>::add(sums + i * sums_stride + n * num_warps * SumsInMemory<kSplit>::kFloats,
                                  chunk_sums[n], chunk == warp, lane);
      }
    }
  }
}

template <class T>
struct FloatVector;
template <>
struct FloatVector<float> {
  static __device__ __forceinline__ void load(const float* p, float (&w)[8]) {
    const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
  }
};
template <class T>
struct FloatVector {
  static __device__ __forceinline__ void load(const T* p, float (&w)[8]) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T pair[2];
      memcpy(pair, &words[i], 4);
      w[2 * i] = to_float(pair[0]), w[2 * i + 1] = to_float(pair[1]);
    }
  }
};

// Eight columns of a row of the input, the first a multiple of 8.
__device__ __forceinline__ void load_input(const Arguments& a, int64_t row, int col, float (&x)[8]) {
  if (a.x != nullptr) {
    FloatVector<float>::load(a.x + row * a.cols + col, x);
    return;
  }
  const uint8_t* codes = a.q8 + row * activation_row_bytes(a.cols);
  const float scale = q8_scales(codes, a.cols)[col / 32].x;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + q8_offset(col + 4 * i));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x[4 * i + j] = static_cast<float>(static_cast<int8_t>(word >> (8 * j))) * scale;
  }
}

// Rows of a tile of floats against a tile of rows of the input.
template <class T, int kSplit>
__device__ __forceinline__ void multiply_floats(const Arguments& a, const Part& part, int tile,
                                                int first_token, float* sums, int warp, int num_warps,
                                                int lane) {
  const int num_tokens = min(8 / kSplit, a.num_tokens - first_token);
  const int num_rows = min(kTileRows, part.rows - tile * kTileRows);
  for (int i = warp; i < num_rows * num_tokens; i += num_warps) {
    const int r = i / num_tokens, t = i % num_tokens;
    const T* weight =
        reinterpret_cast<const T*>(part.weight) + static_cast<int64_t>(tile * kTileRows + r) * a.cols;
    const int64_t token = first_token + t;
    float sum = 0.0f;
    if (a.cols % 8 == 0) {
#pragma unroll 2
      for (int col = 8 * lane; col < a.cols; col += 256) {
        float w[8], x[8];
        FloatVector<T>::load(weight + col, w);
        load_input(a, token, col, x);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = fmaf(w[k], x[k], sum);
      }
    } else {
      for (int col = lane; col < a.cols; col += 32) {
        const float x = a.x != nullptr ? a.x[token * a.cols + col]
                                       : q8_value(a.q8 + token * activation_row_bytes(a.cols), a.cols, col);
        sum = fmaf(to_float(weight[col]), x, sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[SumsInMemory<kSplit>::place(t, r)] = sum;
  }
}

// The tiles of a group that is not quantized.  sums: the first warp's, as all others' are in multiply_group.
template <int kSplit, int kTiles>
__device__ __forceinline__ void multiply_float_group(float* sums, int sums_stride, const Arguments& a,
                                                     const BlockTiles& tiles, int group, int warp,
                                                     int num_warps, int lane) {
  for (int i = group; i < tiles.count; i += tiles.num_groups) {
    const Part& part = a.parts[tiles.part(i)];
    for (int n = 0; n < kTiles; ++n) {
      const int tile = tiles.tile(i);
      float* to = sums + i * sums_stride + n * num_warps * SumsInMemory<kSplit>::kFloats;
      if (part.format == static_cast<int>(Format::kF32)) {
        multiply_floats<float, kSplit>(a, part, tile, 8 * n, to, warp, num_warps, lane);
      } else if (part.format == static_cast<int>(Format::kF16)) {
        multiply_floats<__half, kSplit>(a, part, tile, 8 * n, to, warp, num_warps, lane);
      } else {
        multiply_floats<__nv_bfloat16, kSplit>(a, part, tile, 8 * n, to, warp, num_warps, lane);
      }
    }
  }
}

// All tiles of the block.  Sums: [tiles][kTiles][num_warps][SumsInMemory::kFloats], of which floats write the first warp's only.
template <int kSplit, int kTiles>
__device__ __forceinline__ void multiply_tiles(float* sums, const Arguments& a, Input<kSplit, kTiles>& input,
                                               Ring& ring, const BlockTiles& tiles, int warp, int num_warps,
                                               int lane) {
  constexpr int kFloats = SumsInMemory<kSplit>::kFloats;
  const int sums_stride = kTiles * num_warps * kFloats;
  for (int group = 0; group < tiles.num_groups; ++group) {
    const int format = a.parts[tiles.part(group)].format;
    if (is_float(format)) {
      multiply_float_group<kSplit, kTiles>(sums, sums_stride, a, tiles, group, warp, num_warps,
                                           ptx::opaque(lane));
    }
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name)                                                                  \
  case Format::k##type:                                                                            \
    if constexpr (type::kScales != Scales::kPlain) {                                               \
      multiply_group<type>(sums + warp * kFloats, sums_stride, a, input, ring, tiles, group, warp, \
                           num_warps, ptx::opaque(lane));                                          \
    }                                                                                              \
    break;
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  }
}

// A product that multiply_tiles has left: of weight row r of tile i with row `token` of tile n of the input.
template <int kSplit, int kTiles>
__device__ __forceinline__ float find_product(const float* sums, const Arguments& a, int format, int i, int n,
                                              int token, int r, int num_warps) {
  constexpr int kFloats = SumsInMemory<kSplit>::kFloats;
  const float* from = sums + (i * kTiles + n) * num_warps * kFloats + SumsInMemory<kSplit>::place(token, r);
  float sum = 0.0f;
  const int num_sums = is_float(format) ? 1 : min(num_warps, a.num_chunks);
  for (int w = 0; w < num_sums; ++w) sum += from[w * kFloats];
  return sum;
}

// Copies the sums of squares of the rows to shared memory, each warp those of its own rows: warp, warp + num_warps, ….
__device__ __forceinline__ void fetch_squares(const Arguments& a, float* squares, int warp, int num_warps,
                                              int lane) {
  if (a.squares == nullptr) return;
  const int count = static_cast<int>(activation_squares(a.cols));
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    for (int i = 4 * lane; i < count; i += 128)
      ptx::copy_async(squares + token * count + i, a.squares + token * count + i);
  }
}

// What the products of each row are multiplied by, computed by the warps that have fetched the squares.  A barrier comes after.
__device__ __forceinline__ void find_factors(const Arguments& a, const float* squares, float* factors,
                                             int warp, int num_warps, int lane) {
  if (a.squares != nullptr) {
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncwarp();
  }
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    const float factor = a.squares == nullptr
                             ? 1.0f
                             : norm_factor(squares + token * activation_squares(a.cols), a.cols, a.eps);
    if (lane == 0) factors[token] = factor;
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <int kSplit,  // how many steps share the columns of a matrix instruction; up to 8 / kSplit rows
          int kTiles>  // tiles of 8 rows
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_per_multiprocessor(8 / kSplit * kTiles))
    matvec_kernel(const __grid_constant__ Arguments a) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  constexpr int kTokens = 8 / kSplit;     // of a tile of input rows
  float* sums = dynamic_shared<float>();  // of multiply_tiles
  float* gated = sums + (a.gated != nullptr ? kGatedTiles : a.block_tiles) * kTiles * num_warps *
                            SumsInMemory<kSplit>::kFloats;
  const BlockTiles tiles(a);
  __shared__ uint64_t barriers[kMaxWarps * kMaxStages];
  __shared__ float factors[8 * kTiles];
  float* squares = gated + (a.gated != nullptr ? 2 * 8 * kTiles * kGatedRows : 0);
  uint8_t* rings = reinterpret_cast<uint8_t*>(
      squares + (a.squares != nullptr ? a.num_tokens * activation_squares(a.cols) : 0));
  ptx::allow_consumers();
  Ring ring;
  ring.start(a, tiles, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, warp,
             num_warps, lane);
  Input<kSplit, kTiles> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  fetch_squares(a, squares, warp, num_warps, lane);

  multiply_tiles(sums, a, input, ring, tiles, warp, num_warps, lane);
  find_factors(a, squares, factors, warp, num_warps, lane);
  __syncthreads();

  for (int k = static_cast<int>(threadIdx.x); k < tiles.count * kTiles * kTokens * kTileRows;
       k += static_cast<int>(blockDim.x)) {
    const int r = k % kTileRows, i = k / (kTileRows * kTokens * kTiles);
    const int n = k / (kTileRows * kTokens) % kTiles, token = k / kTileRows % kTokens;
    const Part& part = a.parts[tiles.part(i)];
    const int row = tiles.tile(i) * kTileRows + r, input_row = 8 * n + token;
    if (row >= part.rows || input_row >= a.num_tokens) continue;
    float sum = find_product<kSplit, kTiles>(sums, a, part.format, i, n, token, r, num_warps);
    sum *= factors[input_row];
    if (part.bias != nullptr) sum += part.bias[row];
    if (a.gated == nullptr) {
      a.out[static_cast<int64_t>(input_row) * a.out_stride + part.column + row] = sum;
    } else {
      gated[(i % 2 * 8 * kTiles + input_row) * kGatedRows + i / 2 * kTileRows + r] = sum;
    }
  }

  if (a.gated == nullptr) return;
  __syncthreads();
  const int rows = a.parts[0].rows;
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    const float* gate = gated + token * kGatedRows;
    const float* up = gate + 8 * kTiles * kGatedRows;
    const bool exists = static_cast<int>(blockIdx.x) * kGatedRows + lane < rows;
    quantize_lanes(exists ? silu(gate[lane]) * up[lane] : 0.0f, a.gated + token * activation_row_bytes(rows),
                   rows, blockIdx.x);
  }
}

// What a product writes that ends a block of a model: the residual with it added, and the next norm of that but for the division by
// the root mean square.
struct NormOutput {
  float* residual;      // [num_tokens, rows]
  const float* weight;  // [rows], the norm's; not __restrict__, such loads sink below the wait
  uint8_t* q8;          // [num_tokens, activation_row_bytes(rows)]
  float* x;             // [num_tokens, rows], or null
  float* squares;       // [num_tokens, activation_squares(rows)]
};

// A block has 32 weight rows: two tiles, and one block of columns of the next matmul.
template <int kSplit>
__global__ void __launch_bounds__(kSplit == 8 ? 768 : 512)  // threads that there are registers for
    add_norm_kernel(const __grid_constant__ Arguments a, const __grid_constant__ NormOutput out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  float* sums = dynamic_shared<float>();  // of multiply_tiles
  uint8_t* rings = reinterpret_cast<uint8_t*>(sums + kNormTiles * num_warps * SumsInMemory<kSplit>::kFloats);
  __shared__ uint64_t barriers[kMaxNormWarps * kMaxStages];
  const Part& part = a.parts[0];
  const BlockTiles tiles(a);
  ptx::allow_consumers();
  Ring ring;
  ring.start(a, tiles, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, warp,
             num_warps, lane);
  // In the end a warp has a row, each of its lanes a column.
  const int block = static_cast<int>(blockIdx.x), column = block * kNormRows + lane;
  const bool exists = warp < a.num_tokens && column < part.rows;
  const int64_t place = static_cast<int64_t>(warp) * part.rows + column;
  const float scale = exists ? out.weight[column] : 0.0f;
  const float bias = exists && part.bias != nullptr ? part.bias[column] : 0.0f;
  Input<kSplit, 1> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  const float before = exists ? out.residual[place] : 0.0f;

  multiply_tiles(sums, a, input, ring, tiles, warp, num_warps, lane);
  __syncthreads();
  if (warp >= a.num_tokens) return;

  float value =
      find_product<kSplit, 1>(sums, a, part.format, lane / kTileRows, 0, warp, lane % kTileRows, num_warps);
  value = exists ? before + (value + bias) : 0.0f;
  const float square = warp_sum(value * value), scaled = value * scale;
  quantize_lanes(scaled, out.q8 + warp * activation_row_bytes(part.rows), part.rows, block);
  if (exists) {
    out.residual[place] = value;
    if (out.x != nullptr) out.x[place] = scaled;
  }
  const int count = static_cast<int>(activation_squares(part.rows));
  float* squares = out.squares + warp * count;
  if (lane == 0) squares[block] = square;
  if (column + 32 >= part.rows + lane && lane > 0 && block + lane < count) squares[block + lane] = 0.0f;
}

constexpr int kQuantizeWarps = 4;

template <class T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_rows_kernel(const T* x,   // [num_tokens, cols]
                         uint8_t* q8,  // [num_tokens, activation_row_bytes(cols)]
                         int64_t cols) {
  ptx::allow_consumers();
  ptx::wait_for_producers();
  const int64_t row = blockIdx.y;
  const int64_t col = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  float v[4] = {};
  for (int i = 0; i < 4; ++i) {
    if (col + i < cols) v[i] = to_float(x[row * cols + col + i]);
  }
  quantize_quads(make_float4(v[0], v[1], v[2], v[3]), q8 + row * activation_row_bytes(cols), cols, col / 32);
}

// Shared memory that a block may take so that `blocks` of them fit on a multiprocessor of this device.
int shared_memory_per_block(int blocks) {
#ifdef HELEXA_EMULATED_CUDA
  return 72 * 1024;
#else
  const int total = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(0);
  const int fixed = 8 * kMaxWarps * kMaxStages + 4 * kMaxTokens;  // barriers, factors
  return total / blocks - 1024 - fixed;                           // 1 KiB is the system's
#endif
}

template <int kSplit, int kTiles>
void launch_matvec(const Arguments& a, int num_blocks, int num_warps, size_t shared_bytes, void* stream) {
  launch_kernel(matvec_kernel<kSplit, kTiles>,
                {dim3(num_blocks), dim3(32 * num_warps), stream, shared_bytes, true}, a);
}

// The part of a launch that multiplies weight `w`, and the bytes that a stage needs for it.
int describe(Part& part, const WeightView& w, int cols, int column, int first_block) {
  part = {w.packed, w.bias, w.format, static_cast<int>(w.rows), column, first_block, 0, 0};
  with_format(static_cast<Format>(w.format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales != Scales::kPlain) {
      part.tile_bytes = static_cast<int>(device_tile_bytes<F>(cols));
      part.chunk_bytes = chunk_bytes<F>();
    }
  });
  return part.chunk_bytes;
}

// Fills in what follows from the shapes and launches.
void run_matvec(Arguments a, const std::vector<WeightView>& weights, void* stream) {
  if (weights.empty() || weights.size() > kMaxMatvecWeights) {
    throw std::invalid_argument("quant_matmul: too many weights for one launch");
  }
  a.num_parts = static_cast<int>(weights.size());
  a.num_chunks = (a.cols + kChunkCols - 1) / kChunkCols;
  int64_t num_tiles = 0;
  for (const WeightView& w : weights) num_tiles += (w.rows + kTileRows - 1) / kTileRows;
  // Of a large matrix a block takes several tiles, so that it seldom starts and ends, but not so many that there are fewer than two
  // waves of blocks.
  a.block_tiles = static_cast<int>(std::clamp<int64_t>(
      num_tiles / (kMinBlocksPerMultiprocessor * num_multiprocessors()), 1, kMaxBlockTiles));
  int num_blocks = 0, column = 0, stage_bytes = 0;
  for (int i = 0; i < a.num_parts; ++i) {
    Part& part = a.parts[i];
    stage_bytes = std::max(stage_bytes, describe(part, weights[i], a.cols, column, num_blocks));
    column += part.rows;
    const int tiles = (part.rows + kTileRows - 1) / kTileRows;
    num_blocks += (tiles + a.block_tiles - 1) / a.block_tiles;
  }
  a.out_stride = column;
  a.stage_bytes = stage_bytes;
  if (a.gated != nullptr) num_blocks = (a.parts[0].rows + kGatedRows - 1) / kGatedRows;

  const int num_warps = std::min(kMaxWarps, a.num_chunks);
  const int64_t row_bytes = activation_row_bytes(a.cols), gated_bytes = activation_row_bytes(a.parts[0].rows);
  const int64_t squares = activation_squares(a.cols);
  a.warp_chunks = a.num_chunks / num_warps;
  a.extra_chunks = a.num_chunks % num_warps;
  for (int left = a.num_tokens; left > 0; left -= kMaxTokens) {
    a.num_tokens = std::min(left, kMaxTokens);
    const int tiles = a.num_tokens <= 8 ? 1 : 2,
              block_tiles = a.gated != nullptr ? kGatedTiles : a.block_tiles;
    const int sums = a.num_tokens == 1   ? SumsInMemory<8>::kFloats
                     : a.num_tokens <= 4 ? SumsInMemory<2>::kFloats
                                         : SumsInMemory<1>::kFloats;
    const size_t fixed_bytes = sizeof(float) * (block_tiles * tiles * num_warps * sums +
                                                (a.gated != nullptr ? 2 * 8 * tiles * kGatedRows : 0) +
                                                (a.squares != nullptr ? a.num_tokens * squares : 0));
    // As deep as the memory allows, but no deeper than a warp has chunks; two stages where that is too little.
    const int chunks_per_warp = (a.num_chunks + num_warps - 1) / num_warps * block_tiles;
    const int stages_bytes = std::max(1, num_warps * stage_bytes);
    const int memory = shared_memory_per_block(std::max(2, blocks_per_multiprocessor(a.num_tokens)));
    const int affordable = (memory - static_cast<int>(fixed_bytes)) / stages_bytes;
    a.num_stages = std::min(std::clamp(affordable, 2, kMaxStages), chunks_per_warp);
    const size_t shared_bytes = fixed_bytes + static_cast<size_t>(a.num_stages) * num_warps * stage_bytes;

    const auto launch = a.num_tokens == 1   ? launch_matvec<8, 1>
                        : a.num_tokens <= 4 ? launch_matvec<2, 1>
                        : tiles == 1        ? launch_matvec<1, 1>
                                            : launch_matvec<1, 2>;
    launch(a, num_blocks, num_warps, shared_bytes, stream);
    a.q8 += a.num_tokens * row_bytes;
    if (a.x != nullptr) a.x += static_cast<int64_t>(a.num_tokens) * a.cols;
    if (a.squares != nullptr) a.squares += a.num_tokens * squares;
    if (a.gated != nullptr) {
      a.gated += a.num_tokens * gated_bytes;
    } else {
      a.out += static_cast<int64_t>(a.num_tokens) * a.out_stride;
    }
  }
}

// Shared memory that a block may take of which `count` are to be on a multiprocessor; a single one leaves room for a block of the next
// launch.
int shared_memory_of(int count) {
#ifdef HELEXA_EMULATED_CUDA
  return 128 * 1024 / count;
#else
  const int total = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(0);
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(0);
  const int share = count == 1 ? total * 2 / 3 : total / count;
  return std::min(most, share - 1024) - 8 * kMaxNormWarps * kMaxStages;  // the system's 1 KiB, barriers
#endif
}

// Blocks have as many warps as their number allows to be on a multiprocessor at once, but no more than shorten the time.  The number of
// input rows must not matter: the order of sums depends on the number of warps.
void run_add_norm(Arguments a, NormOutput out, const WeightView& weight, void* stream) {
  a.num_parts = 1;
  a.num_chunks = (a.cols + kChunkCols - 1) / kChunkCols;
  a.stage_bytes = describe(a.parts[0], weight, a.cols, 0, 0);
  a.block_tiles = kNormTiles;
  const int rows = a.parts[0].rows, num_blocks = (rows + kNormRows - 1) / kNormRows;
  const int neighbours = std::min(3, (num_blocks + num_multiprocessors() - 1) / num_multiprocessors());
  const int shared = shared_memory_of(neighbours);
  int num_warps = neighbours == 1 ? kMaxNormWarps : kFewestNormWarps;
  auto bytes_of = [&](int warps, int stages) {
    const int sums = kNormTiles * static_cast<int>(sizeof(float)) * SumsInMemory<1>::kFloats;
    return warps * (sums + stages * a.stage_bytes);
  };
  while (num_warps > kFewestNormWarps && bytes_of(num_warps, 2) > shared) --num_warps;
  const int rounds = (a.num_chunks + num_warps - 1) / num_warps;
  num_warps = std::max(kFewestNormWarps, (a.num_chunks + rounds - 1) / rounds);
  a.warp_chunks = a.num_chunks / num_warps;
  a.extra_chunks = a.num_chunks % num_warps;
  a.num_stages = 2;
  while (a.num_stages < std::min(kMaxStages, rounds * kNormTiles) &&
         bytes_of(num_warps, a.num_stages + 1) <= shared) {
    ++a.num_stages;
  }

  const int64_t row_bytes = activation_row_bytes(a.cols);
  for (int left = a.num_tokens; left > 0; left -= 8) {
    a.num_tokens = std::min(left, 8);
    const auto kernel = a.num_tokens == 1   ? add_norm_kernel<8>
                        : a.num_tokens <= 4 ? add_norm_kernel<2>
                                            : add_norm_kernel<1>;
    const size_t shared_bytes = static_cast<size_t>(bytes_of(num_warps, a.num_stages));
    launch_kernel(kernel, {dim3(num_blocks), dim3(32 * num_warps), stream, shared_bytes, true}, a, out);
    a.q8 += 8 * row_bytes;
    if (a.x != nullptr) a.x += 8 * static_cast<int64_t>(a.cols);
    out.residual += 8 * static_cast<int64_t>(rows);
    out.q8 += 8 * activation_row_bytes(rows);
    if (out.x != nullptr) out.x += 8 * static_cast<int64_t>(rows);
    out.squares += 8 * activation_squares(rows);
  }
}

Arguments input(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                const std::vector<WeightView>& weights) {
  Arguments a = {};
  a.q8 = q8;
  a.x = x;
  a.squares = squares;
  a.eps = eps;
  a.num_tokens = static_cast<int>(num_tokens);
  a.cols = static_cast<int>(weights.at(0).cols);
  return a;
}

}  // namespace

void quant_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, float* out, void* stream) {
  if (num_tokens == 0) return;
  Arguments a = input(q8, x, squares, eps, num_tokens, weights);
  a.out = out;
  run_matvec(a, weights, stream);
}

void gated_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, uint8_t* out, void* stream) {
  if (num_tokens == 0) return;
  Arguments a = input(q8, x, squares, eps, num_tokens, weights);
  a.gated = out;
  run_matvec(a, weights, stream);
}

void add_norm_matmul_cuda(const uint8_t* q8, const float* x, int64_t num_tokens, WeightView weight,
                          float* residual, const float* norm_weight, uint8_t* out_q8, float* out_x,
                          float* out_squares, void* stream) {
  if (num_tokens == 0) return;
  const Arguments a = input(q8, x, nullptr, 0.0f, num_tokens, {weight});
  run_add_norm(a, {residual, norm_weight, out_q8, out_x, out_squares}, weight, stream);
}

void quantize_rows_cuda(const void* x, int64_t num_tokens, int64_t cols, int dtype, uint8_t* q8,
                        void* stream) {
  if (num_tokens == 0) return;
  const int64_t quads = (cols + 31) / 32 * 8;
  const dim3 grid(static_cast<unsigned>((quads + 32 * kQuantizeWarps - 1) / (32 * kQuantizeWarps)),
                  static_cast<unsigned>(num_tokens));
  with_dtype(static_cast<DType>(dtype), [&](auto value) {
    using T = decltype(value);
    launch_kernel(quantize_rows_kernel<T>, {grid, dim3(32 * kQuantizeWarps), stream, 0, true},
                  static_cast<const T*>(x), q8, cols);
  });
}

}  // namespace helexa
