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
  const int num_queries = part.num_rows / part.group;
  const bool is_wanted = part.first_query < call.end_row && part.first_query + num_queries > call.first_row;
  const int row_blocks = is_wanted ? (part.num_rows + block_rows - 1) / block_rows : 0;
  if (part.end_key <= whole_keys) return {row_blocks, 1, whole_keys};
  const int max_splits = static_cast<int>(call.max_splits);
  const int share = ((part.end_key + max_splits - 1) / max_splits + 63) / 64 * 64;
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

// Partial results of the splits.
template <int kDim>
struct Partial {
  const AttentionCall& call;
  const Part& part;

  // Of a row's first split; those of the other splits follow.
  __device__ int64_t at(int row) const {
    const int64_t query =
        call.split_queries == 0 ? part.token(row) : part.sequence * call.split_queries + row / part.group;
    return (query * call.num_heads + part.head(row)) * call.max_splits;
  }
  __device__ float4* values(int64_t split) const {
    return reinterpret_cast<float4*>(call.partial + split * kDim);
  }
  // {max, sum of the weights}
  __device__ float2* softmax(int64_t split) const {
    const int64_t num_queries =
        call.split_queries == 0 ? call.num_tokens : call.num_sequences * call.split_queries;
    float* const first = call.partial + num_queries * call.num_heads * call.max_splits * kDim;
    return reinterpret_cast<float2*>(first) + split;
  }
};

// Whether this block is the last of the splits of the rows from first_row on to have written its partial results, which it then sees
// all of.  All of the block's threads call it.
__device__ inline bool is_last_split(const AttentionCall& call, const Part& part, int first_row,
                                     int num_splits) {
  __shared__ bool is_last;
  constexpr int kRows = 8;  // that have a counter
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block, whose writes are before the barrier
    const int64_t before = call.split_queries == 0
                               ? part.first_query * part.group / kRows + part.sequence
                               : part.sequence * ((call.split_queries * part.group + kRows - 1) / kRows);
    const unsigned last = static_cast<unsigned>(num_splits - 1);
    const int64_t counter = (before + first_row / kRows) * call.num_kv_heads + part.kv_head;
    is_last = atomicInc(call.counters + counter, last) == last;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// Joins all splits of the rows first_row .. end_row and writes their final results.  Each warp takes 128 columns of a row at a time.
template <int kDim>
__device__ void join(const AttentionCall& call, const Part& part, int first_row, int end_row,
                     int num_splits) {
  constexpr int kChunks = (kDim + 127) / 128, kBatch = 16;
  const Partial<kDim> partial{call, part};
  const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  for (int unit = threadIdx.x / 32; unit < (end_row - first_row) * kChunks; unit += num_warps) {
    const int row = first_row + unit / kChunks, column = unit % kChunks * 128 + 4 * lane;
    if (!is_wanted(call, part.token(row))) continue;
    const int64_t from = partial.at(row);
    float best = kLowest, sum = 0.0f;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < num_splits; first += kBatch) {
      const int count = min(kBatch, num_splits - first);
      float2 softmax = make_float2(kLowest, 0.0f);
      if (lane < count) softmax = __ldcg(partial.softmax(from + first + lane));
      float4 values[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        values[s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (s < count && (kDim >= 128 || column < kDim))
          values[s] = __ldcg(partial.values(from + first + s) + column / 4);
      }
      float most = softmax.x;
#pragma unroll
      for (int bit = 16; bit > 0; bit /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, bit));
      most = fmaxf(most, best);
      const float former = ptx::exp2_fast(best - most), factor = ptx::exp2_fast(softmax.x - most);
      best = most;
      sum = sum * former + factor * softmax.y;
      value = make_float4(value.x * former, value.y * former, value.z * former, value.w * former);
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        const float split_factor = __shfl_sync(0xffffffffu, factor, s);
        if (s < count) add(value, split_factor, values[s]);
      }
    }
    sum = warp_sum(sum);
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    store<kDim>(call, part.token(row), part.head(row), column,
                make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse));
  }
}

}  // namespace attention_tiled
}  // namespace helexa
