// SPDX-License-Identifier: GPL-3.0-or-later
// Flash attention (Dao et al. 2022) with query rows in the vector lanes.  A panel holds 64 query rows side by side, transposed:
//
//   scores[key][row] = K[key][:] . Q[row][:]          one K value is broadcast and meets 16 rows in each vector
//   max, sum, exp                                     down the key axis: no step of the softmax crosses lanes
//   O[dim][row] += V[key][dim] . weights[key][row]    the same product, with V's values broadcast
//
// so K and V are read as they lie in the cache, and rows of different tokens and of all heads of a group share a panel.  With
// bfloat16 caches and AVX512-BF16 both products multiply pairs along their inner axis: two keys or two dims in each 32-bit cell.
#include "ops/attention.h"

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// A page's scores and weights of a panel take 96 KB, more than the first-level cache, but smaller tiles of keys would pass over the
// panel's output more often, and that costs more (Zen 5, 128 dims: 390 GFLOP/s with tiles of 64 keys, 410 with 256).
constexpr int64_t kPanelRows = 64;
// Stands for minus infinity where a difference of two such values must be a number.
constexpr float kLowest = -1e30f;
constexpr float kLog2E = 1.44269504f;

#if defined(HELEXA_AVX512)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 1;
#endif

// Rows of a broadcast operand that meet N vectors at once: enough sums to cover the latency of fma, few enough for the registers.
template <int N>
constexpr int kBlock = kMaxVectors == 1 ? 4
                       : N == 1         ? 16
                       : N == 2         ? 8
                                        : 4;
constexpr int64_t kMaxBlock = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Singles {
  static constexpr int64_t kValues = 1;  // per cell
  HELEXA_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) { return fma(a, b, sum); }
  // 2^(score - max) for a cell's keys, whose scores are kPanelRows apart; `sum` is what they add up to.
  HELEXA_INLINE f32x16 weigh(const float* scores, f32x16 max, f32x16& sum) {
    return sum = exp2(load(scores) - max);
  }
};

#if defined(HELEXA_ISA_avx512vnni)
// The two instructions of AVX512-BF16 are written as assembly: this copy of the kernel must also run where they do not exist, and so
// is compiled without them.
HELEXA_INLINE __m512i to_bf16(f32x16 low, f32x16 high) {
  __m512i packed;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(packed) : "v"(low.v), "v"(high.v));
  return packed;
}

// 2^a with a relative error of 8.6e-5, a twentieth of what rounding to bfloat16 adds; 2^0 is exact, so that the weight of a
// single key is.
HELEXA_INLINE f32x16 short_exp2(f32x16 a) {
  const f32x16 f{_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  f32x16 p = set1(0.07706706f);
  p = fma(p, f, set1(0.22764497f));
  p = fma(p, f, set1(0.6951168f));
  p = fma(p, f, set1(1.0f));
  return {_mm512_scalef_ps(p.v, a.v)};
}

// Two values in a cell, the first in the lower half.
struct Bf16Pairs {
  static constexpr int64_t kValues = 2;
  HELEXA_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  }
  HELEXA_INLINE f32x16 weigh(const float* scores, f32x16 max, f32x16& sum) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const f32x16 even = short_exp2(load(scores) - max);
    const f32x16 odd = short_exp2(load(scores + kPanelRows) - max);
    sum = even + odd;
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, to_bf16(even, odd)))};
  }
};
#endif

HELEXA_INLINE f32x16 broadcast(const float* p) {
  float value;
  std::memcpy(&value, p, sizeof value);  // p may point at a pair of bfloat16
  return set1(value);
}

