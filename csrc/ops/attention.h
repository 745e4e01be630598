// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

constexpr int64_t kPageTokens = 256;
// Values of cache_dtype beside those of DType, on CUDA devices only; queries are then float16.
constexpr int kE4M3 = 3;  // 8-bit floats with 4 bits of exponent
constexpr int kInt8 = 4;  // int8 codes with a scale for each token and head: ops/kv_cache.cuh

// Causal attention over a paged cache, softmax(q k^T * scale) v, where query head h reads the keys of kv head
// h / (num_heads / num_kv_heads).  q, out [T, num_heads, head_dim] float32; caches [pages, num_kv_heads, 256, head_dim] of
// cache_dtype; page_table [num_sequences, max_pages]; the queries of sequence s are rows query_start[s] .. query_start[s + 1] of
// q and stand at the last positions of its kv_lengths[s].  A query without keys gives zeros.  out may be q.
void attention_cpu(const float* q, const void* k_cache, const void* v_cache, int cache_dtype,
                   const int32_t* page_table, const int32_t* query_start, const int32_t* kv_lengths,
                   float* out, int64_t num_sequences, int64_t max_pages, int64_t num_heads,
                   int64_t num_kv_heads, int64_t head_dim, float scale);

// The same on a CUDA device, with q of the caches' dtype, float16 for kE4M3 and kInt8.  Only the rows first_row .. end_row of q are wanted; their gates and results
// have row numbers from 0.  Results are multiplied by the sigmoid of gate, float32 or bfloat16 in rows gate_stride values apart, if
// it is there.  They leave as q8 (ops/activation.cuh) or as bf16 [rows, num_heads * head_dim], whichever is not null, where
// is_attention_tiled; else as float32 x.
// The keys of sequences with at most split_queries queries, or of all sequences if it is 0, are split into at most max_splits
// ranges, 24 at most.  That takes counters [queries, num_heads], which are 0 before and after, and partial, room for
// [queries, num_heads, max_splits] times head_dim bfloat16 and two float32, of num_tokens queries, or of split_queries of each
// sequence.
//
// Where qkv is not null, q is not read: the rows of q, k and v are taken from it as rope_append_cuda would, float32 and qkv_stride
// values apart, and what that would write to the caches is written here.  For shapes of is_attention_tiled, at most 16 tokens, and 64
// for each kv head with the heads that share it; all queries then stand at positions from 0 on.
void attention_cuda(const void* q, void* k_cache, void* v_cache, int cache_dtype, const int32_t* page_table,
                    const int32_t* query_start, const int32_t* kv_lengths, int64_t num_tokens,
                    int64_t num_sequences, int64_t max_pages, int64_t num_heads, int64_t num_kv_heads,
                    int64_t head_dim, float scale, int64_t first_row, int64_t end_row, const void* gate,
                    int gate_dtype, int64_t gate_stride, uint8_t* q8, void* bf16, float* x,
                    int64_t split_queries, uint32_t* counters, void* partial, int64_t max_splits,
                    const float* qkv, int64_t qkv_stride, const int32_t* slots, const float* table,
                    const float* q_norm, const float* k_norm, float eps, int64_t num_pairs, bool interleaved,
                    void* stream);
// Whether heads of that size in such caches have a kernel on tensor cores; other shapes are served slowly.
bool is_attention_tiled(int64_t head_dim, int cache_dtype);

// What one thread does at once: a block of query rows of one sequence and kv head over a range of the sequence's keys.  A row
// is one query head of one token; rows go token by token, with the `group` heads that share the kv head next to each other.
struct AttentionTask {
  const float* q;          // of the first row
  int64_t q_token_stride;  // values from a token's heads to the next token's; out has the same layout
  int64_t num_rows, group, head_dim;
  int64_t first_position;  // of the first row's token
  const int32_t* pages;    // the sequence's row of the page table
  const void* k;           // caches at this kv head of page 0
  const void* v;
  int cache_dtype;
  bool use_bf16_pairs;  // bfloat16 arithmetic: AVX512-BF16 is there, and the caches are bfloat16
  int64_t page_stride;  // values from a page to the next
  int64_t first_key, end_key;
  float scale;
  float* out;      // final result of the first row, or null if partial results are wanted:
  float* partial;  // [num_rows, head_dim + 2]: sum of v weighted by 2^(score - max), max, sum of the weights
};

// Memory that one task needs, in bytes; aligned to 64 by the caller.
HELEXA_ISA_KERNEL(int64_t, attention_scratch_bytes, int64_t num_rows, int64_t head_dim)
HELEXA_ISA_KERNEL(void, attention_task, const AttentionTask& task, uint8_t* scratch)
// The same for at most kDecodeRows rows and a head_dim that is a multiple of 16.
constexpr int64_t kDecodeRows = 8;
HELEXA_ISA_KERNEL(int64_t, attention_decode_scratch_bytes, int64_t head_dim)
HELEXA_ISA_KERNEL(void, attention_decode_task, const AttentionTask& task, uint8_t* scratch)
// Joins the partial results of one row over all ranges of keys, which lie partial_stride apart.
HELEXA_ISA_KERNEL(void, attention_combine, const float* partial, int64_t partial_stride, int64_t num_splits,
                  int64_t head_dim, float* out)

}  // namespace helexa
