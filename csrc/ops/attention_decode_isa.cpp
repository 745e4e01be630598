// SPDX-License-Identifier: GPL-3.0-or-later
// Attention of few query rows, bound by the speed at which keys and values arrive: each is read once, in the order of memory, and
// widened to float32 in registers.  Vectors run along the head's dims; the rows of a group meet a key while it is there.
#include "core/simd.h"
#include "ops/attention.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// Keys of one step of the online softmax: 16 KB of 128 bfloat16 dims, so a second group of rows finds them in the first-level cache.
constexpr int64_t kTileKeys = 64;
constexpr float kLowest = -1e30f;  // a maximum before any key; differences with it are numbers
constexpr float kLog2E = 1.44269504f;

// Sums that are kept in registers.
#if defined(HELEXA_AVX512)
constexpr int kSums = 16;
#else
constexpr int kSums = 4;
#endif

// Asks for what lies kAheadBytes behind a block that is about to be read.  The hardware's own prefetch loses the thread at each of
// the many short runs; with this one core reads 25-30 GB/s instead of 20 (Zen 5, 32,768 keys).
constexpr int64_t kAheadBytes = 8192;
HELEXA_INLINE void prefetch_behind(const void* block, int64_t bytes) {
  const char* ahead = static_cast<const char*>(block) + kAheadBytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i);
}

// scores[row][key] of R rows of q and the keys [0, num_keys), which is rounded up to a multiple of 16.
template <class T, int R>
void score_keys(const float* q, const T* k, int64_t num_keys, int64_t head_dim, float* scores) {
  constexpr int kKeys = 16 / R;     // of one reduction to sixteen scores
  constexpr int kStep = kSums / R;  // of one run over the dims
  for (int64_t key = 0; key < num_keys; key += kKeys, k += kKeys * head_dim) {
    prefetch_behind(k, kKeys * head_dim * static_cast<int64_t>(sizeof(T)));
    f32x16 sums[16];
    HELEXA_UNROLL
    for (int step = 0; step < kKeys; step += kStep) {
      f32x16 part[R][kStep];
      HELEXA_UNROLL
      for (int r = 0; r < R; ++r) {
        HELEXA_UNROLL
        for (int j = 0; j < kStep; ++j) part[r][j] = zero();
      }
      for (int64_t d = 0; d < head_dim; d += 16) {
        f32x16 queries[R];
        HELEXA_UNROLL
        for (int r = 0; r < R; ++r) queries[r] = load(q + r * head_dim + d);
        HELEXA_UNROLL
        for (int j = 0; j < kStep; ++j) {
          const f32x16 value = load(k + (step + j) * head_dim + d);
          HELEXA_UNROLL
          for (int r = 0; r < R; ++r) part[r][j] = fma(value, queries[r], part[r][j]);
        }
      }
      HELEXA_UNROLL
      for (int r = 0; r < R; ++r) {
        HELEXA_UNROLL
        for (int j = 0; j < kStep; ++j) sums[r * kKeys + step + j] = part[r][j];
      }
    }
    float lanes[16];
    store(lanes, reduce_add_each(sums));
    HELEXA_UNROLL
    for (int r = 0; r < R; ++r)
      std::memcpy(scores + r * kTileKeys + key, lanes + r * kKeys, kKeys * sizeof(float));
  }
}

// out[row][d .. d + 16 C) = out * scale[row] + sum over keys of weights[row][key] v[key][d ..].
template <class T, int R, int C>
HELEXA_INLINE void add_values(const float* weights, const T* v, int64_t num_keys, int64_t head_dim,
                              const float* scale, float* out) {
  f32x16 sums[R][C];
  HELEXA_UNROLL
  for (int r = 0; r < R; ++r) {
    HELEXA_UNROLL
    for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * head_dim + 16 * c) * set1(scale[r]);
  }
  for (int64_t key = 0; key < num_keys; ++key, v += head_dim) {
    f32x16 values[C];
    prefetch_behind(v, 16 * C * static_cast<int64_t>(sizeof(T)));
    HELEXA_UNROLL
    for (int c = 0; c < C; ++c) values[c] = load(v + 16 * c);
    HELEXA_UNROLL
    for (int r = 0; r < R; ++r) {
      const f32x16 weight = set1(weights[r * kTileKeys + key]);
      HELEXA_UNROLL
      for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, values[c], sums[r][c]);
    }
  }
  HELEXA_UNROLL
  for (int r = 0; r < R; ++r) {
    HELEXA_UNROLL
    for (int c = 0; c < C; ++c) store(out + r * head_dim + 16 * c, sums[r][c]);
  }
}

// The state of a task: rows are padded to a multiple of the last group's size with zero queries.
struct State {
  float* q;    // [rows][head_dim], scaled
  float* out;  // [rows][head_dim]
  float max[kDecodeRows], sum[kDecodeRows], scale[kDecodeRows];
};

