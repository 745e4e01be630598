// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// Attention of few rows: of decoding and of the verification of drafts.  What it takes is the time to read keys and values, if enough
// of them are on their way at any time; so each warp works on 16 keys of its own, which go from memory to the registers of its matrix
// products, those of the next 16 keys being read meanwhile.
//
// Eight rows are the columns of both products: scores^T = k q^T and result^T = v^T weights^T.  Which dims make an operand's depth is
// free in the first as long as k and q agree, so a lane reads eight neighbouring dims of a key (16 bytes); in the second, pairs of keys
// come together from the eight neighbouring dims that a lane has read of each.  In the following lane = 4 quad + t, as in core/ptx.cuh.
#include <climits>

#include "ops/attention_split.cuh"

namespace helexa {
namespace attention_tiled {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeRows = 8;      // of a block
constexpr int kWarpKeys = 16;       // of a warp at a time
constexpr int kMinDecodeKeys = 64;  // of a split
constexpr int kMaxNewTokens = 16;   // of a sequence, that have yet to be appended

// Up to so many keys one block reads faster than several whose results have to be joined.
template <int kDim>
constexpr int kWholeKeys = 65536 / kDim;

template <class C,  // type of the caches
          int kDim>
struct Decoder {
  using T = typename Cache<C>::Operand;
  using Raw = std::conditional_t<sizeof(C) == 1, uint2, uint4>;  // eight values
  static constexpr bool kScaled = Cache<C>::kScaled;
  // The weights are 2^kLift times as great, since the scales that they are multiplied by may be small for float16.
  static constexpr float kLift = kScaled ? 7.0f : 0.0f;
  static constexpr int kQueryStride =
      kDim + 32;  // of queries in shared memory, so that quads read from different banks
  static constexpr int kResultStride = kDim + 4;

  struct Shared {
    T queries[kDecodeRows * kQueryStride];
    float max[kDecodeWarps][kDecodeRows];
    float weights[kDecodeWarps][kDecodeRows];
    float sums[kDecodeWarps][kDecodeRows][kResultStride];
    // Keys and values that this step adds to the block's range.
    C new_keys[kMaxNewTokens * kDim], new_values[kMaxNewTokens * kDim];
    float new_key_scales[kMaxNewTokens], new_value_scales[kMaxNewTokens];
  };

  const AttentionCall& call;
  const Part& part;
  int pages_from, pages;  // lane l has page pages_from + l of the sequence
  int64_t page_start;     // where the kv head's part of the page begins that keys were read from last

  Raw keys[2][kDim / 32];                // dims 32 i + 8 t … of keys quad and quad + 8
  Raw values[kDim / 64][4];              // dims 64 i + 8 quad … of keys 2t, 2t + 1, 2t + 8, 2t + 9
  float key_scales[2], value_scales[2];  // of keys quad and quad + 8

  __device__ Decoder(const AttentionCall& call_, const Part& part_) : call(call_), part(part_) {
    hold_pages(part.first_key / kPageTokens);
  }

  __device__ void hold_pages(int first) {
    const int page = first + static_cast<int>(threadIdx.x % 32);
    pages_from = first;
    pages = page * kPageTokens < part.end_key ? call.page_table[part.sequence * call.max_pages + page] : 0;
  }

  // Reads the keys from `key` on; those beyond the end are whatever lies there.
  __device__ void load_keys(int key) {
    const int index = key / kPageTokens;
    if (index >= pages_from + 32) hold_pages(index);
    const int64_t number = __shfl_sync(0xffffffffu, pages, index - pages_from);
    page_start = (number * call.num_kv_heads + part.kv_head) * Cache<C>::head_stride(kDim);
    const int lane = threadIdx.x % 32, offset = key % kPageTokens + lane / 4;
    const C* const page = static_cast<const C*>(call.k_cache) + page_start;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const C* const from = page + (offset + 8 * half) * kDim + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) ptx::load_fresh(keys[half][i], from + 32 * i);
      if constexpr (kScaled) key_scales[half] = __ldcg(scales_of(page, kDim) + offset + 8 * half);
    }
  }

