// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/gated_delta_net.h"

#include <math.h>

#include "core/simd.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

#if defined(HELEXA_AVX512)
constexpr int kTileRows = 8, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 1;
#endif

// c[Rows, 16 * Vectors] (+)= a[Rows, depth] b[depth, 16 * Vectors]
template <int Rows, int Vectors>
HELEXA_INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                 int64_t c_stride, int64_t depth, bool accumulate) {
  f32x16 sums[Rows * Vectors];
  HELEXA_UNROLL
  for (int i = 0; i < Rows * Vectors; ++i)
    sums[i] = accumulate ? load(c + i / Vectors * c_stride + i % Vectors * 16) : zero();
  for (int64_t d = 0; d < depth; ++d) {
    f32x16 right[Vectors];
    HELEXA_UNROLL
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + d * b_stride + 16 * v);
    HELEXA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32x16 left = set1(a[r * a_stride + d]);
      HELEXA_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[r * Vectors + v] = fma(left, right[v], sums[r * Vectors + v]);
    }
  }
  HELEXA_UNROLL
  for (int i = 0; i < Rows * Vectors; ++i) store(c + i / Vectors * c_stride + i % Vectors * 16, sums[i]);
}

template <int Vectors>
HELEXA_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                    float* c, int64_t c_stride, int64_t rows, int64_t depth,
                                    bool accumulate) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    multiply_tile<kTileRows, Vectors>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride,
                                      depth, accumulate);
  for (; r < rows; ++r)
    multiply_tile<1, Vectors>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, depth,
                              accumulate);
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns is a multiple of 16.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  int64_t n = 0;
  for (; n + 16 * kTileVectors <= columns; n += 16 * kTileVectors)
    multiply_columns<kTileVectors>(a, a_stride, b + n, b_stride, c + n, c_stride, rows, depth, accumulate);
  for (; n < columns; n += 16)
    multiply_columns<1>(a, a_stride, b + n, b_stride, c + n, c_stride, rows, depth, accumulate);
}

HELEXA_INLINE f32x16 silu(f32x16 x) { return x / (set1(1.0f) + exp(zero() - x)); }

// The same columns of neighbouring tokens lie pages apart, where the hardware does not look ahead.
constexpr int64_t kTokensAhead = 2;

HELEXA_INLINE void prefetch_row(const float* p, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(p + i);
}