// Weights of one row's tile from its scores, of which the first `visible` count.
void softmax_tile(float* scores, int64_t visible, int64_t row, State& state) {
  for (int64_t j = visible < 0 ? 0 : visible; j < kTileKeys; ++j) scores[j] = -__builtin_inff();
  f32x16 best = load(scores);
  for (int64_t j = 16; j < kTileKeys; j += 16) best = max(best, load(scores + j));
  const float tile_max = reduce_max(best);
  const float new_max = tile_max > state.max[row] ? tile_max : state.max[row];
  f32x16 sum = zero();
  for (int64_t j = 0; j < kTileKeys; j += 16) {
    const f32x16 weight = exp2(load(scores + j) - set1(new_max));
    sum += weight;
    store(scores + j, weight);
  }
  float scale[16];
  store(scale, exp2(set1(state.max[row] - new_max)));
  state.scale[row] = scale[0];
  state.sum[row] = state.sum[row] * scale[0] + reduce_add(sum);
  state.max[row] = new_max;
}

// One tile of keys for R rows from `row` on.
template <class T, int R>
void attend_rows(const AttentionTask& task, const T* k, const T* v, int64_t key, int64_t num_keys,
                 int64_t row, State& state) {
  const int64_t D = task.head_dim;
  alignas(64) float scores[R * kTileKeys];
  score_keys<T, R>(state.q + row * D, k, num_keys, D, scores);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t position = task.first_position + (row + r) / task.group;
    const int64_t visible = position + 1 - key;
    softmax_tile(scores + r * kTileKeys, visible < num_keys ? visible : num_keys, row + r, state);
  }
  constexpr int C = kSums / R < 8 ? kSums / R : 8;
  int64_t d = 0;
  float* out = state.out + row * D;
  for (; d + 16 * C <= D; d += 16 * C)
    add_values<T, R, C>(scores, v + d, num_keys, D, state.scale + row, out + d);
  for (; d < D; d += 16) add_values<T, R, 1>(scores, v + d, num_keys, D, state.scale + row, out + d);
}

template <class T>
void attend(const AttentionTask& task, State& state) {
  int64_t num_keys;
  for (int64_t key = task.first_key; key < task.end_key; key += num_keys) {
    const int64_t left = task.end_key - key;
    num_keys = left < kTileKeys ? left : kTileKeys;
    const int64_t offset =
        task.pages[key / kPageTokens] * task.page_stride + key % kPageTokens * task.head_dim;
    const T* k = static_cast<const T*>(task.k) + offset;
    const T* v = static_cast<const T*>(task.v) + offset;
    int64_t row = 0;
    for (; row + 2 < task.num_rows; row += 4) attend_rows<T, 4>(task, k, v, key, num_keys, row, state);
    if (task.num_rows - row == 2) attend_rows<T, 2>(task, k, v, key, num_keys, row, state);
    if (task.num_rows - row == 1) attend_rows<T, 1>(task, k, v, key, num_keys, row, state);
  }
}

}  // namespace

int64_t attention_decode_scratch_bytes(int64_t head_dim) {
  return 2 * kDecodeRows * head_dim * static_cast<int64_t>(sizeof(float));
}

void attention_decode_task(const AttentionTask& task, uint8_t* scratch) {
  const int64_t D = task.head_dim;
  State state;
  state.q = reinterpret_cast<float*>(scratch);
  state.out = state.q + kDecodeRows * D;
  std::memset(scratch, 0, static_cast<size_t>(attention_decode_scratch_bytes(D)));
  for (int64_t row = 0; row < kDecodeRows; ++row) {
    state.max[row] = kLowest;
    state.sum[row] = 0.0f;
    if (row >= task.num_rows) continue;
    const float* q = task.q + row / task.group * task.q_token_stride + row % task.group * D;
    for (int64_t d = 0; d < D; ++d) state.q[row * D + d] = q[d] * (task.scale * kLog2E);
  }
  switch (static_cast<DType>(task.cache_dtype)) {
    case DType::kF32: attend<float>(task, state); break;
    case DType::kF16: attend<f16>(task, state); break;
    case DType::kBF16: attend<bf16>(task, state); break;
  }
  for (int64_t row = 0; row < task.num_rows; ++row) {
    const float* from = state.out + row * D;
    if (task.out == nullptr) {
      float* partial = task.partial + row * (D + 2);
      std::memcpy(partial, from, static_cast<size_t>(D) * sizeof(float));
      partial[D] = state.max[row];
      partial[D + 1] = state.sum[row];
    } else {
      float* out = task.out + row / task.group * task.q_token_stride + row % task.group * D;
      const float sum = state.sum[row];
      const float factor = sum > 0.0f ? 1.0f / sum : sum;
      for (int64_t d = 0; d < D; ++d) out[d] = from[d] * factor;
    }
  }
}

}  // namespace HELEXA_ISA
}  // namespace helexa
