// SPDX-License-Identifier: GPL-3.0-or-later
// Encoders of the block formats.
//
// Formats of 32 values have one scale, found from the extremes of the block.  In the K formats each sub-block searches its scale (and
// minimum): every candidate step size gives codes, the codes give the best scale by weighted least squares, and the candidate with
// the least error wins.  Then the scales are rounded to their few bits, and the codes are chosen anew for the rounded scales.
// Sixteen sub-blocks are searched at once, one in each lane, so that no sum runs across lanes; and no multiplication is fused with
// an addition, so that every instruction set finds the same codes.
#include "ops/quantize.h"

#include "core/simd.h"
#include "quant/formats.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

constexpr float kLargest = 500000.0f;  // an eighth of it, the scale of Q4_0, still is a finite f16
constexpr float kTiny = 1e-30f;        // below it a range counts as empty: its inverse would be infinite

HELEXA_INLINE float clamped_round(float x, float low, float high) {
  const float inside = x < low ? low : x > high ? high : x;
  return (inside + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: no bits are left for a fraction
}
HELEXA_INLINE f32x16 clamped_round(f32x16 x, float low, float high) {
  return round(min(max(x, set1(low)), set1(high)));
}
HELEXA_INLINE float inverse(float x) { return x > kTiny || x < -kTiny ? 1.0f / x : 0.0f; }

HELEXA_INLINE void store_u16(uint8_t* p, uint16_t value) { std::memcpy(p, &value, sizeof value); }

// Stores x as f16 and returns what was stored.
HELEXA_INLINE float store_half(uint8_t* p, float x) {
  const uint16_t bits = float_to_f16(x);
  store_u16(p, bits);
  return f16_to_float(bits);
}

// --- blocks of 32 with one scale -------------------------------------------------------------------------------------

// The value of the largest magnitude, with its sign; zero is positive.
template <int kSize>
float peak(const float* x) {
  f32x16 high = load(x), low = load(x);
  for (int i = 16; i < kSize; i += 16) {
    high = max(high, load(x + i));
    low = min(low, load(x + i));
  }
  const float most = reduce_max(high), least = -reduce_max(zero() - low);
  return (most < -least ? least : most) + 0.0f;
}

void encode_q8_0(const float* x, uint8_t* block) {
  const float most = peak<32>(x);
  const float inv = inverse(store_half(block, (most < 0 ? -most : most) / 127.0f));
  for (int i = 0; i < 32; ++i) {
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(clamped_round(x[i] * inv, -127.0f, 127.0f)));
  }
}

// Codes around `zero`, which is half of their number: the peak gets the code 0, whose magnitude no other reaches.
void symmetric_codes(const float* x, int zero, uint8_t* scale, uint8_t* codes) {
  const float z = static_cast<float>(zero);
  const float inv = inverse(store_half(scale, peak<32>(x) / -z));
  for (int i = 0; i < 32; ++i)
    codes[i] = static_cast<uint8_t>(clamped_round(x[i] * inv + z, 0.0f, 2 * z - 1));
}

void join_nibbles(const uint8_t* codes, int n, uint8_t* nibbles) {
  for (int i = 0; i < n; ++i) nibbles[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[n + i] << 4));
}

void store_fifth_bits(const uint8_t* codes, uint8_t* out) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(codes[i] >> 4) << i;
  std::memcpy(out, &bits, sizeof bits);
}

void encode_q4_0(const float* x, uint8_t* block) {
  uint8_t codes[32];
  symmetric_codes(x, 8, block, codes);
  join_nibbles(codes, 16, block + 2);
}

void encode_q5_0(const float* x, uint8_t* block) {
  uint8_t codes[32];
  symmetric_codes(x, 16, block, codes);
  store_fifth_bits(codes, block + 2);
  join_nibbles(codes, 16, block + 6);
}

