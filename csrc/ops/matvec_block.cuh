// SPDX-License-Identifier: GPL-3.0-or-later
// What the blocks of products with up to 16 rows have in common: some tiles of 16 weight rows and all of K, whose chunks of 256 columns the
// warps take in turn.  Each warp streams its chunks, which are contiguous runs of bytes whatever the format, through a ring in shared
// memory that it fills by itself: no barrier stands between a warp and its next bytes, and the bytes in flight do not depend on registers.
// The ring is filled before the kernel waits for its input, so that weights arrive while the kernels before this one still run; with a few
// thousand columns that is all of a block's weights.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "ops/matvec.cuh"
#include "ops/quant_matmul.h"

namespace helexa::matvec {

constexpr int kMaxStages = 4;
constexpr int kTileRows = kDeviceTileRows;
// A warp's chunks are kSlots apart, or half of that; each slot has a sum of its own in memory, so that the order of sums is the same with 8
// and with 16 warps.
constexpr int kSlots = 16;

struct Part {
  const uint8_t* weight;
  const float* bias;  // [rows], or null
  int format, rows;
  int column;  // of out
  int first_unit;
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
  int num_units, num_groups;      // see UnitTiles
  int warp_chunks, extra_chunks;  // num_chunks over and modulo the number of warps
  int num_stages, stage_bytes;
  int unit_tiles;  // of a unit that is not gated
  int out_stride;
  float* out;      // [num_tokens, out_stride]; null if gated
  uint8_t* gated;  // [num_tokens, activation_row_bytes(parts[0].rows)], or null
  Part parts[kMaxMatvecWeights];
};

__device__ __forceinline__ bool is_float(int format) { return format <= static_cast<int>(Format::kBF16); }

// The tiles of a unit, what a block computes at a time: of one weight, but those of a gated product are by turns gate's and up's.  Tiles
// of one format are a group, whose chunks are taken together: all, or gate's and up's where these differ.
struct UnitTiles {
  int first_part, first_tile, count;
  bool is_gated;

  __device__ __forceinline__ UnitTiles(const Arguments& a, int unit) : is_gated(a.gated != nullptr) {
    first_part = 0;
    if (is_gated) {
      first_tile = 2 * unit;
      count = (first_tile + 1) * kTileRows < a.parts[0].rows ? 4 : 2;
    } else {
      while (first_part + 1 < a.num_parts && unit >= a.parts[first_part + 1].first_unit) ++first_part;
      const Part& part = a.parts[first_part];
      first_tile = (unit - part.first_unit) * a.unit_tiles;
      count = min(a.unit_tiles, (part.rows + kTileRows - 1) / kTileRows - first_tile);
    }
  }
  // Tile i is followed by tile i + num_groups of its group.
  __device__ __forceinline__ int part(int i) const { return is_gated ? i % 2 : first_part; }
  __device__ __forceinline__ int tile(int i) const { return first_tile + (is_gated ? i / 2 : i); }
};

// Kernels are for one format F, or for any mix where that is void: instructions that lie far apart come late from the caches.
template <class F>
__device__ __forceinline__ int num_groups(const Arguments& a) {
  return std::is_void_v<F> ? a.num_groups : 1;
}

// The ring of one warp: the stages, each of which is filled anew once it was used, and the chunks that come next, of all units of the
// block.  Lane i knows where those of tile i are.  Where there are bulk copies it starts one for a chunk, else all lanes copy 16 bytes at
// a time.
template <class F>
struct Ring {
  uint8_t* memory;
  uint64_t* barriers;   // one for each stage
  int stage = 0;        // that is used next
  uint32_t parity = 0;  // of the phase in which the stages' copies are waited for
  // What is being fetched: a unit with so many tiles, a group of it, the tile that comes next, chunks of the group to be fetched.
  int unit, count = 0, group, tile = 0, left = 0;
  // Of the lane's tile: its next chunk, its bytes from there on, and those of a chunk, 0 if it is not streamed.
  const uint8_t* from = nullptr;
  int tile_bytes = 0, bytes = 0;

