// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/attention.h"

#include <algorithm>
#include <vector>

#include "core/float_types.h"
#include "core/parallel.h"

namespace helexa {
namespace {

// Query rows of one block: K and V of a page are brought into the kernel's form once for them.
constexpr int64_t kBlockRows = 256;
// Few rows over a long context are split along the keys, so that there is work for all threads.  The size is fixed: results do not
// depend on the number of threads.
constexpr int64_t kSplitRows = 64;
constexpr int64_t kSplitKeys = 4 * kPageTokens;
// Values of partial results from which joining them is worth a second parallel loop.
constexpr int64_t kParallelCombineValues = 65536;

// A block of one sequence's queries over a range of its keys; one task for each kv head.
struct Block {
  int64_t sequence, first_token, num_tokens;  // tokens count from the sequence's first query
  int64_t first_key, end_key;
  int64_t num_splits;
  int64_t partial;  // offset of the first kv head's partial results; heads lie next to each other
};

// Memory that only grows.
template <class T>
T* grown(std::vector<T>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

thread_local std::vector<Block> blocks;
thread_local std::vector<float> partials;
thread_local std::vector<uint8_t> scratch_memory;

uint8_t* scratch(int64_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(grown(scratch_memory, bytes + 64));
  return reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
}

}  // namespace

void attention_cpu(const float* q, const void* k_cache, const void* v_cache, int cache_dtype,
                   const int32_t* page_table, const int32_t* query_start, const int32_t* kv_lengths,
                   float* out, int64_t num_sequences, int64_t max_pages, int64_t num_heads,
                   int64_t num_kv_heads, int64_t head_dim, float scale) {
  const int64_t group = num_heads / num_kv_heads;
  const int64_t block_tokens = std::max<int64_t>(1, kBlockRows / group);
  const int64_t row_values = head_dim + 2;
  const int64_t token_values = num_heads * head_dim;
  const bool is_bf16 = static_cast<DType>(cache_dtype) == DType::kBF16;

  blocks.clear();
  int64_t partial_values = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t num_queries = query_start[s + 1] - query_start[s];
    if (num_queries <= 0) continue;
    // The last block first: it has the most keys.
    for (int64_t first = (num_queries - 1) / block_tokens * block_tokens; first >= 0; first -= block_tokens) {
      const int64_t num_tokens = std::min(block_tokens, num_queries - first);
      const int64_t num_keys = std::max<int64_t>(0, kv_lengths[s] - num_queries + first + num_tokens);
      const int64_t split_keys =
          num_queries * group <= kSplitRows ? kSplitKeys : std::max<int64_t>(num_keys, 1);
      const int64_t num_splits = std::max<int64_t>(1, (num_keys + split_keys - 1) / split_keys);
      for (int64_t split = 0; split < num_splits; ++split) {
        blocks.push_back({s, first, num_tokens, split * split_keys,
                          std::min(num_keys, (split + 1) * split_keys), num_splits, partial_values});
        if (num_splits > 1) partial_values += num_kv_heads * num_tokens * group * row_values;
      }
    }
  }
  float* partial = grown(partials, partial_values);
  const Block* const all_blocks =
      blocks.data();  // the thread-local names mean other vectors on other threads
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());

  const auto attention_task = pick_attention_task();
  const auto attention_decode_task = pick_attention_decode_task();
  const int64_t scratch_bytes = std::max(pick_attention_scratch_bytes()(block_tokens * group, head_dim),
                                         pick_attention_decode_scratch_bytes()(head_dim));
  const int64_t element_bytes = static_cast<DType>(cache_dtype) == DType::kF32 ? 4 : 2;
  parallel_for(num_blocks * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    uint8_t* memory = scratch(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = all_blocks[i / num_kv_heads];
      const int64_t kv_head = i % num_kv_heads;
      const int64_t first_query = query_start[block.sequence];
      const int64_t num_queries = query_start[block.sequence + 1] - first_query;
      const int64_t offset = (first_query + block.first_token) * token_values + kv_head * group * head_dim;
      const int64_t cache_offset = kv_head * kPageTokens * head_dim * element_bytes;
      AttentionTask task;
      task.q = q + offset;
      task.q_token_stride = token_values;
      task.num_rows = block.num_tokens * group;
      task.group = group;
      task.head_dim = head_dim;
      task.first_position = kv_lengths[block.sequence] - num_queries + block.first_token;
      task.pages = page_table + block.sequence * max_pages;
      task.k = static_cast<const uint8_t*>(k_cache) + cache_offset;
      task.v = static_cast<const uint8_t*>(v_cache) + cache_offset;
      task.cache_dtype = cache_dtype;
      task.use_bf16_pairs = is_bf16 && head_dim % 16 == 0 && has_avx512_bf16();
      task.page_stride = num_kv_heads * kPageTokens * head_dim;
      task.first_key = block.first_key;
      task.end_key = block.end_key;
      task.scale = scale;
      task.out = block.num_splits == 1 ? out + offset : nullptr;
      task.partial = partial + block.partial + kv_head * task.num_rows * row_values;
      const bool is_decode = num_queries * group <= kDecodeRows && head_dim % 16 == 0;
      is_decode ? attention_decode_task(task, memory) : attention_task(task, memory);
    }
  });
  if (partial_values == 0) return;

  const auto attention_combine = pick_attention_combine();
  const int64_t grain = partial_values < kParallelCombineValues ? num_blocks : 1;
  parallel_for(num_blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = all_blocks[i];
      if (block.num_splits == 1 || block.first_key != 0) continue;
      const int64_t num_rows = block.num_tokens * group;
      const int64_t split_values = num_kv_heads * num_rows * row_values;
      for (int64_t h = 0; h < num_heads; ++h) {
        for (int64_t token = 0; token < block.num_tokens; ++token) {
          const int64_t row = h / group * num_rows + token * group + h % group;
          const int64_t query = query_start[block.sequence] + block.first_token + token;
          attention_combine(partial + block.partial + row * row_values, split_values, block.num_splits,
                            head_dim, out + query * token_values + h * head_dim);
        }
      }
    }
  });
}

}  // namespace helexa