// c[m][row] = sum over k of a[m * a_row + k * a_step] b[k][row], plus c[m][row] * scale[row] if kAdd, for M rows of `a` and N
// vectors of b's and c's rows, which are kPanelRows apart.
template <class Cells, int M, int N, bool kAdd>
HELEXA_INLINE void multiply_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                  int64_t depth, const float* scale, float* c) {
  f32x16 sums[M][N];
  HELEXA_UNROLL
  for (int m = 0; m < M; ++m) {
    HELEXA_UNROLL
    for (int n = 0; n < N; ++n) {
      sums[m][n] = kAdd ? load(c + m * kPanelRows + 16 * n) * load(scale + 16 * n) : zero();
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += kPanelRows) {
    f32x16 rows[N];
    HELEXA_UNROLL
    for (int n = 0; n < N; ++n) rows[n] = load(b + 16 * n);
    HELEXA_UNROLL
    for (int m = 0; m < M; ++m) {
      const f32x16 value = broadcast(a + m * a_row);
      HELEXA_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = Cells::multiply_add(value, rows[n], sums[m][n]);
    }
  }
  HELEXA_UNROLL
  for (int m = 0; m < M; ++m) {
    HELEXA_UNROLL
    for (int n = 0; n < N; ++n) store(c + m * kPanelRows + 16 * n, sums[m][n]);
  }
}

// Memory that will be read soon.  Each block of a product asks for a share of it, so that a page's keys and
// values arrive while the page before is worked on (Zen 5, 8,192 keys: 410 GFLOP/s, without it 375).
struct Upcoming {
  const char* at;
  int64_t bytes;

  void request(int64_t share) {
    if (share > bytes) share = bytes;
    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += share;
    bytes -= share;
  }
};

// The operands of multiply_block for all rows of `a`, which are num_m.
struct Product {
  const float* a;
  int64_t a_row, a_step, num_m;
  const float* b;
  int64_t depth;
  const float* scale;
  float* c;
};

template <class Cells, int N, bool kAdd>
void multiply_vectors(const Product& p, int64_t lane, Upcoming upcoming) {
  const int64_t share = round_up(upcoming.bytes * kBlock<N> / p.num_m, 64);
  const float* b = p.b + lane;
  const float* scale = kAdd ? p.scale + lane : nullptr;
  int64_t m = 0;
  for (; m + kBlock<N> <= p.num_m; m += kBlock<N>) {
    upcoming.request(share);
    multiply_block<Cells, kBlock<N>, N, kAdd>(p.a + m * p.a_row, p.a_row, p.a_step, b, p.depth, scale,
                                              p.c + m * kPanelRows + lane);
  }
  for (; m < p.num_m; ++m) {
    multiply_block<Cells, 1, N, kAdd>(p.a + m * p.a_row, p.a_row, p.a_step, b, p.depth, scale,
                                      p.c + m * kPanelRows + lane);
  }
}

template <class Cells, bool kAdd>
void multiply(const Product& product, int64_t num_vectors, Upcoming upcoming) {
#if defined(HELEXA_AVX512)
  switch (num_vectors) {
    case 1: return multiply_vectors<Cells, 1, kAdd>(product, 0, upcoming);
    case 2: return multiply_vectors<Cells, 2, kAdd>(product, 0, upcoming);
    case 3: return multiply_vectors<Cells, 3, kAdd>(product, 0, upcoming);
    default: return multiply_vectors<Cells, 4, kAdd>(product, 0, upcoming);
  }
#else
  multiply_vectors<Cells, 1, kAdd>(product, 0, upcoming);
  for (int64_t n = 1; n < num_vectors; ++n) multiply_vectors<Cells, 1, kAdd>(product, 16 * n, {nullptr, 0});
#endif
}

// The running state of one panel's softmax, and its queries.
struct Panel {
  float* queries;  // [cells of head_dim][kPanelRows]
  float* out;      // [head_dim][kPanelRows]
  float* max;      // [kPanelRows] each from here
  float* sum;
  float* position;  // of the row's token
  float* scale;     // of `out` before the next tile is added
  int64_t num_rows, num_vectors;
  int64_t first_position, last_position;
};

// Turns scores of N vectors of rows into weights 2^(score - max) and moves max, sum and scale on.
template <class Cells, int N, bool kMasked>
void weigh_vectors(float* scores, int64_t num_keys, int64_t first_key, const Panel& panel, int64_t lane,
                   float* weights) {
  f32x16 old_max[N], best[N], sum[N];
  HELEXA_UNROLL
  for (int n = 0; n < N; ++n) {
    old_max[n] = best[n] = load(panel.max + lane + 16 * n);
    sum[n] = zero();
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    float* row = scores + j * kPanelRows + lane;
    HELEXA_UNROLL
    for (int n = 0; n < N; ++n) {
      f32x16 score = load(row + 16 * n);
      if constexpr (kMasked) {
        const f32x16 position = load(panel.position + lane + 16 * n);
        score = select_le(set1(static_cast<float>(first_key + j)), position, score, set1(-__builtin_inff()));
        store(row + 16 * n, score);
      }
      best[n] = max(best[n], score);
    }
  }
  for (int64_t j = 0; j < num_keys; j += Cells::kValues) {
    const float* row = scores + j * kPanelRows + lane;
    float* to = weights + j / Cells::kValues * kPanelRows + lane;
    HELEXA_UNROLL
    for (int n = 0; n < N; ++n) {
      f32x16 added;
      store(to + 16 * n, Cells::weigh(row + 16 * n, best[n], added));
      sum[n] += added;
    }
  }
  HELEXA_UNROLL
  for (int n = 0; n < N; ++n) {
    const f32x16 scale = exp2(old_max[n] - best[n]);
    store(panel.scale + lane + 16 * n, scale);
    store(panel.sum + lane + 16 * n, fma(load(panel.sum + lane + 16 * n), scale, sum[n]));
    store(panel.max + lane + 16 * n, best[n]);
  }
}

template <class Cells, bool kMasked>
void weigh(float* scores, int64_t num_keys, int64_t first_key, const Panel& panel, float* weights) {
  // An odd last key shares its cell with one of no weight.
  if (num_keys % Cells::kValues != 0) {
    for (int64_t i = 0; i < kPanelRows; ++i) scores[num_keys * kPanelRows + i] = -__builtin_inff();
  }
  int64_t n = 0;
  for (; n + kMaxVectors <= panel.num_vectors; n += kMaxVectors) {
    weigh_vectors<Cells, kMaxVectors, kMasked>(scores, num_keys, first_key, panel, 16 * n, weights);
  }
  for (; n < panel.num_vectors; ++n) {
    weigh_vectors<Cells, 1, kMasked>(scores, num_keys, first_key, panel, 16 * n, weights);
  }
}

// Loads up to sixteen cells of a scaled query row, from dim `first`.
template <class Cells>
HELEXA_INLINE f32x16 load_query_cells(const float* row, int64_t first, int64_t head_dim, float scale) {
  const f32x16 factor = set1(scale);
  if constexpr (Cells::kValues == 1) {
    return (head_dim - first < 16 ? load_n(row + first, head_dim - first) : load(row + first)) * factor;
  } else {
#if defined(HELEXA_ISA_avx512vnni)
    const f32x16 high = first + 16 < head_dim ? load(row + first + 16) : zero();
    return {_mm512_castsi512_ps(to_bf16(load(row + first) * factor, high * factor))};
#endif
  }
}

template <class Cells>
void load_queries(const AttentionTask& task, int64_t first_row, const Panel& panel) {
  const int64_t num_cells = task.head_dim / Cells::kValues;
  for (int64_t lane = 0; lane < 16 * panel.num_vectors; lane += 16) {
    for (int64_t cell = 0; cell < num_cells; cell += 16) {
      f32x16 block[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = first_row + lane + i;
        const float* q = task.q + row / task.group * task.q_token_stride + row % task.group * task.head_dim;
        block[i] = lane + i < panel.num_rows
                       ? load_query_cells<Cells>(q, cell * Cells::kValues, task.head_dim, task.scale * kLog2E)
                       : zero();
      }
      transpose(block);
      float* to = panel.queries + cell * kPanelRows + lane;
      for (int64_t i = 0; i < 16 && cell + i < num_cells; ++i) store(to + i * kPanelRows, block[i]);
    }
  }
}

void store_results(const AttentionTask& task, int64_t first_row, const Panel& panel) {
  const int64_t D = task.head_dim;
  for (int64_t lane = 0; lane < panel.num_rows; lane += 16) {
    const int64_t num_rows = panel.num_rows - lane < 16 ? panel.num_rows - lane : 16;
    float factors[16];
    for (int64_t i = 0; i < 16; ++i) {
      const float sum = panel.sum[lane + i];
      factors[i] = task.out == nullptr ? 1.0f : sum > 0.0f ? 1.0f / sum : sum;
    }
    const f32x16 factor = load(factors);
    for (int64_t d = 0; d < D; d += 16) {
      const int64_t num_dims = D - d < 16 ? D - d : 16;
      f32x16 block[16];
      for (int64_t i = 0; i < 16; ++i) {
        block[i] = i < num_dims ? load(panel.out + (d + i) * kPanelRows + lane) * factor : zero();
      }
      transpose(block);
      for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t row = first_row + lane + i;
        float* to = task.out == nullptr
                        ? task.partial + row * (D + 2)
                        : task.out + row / task.group * task.q_token_stride + row % task.group * D;
        num_dims == 16 ? store(to + d, block[i]) : store_n(to + d, block[i], num_dims);
      }
    }
    if (task.out != nullptr) continue;
    for (int64_t i = 0; i < num_rows; ++i) {
      float* tail = task.partial + (first_row + lane + i) * (D + 2) + D;
      tail[0] = panel.max[lane + i];
      tail[1] = panel.sum[lane + i];
    }
  }
}

