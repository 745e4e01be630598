// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// Who attends to what:
//
// decode_kernel: sequences with few rows, whatever the step.
// split_kernel: the others in steps of few tokens, with their keys split.
// prompt_kernel: the others in steps of many tokens, a block for each kRows rows.
//
// Tables and keys of earlier steps are read before the kernel just before has ended; that one writes neither (it may append the new
// keys).
#include "ops/attention_decode.cuh"

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
      store<kDim>(call, part.token(row), part.head(row), column,
                  scaled(results.values<kDim>(i, column), inverse));
    }
  }
}

template <class C,  // type of the caches
          int kDim>
__global__ void __launch_bounds__(kThreads) prompt_kernel(const AttentionCall call) {
  using T = typename Cache<C>::Operand;
  using Rows = Block<C, kDim, kDim <= 128 ? 2 : 1>;
  // Which rows of which sequence: blocks count through all of them.  Later rows come first, since they see more keys.
  const int group = call.group;
  auto blocks_of = [&](int s) {
    const int num_queries = call.query_start[s + 1] - call.query_start[s];
    return !is_decoding(call, num_queries, group) ? (num_queries * group + Rows::kRows - 1) / Rows::kRows : 0;
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

// Writes the partial results of a block's rows.
template <int kDim>
__device__ void store_partial(const AttentionCall& call, const Part& part, int first_row, int split,
                              const Results& results) {
  const Partial<kDim> partial{call, part};
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < results.rows && first_row + i < part.num_rows; i += kWarps) {
    const int64_t to = partial.at(first_row + i) + split;
    for (int column = 4 * lane; column < kDim; column += 128)
      partial.values(to)[column / 4] = pack(results.values<kDim>(i, column));
    const float2 softmax = results.softmax(i);
    if (lane == 0) *partial.softmax(to) = softmax;
  }
}

template <class C,  // type of the caches
          int kDim>
__global__ void __launch_bounds__(kThreads) split_kernel(const AttentionCall call) {
  using T = typename Cache<C>::Operand;
  using Rows = Block<C, kDim, 1>;
  auto cut_of = [&](int sequence) {
    const Part part = part_of(call, sequence, 0);
    if (is_decoding(call, part.query(part.num_rows), part.group)) return Cut{0, 1, 0};
    constexpr int kMinKeys = 128;  // fewer would cost more in joining than their reading takes
    return cut_keys(call, part, Rows::kRows, kMinKeys, kMinKeys);
  };
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Piece piece = piece_at(call, index, cut_of);
    if (piece.sequence < 0) break;
    Part part = part_of(call, piece.sequence, piece.kv_head);
    const int first_row = piece.row_block * Rows::kRows, num_splits = piece.cut.num_splits;
    part.first_key = piece.split * piece.cut.split_keys;
    part.end_key = min(part.end_key, part.first_key + piece.cut.split_keys);
    const Results results = Rows::attend(call, part, first_row, dynamic_shared<T>());
    if (num_splits == 1) {
      store_rows<kDim>(call, part, first_row, results);
    } else {
      store_partial<kDim>(call, part, first_row, piece.split, results);
      __syncthreads();
      const Partial<kDim> partial{call, part};
      const int is_last = threadIdx.x == 0 && partial.is_last(first_row, num_splits) ? 1 : 0;
      if (__syncthreads_or(is_last)) {
        const int end_row = min(first_row + Rows::kRows, part.num_rows);
        for (int row = first_row + threadIdx.x / 32; row < end_row; row += kWarps) {
          if (is_wanted(call, part.token(row))) join(partial, row, num_splits).store(call, part, row);
        }
      }
    }
    __syncthreads();  // the results' memory takes the next tiles
  }
  ptx::wait_for_producers();  // also without work, so that this kernel does not end before them
}

template <class C, int kDim>
void launch(const AttentionCall& call, void* stream) {
  // As many blocks as run at once; each takes piece after piece.
  auto launch_split = [&](auto kernel, int blocks_each, int num_threads, size_t shared_bytes) {
    const auto num_blocks = static_cast<unsigned>(blocks_each * num_multiprocessors());
    launch_kernel(kernel, {dim3(num_blocks), dim3(num_threads), stream, shared_bytes, true}, call);
  };
  if (call.split_queries != 0) {
    constexpr int kRows = kDim <= 128 ? 128 : 64;
    // Each sequence may have a block that is not full.
    const int64_t num_blocks = (call.num_tokens * call.group + kRows - 1) / kRows + call.num_sequences;
    launch_kernel(prompt_kernel<C, kDim>,
                  {dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(call.num_kv_heads)),
                   dim3(kThreads), stream, shared_bytes<kDim, kRows>(), true},
                  call);
  } else if (call.num_tokens * call.group > kMaxDecodeRows) {
    launch_split(split_kernel<C, kDim>, kDim < 128 ? 4 : 2, kThreads, shared_bytes<kDim, 16 * kWarps>());
  }
  if (call.is_prompt) return;
  launch_split(decode_kernel<C, kDim>, kDecodeBlocks<kDim>, 32 * kDecodeWarps,
               sizeof(typename Decoder<C, kDim>::Shared));
}

template <int kDim>
void launch(AttentionCall call, void* stream) {
  call.is_prompt = call.num_sequences == 1 && call.num_tokens * call.group > kMaxDecodeRows;
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