void encode_q5_1(const float* x, uint8_t* block) {
  float low = x[0], high = x[0];
  for (int i = 1; i < 32; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float inv = inverse(store_half(block, (high - low) / 31.0f));
  const float base = store_half(block + 2, low + 0.0f);  // zero is positive
  uint8_t codes[32];
  for (int i = 0; i < 32; ++i)
    codes[i] = static_cast<uint8_t>(clamped_round((x[i] - base) * inv, 0.0f, 31.0f));
  store_fifth_bits(codes, block + 4);
  join_nibbles(codes, 16, block + 8);
}

// --- super-blocks of 256 ---------------------------------------------------------------------------------------------

// x[i] of sub-block s -> lane s of lanes[i].
template <int kSize>
void to_lanes(const float* x, f32x16 (&lanes)[kSize]) {
  for (int i = 0; i < kSize; ++i) {
    float lane[16];
    for (int s = 0; s < 16; ++s) lane[s] = x[s * kSize + i];
    lanes[i] = load(lane);
  }
}

// 1 / x, and 0 where x is not above kTiny.
HELEXA_INLINE f32x16 inverse(f32x16 x) {
  return select_le(x, set1(kTiny), zero(), set1(1.0f) / max(x, set1(kTiny)));
}

// Of each lane, value = scale * code + base, base <= 0, and the weighted square of what it misses.
struct Affine {
  f32x16 scale, base, error;
};

// The least-squares fit of x to codes q.
HELEXA_INLINE Affine fit_affine(const f32x16 (&x)[32], const f32x16 (&weight)[32], const f32x16 (&q)[32],
                                f32x16 w, f32x16 wx) {
  f32x16 wq = zero(), wqq = zero(), wxq = zero();
  for (int i = 0; i < 32; ++i) {
    const f32x16 weighted = weight[i] * q[i];
    wq += weighted;
    wqq += weighted * q[i];
    wxq += weighted * x[i];
  }
  // Codes that are nearly all the same, or a base above zero, leave the scale alone.
  const f32x16 determinant = w * wqq - wq * wq, least = set1(1e-6f) * w * wqq;
  const f32x16 inv = inverse(determinant), alone = wxq * inverse(wqq);
  const f32x16 base = select_le(determinant, least, set1(1.0f), (wqq * wx - wq * wxq) * inv);
  Affine fit{select_le(base, zero(), (w * wxq - wx * wq) * inv, alone), select_le(base, zero(), base, zero()),
             zero()};
  for (int i = 0; i < 32; ++i) {
    const f32x16 missed = fit.scale * q[i] + fit.base - x[i];
    fit.error += weight[i] * missed * missed;
  }
  return fit;
}

// Scale and base of 16 sub-blocks of 32.  Weights grow with a value's magnitude: what is large matters more to a dot product.
template <int kMost>
Affine search_affine(const f32x16 (&x)[32], f32x16 (&weight)[32]) {
  f32x16 low = zero(), high = x[0], square = zero();
  for (int i = 0; i < 32; ++i) {
    low = min(low, x[i]);
    high = max(high, x[i]);
    square += x[i] * x[i];
  }
  float mean[16];
  store(mean, square * set1(1.0f / 32));
  for (int s = 0; s < 16; ++s) mean[s] = __builtin_sqrtf(mean[s]);
  const f32x16 rms = load(mean);
  f32x16 w = zero(), wx = zero();
  for (int i = 0; i < 32; ++i) {
    weight[i] = rms + max(x[i], zero() - x[i]);
    w += weight[i];
    wx += weight[i] * x[i];
  }
  const f32x16 step = inverse(high - low);
  Affine best{zero(), low, zero()};
  for (int i = 0; i < 32; ++i) best.error += weight[i] * (low - x[i]) * (low - x[i]);
  constexpr int kCandidates = kMost == 15 ? 22 : 17;
  constexpr float kFirst = kMost == 15 ? -1.0f : -0.5f;
  f32x16 q[32];
  for (int k = 0; k < kCandidates; ++k) {
    const f32x16 inv = set1(static_cast<float>(kMost) + kFirst + 0.1f * static_cast<float>(k)) * step;
    for (int i = 0; i < 32; ++i) q[i] = clamped_round((x[i] - low) * inv, 0.0f, kMost);
    const Affine fit = fit_affine(x, weight, q, w, wx);
    best.scale = select_le(best.error, fit.error, best.scale, fit.scale);
    best.base = select_le(best.error, fit.error, best.base, fit.base);
    best.error = min(best.error, fit.error);
  }
  return best;
}

// Eight 6-bit scales and mins as 12 bytes: quant/block.h has the layout.
void pack_k_scales(const uint8_t* scale, const uint8_t* min, uint8_t* out) {
  for (int j = 0; j < 4; ++j) {
    out[j] = static_cast<uint8_t>(scale[j] | (scale[4 + j] >> 4 << 6));
    out[4 + j] = static_cast<uint8_t>(min[j] | (min[4 + j] >> 4 << 6));
    out[8 + j] = static_cast<uint8_t>((scale[4 + j] & 15) | (min[4 + j] << 4));
  }
}

// Fifth bits, if there are, and nibbles of 256 codes.
template <class F>
void store_codes(const uint8_t* codes, uint8_t* out) {
  if constexpr (F::kBits == 5) {
    for (int i = 0; i < 32; ++i) {
      uint8_t bits = 0;
      for (int j = 0; j < 8; ++j) bits = static_cast<uint8_t>(bits | (codes[32 * j + i] >> 4) << j);
      out[i] = bits;
    }
    out += 32;
  }
  for (int run = 0; run < 4; ++run) join_nibbles(codes + 64 * run, 32, out + 32 * run);
}

// What 16 sub-blocks, two super-blocks, are stored as: value = d * scale * code - dmin * min, d and dmin the same in eight lanes.
struct SuperMin {
  f32x16 d, dmin, scale, min, error;
};

// Chooses the codes and says what they miss.
template <int kMost>
void choose_codes(const f32x16 (&x)[32], const f32x16 (&weight)[32], SuperMin& s, f32x16 (&q)[32]) {
  const f32x16 step = s.d * s.scale, base = s.dmin * s.min;
  const f32x16 inv = inverse(step);
  s.error = zero();
  for (int i = 0; i < 32; ++i) {
    q[i] = clamped_round((x[i] + base) * inv, 0.0f, kMost);
    const f32x16 missed = step * q[i] - base - x[i];
    s.error += weight[i] * missed * missed;
  }
}

// A common unit, f16, for each eight of 16 numbers from 0 up, so that they are 0 .. 63 units.
HELEXA_INLINE f32x16 unit_of(f32x16 values) {
  float lane[16];
  store(lane, values);
  for (int half = 0; half < 16; half += 8) {
    float most = 0.0f;
    for (int j = 0; j < 8; ++j) most = lane[half + j] > most ? lane[half + j] : most;
    const float unit = f16_to_float(float_to_f16(most / 63.0f));
    for (int j = 0; j < 8; ++j) lane[half + j] = unit;
  }
  return load(lane);
}

// Fits d and dmin of each super-block to all its codes by least squares.
HELEXA_INLINE void refit(const f32x16 (&x)[32], const f32x16 (&weight)[32], const f32x16 (&q)[32],
                         SuperMin& s) {
  f32x16 terms[5];  // of the normal equations: aa ab bb xa xb, for x = d * a - dmin * b
  for (int i = 0; i < 5; ++i) terms[i] = zero();
  for (int i = 0; i < 32; ++i) {
    const f32x16 a = s.scale * q[i], wa = weight[i] * a, wb = weight[i] * s.min;
    terms[0] += wa * a;
    terms[1] += wa * s.min;
    terms[2] += wb * s.min;
    terms[3] += wa * x[i];
    terms[4] += wb * x[i];
  }
  float lanes[5][16], d[16], dmin[16];
  for (int i = 0; i < 5; ++i) store(lanes[i], terms[i]);
  store(d, s.d);
  store(dmin, s.dmin);
  for (int half = 0; half < 16; half += 8) {
    double sum[5] = {};
    for (int i = 0; i < 5; ++i) {
      for (int j = 0; j < 8; ++j) sum[i] += lanes[i][half + j];
    }
    const double determinant = sum[0] * sum[2] - sum[1] * sum[1];
    double fit_d = sum[0] > 0 ? sum[3] / sum[0] : 0, fit_min = 0;
    if (determinant > 1e-6 * sum[0] * sum[2]) {
      const double e = (sum[3] * sum[1] - sum[4] * sum[0]) / determinant;
      if (e > 0) fit_d = (sum[3] * sum[2] - sum[4] * sum[1]) / determinant, fit_min = e;
    }
    const float rounded_d = f16_to_float(float_to_f16(static_cast<float>(fit_d > 0 ? fit_d : 0)));
    const float rounded_min = f16_to_float(float_to_f16(static_cast<float>(fit_min)));
    for (int j = half; j < half + 8; ++j) d[j] = rounded_d, dmin[j] = rounded_min;
  }
  s.d = load(d);
  s.dmin = load(dmin);
}

// The sum of each eight lanes, in all of them.
HELEXA_INLINE f32x16 sum_of_eight(f32x16 values) {
  float lane[16];
  store(lane, values);
  for (int half = 0; half < 16; half += 8) {
    float sum = 0.0f;
    for (int j = 0; j < 8; ++j) sum += lane[half + j];
    for (int j = 0; j < 8; ++j) lane[half + j] = sum;
  }
  return load(lane);
}

// The stored form of two super-blocks, its codes in q.
template <int kMost>
SuperMin encode_lanes(const f32x16 (&x)[32], f32x16 (&q)[32]) {
  f32x16 weight[32];
  const Affine found = search_affine<kMost>(x, weight);
  const f32x16 scales = max(found.scale, zero()), mins = zero() - found.base;
  SuperMin best{unit_of(scales), unit_of(mins), zero(), zero(), set1(3e38f)};
  const f32x16 scale = scales * inverse(best.d), min_ = mins * inverse(best.dmin);
  for (int ds = -1; ds <= 1; ++ds) {
    for (int dm = -1; dm <= 1; ++dm) {
      SuperMin next = best;
      next.scale = clamped_round(scale + set1(static_cast<float>(ds)), 0.0f, 63.0f);
      next.min = clamped_round(min_ + set1(static_cast<float>(dm)), 0.0f, 63.0f);
      choose_codes<kMost>(x, weight, next, q);
      best.scale = select_le(best.error, next.error, best.scale, next.scale);
      best.min = select_le(best.error, next.error, best.min, next.min);
      best.error = min(best.error, next.error);
    }
  }
  choose_codes<kMost>(x, weight, best, q);
  for (int pass = 0; pass < 2; ++pass) {
    SuperMin next = best;
    refit(x, weight, q, next);
    choose_codes<kMost>(x, weight, next, q);
    const f32x16 before = sum_of_eight(best.error), after = sum_of_eight(next.error);
    best.d = select_le(before, after, best.d, next.d);
    best.dmin = select_le(before, after, best.dmin, next.dmin);
    choose_codes<kMost>(x, weight, best, q);
  }
  return best;
}

// One or two super-blocks; with one, the second half of the lanes is idle.
template <class F>
void encode_super_min(const float* x, int num_blocks, uint8_t* blocks) {
  float values[512] = {};
  std::memcpy(values, x, static_cast<size_t>(num_blocks) * 256 * sizeof(float));
  f32x16 lanes[32], q[32];
  to_lanes(values, lanes);
  const SuperMin stored = encode_lanes<(1 << F::kBits) - 1>(lanes, q);
  float d[16], dmin[16], scale[16], min[16];
  store(d, stored.d);
  store(dmin, stored.dmin);
  store(scale, stored.scale);
  store(min, stored.min);
  uint8_t codes[512], scales[16], mins[16];
  for (int i = 0; i < 32; ++i) {
    float lane[16];
    store(lane, q[i]);
    for (int s = 0; s < 16; ++s) codes[32 * s + i] = static_cast<uint8_t>(lane[s]);
  }
  for (int s = 0; s < 16; ++s)
    scales[s] = static_cast<uint8_t>(scale[s]), mins[s] = static_cast<uint8_t>(min[s]);
  for (int b = 0; b < num_blocks; ++b) {
    uint8_t* block = blocks + b * F::kBlockBytes;
    store_half(block, d[8 * b]);
    store_half(block + 2, dmin[8 * b]);
    pack_k_scales(scales + 8 * b, mins + 8 * b, block + 4);
    store_codes<F>(codes + 256 * b, block + 16);
  }
}

// The scales of 16 sub-blocks of 16 with codes -32 .. 31.  Values weigh as their squares.
f32x16 search_symmetric(const f32x16 (&x)[16]) {
  f32x16 low = zero(), high = zero();
  for (int i = 0; i < 16; ++i) {
    low = min(low, x[i]);
    high = max(high, x[i]);
  }
  const f32x16 most = select_le(high, zero() - low, zero() - low, high);
  const f32x16 sign = select_le(high, zero() - low, set1(1.0f), set1(-1.0f));  // the peak's code is negative
  const f32x16 step = inverse(most) * sign;
  f32x16 scale = zero(), best = zero();
  for (int k = -9; k <= 9; ++k) {
    const f32x16 inv = set1(32.0f + 0.1f * static_cast<float>(k)) * step;
    f32x16 wxq = zero(), wqq = zero();
    for (int i = 0; i < 16; ++i) {
      const f32x16 q = clamped_round(x[i] * inv, -32.0f, 31.0f);
      const f32x16 weighted = x[i] * x[i] * q;
      wxq += weighted * x[i];
      wqq += weighted * q;
    }
    const f32x16 fit = wxq * inverse(wqq);
    const f32x16 gain = fit * wxq;
    scale = select_le(gain, best, scale, fit);
    best = max(gain, best);
  }
  return scale;
}

void encode_q6_k(const float* x, uint8_t* block) {
  f32x16 lanes[16];
  to_lanes(x, lanes);
  float scales[16];
  store(scales, search_symmetric(lanes));
  const float d = store_half(block + 208, peak<16>(scales) / -128.0f);
  const float inv = inverse(d);
  uint8_t codes[256];
  for (int j = 0; j < 16; ++j) {
    const int8_t scale = static_cast<int8_t>(clamped_round(scales[j] * inv, -128.0f, 127.0f));
    block[192 + j] = static_cast<uint8_t>(scale);
    const float step = inverse(d * scale);
    for (int i = 16 * j; i < 16 * j + 16; ++i) {
      codes[i] = static_cast<uint8_t>(clamped_round(x[i] * step, -32.0f, 31.0f) + 32.0f);
    }
  }
  for (int half = 0; half < 2; ++half) {
    const uint8_t* c = codes + 128 * half;
    uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint8_t>((c[i] & 15) | (c[64 + i] << 4));
      low[32 + i] = static_cast<uint8_t>((c[32 + i] & 15) | (c[96 + i] << 4));
      high[i] = static_cast<uint8_t>(c[i] >> 4 | (c[32 + i] >> 4 << 2) | (c[64 + i] >> 4 << 4) |
                                     (c[96 + i] >> 4 << 6));
    }
  }
}

