// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What one block does of attention on tensor cores over a paged cache of 16-bit values or of bytes (Dao et al. 2022).
//
// A row is one query head of one token; rows of a sequence and kv head go token by token, with the `group` heads that share the kv
// head next to each other, so that its keys and values are read once for all of them.  Keys come in tiles through two stages of
// shared memory, and each warp has its own 16 (or 32) rows.
//
// Rows leave in the form that the next matmul takes, multiplied by the sigmoid of the output gate if there is one.
#include "core/cuda.cuh"
#include "ops/activation.cuh"
#include "ops/attention.h"
#include "ops/kv_cache.cuh"
#include "ops/rope.cuh"

namespace helexa {

// The arguments of attention_cuda.
struct AttentionCall {
  const void* q;  // or null: q, k and v are taken from qkv
  void* k_cache;
  void* v_cache;
  int cache_dtype;
  const int32_t* page_table;
  const int32_t* query_start;
  const int32_t* kv_lengths;
  int64_t num_tokens, num_sequences, max_pages, num_heads, num_kv_heads, head_dim;
  float scale;
  int64_t first_row, end_row;
  const void* gate;
  int gate_dtype;
  int64_t gate_stride;
  uint8_t* q8;
  void* bf16;
  float* x;
  int64_t split_queries;
  uint32_t* counters;
  void* partial;
  int64_t max_splits;
  int group;               // heads that share a kv head
  uint32_t group_inverse;  // 2^32 / group, rounded up
  bool is_prompt;  // of one sequence with more rows than decode_kernel is for, which is not launched then
  // Of steps whose keys and values have yet to be appended:
  const float* qkv;  // rows of q, k and v, as the matmul left them
  int64_t qkv_stride;
  const int32_t* slots;
  HeadTransform how;
};

namespace attention_tiled {

// Finite, so that differences of maxima are never inf - inf.
constexpr float kLowest = -1e30f;
constexpr int kStages = 2;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <int kDim>
struct Tile {
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kStageValues = 2 * kKeys * kDim;  // of k and of v
  static constexpr int kRowChunks = kDim / 8;            // of 16 bytes
  // Row length of float32 results in shared memory; 8 more, so that the quads of a warp write to different banks.
  static constexpr int kResultStride = kDim + 8;
};

// The tiles' memory has two stages, or a tile of 16-bit values and two stages of bytes.
template <int kDim, int kRows>
constexpr int shared_bytes() {
  const int tiles = (kStages * Tile<kDim>::kStageValues + kRows * kDim) * 2;
  const int result_rows = kRows > 16 * kWarps ? kRows : 16 * kWarps;
  const int results = result_rows * Tile<kDim>::kResultStride * 4;
  return tiles > results ? tiles : results;
}

// Where chunk `chunk` of row `row` lies in a tile: eight rows' chunks of one column are in eight different groups of banks.
template <int kDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kDim + ((chunk ^ (row & 7)) * 8);
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma_bf16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __half) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma_f16(d, a, b);
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
__device__ __forceinline__ uint32_t pair(float x, float y, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x, y));
}
__device__ __forceinline__ uint32_t pair(float x, float y, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(x, y));
}

// Eight bytes of a cache as eight 16-bit values.
__device__ inline uint4 widen(uint2 bytes, float, __nv_fp8_e4m3) {
  auto two = [](uint32_t pair) {
    const __half2_raw wide =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair & 0xffffu), __NV_E4M3);
    return static_cast<uint32_t>(wide.x) | static_cast<uint32_t>(wide.y) << 16;
  };
  return make_uint4(two(bytes.x), two(bytes.x >> 16), two(bytes.y), two(bytes.y >> 16));
}
__device__ inline uint4 widen(uint2 bytes, float scale, int8_t) {
  auto two = [scale](uint32_t codes) {
    const uint32_t second = codes >> 8;
    return pair(scale * static_cast<float>(static_cast<int8_t>(codes)),
                scale * static_cast<float>(static_cast<int8_t>(second)), __half());
  };
  return make_uint4(two(bytes.x), two(bytes.x >> 16), two(bytes.y), two(bytes.y >> 16));
}

// The queries of one sequence and kv head, and the part of its keys that a block sees.
struct Part {
  int sequence, kv_head, group;
  uint32_t group_inverse;
  int first_query, num_rows;
  int first_position;  // of the first query
  int first_key, end_key;

