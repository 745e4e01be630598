// SPDX-License-Identifier: GPL-3.0-or-later
// What a warp does with a part of an expert: it streams chunks of weights through a ring of its own in shared memory and multiplies them
// with the rows of some tokens.
#pragma once

#include <type_traits>

#include "ops/matvec.cuh"

namespace helexa::moe {

constexpr int kTileRows = kDeviceTileRows;
constexpr int kMaxStages = 4;

// One matrix of each expert, or of the shared one.
struct Matrix {
  const uint8_t* data;
  int64_t expert_bytes;
  int tile_bytes, chunk_bytes, num_chunks;  // no chunks of float formats, which are read where they are
  int format, rows, cols;

  __device__ const uint8_t* tile(int64_t expert, int row_tile) const {
    return data + expert * expert_bytes + static_cast<int64_t>(row_tile) * tile_bytes;
  }
};

// Rows that are multiplied: as int8, and as floats where a matrix is of a float format.
struct Rows {
  uint8_t* q8;
  float* x;
  int64_t row_bytes;
  int cols;
};

// Some rows, side by side or gathered, from row `first` on.
struct Tokens {
  const Rows& rows;
  const int* order;  // null for rows side by side
  int64_t first;
  int count;

  // The n-th, counted from `first`; the last one beyond it.
  __device__ int row(int n) const {
    n = min(n, count - 1);
    return order == nullptr ? n : order[n];
  }
};

// The row that a lane has of up to eight tokens, as a column of the operand.
struct LaneRow {
  const uint8_t* row;
  int cols;

  __device__ LaneRow(const Tokens& tokens, int column)
      : row(tokens.rows.q8 + (tokens.first + tokens.row(column)) * tokens.rows.row_bytes),
        cols(tokens.rows.cols) {}

  // The pairs of a chunk, of which a row may have fewer than follow.
  __device__ __forceinline__ int num_pairs(int chunk) const {
    return static_cast<int>(activation_padded_cols(cols) / 64) - chunk * kChunkPairs;
  }
  // Of a chunk all of x, or its j-th part: the codes of a pair, last the scales.
  template <bool kWhole, int kSplit>
  __device__ __forceinline__ void load(LaneActivations<kSplit>& x, int chunk, int lane) const {
    x.template load<kWhole>(row, static_cast<int>(activation_padded_cols(cols)), lane, chunk * kChunkPairs,
                            num_pairs(chunk));
  }
  template <bool kWhole, int kSplit>
  __device__ __forceinline__ void load(LaneActivations<kSplit>& x, int chunk, int lane, int j) const {
    const int first_pair = chunk * kChunkPairs, pairs = num_pairs(chunk);
    if (j < LaneActivations<kSplit>::kOwnPairs) {
      x.template load_codes<kWhole>(row, lane, first_pair, pairs, j);
    } else {
      x.template load_scales<kWhole>(row, static_cast<int>(activation_padded_cols(cols)), lane, first_pair,
                                     pairs);
    }
  }
};

// The rings of a block's warps.
struct Rings {
  int num_stages, stage_bytes;

  __host__ __device__ int bytes() const { return num_stages * stage_bytes; }  // of a warp
};

// A chunk to be fetched; nothing more if it has no bytes.
struct Piece {
  const uint8_t* from;
  int bytes;
};

// Every num_splits-th chunk of a tile.
struct TileWalk {
  const uint8_t* from = nullptr;
  int stride = 0, left = 0, bytes = 0, last_bytes = 0;

  TileWalk() = default;
  __device__ TileWalk(const Matrix& matrix, const uint8_t* tile, int split, int num_splits)
      : from(tile + split * matrix.chunk_bytes),
        stride(num_splits * matrix.chunk_bytes),
        left(0),
        bytes(matrix.chunk_bytes),
        last_bytes(bytes) {
    const int rest = matrix.num_chunks - 1 - split;
    if (rest < 0) return;
    left = rest / num_splits + 1;
    // Only the last chunk of a tile may be a short one.
    if (rest % num_splits == 0) last_bytes = matrix.tile_bytes - (matrix.num_chunks - 1) * bytes;
  }

  __device__ __forceinline__ Piece next() {
    if (left == 0) return {from, 0};
    const Piece piece{from, --left == 0 ? last_bytes : bytes};
    from += stride;
    return piece;
  }
};

// The tiles of every stride-th part from the first on, one after the other.  Parts has `count` and tile(i).
template <class Parts>
struct PartWalk {
  const Parts& parts;
  int part, stride;
  TileWalk tile;