// --- runs ------------------------------------------------------------------------------------------------------------

template <class T>
void widen(const uint8_t* source, int64_t n, float* out) {
  const T* values = reinterpret_cast<const T*>(source);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load(values + i));
  if (i < n) store_n(out + i, load_n(values + i, n - i), n - i);
}

// The number of values of a block that cannot be encoded; such a block becomes zeros.
int64_t drop_bad_block(float* x, int n) {
  int64_t bad = 0;
  for (int i = 0; i < n; ++i) bad += !(x[i] <= kLargest && x[i] >= -kLargest);
  if (bad > 0) std::memset(x, 0, static_cast<size_t>(n) * sizeof(float));
  return bad;
}

}  // namespace

int64_t quantize_run(int source_format, const uint8_t* source, int64_t num_values, int format,
                     uint8_t* blocks) {
  float x[kQuantizeRun];
  switch (static_cast<Format>(source_format)) {
    case Format::kF16: widen<f16>(source, num_values, x); break;
    case Format::kBF16: widen<bf16>(source, num_values, x); break;
    default: widen<float>(source, num_values, x);
  }
  const auto each = [&](int block_size, int block_bytes, auto encode) {
    for (int64_t at = 0; at < num_values; at += block_size, blocks += block_bytes) encode(x + at, blocks);
  };
  const auto pairs = [&](int block_bytes, auto encode) {
    for (int64_t at = 0; at < num_values; at += 512, blocks += 2 * block_bytes) {
      encode(x + at, num_values - at < 512 ? 1 : 2, blocks);
    }
  };
  const bool is_super = format == static_cast<int>(Format::kQ4_K) ||
                        format == static_cast<int>(Format::kQ5_K) ||
                        format == static_cast<int>(Format::kQ6_K);
  int64_t bad = 0;
  for (int64_t at = 0; at < num_values; at += is_super ? 256 : 32) {
    bad += drop_bad_block(x + at, is_super ? 256 : 32);
  }
  switch (static_cast<Format>(format)) {
    case Format::kQ8_0: each(32, Q8_0::kBlockBytes, encode_q8_0); break;
    case Format::kQ4_0: each(32, Q4_0::kBlockBytes, encode_q4_0); break;
    case Format::kQ5_0: each(32, Q5_0::kBlockBytes, encode_q5_0); break;
    case Format::kQ5_1: each(32, Q5_1::kBlockBytes, encode_q5_1); break;
    case Format::kQ4_K: pairs(Q4_K::kBlockBytes, encode_super_min<Q4_K>); break;
    case Format::kQ5_K: pairs(Q5_K::kBlockBytes, encode_super_min<Q5_K>); break;
    case Format::kQ6_K: each(256, Q6_K::kBlockBytes, encode_q6_k); break;
    default: break;
  }
  return bad;
}

}  // namespace HELEXA_ISA
}  // namespace helexa