  // row / group, which is exact as long as row * group is below 2^32.
  __device__ int query(int row) const {
    return group == 1 ? row : static_cast<int>(__umulhi(static_cast<unsigned>(row), group_inverse));
  }
  __device__ int token(int row) const { return first_query + query(row); }
  __device__ int head(int row) const { return kv_head * group + row - query(row) * group; }
};

__device__ inline Part part_of(const AttentionCall& call, int sequence, int kv_head) {
  Part part;
  part.sequence = sequence;
  part.kv_head = kv_head;
  part.group = call.group;
  part.group_inverse = call.group_inverse;
  part.first_query = call.query_start[sequence];
  const int num_queries = call.query_start[sequence + 1] - part.first_query;
  const int num_keys = call.kv_lengths[sequence];
  part.num_rows = num_queries * part.group;
  part.first_position = num_keys - num_queries;
  part.first_key = 0;
  part.end_key = num_keys > 0 ? num_keys : 0;
  return part;
}

__device__ inline bool is_wanted(const AttentionCall& call, int token) {
  return token >= call.first_row && token < call.end_row;
}

__device__ __forceinline__ float4 scaled(const float4& x, float factor) {
  return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

// Four values as bfloat16.
__device__ __forceinline__ uint2 pack(const float4& x) {
  return make_uint2(pair(x.x, x.y, __nv_bfloat16()), pair(x.z, x.w, __nv_bfloat16()));
}
__device__ __forceinline__ float4 unpack(const uint2& x) {
  return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u),
                     __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
}

// Four neighbouring values of a row's result, those of each lane beside those of the next; a lane whose column is not below kDim
// has none.  All lanes of the warp call it.
template <int kDim>
__device__ void store(const AttentionCall& call, int token, int head, int column, float4 value) {
  const bool is_there = kDim >= 128 || column < kDim;
  const int64_t row = token - call.first_row;
  const int64_t width = call.num_heads * kDim, index = static_cast<int64_t>(head) * kDim + column;
  if (call.gate != nullptr && is_there) {
    const int64_t at = row * call.gate_stride + index;
    float4 gate;
    if (static_cast<DType>(call.gate_dtype) == DType::kF32) {
      gate = *reinterpret_cast<const float4*>(static_cast<const float*>(call.gate) + at);
    } else {
      const auto pairs =
          reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(call.gate) + at);
      const float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);
      gate = make_float4(low.x, low.y, high.x, high.y);
    }
    value.x *= 1.0f / (1.0f + __expf(-gate.x));
    value.y *= 1.0f / (1.0f + __expf(-gate.y));
    value.z *= 1.0f / (1.0f + __expf(-gate.z));
    value.w *= 1.0f / (1.0f + __expf(-gate.w));
  }
  if (call.q8 != nullptr) {
    const int64_t block = is_there ? index / 32 : width;  // beyond the row: nothing is written
    quantize_quads(value, call.q8 + row * activation_row_bytes(width), width, block);
  } else if (is_there) {
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(call.bf16) + row * width + index) = pack(value);
  }
}

__device__ __forceinline__ void add(float4& sum, float factor, const float4& x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z);
  sum.w = fmaf(factor, x.w, sum.w);
}

// What attend leaves in shared memory: sums of v weighted by 2^(score - max).
struct Results {
  const float* sums;     // [rows, Tile::kResultStride]
  const float* max;      // [rows]
  const float* weights;  // [rows]
  int rows;

  // {max, sum of the weights}
  __device__ float2 softmax(int row) const { return make_float2(max[row], weights[row]); }

  template <int kDim>
  __device__ float4 values(int row, int column) const {
    if (kDim < 128 && column >= kDim) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return *reinterpret_cast<const float4*>(sums + row * Tile<kDim>::kResultStride + column);
  }
};

template <class C,  // type of the caches
          int kDim,
          int kRowTiles>  // of 16 rows in a warp
struct Block {
  using T = typename Cache<C>::Operand;
  static constexpr bool kWiden = sizeof(C) == 1, kScaled = Cache<C>::kScaled;
  using Shape = Tile<kDim>;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = Shape::kKeys;
  // Tiles that have to be widened need a second barrier each, which lets both stages be on their way while the first is waited for.
  static constexpr bool kBothAhead = kWiden;

  static __device__ C* stage_at(T* shared, int stage) {
    return reinterpret_cast<C*>(shared + (kWiden ? Shape::kStageValues : 0)) + stage * Shape::kStageValues;
  }

