// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// Who attends to what: the kernels over ops/attention_block.cuh.
//
// prompt_kernel (steps of many tokens): a block for each kRows rows of the sequences with many queries.
// split_kernel (decoding, verification): the grid is what runs at once, whatever the lengths, since a captured grid is fixed.  From the
//   lengths each block finds its pieces of the work: a range of keys for each 64 rows of a sequence and kv head.  Whoever finishes last
//   of a sequence's ranges joins their partial results.
//
// Tables and keys of earlier steps are read before the kernel just before has ended; that one writes neither (it appends the new keys).
#include "ops/attention_block.cuh"

namespace helexa {
namespace attention_tiled {

// Writes the final results of a block's rows.
template <int kDim>
__device__ void store_rows(const AttentionCall& call, const Part& part, int first_row,
                           const Results& results) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < results.rows && first_row + i < part.num_rows; i += kWarps) {
    const int row = first_row + i;
    if (!is_wanted(call, part.token(row))) continue;
    const float sum = results.softmax(i).y;
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int column = 4 * lane; column < (kDim < 128 ? 128 : kDim); column += 128) {
      float4 value = results.values<kDim>(i, column);
      value = make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
      store<kDim>(call, part.token(row), part.head(row), column, value);
    }
  }
}

template <class C,  // type of the caches
          int kDim>
__global__ void __launch_bounds__(kThreads) prompt_kernel(const AttentionCall call) {
  using T = typename Cache<C>::Operand;
  using Rows = Block<C, kDim, kDim <= 128 ? 2 : 1, 4, 1, 1>;
  // Which rows of which sequence: blocks count through all of them.  Later rows come first, since they see more keys.
  const int group = static_cast<int>(call.num_heads / call.num_kv_heads);
  auto blocks_of = [&](int s) {
    const int num_queries = call.query_start[s + 1] - call.query_start[s];
    return num_queries > call.split_queries ? (num_queries * group + Rows::kRows - 1) / Rows::kRows : 0;
  };
  int remaining = blockIdx.x, sequence = static_cast<int>(call.num_sequences) - 1;
  for (; sequence >= 0; --sequence) {
    const int num_blocks = blocks_of(sequence);
    if (remaining < num_blocks) {
      remaining = num_blocks - 1 - remaining;
      break;
    }
    remaining -= num_blocks;
  }
  ptx::wait_for_producers();
  ptx::allow_consumers();
  if (sequence < 0) return;
  const Part part = part_of(call, sequence, blockIdx.y);
  const int first_row = remaining * Rows::kRows;
  const int last_row = min(first_row + Rows::kRows, part.num_rows) - 1;
  if (part.token(last_row) < call.first_row || part.token(first_row) >= call.end_row) return;
  store_rows<kDim>(call, part, first_row, Rows::attend(call, part, first_row, dynamic_shared<T>()));
}

// How the work on one sequence is cut: into num_splits ranges of split_keys keys for each row_blocks blocks of rows and kv head.
struct Cut {
  int row_blocks, num_splits, split_keys;
};

// Depends on nothing but the sequence's lengths, so that its result does not change with its neighbours.  No row blocks at all for
// sequences that are not this kernel's, or of which nothing is wanted.
template <int kRows>
__device__ Cut cut_of(const AttentionCall& call, int sequence) {
  const Part part = part_of(call, sequence, 0);
  const int num_queries = part.num_rows / part.group;
  const bool is_mine = (call.split_queries == 0 || num_queries <= call.split_queries) &&
                       part.first_query < call.end_row && part.first_query + num_queries > call.first_row;
  const int max_splits = static_cast<int>(call.max_splits);
  const int share = ((part.end_key + max_splits - 1) / max_splits + 63) / 64 * 64;
  const int split_keys = share > kMinSplitKeys ? share : kMinSplitKeys;
  const int num_splits = part.end_key > split_keys ? (part.end_key + split_keys - 1) / split_keys : 1;
  return {is_mine ? (part.num_rows + kRows - 1) / kRows : 0, num_splits, split_keys};
}