  // Reads the values of the keys that were read last; the last one's for those beyond the end, since no weight makes 0 of what may lie there.
  __device__ void load_values(int key) {
    const int lane = threadIdx.x % 32, last = part.end_key - 1 - key;
    const C* const page = static_cast<const C*>(call.v_cache) + page_start;
    const C* const first = page + key % kPageTokens * kDim + lane / 4 * 8;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const C* const from = first + min(lane % 4 * 2 + n % 2 + n / 2 * 8, last) * kDim;
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) ptx::load_fresh(values[i][n], from + 64 * i);
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        value_scales[half] =
            __ldcg(scales_of(page, kDim) + key % kPageTokens + min(lane / 4 + 8 * half, last));
    }
  }

  // Takes those of the loaded keys and values that this step adds from where they were staged, of which the first is key `from`.
  __device__ void take_new(int key, int from, const Shared& shared) {
    const int lane = threadIdx.x % 32, last = part.end_key - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = min(key + lane / 4 + 8 * half, last) - from;
      if (at < 0) continue;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i)
        keys[half][i] = *reinterpret_cast<const Raw*>(shared.new_keys + at * kDim + 32 * i + lane % 4 * 8);
      if constexpr (kScaled) {
        key_scales[half] = shared.new_key_scales[at];
        value_scales[half] = shared.new_value_scales[at];
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int at = min(key + lane % 4 * 2 + n % 2 + n / 2 * 8, last) - from;
      if (at < 0) continue;
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i)
        values[i][n] = *reinterpret_cast<const Raw*>(shared.new_values + at * kDim + 64 * i + lane / 4 * 8);
    }
  }

  static __device__ uint4 operand(uint4 raw) { return raw; }
  static __device__ uint4 operand(uint2 raw) { return widen(raw, 1.0f, C()); }

  // Scores of the loaded keys: [i] of key quad + 8 (i / 2) and row 2t + i % 2.
  __device__ void score(const T* queries, float (&scores)[4]) const {
    const int lane = threadIdx.x % 32;
    float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const uint4 a = operand(keys[0][i]), b = operand(keys[1][i]);
      const uint4 q =
          *reinterpret_cast<const uint4*>(queries + lane / 4 * kQueryStride + 32 * i + lane % 4 * 8);
      multiply(scores, {a.x, b.x, a.y, b.y}, q.x, q.y, T());
      multiply(odd, {a.z, b.z, a.w, b.w}, q.z, q.w, T());
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] += odd[i];
      if constexpr (kScaled) scores[i] *= key_scales[i / 2];
    }
  }

  // Rows `first_row` … over the keys of this warp, part of which may be on their way; those from first_new on are staged.  Its results
  // go to shared memory.
  __device__ void attend(int first_row, int first_key, int first_new, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale = call.scale * 1.44269504f;  // of exponents to base 2
    float max[2], weights[2];
    int limit[2];  // the first key that a row does not see
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      limit[n] = part.first_position + part.query(first_row + lane % 4 * 2 + n) + 1;
      max[n] = kLowest;
      weights[n] = 0.0f;
    }
    const int least_limit = min(part.end_key, part.first_position + part.query(first_row) + 1);
    float sums[kDim / 64][4][4];  // [i][j][n] of dim 64 i + 8 quad + 2j + n / 2 and row 2t + n % 2
#pragma unroll
    for (auto& of_columns : sums) {
#pragma unroll
      for (auto& sum : of_columns) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }

    for (int key = first_key; key < part.end_key;) {
      const int next = key + kWarpKeys * kDecodeWarps;
      float scores[4], former_scales[2];
      if (key + kWarpKeys > first_new) take_new(key, first_new, shared);
      score(shared.queries, scores);
      if (next < part.end_key) load_keys(next);
      if (key + kWarpKeys > least_limit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = key + lane / 4 + i / 2 * 8;
          if (at >= limit[i % 2] || at >= part.end_key) scores[i] = -INFINITY;
        }
      }
      former_scales[0] = former_scales[1] = 1.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float best = fmaxf(scores[n], scores[2 + n]);
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, bit));
        best = fmaxf(max[n], best * scale - kLift);
        former_scales[n] = ptx::exp2_fast(max[n] - best);
        max[n] = best;
        scores[n] = ptx::exp2_fast(fmaf(scores[n], scale, -best));
        scores[2 + n] = ptx::exp2_fast(fmaf(scores[2 + n], scale, -best));
        weights[n] = weights[n] * former_scales[n] + (scores[n] + scores[2 + n]);
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] *= value_scales[i / 2];
      }
      const uint32_t low = ptx::transpose(pair(scores[0], scores[1], T()));
      const uint32_t high = ptx::transpose(pair(scores[2], scores[3], T()));
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) {
        uint32_t words[4][4];  // of each key
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint4 value = operand(values[i][n]);
          words[n][0] = value.x, words[n][1] = value.y, words[n][2] = value.z, words[n][3] = value.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&sum)[4] = sums[i][j];