  __device__ __forceinline__ void start(const Arguments& a, uint8_t* stages, uint64_t* stage_barriers,
                                        int warp, int num_warps, int lane) {
    memory = stages;
    barriers = stage_barriers;
    unit = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
    group = num_groups<F>(a);
    if (ptx::has_bulk_copies()) {
      if (lane < kMaxStages) ptx::make_copy_barrier(barriers + lane);
      __syncwarp();
    }
    for (int i = 0; i < a.num_stages; ++i) fetch(a, i, warp, num_warps, lane);
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
  __device__ __forceinline__ void next(const Arguments& a, int warp, int num_warps, int lane) {
    __syncwarp();  // all lanes are done with it
    fetch(a, stage, warp, num_warps, lane);
    if (++stage == a.num_stages) stage = 0, parity ^= 1;
  }

 private:
  __device__ __forceinline__ void fetch(const Arguments& a, int into, int warp, int num_warps, int lane) {
    while (left == 0 && unit < a.num_units) begin_group(a, warp, lane);
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
      tile += num_groups<F>(a);
      if (tile >= count) tile = group;
    }
    if (!ptx::has_bulk_copies()) ptx::commit_copies();  // also of nothing: the groups are counted
  }

  // Goes on to the next group, of this unit or of the block's next one, if there is one.
  __device__ __forceinline__ void begin_group(const Arguments& a, int warp, int lane) {
    if (++group >= num_groups<F>(a)) {
      group = 0;
      unit += static_cast<int>(gridDim.x);
      if (unit >= a.num_units) return;
      const UnitTiles tiles(a, unit);
      count = tiles.count;
      if (lane < count) {
        const Part& part = a.parts[tiles.part(lane)];
        bytes = part.chunk_bytes;
        tile_bytes = part.tile_bytes - warp * bytes;
        from = part.weight + (static_cast<int64_t>(tiles.tile(lane)) * part.tile_bytes + warp * bytes);
      }
    }
    tile = group;
    const bool is_streamed = !std::is_void_v<F> || __shfl_sync(0xffffffffu, bytes, group) > 0;
    if (is_streamed)
      left = (a.warp_chunks + (warp < a.extra_chunks)) * (num_groups<F>(a) == 2 ? count / 2 : count);
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

// The sums of tile i of a unit and tile n of the input: [num_slots][SumsInMemory::kFloats].
__host__ __device__ constexpr int num_slots(const Arguments& a) {
  return a.num_chunks < kSlots ? a.num_chunks : kSlots;
}
template <int kSplit, int kTiles>
__device__ __forceinline__ float* slot_sums(float* sums, const Arguments& a, int i, int n) {
  return sums + (i * kTiles + n) * num_slots(a) * SumsInMemory<kSplit>::kFloats;
}

// This warp's chunks of a group of tiles.  `input` has the activations of the first, and of the first again in the end.
template <class F, class Only, int kSplit, int kTiles>
__device__ __forceinline__ void multiply_group(float* sums, const Arguments& a, Input<kSplit, kTiles>& input,
                                               Ring<Only>& ring, const UnitTiles& tiles, int group, int warp,
                                               int num_warps, int lane) {
  constexpr bool kWhole = Unit<F>::kPairs == kChunkPairs;
  for (int chunk = warp; chunk < a.num_chunks; chunk += num_warps) {
    const int num_pairs = min(kChunkPairs, input.padded_cols / 64 - chunk * kChunkPairs);
    const int next = chunk + num_warps < a.num_chunks ? chunk + num_warps : warp;
    const auto scales = input.scales(lane, std::make_integer_sequence<int, kTiles>());
    input.template load_scales<kWhole>(lane, next);
    for (int i = group; i < tiles.count; i += num_groups<Only>(a)) {
      const bool is_last = i + num_groups<Only>(a) >= tiles.count;
      const uint8_t* stage = ring.wait(a);
      LaneSums chunk_sums[kTiles];
      multiply_chunk<F>(chunk_sums, stage, lane, num_pairs, input.x, scales.of, [&](int j) {
        if (is_last) input.template load_codes<kWhole>(lane, next, j);
      });
      ring.next(a, warp, num_warps, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        SumsInMemory<kSplit>::add(
            slot_sums<kSplit, kTiles>(sums, a, i, n) + chunk % kSlots * SumsInMemory<kSplit>::kFloats,
            chunk_sums[n], chunk < kSlots, lane);
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

// The tiles of a group that is not quantized, into the first slots.
template <int kSplit, int kTiles>
__device__ __forceinline__ void multiply_float_group(float* sums, const Arguments& a, const UnitTiles& tiles,
                                                     int group, int warp, int num_warps, int lane) {
  for (int i = group; i < tiles.count; i += a.num_groups) {
    const Part& part = a.parts[tiles.part(i)];
    for (int n = 0; n < kTiles; ++n) {
      const int tile = tiles.tile(i);
      float* to = slot_sums<kSplit, kTiles>(sums, a, i, n);
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

// All tiles of a unit; sums: those of slot_sums.
template <class Only, int kSplit, int kTiles>
__device__ __forceinline__ void multiply_unit(float* sums, const Arguments& a, Input<kSplit, kTiles>& input,
                                              Ring<Only>& ring, const UnitTiles& tiles, int warp,
                                              int num_warps, int lane) {
  if constexpr (!std::is_void_v<Only>) {
    multiply_group<Only>(sums, a, input, ring, tiles, 0, warp, num_warps, lane);
  } else {
    for (int group = 0; group < a.num_groups; ++group) {
      const int format = a.parts[tiles.part(group)].format;
      if (is_float(format)) {
        multiply_float_group<kSplit, kTiles>(sums, a, tiles, group, warp, num_warps, ptx::opaque(lane));
      }
      switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name)                                                                   \
  case Format::k##type:                                                                             \
    if constexpr (type::kScales != Scales::kPlain) {                                                \
      multiply_group<type>(sums, a, input, ring, tiles, group, warp, num_warps, ptx::opaque(lane)); \
    }                                                                                               \
    break;
#include "quant/formats.def"
#undef HELEXA_FORMAT
      }
    }
  }
}

// A product that multiply_unit has left: of weight row r of tile i with row `token` of tile n of the input.
template <class Only, int kSplit, int kTiles>
__device__ __forceinline__ float find_product(float* sums, const Arguments& a, int format, int i, int n,
                                              int token, int r) {
  const float* from = slot_sums<kSplit, kTiles>(sums, a, i, n) + SumsInMemory<kSplit>::place(token, r);
  const int count = std::is_void_v<Only> && is_float(format) ? 1 : num_slots(a);
  float sum = 0.0f;
  for (int slot = 0; slot < count; ++slot) sum += from[slot * SumsInMemory<kSplit>::kFloats];
  return sum;
}

// The part of a launch that multiplies weight `w`, and the bytes that a stage needs for it.
inline int describe(Part& part, const WeightView& w, int cols, int column, int first_unit) {
  part = {w.packed, w.bias, w.format, static_cast<int>(w.rows), column, first_unit, 0, 0};
  with_format(static_cast<Format>(w.format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales != Scales::kPlain) {
      part.tile_bytes = static_cast<int>(device_tile_bytes<F>(cols));
      part.chunk_bytes = chunk_bytes<F>();
    }
  });
  return part.chunk_bytes;
}

// Calls f with the format that all weights have, if there is a kernel for it, else with nothing.
template <class F>
struct Only {
  using Format = F;
};
template <class Function>
void with_only_format(const std::vector<WeightView>& weights, Function&& f) {
  for (const WeightView& w : weights) {
    if (w.format != weights[0].format) return f(Only<void>());
  }
  switch (static_cast<Format>(weights[0].format)) {
    case Format::kQ4_K: return f(Only<Q4_K>());
    case Format::kQ6_K: return f(Only<Q6_K>());
    case Format::kQ8_0: return f(Only<Q8_0>());
    default: return f(Only<void>());
  }
}

inline Arguments input(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
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

}  // namespace helexa::matvec