template <class T>
void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load_n(from + i, count - i), count - i);
}

const float* as_floats(const void* cache, int dtype, int64_t offset, int64_t count, float* buffer) {
  switch (static_cast<DType>(dtype)) {
    case DType::kF16: widen(static_cast<const f16*>(cache) + offset, count, buffer); return buffer;
    case DType::kBF16: widen(static_cast<const bf16*>(cache) + offset, count, buffer); return buffer;
    default: return static_cast<const float*>(cache) + offset;
  }
}

// Memory of one task, cut into its parts.
struct Scratch {
  uint8_t* next;
  float* floats(int64_t count) {
    float* result = reinterpret_cast<float*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
    return result;
  }
};

template <class Cells>
struct PageOperands;

template <>
struct PageOperands<Singles> {
  const float* k;
  const float* v;

  // Keys are read in whole blocks, so a few rows behind the range come along; they lie in the page, and their scores are dropped.
  PageOperands(const AttentionTask& task, int64_t offset, int64_t num_keys, float* k_buffer,
               float* v_buffer) {
    k = as_floats(task.k, task.cache_dtype, offset, round_up(num_keys, kMaxBlock) * task.head_dim, k_buffer);
    v = as_floats(task.v, task.cache_dtype, offset, num_keys * task.head_dim, v_buffer);
  }
};