  __device__ __forceinline__ PartWalk(const Parts& parts, int first, int stride)
      : parts(parts), part(first), stride(stride) {
    if (part < parts.count) tile = parts.tile(part);
  }
  __device__ __forceinline__ Piece next() {
    while (tile.left == 0) {
      part += stride;
      if (part >= parts.count) return {nullptr, 0};
      tile = parts.tile(part);
    }
    return tile.next();
  }
};

// The ring of a warp: stages that are filled anew once they were used, by bulk copies where there are any (a lane starts one for a
// whole chunk), else by all lanes.
class Stream {
 public:
  // memory: rings.bytes(); barriers: kMaxStages.  Both of this warp alone.
  __device__ __forceinline__ Stream(const Rings& rings, uint8_t* memory, uint64_t* barriers)
      : memory_(memory), barriers_(barriers), stage_bytes_(rings.stage_bytes), num_stages_(rings.num_stages) {
    if (!ptx::has_bulk_copies()) return;
    const int lane = threadIdx.x % 32;
    if (lane < kMaxStages) ptx::make_copy_barrier(barriers_ + lane);
    __syncwarp();
  }

  // Sends the first chunks of a walk on their way.
  template <class Walk>
  __device__ __forceinline__ void begin(Walk& walk) {
    for (int i = 0; i < num_stages_; ++i) fetch(walk, i);
  }

  // The next chunk, once it is there.
  __device__ __forceinline__ const uint8_t* wait() const {
    if (ptx::has_bulk_copies()) {
      ptx::wait_for_bulk(barriers_ + stage_, parity_);
    } else {
      switch (num_stages_) {
        case 1: ptx::wait_for_copies<0>(); break;
        case 2: ptx::wait_for_copies<1>(); break;
        case 3: ptx::wait_for_copies<2>(); break;
        default: ptx::wait_for_copies<kMaxStages - 1>(); break;
      }
      __syncwarp();
    }
    return memory_ + stage_ * stage_bytes_;
  }

  // All lanes are done with that chunk: the walk's next one takes its place.
  template <class Walk>
  __device__ __forceinline__ void release(Walk& walk) {
    __syncwarp();
    fetch(walk, stage_);
    if (++stage_ == num_stages_) stage_ = 0, parity_ ^= 1;
  }

 private:
  uint8_t* memory_;
  uint64_t* barriers_;
  int stage_bytes_, num_stages_;
  int stage_ = 0;  // that is used next
  uint32_t parity_ = 0;

  template <class Walk>
  __device__ __forceinline__ void fetch(Walk& walk, int stage) {
    const int lane = threadIdx.x % 32;
    const Piece piece = walk.next();
    uint8_t* to = memory_ + stage * stage_bytes_;
    if (ptx::has_bulk_copies()) {
      if (lane == 0 && piece.bytes > 0) ptx::copy_bulk(to, piece.from, piece.bytes, barriers_ + stage);
      __syncwarp();
    } else {
      for (int at = 16 * lane; at < piece.bytes; at += 512) ptx::copy_async(to + at, piece.from + at);
      ptx::commit_copies();  // also of nothing: the groups are counted
    }
  }
};
static_assert(kMaxStages == 4, "Stream::wait");

// Products of a tile of a float format: rows in turn, each lane with columns of its own.
template <class T, class Store>
__device__ void multiply_floats(const uint8_t* tile, const Tokens& tokens, int split, int num_splits,
                                Store&& store) {
  const int cols = tokens.rows.cols, lane = threadIdx.x % 32;
  for (int i = 0; i < kTileRows * tokens.count; ++i) {
    const T* weights = reinterpret_cast<const T*>(tile) + static_cast<int64_t>(i % kTileRows) * cols;
    const float* x = tokens.rows.x + (tokens.first + tokens.row(i / kTileRows)) * cols;
    float sum = 0.0f;
    for (int col = 32 * split + lane; col < cols; col += 32 * num_splits)
      sum = fmaf(to_float(weights[col]), x[col], sum);
    sum = warp_sum(sum);
    if (lane == 0) store(i / kTileRows, i % kTileRows, sum);
  }
}

template <class Store>
__device__ __forceinline__ void multiply_any_floats(int format, const uint8_t* tile, const Tokens& tokens,
                                                    int split, int num_splits, Store&& store) {
  switch (static_cast<Format>(format)) {
    case Format::kF32: return multiply_floats<float>(tile, tokens, split, num_splits, store);
    case Format::kF16: return multiply_floats<__half>(tile, tokens, split, num_splits, store);
    default: return multiply_floats<__nv_bfloat16>(tile, tokens, split, num_splits, store);
  }
}

__host__ __device__ inline bool is_float(int format) { return format <= static_cast<int>(Format::kBF16); }

// What a warp has of a tile: the chunks split, split + num_splits, …
template <int kSplit>
struct TileProduct {
  // Chunks whose activations are there or on their way.  Those of several tokens take many registers: each is replaced by the next
  // one's as soon as it was used.
  static constexpr int kAhead = kSplit == 8 ? 2 : 1;
  LaneRow row;
  int split, num_splits, num_chunks;
  LaneActivations<kSplit> x[kAhead][1];

  // Asks for the first activations, which do not depend on the weights.
  __device__ __forceinline__ TileProduct(const Tokens& tokens, int num_chunks, int split, int num_splits)
      : row(tokens, LaneColumns<kSplit>::operand_row(static_cast<int>(threadIdx.x) % 32 / 4)),
        split(split),
        num_splits(num_splits),
        num_chunks(num_chunks) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load<false>(x[i][0], split + i * num_splits, threadIdx.x % 32);
  }