float dot(const float* a, const float* b, int64_t width) {
  f32x16 sum = zero();
  for (int64_t i = 0; i < width; i += 16) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// u / sqrt(sum of squares + 1e-6) * scale, as the reference norms queries and keys.
void normalize(const float* u, float* out, int64_t width, float scale) {
  const f32x16 factor = set1(scale / sqrtf(dot(u, u, width) + 1e-6f));
  for (int64_t i = 0; i < width; i += 16) store(out + i, load(u + i) * factor);
}

float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// What one head reads and writes, token by token.
struct Head {
  const DeltaShape& shape;
  const DeltaSequence& sequence;
  int64_t head, key_head;

  Head(const DeltaShape& s, const DeltaSequence& q, int64_t h)
      : shape(s),
        sequence(q),
        head(h),
        key_head(s.tiled ? h % s.num_key_heads : h / (s.num_value_heads / s.num_key_heads)) {}

  const float* q(int64_t t) const {
    return sequence.conv + t * shape.conv_dim() + key_head * shape.key_head_dim;
  }
  const float* k(int64_t t) const { return q(t) + shape.key_dim(); }
  const float* v(int64_t t) const {
    return sequence.conv + t * shape.conv_dim() + 2 * shape.key_dim() + head * shape.value_head_dim;
  }
  const float* z(int64_t t) const {
    return sequence.x + t * shape.row() + shape.conv_dim() + head * shape.value_head_dim;
  }
  const float* gates(int64_t t) const {
    return sequence.x + t * shape.row() + shape.conv_dim() + shape.value_dim() + head;
  }
  float beta(int64_t t) const { return sigmoid(gates(t)[0]); }
  float log_decay(int64_t t) const {
    return shape.decay[head] * softplus(gates(t)[shape.num_value_heads] + shape.dt_bias[head]);
  }
  float* state() const { return sequence.state + head * shape.key_head_dim * shape.value_head_dim; }

  // Writes the rms norm of o, weighted and gated by silu(z), as the output of token t.
  void write(int64_t t, const float* o) const {
    const int64_t width = shape.value_head_dim;
    const f32x16 scale = set1(1.0f / sqrtf(dot(o, o, width) / static_cast<float>(width) + shape.eps));
    float* out = sequence.out + t * shape.value_dim() + head * width;
    prefetch_row(z(t + kTokensAhead), width);
    for (int64_t i = 0; i < width; i += 16)
      store(out + i, load(o + i) * scale * load(shape.norm_weight + i) * silu(load(z(t) + i)));
  }
};

// Columns of the state that stay in registers while all of its rows pass by.
constexpr int64_t kColumns = 64;

// S *= decay; d = (v - Sᵀk) beta; S += k dᵀ; o = Sᵀq
template <int Vectors>
HELEXA_INLINE void step_columns(float* state, int64_t stride, int64_t depth, const float* q, const float* k,
                                const float* v, float decay, float beta, float* o) {
  f32x16 read[Vectors], written[Vectors];
  HELEXA_UNROLL
  for (int i = 0; i < Vectors; ++i) read[i] = written[i] = zero();
  for (int64_t d = 0; d < depth; ++d) {
    const f32x16 key = set1(k[d]);
    HELEXA_UNROLL
    for (int i = 0; i < Vectors; ++i) read[i] = fma(key, load(state + d * stride + 16 * i), read[i]);
  }
  const f32x16 factor = set1(decay);
  f32x16 delta[Vectors];
  HELEXA_UNROLL
  for (int i = 0; i < Vectors; ++i) delta[i] = (load(v + 16 * i) - factor * read[i]) * set1(beta);
  for (int64_t d = 0; d < depth; ++d) {
    const f32x16 key = set1(k[d]), query = set1(q[d]);
    HELEXA_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      float* place = state + d * stride + 16 * i;
      const f32x16 updated = fma(key, delta[i], factor * load(place));
      store(place, updated);
      written[i] = fma(query, updated, written[i]);
    }
  }
  HELEXA_UNROLL
  for (int i = 0; i < Vectors; ++i) store(o + 16 * i, written[i]);
}

void recur(const Head& head, float* scratch) {
  const int64_t depth = head.shape.key_head_dim, width = head.shape.value_head_dim;
  float *q = scratch, *k = q + depth, *o = k + depth, *state = head.state();
  const float scale = 1.0f / sqrtf(static_cast<float>(depth));
  for (int64_t t = 0; t < head.sequence.num_tokens; ++t) {
    normalize(head.q(t), q, depth, scale);
    normalize(head.k(t), k, depth, 1.0f);
    const float decay = expf(head.log_decay(t)), beta = head.beta(t);
    int64_t n = 0;
    for (; n + kColumns <= width; n += kColumns)
      step_columns<kColumns / 16>(state + n, width, depth, q, k, head.v(t) + n, decay, beta, o + n);
    for (; n < width; n += 16)
      step_columns<1>(state + n, width, depth, q, k, head.v(t) + n, decay, beta, o + n);
    head.write(t, o);
  }
}

// The scratch of a chunk.  Rows of tokens beyond the chunk's last are zeros.
struct Chunk {
  int64_t depth, width;
  float *qk, *keys, *read, *products, *values, *decays, *betas;
  // qk [2 C, d_k]: queries, then keys.  keys [d_k, C]: keys by columns.  read [2 C, d_v]: qk S.
  // products [2 C, C]: qk Kᵀ.  values [C, d_v].  decays [C]: sums of log decays.  betas [C].

  Chunk(const DeltaShape& shape, float* scratch) : depth(shape.key_head_dim), width(shape.value_head_dim) {
    qk = scratch;
    keys = qk + 2 * kDeltaChunk * depth;
    read = keys + depth * kDeltaChunk;
    products = read + 2 * kDeltaChunk * width;
    values = products + 2 * kDeltaChunk * kDeltaChunk;
    decays = values + kDeltaChunk * width;
    betas = decays + kDeltaChunk;
  }
  static int64_t num_floats(const DeltaShape& shape) {
    return kDeltaChunk * (3 * shape.key_head_dim + 3 * shape.value_head_dim + 2 * kDeltaChunk + 2);
  }
};