#if defined(HELEXA_ISA_avx512vnni)
template <>
struct PageOperands<Bf16Pairs> {
  const float* k;
  const float* v;

  // Pairs along the dims are in the cache as they are; pairs of keys have to be made.
  PageOperands(const AttentionTask& task, int64_t offset, int64_t num_keys, float*, float* v_buffer) {
    k = reinterpret_cast<const float*>(static_cast<const bf16*>(task.k) + offset);
    v = v_buffer;
    const bf16* rows = static_cast<const bf16*>(task.v) + offset;
    for (int64_t j = 0; j < num_keys; j += 2, rows += 2 * task.head_dim) {
      for (int64_t d = 0; d < task.head_dim; d += 16) {
        const __m512i even =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + d)));
        const __m512i odd =
            j + 1 < num_keys ? _mm512_castps_si512(load(rows + task.head_dim + d).v) : _mm512_setzero_si512();
        _mm512_storeu_si512(v_buffer + j / 2 * task.head_dim + d, _mm512_or_si512(even, odd));
      }
    }
  }
};
#endif

template <class Cells>
void attend(const AttentionTask& task, uint8_t* memory) {
  const int64_t D = task.head_dim;
  const int64_t element_bytes = static_cast<DType>(task.cache_dtype) == DType::kF32 ? 4 : 2;
  const int64_t num_cells = D / Cells::kValues;
  const int64_t num_panels = (task.num_rows + kPanelRows - 1) / kPanelRows;
  Scratch scratch{memory};
  float* scores = scratch.floats(kPageTokens * kPanelRows);
  float* weights = Cells::kValues == 1 ? scores : scratch.floats(kPageTokens / 2 * kPanelRows);
  float* k_buffer = scratch.floats(kPageTokens * D);
  float* v_buffer = scratch.floats(kPageTokens * D);
  const Scratch after_buffers = scratch;

  auto panel_at = [&](int64_t index) {
    Scratch part = after_buffers;
    part.next += index * (2 * D + 4) * kPanelRows * static_cast<int64_t>(sizeof(float));
    Panel panel;
    panel.queries = part.floats(D * kPanelRows);
    panel.out = part.floats(D * kPanelRows);
    panel.max = part.floats(kPanelRows);
    panel.sum = part.floats(kPanelRows);
    panel.position = part.floats(kPanelRows);
    panel.scale = part.floats(kPanelRows);
    const int64_t first_row = index * kPanelRows;
    panel.num_rows = task.num_rows - first_row < kPanelRows ? task.num_rows - first_row : kPanelRows;
    panel.num_vectors = (panel.num_rows + 15) / 16;
    panel.first_position = task.first_position + first_row / task.group;
    panel.last_position = task.first_position + (first_row + panel.num_rows - 1) / task.group;
    return panel;
  };

  for (int64_t p = 0; p < num_panels; ++p) {
    const Panel panel = panel_at(p);
    load_queries<Cells>(task, p * kPanelRows, panel);
    std::memset(panel.out, 0, static_cast<size_t>(D * kPanelRows) * sizeof(float));
    for (int64_t i = 0; i < kPanelRows; ++i) {
      panel.max[i] = kLowest;
      panel.sum[i] = 0.0f;
      panel.position[i] = static_cast<float>(task.first_position + (p * kPanelRows + i) / task.group);
    }
  }

  int64_t page_end;
  for (int64_t key = task.first_key; key < task.end_key; key = page_end) {
    page_end = (key / kPageTokens + 1) * kPageTokens;
    if (page_end > task.end_key) page_end = task.end_key;
    const int64_t offset = task.pages[key / kPageTokens] * task.page_stride + key % kPageTokens * D;
    const PageOperands<Cells> page(task, offset, page_end - key, k_buffer, v_buffer);
    // The part of the next page that is to be requested with panel p.
    auto next_page = [&](const void* cache, int64_t p) -> Upcoming {
      if (page_end >= task.end_key) return {nullptr, 0};
      const int64_t page_bytes = kPageTokens * D * element_bytes;
      const char* next = static_cast<const char*>(cache) +
                         task.pages[page_end / kPageTokens] * task.page_stride * element_bytes;
      return {next + p * page_bytes / num_panels, page_bytes / num_panels};
    };
    for (int64_t p = 0; p < num_panels; ++p) {
      const Panel panel = panel_at(p);
      // Keys behind the panel's last position are left out; only a page with a key behind its first one needs a mask.
      const int64_t end = panel.last_position + 1 < page_end ? panel.last_position + 1 : page_end;
      const int64_t num_keys = end - key;
      if (num_keys <= 0) continue;
      const Product score{page.k,        num_cells, 1,       round_up(num_keys, kMaxBlock),
                          panel.queries, num_cells, nullptr, scores};
      multiply<Cells, false>(score, panel.num_vectors, next_page(task.k, p));
      end - 1 > panel.first_position ? weigh<Cells, true>(scores, num_keys, key, panel, weights)
                                     : weigh<Cells, false>(scores, num_keys, key, panel, weights);
      const int64_t weight_cells = round_up(num_keys, Cells::kValues) / Cells::kValues;
      const Product add{page.v, 1, D, D, weights, weight_cells, panel.scale, panel.out};
      multiply<Cells, true>(add, panel.num_vectors, next_page(task.v, p));
    }
  }

  for (int64_t p = 0; p < num_panels; ++p) store_results(task, p * kPanelRows, panel_at(p));
}

}  // namespace