#pragma unroll
          for (int n = 0; n < 4; ++n) sum[n] *= former_scales[n % 2];
          multiply(
              sum,
              {__byte_perm(words[0][j], words[1][j], 0x5410), __byte_perm(words[0][j], words[1][j], 0x7632),
               __byte_perm(words[2][j], words[3][j], 0x5410), __byte_perm(words[2][j], words[3][j], 0x7632)},
              low, high, T());
        }
      }
      if (next < part.end_key) load_values(next);
      key = next;
    }

#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) weights[n] += __shfl_xor_sync(0xffffffffu, weights[n], bit);
      const int row = lane % 4 * 2 + n;
      if (lane < 4) {
        shared.max[warp][row] = max[n];
        shared.weights[warp][row] = weights[n];
      }
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) {
        float* const to = &shared.sums[warp][row][64 * i + lane / 4 * 8];
        const auto& sum = sums[i];
        *reinterpret_cast<float4*>(to) = make_float4(sum[0][n], sum[0][2 + n], sum[1][n], sum[1][2 + n]);
        *reinterpret_cast<float4*>(to + 4) = make_float4(sum[2][n], sum[2][2 + n], sum[3][n], sum[3][2 + n]);
      }
    }
  }

  // Reads the queries of first_row … end_row and leaves them in shared memory.
  __device__ void stage_queries(int first_row, int end_row, Shared& shared) const {
    constexpr int kRowChunks = kDim / 8;
    static_assert(kDecodeRows * kRowChunks <= 32 * kDecodeWarps);
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    uint4 query = make_uint4(0, 0, 0, 0);
    if (first_row + row < end_row) {
      const int64_t from =
          static_cast<int64_t>(part.token(first_row + row)) * call.num_heads + part.head(first_row + row);
      ptx::load_fresh(query, static_cast<const T*>(call.q) + from * kDim + chunk * 8);
    }
    if (row < kDecodeRows) *reinterpret_cast<uint4*>(shared.queries + row * kQueryStride + chunk * 8) = query;
  }

  // The same from what the matmul left, with the keys and values from first_new on; `stores`: these go to the caches too.  A warp takes
  // a head at a time while its next one is on the way.
  __device__ void stage_new(int first_row, int end_row, int first_new, bool stores, Shared& shared) const {
    struct Unit {
      Head<kDim / 32> values;
      int slot;
    };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_heads = static_cast<int>(call.num_heads),
              num_kv_heads = static_cast<int>(call.num_kv_heads);
    // The rows come first, then the new keys, then their values.
    const int num_rows = end_row - first_row, num_new = max(part.end_key - first_new, 0);
    const int num_units = num_rows + 2 * num_new;
    auto read = [&](int index) {
      Unit unit;
      const bool is_query = index < num_rows, is_value = index >= num_rows + num_new;
      const int row = first_row + index, key = index - num_rows - (is_value ? num_new : 0);
      const int token = is_query ? part.token(row) : part.first_query + first_new - part.first_position + key;
      const int head = is_query ? part.head(row) : num_heads + (is_value ? num_kv_heads : 0) + part.kv_head;
      unit.slot = stores && !is_query ? call.slots[token] : -1;
      unit.values.read(call.qkv + token * call.qkv_stride + head * kDim, kDim,
                       is_query   ? call.how.q_norm
                       : is_value ? nullptr
                                  : call.how.k_norm,
                       is_value ? nullptr : call.how.table + static_cast<int64_t>(token) * call.how.num_pairs,
                       call.how.num_pairs);
      return unit;
    };
    float* const x = &shared.sums[warp][0][0];
    constexpr bool kAhead = kDim <= 128;  // beyond, there are not the registers for it
    Unit unit;
    if (kAhead && warp < num_units) unit = read(warp);
    for (int index = warp; index < num_units; index += kDecodeWarps) {
      const Unit current = kAhead ? unit : read(index);
      if (kAhead && index + kDecodeWarps < num_units) unit = read(index + kDecodeWarps);
      current.values.transform(call.how, kDim, x);
      if (index < num_rows) {
        for (int i = lane; i < kDim; i += 32) assign(shared.queries[index * kQueryStride + i], x[i]);
      } else {
        const bool is_value = index >= num_rows + num_new;
        const int key = index - num_rows - (is_value ? num_new : 0);
        write_head(x, kDim, (is_value ? shared.new_values : shared.new_keys) + key * kDim,
                   (is_value ? shared.new_value_scales : shared.new_key_scales) + key);
        if (current.slot >= 0)
          append_head(x, kDim, static_cast<C*>(is_value ? call.v_cache : call.k_cache), num_kv_heads,
                      part.kv_head, current.slot);
      }
      __syncwarp();
    }
    for (int row = num_rows + warp; row < kDecodeRows; row += kDecodeWarps) {
      for (int i = lane; i < kDim; i += 32) assign(shared.queries[row * kQueryStride + i], 0.0f);
    }
  }

  // Adds the warps' results of a row, each warp those of one: final ones if there is but one split, or if it is the last to be there.
  __device__ void finish(int first_row, int split, int num_splits, const Shared& shared) const {
    static_assert(kDecodeRows == kDecodeWarps);
    constexpr int kChunks = RowResult<kDim>::kChunks;
    const Partial<kDim> partial{call, part};
    const int lane = threadIdx.x % 32, i = threadIdx.x / 32, row = first_row + i;
    if (row >= part.num_rows || !is_wanted(call, part.token(row))) return;
    RowResult<kDim> result;
    float best = kLowest;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) best = fmaxf(best, shared.max[w][i]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = ptx::exp2_fast(shared.max[w][i] - best);
      result.sum += factor * shared.weights[w][i];
      if (kDim < 128 && 4 * lane >= kDim) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        add(result.value[c], factor,
            *reinterpret_cast<const float4*>(&shared.sums[w][i][128 * c + 4 * lane]));
    }
    if (num_splits > 1) {
      const int64_t to = partial.at(row) + split;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (kDim >= 128 || 4 * lane < kDim) partial.values(to)[32 * c + lane] = pack(result.value[c]);
      }
      if (lane == 0) *partial.softmax(to) = make_float2(best, result.sum);
      __syncwarp();
      int is_last = 0;
      if (lane == 0) is_last = partial.is_last(row, num_splits);
      __syncwarp();
      if (__shfl_sync(0xffffffffu, is_last, 0) == 0) return;
      result = join(partial, row, num_splits);
    }
    result.store(call, part, row);
  }
};