// Turns q·k of the chunk into weights: exp(G_i - G_j) for j <= i, else 0; and k·k into the negated strictly lower matrix
// -beta_i exp(G_i - G_j).  Differences are masked before the exponential, whose argument is then never positive.
void weigh_products(const Chunk& c, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i) {
    float* attention = c.products + i * kDeltaChunk;
    float* system = c.products + (kDeltaChunk + i) * kDeltaChunk;
    const f32x16 own = set1(c.decays[i]), beta = set1(-c.betas[i]);
    for (int64_t j = 0; j < padded; j += 16) {
      const f32x16 weight = exp(min(own - load(c.decays + j), zero()));
      store(attention + j, load(attention + j) * weight);
      store(system + j, load(system + j) * weight * beta);
    }
    for (int64_t j = i + 1; j < padded; ++j) attention[j] = 0.0f;
    for (int64_t j = i; j < padded; ++j) system[j] = 0.0f;
  }
}

// values = (I - system)⁻¹ values by forward substitution, sixteen rows at a time.
void substitute(const Chunk& c, int64_t padded) {
  const float* system = c.products + kDeltaChunk * kDeltaChunk;
  for (int64_t block = 0; block < padded; block += 16) {
    if (block > 0)
      multiply(system + block * kDeltaChunk, kDeltaChunk, c.values, c.width, c.values + block * c.width,
               c.width, 16, c.width, block, true);
    for (int64_t i = block + 1; i < block + 16; ++i) {
      float* row = c.values + i * c.width;
      for (int64_t j = block; j < i; ++j) {
        const f32x16 factor = set1(system[i * kDeltaChunk + j]);
        const float* other = c.values + j * c.width;
        for (int64_t n = 0; n < c.width; n += 16) store(row + n, fma(factor, load(other + n), load(row + n)));
      }
    }
  }
}

void fill_chunk(const Head& head, const Chunk& c, int64_t first, int64_t count, int64_t padded) {
  const float scale = 1.0f / sqrtf(static_cast<float>(c.depth));
  float sum = 0.0f;
  for (int64_t i = 0; i < padded; ++i) {
    float *q = c.qk + i * c.depth, *k = c.qk + (kDeltaChunk + i) * c.depth;
    if (i < count) {
      prefetch_row(head.q(first + i + kTokensAhead), c.depth);
      prefetch_row(head.k(first + i + kTokensAhead), c.depth);
      normalize(head.q(first + i), q, c.depth, scale);
      normalize(head.k(first + i), k, c.depth, 1.0f);
      sum += head.log_decay(first + i);
    } else {
      for (int64_t d = 0; d < c.depth; ++d) q[d] = k[d] = 0.0f;
    }
    c.decays[i] = sum;
    c.betas[i] = i < count ? head.beta(first + i) : 0.0f;
    for (int64_t d = 0; d < c.depth; ++d) c.keys[d * kDeltaChunk + i] = k[d];
  }
}