// Which sequence the index-th piece of all work belongs to, and which of that one's pieces it is; a sequence of -1 if there are not
// so many.  All lanes of the warp call it.
template <int kRows>
__device__ int2 piece_at(const AttentionCall& call, int index) {
  const int lane = threadIdx.x % 32, num_sequences = static_cast<int>(call.num_sequences);
  for (int first = 0; first < num_sequences; first += 32) {
    int count = 0;
    if (first + lane < num_sequences) {
      const Cut cut = cut_of<kRows>(call, first + lane);
      count = cut.row_blocks * cut.num_splits * static_cast<int>(call.num_kv_heads);
    }
    int end = count;  // of this lane's pieces, after those of the lanes before it
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, offset);
      if (lane >= offset) end += before;
    }
    const unsigned found = __ballot_sync(0xffffffffu, index < end);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      return make_int2(first + owner, index - __shfl_sync(0xffffffffu, end - count, owner));
    }
    index -= __shfl_sync(0xffffffffu, end, 31);
  }
  return make_int2(-1, 0);
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

template <int kDim>
__device__ void store_partial(const AttentionCall& call, const Part& part, int first_row, int split,
                              const Results& results) {
  const Partial<kDim> partial{call, part};
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < results.rows && first_row + i < part.num_rows; i += kWarps) {
    const int64_t to = partial.at(first_row + i) + split;
    for (int column = 4 * lane; column < kDim; column += 128)
      partial.values(to)[column / 4] = results.values<kDim>(i, column);
    const float2 softmax = results.softmax(i);
    if (lane == 0) *partial.softmax(to) = softmax;
  }
}

// Joins all splits of the rows first_row .. end_row and writes their final results.
template <int kDim>
__device__ void join(const AttentionCall& call, const Part& part, int first_row, int end_row,
                     int num_splits) {
  constexpr int kChunks = kDim <= 128 ? 1 : kDim / 128;
  const Partial<kDim> partial{call, part};
  const int lane = threadIdx.x % 32;
  for (int row = first_row + threadIdx.x / 32; row < end_row; row += kWarps) {
    if (!is_wanted(call, part.token(row))) continue;
    const int64_t from = partial.at(row);
    float best = kLowest;
    for (int s = lane; s < num_splits; s += 32) best = fmaxf(best, __ldcg(partial.softmax(from + s)).x);
    for (int offset = 16; offset > 0; offset /= 2)
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, offset));
    float4 values[kChunks];
#pragma unroll
    for (float4& value : values) value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
    for (int first = 0; first < num_splits; first += 32) {
      float factor = 0.0f;
      if (first + lane < num_splits) {
        const float2 softmax = __ldcg(partial.softmax(from + first + lane));
        factor = ptx::exp2_fast(softmax.x - best);
        sum += factor * softmax.y;
      }
      const int count = min(32, num_splits - first);
#pragma unroll 8
      for (int s = 0; s < count; ++s) {
        const float split_factor = __shfl_sync(0xffffffffu, factor, s);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (kDim >= 128 || 4 * lane < kDim)
            add(values[c], split_factor, __ldcg(partial.values(from + first + s) + 32 * c + lane));
        }
      }
    }
    sum = warp_sum(sum);
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const float4 v = values[c];
      store<kDim>(call, part.token(row), part.head(row), 128 * c + 4 * lane,
                  make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse));
    }
  }
}

template <class C,  // type of the caches
          int kDim>
