// SPDX-License-Identifier: GPL-3.0-or-later
// Products of quantized weights with 1 to 16 rows, which memory's bandwidth bounds.
//
// A block has 16 weight rows of one weight (gated: 32 rows of both) and all of K: its warps take the chunks of 256 columns in turn, so
// that even a small matrix keeps many of them busy, and their sums meet in shared memory.  Each warp streams its chunks, which are
// contiguous runs of bytes whatever the format, through a ring in shared memory that it fills by itself: no barrier stands between
// a warp and its next bytes, and the bytes in flight do not depend on registers.  The ring is filled before the kernel waits for its
// input, so that weights arrive while the kernels before this one still run; with a few thousand columns that is all of a block's
// weights.
//
// matvec.cuh has the products.  1 row takes kSplit 8, 2 to 4 rows kSplit 2, 5 to 8 rows kSplit 1; beyond, there are 2 tiles of 8 rows,
// and more than 16 rows are launched 16 at a time.  Weights of float formats, which are small or rare, are multiplied by a plain
// loop of each warp over whole rows.
#include <algorithm>
#include <stdexcept>

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
constexpr int kMaxBlockTiles = 8;
constexpr int kMinBlocksPerMultiprocessor = 6;  // of a block with several tiles
constexpr int kGatedRows = 32;  // outputs of a gated block: one block of columns of the next matmul
constexpr int kNormRows = 32;   // outputs of a block that a norm follows: the same
constexpr int kMaxNormWarps = 16, kFewestTileWarps = 4;  // so that each of 8 input rows has a warp
// Floats between the rows of a warp's sums of 8 activations x 16 weight rows; the 4 keep a warp's stores in different banks.
constexpr int kPartStride = kTileRows + 4;
constexpr int kPartFloats = 8 * kPartStride;

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

// The tiles that a block computes, one after the other: of one weight, but those of a gated block are by turns gate's and up's.
struct BlockTiles {
  int first_part, first_tile, count;
  bool is_gated;

  __device__ __forceinline__ explicit BlockTiles(const Arguments& a) : is_gated(a.gated != nullptr) {
    const int block = static_cast<int>(blockIdx.x);
    first_part = 0;
    if (is_gated) {
      first_tile = 2 * block;
      count = (first_tile + 1) * kTileRows < a.parts[0].rows ? 4 : 2;
    } else {
      while (first_part + 1 < a.num_parts && block >= a.parts[first_part + 1].first_block) ++first_part;
      const Part& part = a.parts[first_part];
      first_tile = (block - part.first_block) * a.block_tiles;
      count = min(a.block_tiles, (part.rows + kTileRows - 1) / kTileRows - first_tile);
    }
  }
  // One tile of the only weight, or none if it has no such tile.
  __device__ __forceinline__ BlockTiles(const Arguments& a, int tile)
      : first_part(0), first_tile(tile), count(tile * kTileRows < a.parts[0].rows ? 1 : 0), is_gated(false) {}

  __device__ __forceinline__ int part(int i) const { return is_gated ? i % 2 : first_part; }
  __device__ __forceinline__ int tile(int i) const { return first_tile + (is_gated ? i / 2 : i); }
};

// The ring of one warp: the stages, each of which is filled anew once it was used, and the chunks that come next.  Where there are bulk
// copies a lane starts one for a chunk, else all lanes copy 16 bytes at a time.
struct Ring {
  uint8_t* memory;
  uint64_t* barriers;   // one for each stage
  int stage = 0;        // that is used next
  uint32_t parity = 0;  // of the phase in which the stages' copies are waited for
  int tile = -1;        // that is being fetched
  const uint8_t* from = nullptr;
  int left = 0;  // chunks of it to be fetched
  int bytes = 0, last_bytes = 0;

  __device__ __forceinline__ void start(const Arguments& a, const BlockTiles& tiles, uint8_t* stages,
                                        uint64_t* stage_barriers, int warp, int num_warps, int lane) {
    memory = stages;
    barriers = stage_barriers;
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
    if (left == 0 && tile < tiles.count) begin_tile(a, tiles, warp, num_warps);
    if (left > 0) {
      --left;
      const int size = left == 0 ? last_bytes : bytes;
      uint8_t* to = memory + into * a.stage_bytes;
      if (ptx::has_bulk_copies()) {
        if (lane == 0) ptx::copy_bulk(to, from, size, barriers + into);
        __syncwarp();
      } else {
        for (int i = 16 * lane; i < size; i += 512) ptx::copy_async(to + i, from + i);
      }
      from += num_warps * bytes;
    }
    if (!ptx::has_bulk_copies()) ptx::commit_copies();  // also of nothing: the groups are counted
  }