  // sums += the chunks of the stream · activations.
  template <class F, class Walk>
  __device__ __forceinline__ void run(LaneSums& sums, Stream& stream, Walk& walk, int lane) {
    constexpr bool kWhole = Unit<F>::kPairs == kChunkPairs;  // such tiles have no short chunks
    for (int chunk = split; chunk < num_chunks; chunk += num_splits) {
      const int pairs = min(kChunkPairs, row.num_pairs(chunk));
      const LaneScales<kSplit> scales[1] = {LaneScales<kSplit>(x[0][0], lane)};
      LaneSums chunk_sums[1];
      if constexpr (kAhead == 1) {
        const int next = chunk + num_splits < num_chunks ? chunk + num_splits : chunk;
        row.template load<kWhole>(x[0][0], next, lane, LaneColumns<kSplit>::kOwnPairs);
        multiply_chunk<F>(chunk_sums, stream.wait(), lane, pairs, x[0], scales,
                          [&](int j) { row.template load<kWhole>(x[0][0], next, lane, j); });
        stream.release(walk);
      } else {
        multiply_chunk<F>(chunk_sums, stream.wait(), lane, pairs, x[0], scales);
        stream.release(walk);
        x[0][0] = x[1][0];
        load<kWhole>(x[1][0], chunk + 2 * num_splits, lane);
      }
#pragma unroll
      for (int i = 0; i < 4; i += kSplit == 8 ? 2 : 1) sums[i] += chunk_sums[0][i];
    }
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void load(LaneActivations<kSplit>& to, int chunk, int lane) const {
    if (chunk < num_chunks) row.template load<kWhole>(to, chunk, lane);
  }
};

// Calls store(token, row, sum) for the tokens and the 16 rows of a tile of a quantized format, F or, if that is void, `format`.  The sums
// are those of this warp's chunks.
template <class F, int kSplit, class Walk, class Store>
__device__ __forceinline__ void multiply_quantized(int format, TileProduct<kSplit>& product, int num_tokens,
                                                   Stream& stream, Walk& walk, Store&& store) {
  using Columns = LaneColumns<kSplit>;
  const int lane = threadIdx.x % 32, t = lane % 4;
  LaneSums sums = {};
  if constexpr (std::is_void_v<F>) {
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name)                                        \
  case Format::k##type:                                                  \
    if constexpr (type::kScales != Scales::kPlain) {                     \
      product.template run<type>(sums, stream, walk, ptx::opaque(lane)); \
    }                                                                    \
    break;
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  } else {
    product.template run<F>(sums, stream, walk, lane);
  }
  if (kSplit == 8 && t > 0) return;
#pragma unroll
  for (int i = 0; i < (kSplit == 8 ? 1 : 2); ++i) {
    const int token = Columns::result_row(t, i);
    if (token >= num_tokens) continue;
    store(token, lane / 4, sums[i]);
    store(token, lane / 4 + 8, sums[2 + i]);
  }
}

// The tokens of one item, a single one where kIsOne, times a tile of a format: F, or any if that is void.
template <class F, bool kIsOne>
class Multiplier {
 public:
  // Of a single token asks for its first columns.
  __device__ __forceinline__ Multiplier(const Matrix& matrix, const Tokens& tokens, int split, int num_splits)
      : matrix_(matrix), tokens_(tokens), split_(split), num_splits_(num_splits), first_(this) {}

  // Calls store(token, row, sum) with the sums of this warp's chunks.
  template <class Walk, class Store>
  __device__ __forceinline__ void run(int format, const uint8_t* tile, Stream& stream, Walk& walk,
                                      Store&& store) {
    if constexpr (std::is_void_v<F>) {
      if (is_float(format)) {
        return multiply_any_floats(format, tile, tokens_, split_, num_splits_, store);
      }
    }
    if constexpr (kIsOne) {
      multiply_quantized<F>(format, first_.product, 1, stream, walk, store);
    } else if (tokens_.count == 1) {
      TileProduct<8> product(tokens_, matrix_.num_chunks, split_, num_splits_);
      multiply_quantized<F>(format, product, 1, stream, walk, store);
    } else {
      TileProduct<1> product(tokens_, matrix_.num_chunks, split_, num_splits_);
      multiply_quantized<F>(format, product, tokens_.count, stream, walk, store);
    }
  }

 private:
  struct Nothing {
    __device__ explicit Nothing(const Multiplier*) {}
  };
  struct One {
    TileProduct<8> product;
    __device__ __forceinline__ explicit One(const Multiplier* of)
        : product(of->tokens_, of->matrix_.num_chunks, of->split_, of->num_splits_) {}
  };
  const Matrix& matrix_;
  Tokens tokens_;
  int split_, num_splits_;
  std::conditional_t<kIsOne, One, Nothing> first_;
};

}  // namespace helexa::moe