  // Starts copying the tile of keys from `key` on to where it is multiplied or, if it has to be widened, as it lies in the cache, with
  // the keys' and the values' scales if it has any; none from part.end_key on.
  static __device__ void load_tile(const AttentionCall& call, const Part& part, int key, C* stage,
                                   float* scales) {
    if (key < part.end_key) {
      const int64_t page = call.page_table[part.sequence * call.max_pages + key / kPageTokens];
      const int64_t first = (page * call.num_kv_heads + part.kv_head) * Cache<C>::head_stride(kDim);
      const C* const k_page = static_cast<const C*>(call.k_cache) + first;
      const C* const v_page = static_cast<const C*>(call.v_cache) + first;
      constexpr int kValues = 16 / sizeof(C), kChunks = kDim / kValues;
      const C* k = k_page + key % kPageTokens * kDim;
      const C* v = v_page + key % kPageTokens * kDim;
#pragma unroll
      for (int i = threadIdx.x; i < Shape::kKeys * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const bool valid = key + row < part.end_key;
        const int to = kWiden ? i * kValues : chunk_offset<kDim>(row, i % kChunks);
        ptx::copy_async(stage + to, k + i * kValues, valid);
        ptx::copy_async(stage + Shape::kKeys * kDim + to, v + i * kValues, valid);
      }
      if constexpr (kScaled) {
        if (threadIdx.x < Shape::kKeys / 2) {
          const int row = threadIdx.x * 4;  // those of the values follow those of the keys
          const float* from = scales_of(row < Shape::kKeys ? k_page : v_page, kDim);
          ptx::copy_async(scales + row, from + key % kPageTokens + row % Shape::kKeys);
        }
      }
    }
    ptx::commit_copies();
  }

  // Keys and values follow each other as rows of one tile, num_keys of them are there.
  static __device__ void widen_tile(const C* stage, const float* scales, int num_keys, T* tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * Shape::kKeys * Shape::kRowChunks; i += kThreads) {
      const int row = i / Shape::kRowChunks;
      const float scale = kScaled && row % Shape::kKeys < num_keys ? scales[row] : 0.0f;
      const uint4 wide = widen(*reinterpret_cast<const uint2*>(stage + 8 * i), scale, C());
      *reinterpret_cast<uint4*>(tile + chunk_offset<kDim>(row, i % Shape::kRowChunks)) = wide;
    }
  }

  static __device__ void load_queries(const AttentionCall& call, const Part& part, int first_row,
                                      T* queries) {
    for (int i = threadIdx.x; i < kRows * Shape::kRowChunks; i += kThreads) {
      const int row = i / Shape::kRowChunks, chunk = i % Shape::kRowChunks;
      const bool valid = first_row + row < part.num_rows;
      const int64_t from =
          valid
              ? (part.token(first_row + row) * call.num_heads + part.head(first_row + row)) * kDim + chunk * 8
              : 0;
      ptx::copy_async(queries + chunk_offset<kDim>(row, chunk), static_cast<const T*>(call.q) + from, valid);
    }
  }

  // The rows from first_row on over the part's keys.  All of the block's threads call it; results are there for all of them.  Waits
  // for the producers of q and of the newest keys, but, where both stages are filled ahead, has older keys copied before that.
  static __device__ Results attend(const AttentionCall& call, Part part, int first_row, T* shared) {
    __shared__ float row_max[kRows], row_weights[kRows];
    __shared__ __align__(16) float scales[kStages][kScaled ? 2 * Shape::kKeys : 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
    const int warp_row = warp * 16 * kRowTiles;
    T* const queries = shared + kStages * Shape::kStageValues;
    const float scale = call.scale * 1.44269504f;  // of exponents to base 2

    const int last_row = min(first_row + kRows, part.num_rows) - 1;
    part.end_key = min(part.end_key, part.first_position + part.query(last_row) + 1);
    // The first key that a row does not see.
    int limit[kRowTiles][2];
    float max[kRowTiles][2], weights[kRowTiles][2];
    float sums[kRowTiles][kDim / 8][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + warp_row + 16 * r + 8 * i + quad;
        limit[r][i] = min(part.end_key, part.first_position + part.query(row) + 1);
        max[r][i] = kLowest;
        weights[r][i] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0.0f;
    }
    const int least_limit = min(part.end_key, part.first_position + part.query(first_row + warp_row) + 1);

    constexpr int kTilesAhead = kBothAhead ? 2 : 1;
    int num_early = 0;
    for (; kBothAhead && num_early < kTilesAhead; ++num_early) {
      const int key = part.first_key + num_early * Shape::kKeys;
      if (key + Shape::kKeys > part.first_position) break;
      load_tile(call, part, key, stage_at(shared, num_early), scales[num_early]);
    }
    ptx::wait_for_producers();
    ptx::allow_consumers();
    load_queries(call, part, first_row, queries);
    for (int i = num_early; i < kTilesAhead; ++i)
      load_tile(call, part, part.first_key + i * Shape::kKeys, stage_at(shared, i), scales[i]);
    ptx::commit_copies();
    int stage = 0;
    for (int tile_key = part.first_key; tile_key < part.end_key; tile_key += Shape::kKeys, stage ^= 1) {
      // The queries came last, so at first all copies have to be there; later those of the next tile may be under way.
      if (kBothAhead && tile_key != part.first_key) {
        ptx::wait_for_copies<1>();
      } else {
        ptx::wait_for_copies<0>();
      }
      // Everybody's copies are there, and everybody is done with the stage before.
      __syncthreads();
      if constexpr (kWiden) {
        widen_tile(stage_at(shared, stage), scales[stage], part.end_key - tile_key, shared);
        __syncthreads();
        load_tile(call, part, tile_key + 2 * Shape::kKeys, stage_at(shared, stage), scales[stage]);
      } else if (!kBothAhead) {
        load_tile(call, part, tile_key + Shape::kKeys, stage_at(shared, stage ^ 1), scales[stage ^ 1]);
      }
      const T* k = shared + (kWiden ? 0 : stage * Shape::kStageValues);
      const T* v = k + Shape::kKeys * kDim;
      const int key = tile_key;

      float scores[kRowTiles][kKeys / 8][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
          scores[r][j][0] = scores[r][j][1] = scores[r][j][2] = scores[r][j][3] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          ptx::load_matrices(a[r],
                             queries + chunk_offset<kDim>(warp_row + 16 * r + lane % 16, 2 * d + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
          uint32_t b[4];
          ptx::load_matrices(b,
                             k + chunk_offset<kDim>(16 * j + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            multiply(scores[r][2 * j], a[r], b[0], b[1], T());
            multiply(scores[r][2 * j + 1], a[r], b[2], b[3], T());
          }
        }
      }

      if (key + kKeys > least_limit) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (key + 8 * j + lane % 4 * 2 + i % 2 >= limit[r][i / 2]) scores[r][j][i] = -INFINITY;
            }
          }
        }
      }

      uint32_t p[kRowTiles][kKeys / 16][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float best = scores[r][0][2 * i];
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
            best = fmaxf(best, fmaxf(scores[r][j][2 * i], scores[r][j][2 * i + 1]));
          best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
          best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
          best = fmaxf(max[r][i], best * scale);
          const float factor = ptx::exp2_fast(max[r][i] - best);
          max[r][i] = best;
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              float& score = scores[r][j][2 * i + n];
              score = ptx::exp2_fast(fmaf(score, scale, -best));
              sum += score;
            }
          }
          weights[r][i] = weights[r][i] * factor + sum;