  // Goes on to the next tile that is streamed, if there is one.
  __device__ __forceinline__ void begin_tile(const Arguments& a, const BlockTiles& tiles, int warp,
                                             int num_warps) {
    do {
      if (++tile >= tiles.count) return;
    } while (is_float(a.parts[tiles.part(tile)].format));
    const Part& part = a.parts[tiles.part(tile)];
    left = a.warp_chunks + (warp < a.extra_chunks);
    bytes = part.chunk_bytes;
    last_bytes = min(bytes, part.tile_bytes - (warp + (left - 1) * num_warps) * bytes);
    from = part.weight + (static_cast<int64_t>(tiles.tile(tile)) * part.tile_bytes + warp * bytes);
  }
};
static_assert(kMaxStages == 4, "Ring::wait");

// The activations that a warp multiplies by: those of a chunk, each of which is replaced by that of the next chunk as soon as it was used.
template <int kSplit, int kTiles>
struct Stream {
  LaneActivations<kSplit> x[kTiles];
  const uint8_t* rows[kTiles];
  int padded_cols;

  __device__ __forceinline__ Stream(const Arguments& a, int lane) {
    const InputRows input(a.q8, a.num_tokens, a.cols);
    padded_cols = input.padded_cols;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      rows[n] = kSplit == 8 ? a.q8 : input.row(8 * n + LaneColumns<kSplit>::operand_row(lane >> 2));
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
  // Pair j of `chunk`, or the scales.
  template <bool kWhole>
  __device__ __forceinline__ void refill(int lane, int chunk, int j) {
    const int first_pair = chunk * kChunkPairs, num_pairs = padded_cols / 64 - first_pair;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (j < LaneColumns<kSplit>::kOwnPairs) {
        x[n].template load_codes<kWhole>(rows[n], lane, first_pair, num_pairs, j);
      } else {
        x[n].template load_scales<kWhole>(rows[n], padded_cols, lane, first_pair, num_pairs);
      }
    }
  }
};

// The sums of this warp's chunks of one tile.  `rows` has the activations of the first, and of the first again in the end.
template <class F, int kSplit, int kTiles>
__device__ __forceinline__ void multiply_tile(LaneSums<kSplit, kTiles>& sums, const Arguments& a,
                                              Stream<kSplit, kTiles>& rows, Ring& ring,
                                              const BlockTiles& tiles, int warp, int num_warps, int lane) {
  constexpr bool kWhole = Unit<F>::kPairs == kChunkPairs;
  for (int chunk = warp; chunk < a.num_chunks; chunk += num_warps) {
    const int num_pairs = min(kChunkPairs, rows.padded_cols / 64 - chunk * kChunkPairs);
    const int next = chunk + num_warps < a.num_chunks ? chunk + num_warps : warp;
    const uint8_t* stage = ring.wait(a);
    multiply_chunk<F>(sums, stage, lane, num_pairs, rows.x,
                      [&](int j) { rows.template refill<kWhole>(lane, next, j); });
    ring.next(a, tiles, warp, num_warps, lane);
  }
}

// The same of a tile of any format; nothing of one that is not packed.
template <int kSplit, int kTiles>
__device__ __forceinline__ void multiply_packed(LaneSums<kSplit, kTiles>& sums, const Arguments& a,
                                                int format, Stream<kSplit, kTiles>& rows, Ring& ring,
                                                const BlockTiles& tiles, int warp, int num_warps, int lane) {
  switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name)                                                          \
  case Format::k##type:                                                                    \
    if constexpr (type::kScales != Scales::kPlain) {                                       \
      multiply_tile<type>(sums, a, rows, ring, tiles, warp, num_warps, ptx::opaque(lane)); \
    }                                                                                      \
    break;
#include "quant/formats.def"
#undef HELEXA_FORMAT
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