__global__ void __launch_bounds__(kThreads) split_kernel(const AttentionCall call) {
  using T = typename Cache<C>::Operand;
  using FewRows = Block<C, kDim, 1, 1, kDim <= 128 ? 4 : 2, kDim <= 128 ? 1 : 2>;
  using ManyRows = Block<C, kDim, 1, 4, 1, 1>;
  constexpr int kRows = ManyRows::kRows;
  __shared__ bool is_last;
  const int num_kv_heads = static_cast<int>(call.num_kv_heads);
  for (int index = blockIdx.x;; index += gridDim.x) {
    const int2 piece = piece_at<kRows>(call, index);
    if (piece.x < 0) break;
    const Cut cut = cut_of<kRows>(call, piece.x);
    Part part = part_of(call, piece.x, piece.y % num_kv_heads);
    const int row_block = piece.y / num_kv_heads % cut.row_blocks;
    const int split = piece.y / num_kv_heads / cut.row_blocks;
    const int first_row = row_block * kRows, end_row = min(first_row + kRows, part.num_rows);
    part.first_key = split * cut.split_keys;
    part.end_key = min(part.end_key, part.first_key + cut.split_keys);

    const Results results = end_row - first_row <= FewRows::kRows
                                ? FewRows::attend(call, part, first_row, dynamic_shared<T>())
                                : ManyRows::attend(call, part, first_row, dynamic_shared<T>());
    if (cut.num_splits == 1) {
      store_rows<kDim>(call, part, first_row, results);
    } else {
      store_partial<kDim>(call, part, first_row, split, results);
      // The block that comes last, with everybody's partial results written, joins them.
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        const int64_t before = call.split_queries == 0
                                   ? part.first_query * part.group / kRows + part.sequence
                                   : part.sequence * ((call.split_queries * part.group + kRows - 1) / kRows);
        const unsigned last = static_cast<unsigned>(cut.num_splits - 1);
        is_last = atomicInc(call.counters + (before + row_block) * num_kv_heads + part.kv_head, last) == last;
      }
      __syncthreads();
      if (is_last) {
        __threadfence();
        join<kDim>(call, part, first_row, end_row, cut.num_splits);
      }
    }
    __syncthreads();  // the results' memory takes the next tiles
  }
  ptx::wait_for_producers();  // also without work, so that this kernel does not end before them
}

template <class C, int kDim>
void launch(const AttentionCall& call, void* stream) {
  const int64_t group = call.num_heads / call.num_kv_heads;
  const unsigned num_kv_heads = static_cast<unsigned>(call.num_kv_heads);
  if (call.split_queries != 0) {
    constexpr int kRows = kDim <= 128 ? 128 : 64;
    // Each sequence may have a block that is not full.
    const int64_t num_blocks = (call.num_tokens * group + kRows - 1) / kRows + call.num_sequences;
    launch_kernel(prompt_kernel<C, kDim>,
                  {dim3(static_cast<unsigned>(num_blocks), num_kv_heads), dim3(kThreads), stream,
                   shared_bytes<kDim, kRows>(), true},
                  call);
  }
  // As many blocks as run at once; each takes piece after piece.
  const int64_t num_blocks = (kDim < 128 ? 4 : 2) * num_multiprocessors();
  launch_kernel(split_kernel<C, kDim>,
                {dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), stream,
                 shared_bytes<kDim, 16 * kWarps>(), true},
                call);
}

template <int kDim>
void launch(const AttentionCall& call, void* stream) {
  switch (call.cache_dtype) {
    case kE4M3: return launch<__nv_fp8_e4m3, kDim>(call, stream);
    case kInt8: return launch<int8_t, kDim>(call, stream);
    case static_cast<int>(DType::kBF16): return launch<__nv_bfloat16, kDim>(call, stream);
    default: return launch<__half, kDim>(call, stream);
  }
}

}  // namespace attention_tiled

// One for each size of heads, in files of their own: they take long to compile.
void attention_64_cuda(const AttentionCall& call, void* stream);
void attention_128_cuda(const AttentionCall& call, void* stream);
void attention_256_cuda(const AttentionCall& call, void* stream);

}  // namespace helexa