#pragma unroll
          for (int j = 0; j < kDim / 8; ++j) {
            sums[r][j][2 * i] *= factor;
            sums[r][j][2 * i + 1] *= factor;
          }
        }
        // Two neighbouring 16 x 8 results lie in the registers as one 16 x 16 operand does.
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* from = &scores[r][2 * j + i / 2][2 * (i % 2)];
            p[r][j][i] = pair(from[0], from[1], T());
          }
        }
      }

#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          uint32_t b[4];
          ptx::load_matrices_transposed(b, v + chunk_offset<kDim>(16 * j + lane % 16, 2 * d + lane / 16));
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            multiply(sums[r][2 * d], p[r][j], b[0], b[1], T());
            multiply(sums[r][2 * d + 1], p[r][j], b[2], b[3], T());
          }
        }
      }
    }
    ptx::wait_for_copies<0>();
    __syncthreads();  // the tiles' memory takes the results

    float* const results = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + 16 * r + 8 * i + quad;
        weights[r][i] += __shfl_xor_sync(0xffffffffu, weights[r][i], 1);
        weights[r][i] += __shfl_xor_sync(0xffffffffu, weights[r][i], 2);
        if (lane % 4 == 0) {
          row_max[row] = max[r][i];
          row_weights[row] = weights[r][i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + 16 * r + 8 * i + quad;
        float* to = results + row * Shape::kResultStride + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) = make_float2(sums[r][j][2 * i], sums[r][j][2 * i + 1]);
        }
      }
    }
    __syncthreads();
    return {results, row_max, row_weights, kRows};
  }
};

}  // namespace attention_tiled
}  // namespace helexa
