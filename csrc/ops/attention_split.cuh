// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// How the keys of a sequence are split between blocks, and how their partial results are joined.
//
// A captured grid is fixed, whatever the lengths: it is what runs at once, and from the lengths each block finds its pieces of the
// work, a range of keys for some rows of a sequence and kv head.  Whoever finishes last of a sequence's ranges joins their partial
// results.
#include "ops/attention_block.cuh"

namespace helexa {
namespace attention_tiled {

// Sequences with at most so many rows for each kv head are decode_kernel's.
constexpr int kMaxDecodeRows = 64;
// Ranges of a sequence's keys at most: whoever joins them reads them all.
constexpr int kMaxSplits = 24;

__device__ inline bool is_decoding(const AttentionCall& call, int num_queries, int group) {
  return !call.is_prompt && num_queries * group <= kMaxDecodeRows &&
         (call.split_queries == 0 || num_queries <= call.split_queries);
}

// How the work on one sequence is cut: into num_splits ranges of split_keys keys for each row_blocks blocks of rows and kv head.
// Depends on nothing but the sequence's lengths, so that its result does not change with its neighbours.  There are no row blocks
// at all of sequences that are another kernel's, or of which nothing is wanted.
struct Cut {
  int row_blocks, num_splits, split_keys;
};

// Of a sequence whose keys are split if there are more than whole_keys of them, into ranges of at least min_keys.
__device__ inline Cut cut_keys(const AttentionCall& call, const Part& part, int block_rows, int whole_keys,
                               int min_keys) {
  const int num_queries = part.query(part.num_rows);
  // The keys of new tokens are wanted, too.
  const bool is_wanted = call.qkv != nullptr ||
                         (part.first_query < call.end_row && part.first_query + num_queries > call.first_row);
  const int row_blocks = is_wanted ? (part.num_rows + block_rows - 1) / block_rows : 0;
  if (part.end_key <= whole_keys) return {row_blocks, 1, whole_keys};
  const int max_splits = static_cast<int>(call.max_splits);
  const int share = ((part.end_key + max_splits - 1) / max_splits + 15) / 16 * 16;
  const int split_keys = share > min_keys ? share : min_keys;
  return {row_blocks, (part.end_key + split_keys - 1) / split_keys, split_keys};
}

// One piece of the work; all work is done where the sequence is -1.
struct Piece {
  int sequence, kv_head, row_block, split;
  Cut cut;
};

// The index-th piece of all work, where cut_of(sequence) says how a sequence is cut.  All lanes of the warp call it.
template <class CutOf>
__device__ Piece piece_at(const AttentionCall& call, int index, CutOf cut_of) {
  const int lane = threadIdx.x % 32, num_sequences = static_cast<int>(call.num_sequences);
  const int num_kv_heads = static_cast<int>(call.num_kv_heads);
  for (int first = 0; first < num_sequences; first += 32) {
    Cut cut{0, 1, 0};
    if (first + lane < num_sequences) cut = cut_of(first + lane);
    const int count = cut.row_blocks * cut.num_splits * num_kv_heads;
    int end = count;  // of this lane's pieces, after those of the lanes before it
    if (num_sequences > 1) {
      for (int offset = 1; offset < 32; offset *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, end, offset);
        if (lane >= offset) end += before;
      }
    }
    const unsigned found = __ballot_sync(0xffffffffu, index < end);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      const int rest = index - __shfl_sync(0xffffffffu, end - count, owner);
      cut.row_blocks = __shfl_sync(0xffffffffu, cut.row_blocks, owner);
      cut.num_splits = __shfl_sync(0xffffffffu, cut.num_splits, owner);
      cut.split_keys = __shfl_sync(0xffffffffu, cut.split_keys, owner);
      const int block = rest / num_kv_heads;
      const int split = block / cut.row_blocks;
      return {first + owner, rest - block * num_kv_heads, block - split * cut.row_blocks, split, cut};
    }
    index -= __shfl_sync(0xffffffffu, end, 31);
  }
  return {-1, 0, 0, 0, {0, 1, 0}};
}

// Partial results of the splits, in bfloat16: the values and weights that they come from are no more exact.
template <int kDim>
struct Partial {
  const AttentionCall& call;
  const Part& part;

  // A number of the row that no other row has.
  __device__ int64_t place(int row) const {
    const int64_t query =
        call.split_queries == 0 ? part.token(row) : part.sequence * call.split_queries + part.query(row);
    return query * call.num_heads + part.head(row);
  }
  // Of a row's first split; those of the other splits follow.
  __device__ int64_t at(int row) const { return place(row) * call.max_splits; }
  // Its weighted values, four in each.
  __device__ uint2* values(int64_t split) const {
    return static_cast<uint2*>(call.partial) + split * (kDim / 4);
  }
  // {max, sum of the weights}
  __device__ float2* softmax(int64_t split) const {
    const int64_t num_queries =
        call.split_queries == 0 ? call.num_tokens : call.num_sequences * call.split_queries;
    return reinterpret_cast<float2*>(values(num_queries * call.num_heads * call.max_splits)) + split;
  }
  // Counts one thread's arrival for the row (a block of rows has its first row's counter), and says whether it is the last of the
  // splits, which then sees what all have written.
  __device__ bool is_last(int row, int num_splits) const {
    return ptx::is_last_arrival(call.counters + place(row), static_cast<uint32_t>(num_splits - 1));
  }
};

// A row's result before it is divided by the sum of its weights; each lane has four values of each 128.
template <int kDim>
struct RowResult {
  static constexpr int kChunks = (kDim + 127) / 128;
  float4 value[kChunks];
  float sum;

  __device__ RowResult() : sum(0.0f) {
#pragma unroll
    for (float4& of_chunk : value) of_chunk = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  __device__ void store(const AttentionCall& call, const Part& part, int row) const {
    const int lane = threadIdx.x % 32;
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      attention_tiled::store<kDim>(call, part.token(row), part.head(row), 128 * c + 4 * lane,
                                   scaled(value[c], inverse));
    }
  }
};

// Joins all splits of a row; a warp does it.
template <int kDim>
__device__ RowResult<kDim> join(const Partial<kDim>& partial, int row, int num_splits) {
  RowResult<kDim> result;
  constexpr int kChunks = RowResult<kDim>::kChunks;
  const int lane = threadIdx.x % 32;
  const int64_t from = partial.at(row);
  float2 softmax = make_float2(kLowest, 0.0f);
  if (lane < num_splits) softmax = __ldcg(partial.softmax(from + lane));
  uint2 values[kMaxSplits][kChunks];
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      values[s][c] = make_uint2(0, 0);
      if (s < num_splits && (kDim >= 128 || 4 * lane < kDim))
        values[s][c] = __ldcg(partial.values(from + s) + 32 * c + lane);
    }
  }
  float best = softmax.x;
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, bit));
  const float factor = ptx::exp2_fast(softmax.x - best);  // of this lane's split
  result.sum = warp_sum(factor * softmax.y);
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    const float of_split = __shfl_sync(0xffffffffu, factor, s);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) add(result.value[c], of_split, unpack(values[s][c]));
  }
  return result;
}

}  // namespace attention_tiled
}  // namespace helexa