// One chunk in the form of section 3.3 of the paper: with G the running sum of log decays,
//   V = (I + A)⁻¹ (beta (v - e^G K S)),  A_ij = beta_i e^(G_i - G_j) k_i·k_j for j < i
//   O = e^G Q S + (Q Kᵀ ∘ D) V,          D_ij = e^(G_i - G_j) for j <= i
//   S = e^G_last S + Σ_j e^(G_last - G_j) k_j V_jᵀ
void run_chunk(const Head& head, const Chunk& c, int64_t first, int64_t count) {
  const int64_t padded = (count + 15) / 16 * 16;
  float* state = head.state();
  fill_chunk(head, c, first, count, padded);
  const float* keys = c.qk + kDeltaChunk * c.depth;
  multiply(c.qk, c.depth, state, c.width, c.read, c.width, padded, c.width, c.depth, false);
  multiply(keys, c.depth, state, c.width, c.read + kDeltaChunk * c.width, c.width, padded, c.width, c.depth,
           false);
  multiply(c.qk, c.depth, c.keys, kDeltaChunk, c.products, kDeltaChunk, padded, padded, c.depth, false);
  multiply(keys, c.depth, c.keys, kDeltaChunk, c.products + kDeltaChunk * kDeltaChunk, kDeltaChunk, padded,
           padded, c.depth, false);
  weigh_products(c, padded);
  for (int64_t i = 0; i < padded; ++i) {
    const f32x16 decay = set1(expf(c.decays[i])), beta = set1(c.betas[i]);
    const float* known = c.read + (kDeltaChunk + i) * c.width;
    float *value = c.values + i * c.width, *output = c.read + i * c.width;
    prefetch_row(head.v(first + i + kTokensAhead), c.width);
    for (int64_t n = 0; n < c.width; n += 16) {
      store(value + n, i < count ? (load(head.v(first + i) + n) - decay * load(known + n)) * beta : zero());
      store(output + n, decay * load(output + n));
    }
  }
  substitute(c, padded);
  multiply(c.products, kDeltaChunk, c.values, c.width, c.read, c.width, count, c.width, count, true);
  const float last = c.decays[count - 1];
  const f32x16 whole_decay = set1(expf(last));
  for (int64_t j = 0; j < count; ++j) c.betas[j] = expf(last - c.decays[j]);
  for (int64_t d = 0; d < c.depth; ++d) {
    for (int64_t j = 0; j < count; ++j) c.keys[d * kDeltaChunk + j] *= c.betas[j];
    for (int64_t n = 0; n < c.width; n += 16)
      store(state + d * c.width + n, whole_decay * load(state + d * c.width + n));
  }
  multiply(c.keys, kDeltaChunk, c.values, c.width, state, c.width, c.depth, c.width, count, true);
  for (int64_t i = 0; i < count; ++i) head.write(first + i, c.read + i * c.width);
}

}  // namespace

void delta_convolve(const DeltaShape& shape, const DeltaSequence& sequence, float* conv, int64_t begin,
                    int64_t end) {
  const int64_t conv_dim = shape.conv_dim(), past = shape.num_taps - 1;
  auto input =
      [&](int64_t t) -> const float* {  // of token t, which may lie before the first; null if there is none
    if (t >= 0) return sequence.x + t * shape.row();
    return sequence.is_fresh ? nullptr : sequence.conv_state + (past + t) * conv_dim;
  };
  for (int64_t t = 0; t < sequence.num_tokens; ++t) {
    prefetch_row(sequence.x + (t + kTokensAhead) * shape.row() + begin, end - begin);
    for (int64_t c = begin; c < end; c += 16) {
      f32x16 sum = zero();
      for (int64_t tap = 0; tap <= past; ++tap) {
        if (const float* values = input(t - past + tap))
          sum = fma(load(values + c), load(shape.conv_weight + tap * conv_dim + c), sum);
      }
      store(conv + t * conv_dim + c, silu(sum));
    }
  }
  // The oldest first: what moves down within the state is read before it is overwritten.
  for (int64_t i = 0; i < past; ++i) {
    const float* values = input(sequence.num_tokens - past + i);
    for (int64_t c = begin; c < end; c += 16)
      store(sequence.conv_state + i * conv_dim + c, values ? load(values + c) : zero());
  }
}

int64_t delta_scratch(const DeltaShape& shape, int64_t num_tokens) {
  if (num_tokens < kRecurrentTokens) return 2 * shape.key_head_dim + shape.value_head_dim;
  return Chunk::num_floats(shape);
}

void delta_head(const DeltaShape& shape, const DeltaSequence& sequence, int64_t head, float* scratch) {
  const Head view(shape, sequence, head);
  if (sequence.is_fresh && sequence.num_tokens > 0) {
    float* state = view.state();
    for (int64_t i = 0; i < shape.key_head_dim * shape.value_head_dim; i += 16) store(state + i, zero());
  }
  if (sequence.num_tokens < kRecurrentTokens) {
    recur(view, scratch);
    return;
  }
  const Chunk chunk(shape, scratch);
  for (int64_t first = 0; first < sequence.num_tokens; first += kDeltaChunk) {
    const int64_t left = sequence.num_tokens - first;
    run_chunk(view, chunk, first, left < kDeltaChunk ? left : kDeltaChunk);
  }
}

}  // namespace HELEXA_ISA
}  // namespace helexa