// Rows of a tile of floats against 8 rows of the input: sums[row of the input * kPartStride + weight row].
template <class T>
__device__ __forceinline__ void multiply_floats(const Arguments& a, const Part& part, int tile,
                                                int first_token, float* sums, int warp, int num_warps,
                                                int lane) {
  const int num_tokens = min(8, a.num_tokens - first_token);
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
    if (lane == 0) sums[t * kPartStride + r] = sum;
  }
}

__device__ __forceinline__ void multiply_floats(const Arguments& a, const Part& part, int tile,
                                                int first_token, float* sums, int warp, int num_warps,
                                                int lane) {
  if (part.format == static_cast<int>(Format::kF32)) {
    multiply_floats<float>(a, part, tile, first_token, sums, warp, num_warps, lane);
  } else if (part.format == static_cast<int>(Format::kF16)) {
    multiply_floats<__half>(a, part, tile, first_token, sums, warp, num_warps, lane);
  } else {
    multiply_floats<__nv_bfloat16>(a, part, tile, first_token, sums, warp, num_warps, lane);
  }
}

// A warp's sums of tile n of activations to memory.
template <int kSplit, int kTiles>
__device__ __forceinline__ void store_sums(const LaneSums<kSplit, kTiles>& sums, int n, float* part,
                                           int lane) {
  using Columns = LaneColumns<kSplit>;
  const int g = lane >> 2, t = lane & 3;
  float total[4];
  sums.total(n, total);
  if (t >= 4 / kSplit + (kSplit == 8)) return;
#pragma unroll
  for (int i = 0; i < (kSplit == 8 ? 1 : 2); ++i) {
    float* row = part + Columns::result_row(t, i) * kPartStride;
    row[g] = total[i], row[g + 8] = total[2 + i];
  }
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
  float* parts = dynamic_shared<float>();          // [num_warps][8][kPartStride]
  float* gated = parts + num_warps * kPartFloats;  // [2][8 * kTiles][kGatedRows] if gated
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
  Stream<kSplit, kTiles> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  fetch_squares(a, squares, warp, num_warps, lane);

  for (int i = 0; i < tiles.count; ++i) {
    const Part& part = a.parts[tiles.part(i)];
    const int tile = tiles.tile(i);
    LaneSums<kSplit, kTiles> sums;
    sums.clear();
    multiply_packed(sums, a, part.format, input, ring, tiles, warp, num_warps, lane);
    for (int n = 0; n < kTiles && 8 * n < a.num_tokens; ++n) {
      if (i + n > 0) __syncthreads();  // the sums before these are read
      if (is_float(part.format)) {
        multiply_floats(a, part, tile, 8 * n, parts, warp, num_warps, ptx::opaque(lane));
      } else {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          if (m == n) store_sums(sums, m, parts + warp * kPartFloats, lane);
        }
      }
      if (i + n == 0) find_factors(a, squares, factors, warp, num_warps, lane);
      __syncthreads();
      const int count = kTileRows * min(8, a.num_tokens - 8 * n);
      const int num_parts = is_float(part.format) ? 1 : num_warps;
      for (int k = static_cast<int>(threadIdx.x); k < count; k += static_cast<int>(blockDim.x)) {
        const int r = k % kTileRows, token = k / kTileRows, row = tile * kTileRows + r;
        if (row >= part.rows) continue;
        float sum = 0.0f;
        for (int w = 0; w < num_parts; ++w) sum += parts[w * kPartFloats + token * kPartStride + r];
        sum *= factors[8 * n + token];
        if (part.bias != nullptr) sum += part.bias[row];
        if (a.gated == nullptr) {
          a.out[static_cast<int64_t>(8 * n + token) * a.out_stride + part.column + row] = sum;
        } else {
          gated[(i % 2 * 8 * kTiles + 8 * n + token) * kGatedRows + i / 2 * kTileRows + r] = sum;
        }
      }
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

// A block has 32 weight rows: two tiles, each with half of the warps, and one block of columns of the next matmul.
template <int kSplit>
__global__ void __launch_bounds__(kSplit == 8 ? 768 : 512)  // threads that there are registers for
    add_norm_kernel(const __grid_constant__ Arguments a, const __grid_constant__ NormOutput out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int tile_warps = static_cast<int>(blockDim.x) / 64, half = warp / tile_warps;
  const int own_warp = warp - half * tile_warps;  // among those of its tile
  float* parts = dynamic_shared<float>();         // [2 * tile_warps][8][kPartStride]
  uint8_t* rings = reinterpret_cast<uint8_t*>(parts + 2 * tile_warps * kPartFloats);
  __shared__ uint64_t barriers[kMaxNormWarps * kMaxStages];
  const Part& part = a.parts[0];
  const BlockTiles tiles(a, 2 * static_cast<int>(blockIdx.x) + half);
  ptx::allow_consumers();
  Ring ring;
  ring.start(a, tiles, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, own_warp,
             tile_warps, lane);
  // In the end a warp has a row, each of its lanes a column.
  const int block = static_cast<int>(blockIdx.x), column = block * kNormRows + lane;
  const bool exists = warp < a.num_tokens && column < part.rows;
  const int64_t place = static_cast<int64_t>(warp) * part.rows + column;
  const float scale = exists ? out.weight[column] : 0.0f;
  const float bias = exists && part.bias != nullptr ? part.bias[column] : 0.0f;
  Stream<kSplit, 1> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, own_warp);
  const float before = exists ? out.residual[place] : 0.0f;

  LaneSums<kSplit, 1> sums;
  sums.clear();
  if (is_float(part.format)) {
    if (tiles.count > 0)
      multiply_floats(a, part, tiles.tile(0), 0, parts + half * tile_warps * kPartFloats, own_warp,
                      tile_warps, ptx::opaque(lane));
  } else {
    if (tiles.count > 0)
      multiply_packed(sums, a, part.format, input, ring, tiles, own_warp, tile_warps, lane);
    store_sums(sums, 0, parts + warp * kPartFloats, lane);
  }
  __syncthreads();
  if (warp >= a.num_tokens) return;

  const int num_parts = is_float(part.format) ? 1 : tile_warps;
  const float* column_sums =
      parts + lane / kTileRows * tile_warps * kPartFloats + warp * kPartStride + lane % kTileRows;
  float value = 0.0f;
  for (int w = 0; w < num_parts; ++w) value += column_sums[w * kPartFloats];
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
    const int tiles = a.num_tokens <= 8 ? 1 : 2;
    const size_t fixed_bytes =
        sizeof(float) * (num_warps * kPartFloats + (a.gated != nullptr ? 2 * 8 * tiles * kGatedRows : 0) +
                         (a.squares != nullptr ? a.num_tokens * squares : 0));
    // As deep as the memory allows, but no deeper than a warp has chunks; two stages where that is too little.
    const int chunks_per_warp =
        (a.num_chunks + num_warps - 1) / num_warps * (a.gated != nullptr ? 4 : a.block_tiles);
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
  a.block_tiles = 1;
  const int rows = a.parts[0].rows, num_blocks = (rows + kNormRows - 1) / kNormRows;
  const int neighbours = std::min(3, (num_blocks + num_multiprocessors() - 1) / num_multiprocessors());
  const int shared = shared_memory_of(neighbours);
  int tile_warps = neighbours == 1 ? kMaxNormWarps / 2 : kFewestTileWarps;
  auto bytes_of = [&](int warps, int stages) {
    return 2 * warps * static_cast<int>(sizeof(float) * kPartFloats + stages * a.stage_bytes);
  };
  while (tile_warps > kFewestTileWarps && bytes_of(tile_warps, 2) > shared) --tile_warps;
  const int rounds = (a.num_chunks + tile_warps - 1) / tile_warps;
  tile_warps = std::max(kFewestTileWarps, (a.num_chunks + rounds - 1) / rounds);
  a.warp_chunks = a.num_chunks / tile_warps;
  a.extra_chunks = a.num_chunks % tile_warps;
  a.num_stages = std::min(2, rounds);
  while (a.num_stages < std::min(kMaxStages, rounds) && bytes_of(tile_warps, a.num_stages + 1) <= shared)
    ++a.num_stages;

  const int64_t row_bytes = activation_row_bytes(a.cols);
  for (int left = a.num_tokens; left > 0; left -= 8) {
    a.num_tokens = std::min(left, 8);
    const auto kernel = a.num_tokens == 1   ? add_norm_kernel<8>
                        : a.num_tokens <= 4 ? add_norm_kernel<2>
                                            : add_norm_kernel<1>;
    const size_t shared_bytes = static_cast<size_t>(bytes_of(tile_warps, a.num_stages));
    launch_kernel(kernel, {dim3(num_blocks), dim3(64 * tile_warps), stream, shared_bytes, true}, a, out);
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