// Blocks that a multiprocessor holds.
template <int kDim>
constexpr int kDecodeBlocks = kDim < 128 ? 2 : 1;
// Threads of a block that the registers are to be enough for.  More than there are, which leaves room for a block of the matmul before
// or after, so that it stays busy or gets its weights meanwhile; for heads of 256 that would be too few registers.
template <int kDim>
constexpr int kDecodeThreads = kDim == 128 ? 384 : 32 * kDecodeWarps;

template <class C, int kDim>
__global__ void __launch_bounds__(kDecodeThreads<kDim>, kDecodeBlocks<kDim>)
    decode_kernel(const AttentionCall call) {
  using Decoder = attention_tiled::Decoder<C, kDim>;
  using T = typename Decoder::T;
  auto& shared = *dynamic_shared<typename Decoder::Shared>();
  auto cut_of = [&](int sequence) {
    const Part part = part_of(call, sequence, 0);
    if (!is_decoding(call, part.query(part.num_rows), part.group)) return Cut{0, 1, 0};
    return cut_keys(call, part, kDecodeRows, kWholeKeys<kDim>, kMinDecodeKeys);
  };
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Piece piece = piece_at(call, index, cut_of);
    if (piece.sequence < 0) break;
    Part part = part_of(call, piece.sequence, piece.kv_head);
    const int first_row = piece.row_block * kDecodeRows;
    const int end_row = min(first_row + kDecodeRows, part.num_rows);
    part.first_key = piece.split * piece.cut.split_keys;
    part.end_key = min(part.end_key, part.first_key + piece.cut.split_keys);
    part.end_key = min(part.end_key, part.first_position + part.query(end_row - 1) + 1);

    Decoder decoder(call, part);
    const int first_key = part.first_key + static_cast<int>(threadIdx.x / 32) * kWarpKeys;
    // From the first of this range that the step adds on, keys and values are staged; others may be read before the kernel ahead has
    // ended, unless that one is to append them.
    const bool appends = call.qkv != nullptr;
    const int first_new = appends ? max(part.first_key, part.first_position) : INT_MAX;
    if (!appends && first_key + kWarpKeys > part.first_position) ptx::wait_for_producers();
    if (first_key < part.end_key) {
      decoder.load_keys(first_key);
      decoder.load_values(first_key);
    }
    ptx::wait_for_producers();
    ptx::allow_consumers();
    if (appends) {
      const bool stores = piece.row_block == piece.cut.row_blocks - 1;
      decoder.stage_new(first_row, end_row, first_new, stores, shared);
    } else {
      decoder.stage_queries(first_row, end_row, shared);
    }
    __syncthreads();
    decoder.attend(first_row, first_key, first_new, shared);
    __syncthreads();
    decoder.finish(first_row, piece.split, piece.cut.num_splits, shared);
    __syncthreads();  // shared memory takes the next piece
  }
  ptx::wait_for_producers();  // also without work, so that this kernel does not end before them
}

}  // namespace attention_tiled
}  // namespace helexa