int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim) {
  const int64_t num_panels = (num_rows + kPanelRows - 1) / kPanelRows;
  const int64_t shared = 2 * kPageTokens * kPanelRows + 2 * kPageTokens * head_dim;
  return (shared + num_panels * (2 * head_dim + 4) * kPanelRows) * static_cast<int64_t>(sizeof(float));
}

void attention_task(const AttentionTask& task, uint8_t* scratch) {
#if defined(HELEXA_ISA_avx512vnni)
  if (task.use_bf16_pairs) return attend<Bf16Pairs>(task, scratch);
#endif
  attend<Singles>(task, scratch);
}

void attention_combine(const float* partial, int64_t partial_stride, int64_t num_splits, int64_t head_dim,
                       float* out) {
  float best = kLowest;
  for (int64_t s = 0; s < num_splits; ++s) {
    const float split_max = partial[s * partial_stride + head_dim];
    best = split_max > best ? split_max : best;
  }
  float sum = 0.0f;
  std::memset(out, 0, static_cast<size_t>(head_dim) * sizeof(float));
  for (int64_t s = 0; s < num_splits; ++s, partial += partial_stride) {
    float factor[16];
    store(factor, exp2(set1(partial[head_dim] - best)));
    sum += partial[head_dim + 1] * factor[0];
    for (int64_t d = 0; d < head_dim; ++d) out[d] += partial[d] * factor[0];
  }
  const float inverse = sum > 0.0f ? 1.0f / sum : sum;
  for (int64_t d = 0; d < head_dim; ++d) out[d] *= inverse;
}

}  // namespace HELEXA_ISA
}  // namespace helexa
