// SPDX-License-Identifier: GPL-3.0-or-later
// The encoders of quantize_isa.cpp for devices, step for step, so that they find the same codes: a thread has a block of 32 values, or a
// sub-block of a super-block, whose other sub-blocks are its neighbours in the warp.  No product is fused with a sum, and what is
// summed over sub-blocks is summed in their order.
#include "core/cuda.cuh"
#include "ops/quantize.h"
#include "quant/formats.h"

namespace helexa {
namespace {

constexpr int kThreads = 128;
constexpr float kLargest = 500000.0f;
constexpr float kTiny = 1e-30f;

// A float whose operations the compiler does not fuse.
struct Exact {
  float v;
  Exact() = default;
  __device__ __forceinline__ Exact(float x) : v(x) {}
};
__device__ __forceinline__ Exact operator+(Exact a, Exact b) { return __fadd_rn(a.v, b.v); }
__device__ __forceinline__ Exact operator-(Exact a, Exact b) { return __fsub_rn(a.v, b.v); }
__device__ __forceinline__ Exact operator*(Exact a, Exact b) { return __fmul_rn(a.v, b.v); }
__device__ __forceinline__ Exact operator/(Exact a, Exact b) { return __fdiv_rn(a.v, b.v); }
__device__ __forceinline__ Exact least(Exact a, Exact b) { return fminf(a.v, b.v); }
__device__ __forceinline__ Exact most(Exact a, Exact b) { return fmaxf(a.v, b.v); }
// a where key <= limit, else b.
__device__ __forceinline__ Exact select_le(Exact key, Exact limit, Exact a, Exact b) {
  return key.v <= limit.v ? a : b;
}
__device__ __forceinline__ Exact clamped_round(Exact x, float low, float high) {
  return (least(most(x, low), high) + 12582912.0f) - 12582912.0f;
}
// 1 / x, and 0 where x is not above kTiny.
__device__ __forceinline__ Exact inverse_above(Exact x) {
  return x.v <= kTiny ? Exact(0.0f) : Exact(1.0f) / x;
}
// 1 / x, and 0 next to 0.
__device__ __forceinline__ Exact inverse(Exact x) {
  return x.v > kTiny || x.v < -kTiny ? Exact(1.0f) / x : Exact(0.0f);
}
__device__ __forceinline__ Exact rounded_to_half(Exact x) { return __half2float(__float2half_rn(x.v)); }
__device__ __forceinline__ uint16_t half_bits(Exact x) { return __half_as_ushort(__float2half_rn(x.v)); }
__device__ __forceinline__ uint32_t code_of(Exact x) { return static_cast<uint32_t>(__float2int_rn(x.v)); }

__device__ __forceinline__ void store_u16(uint8_t* p, uint32_t value) {
  *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(value);
}
__device__ __forceinline__ void store_u32(uint8_t* p, uint32_t value) {
  store_u16(p, value), store_u16(p + 2, value >> 16);
}

// kSize values from `first` on, a multiple of kSize.
template <int kSize>
__device__ __forceinline__ void load_values(Format format, const uint8_t* source, int64_t first,
                                            Exact (&x)[kSize]) {
  if (format == Format::kF32) {
    const float4* from = reinterpret_cast<const float4*>(source + 4 * first);
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      const float4 v = from[i];
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
    return;
  }
  const uint4* from = reinterpret_cast<const uint4*>(source + 2 * first);
#pragma unroll
  for (int i = 0; i < kSize / 8; ++i) {
    const uint4 v = from[i];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t bits = words[j / 2] >> (16 * (j % 2)) & 0xffff;
      x[8 * i + j] = format == Format::kBF16
                         ? __uint_as_float(bits << 16)
                         : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    }
  }
}

// The values of this thread; zeros where there are none, or where one of the kLanes threads of the block has a value that cannot be
// encoded.  Such values are counted.
template <int kSize, int kLanes>
__device__ __forceinline__ void take_values(Format format, const uint8_t* source, int64_t first,
                                            int64_t num_values, unsigned long long* num_bad,
                                            Exact (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = 0.0f;
  if (first < num_values) load_values(format, source, first, x);
  int bad = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) bad += x[i].v <= kLargest && x[i].v >= -kLargest ? 0 : 1;
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) bad += __shfl_xor_sync(0xffffffffu, bad, lane);
  if (bad == 0) return;
  if (threadIdx.x % kLanes == 0) atomicAdd(num_bad, static_cast<unsigned long long>(bad));
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = 0.0f;
}

// Codes, four to a word.
template <int kWords>
__device__ __forceinline__ void join_codes(const Exact (&q)[4 * kWords], uint32_t (&words)[kWords]) {
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    words[k] = code_of(q[4 * k]) | code_of(q[4 * k + 1]) << 8 | code_of(q[4 * k + 2]) << 16 |
               code_of(q[4 * k + 3]) << 24;
  }
}

// --- blocks of 32 with one scale -------------------------------------------------------------------------------------

template <int kSize>
__device__ __forceinline__ void find_range(const Exact (&x)[kSize], Exact& low, Exact& high) {
  low = high = x[0];
#pragma unroll
  for (int i = 1; i < kSize; ++i) low = least(low, x[i]), high = most(high, x[i]);
}
// The value of the largest magnitude, with its sign; zero is positive.
__device__ __forceinline__ Exact peak_of(Exact low, Exact high) {
  return (high.v < -low.v ? low : high) + 0.0f;
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    quantize_block_kernel(Format source_format, const uint8_t* __restrict__ source, int64_t num_values,
                          uint8_t* __restrict__ blocks, unsigned long long* num_bad) {
  static_assert(F::kBlockSize == 32);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  Exact x[32], low, high, q[32];
  take_values<32, 1>(source_format, source, 32 * number, num_values, num_bad, x);
  if (32 * number >= num_values) return;
  uint8_t* block = blocks + number * F::kBlockBytes;
  find_range(x, low, high);
  if constexpr (F::kBits == 8) {
    const Exact magnitude = peak_of(low, high);
    const Exact d = rounded_to_half((magnitude.v < 0 ? Exact(-magnitude.v) : magnitude) / 127.0f);
    const Exact inv = inverse(d);
    store_u16(block, half_bits(d));
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const uint32_t first = code_of(clamped_round(x[2 * k] * inv, -127.0f, 127.0f)) & 0xff;
      const uint32_t second = code_of(clamped_round(x[2 * k + 1] * inv, -127.0f, 127.0f)) & 0xff;
      store_u16(block + 2 + 2 * k, first | second << 8);
    }
    return;
  }
  constexpr bool kAffine = F::kScales == Scales::kAffine;
  constexpr float kMost = (1 << F::kBits) - 1, kZero = 1 << (F::kBits - 1);
  const Exact d = rounded_to_half(kAffine ? (high - low) / kMost : peak_of(low, high) / -kZero);
  const Exact base = kAffine ? rounded_to_half(low + 0.0f) : Exact(0.0f);
  const Exact inv = inverse(d);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    q[i] = clamped_round(kAffine ? (x[i] - base) * inv : x[i] * inv + kZero, 0.0f, kMost);
  }
  uint32_t codes[8];
  join_codes(q, codes);
  store_u16(block, half_bits(d));
  if constexpr (kAffine) store_u16(block + 2, half_bits(base));
  constexpr int kNibbles = F::kBlockBytes - 16;
  if constexpr (F::kBits == 5) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) bits |= (codes[i / 4] >> (8 * (i % 4) + 4) & 1) << i;
    store_u32(block + kNibbles - 4, bits);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    store_u32(block + kNibbles + 4 * k, (codes[k] & 0x0f0f0f0fu) | (codes[4 + k] & 0x0f0f0f0fu) << 4);
  }
}

// --- super-blocks of 256 with minimums -------------------------------------------------------------------------------

// Of a sub-block, value = scale * code + base, base <= 0, and the weighted square of what it misses.
struct Affine {
  Exact scale, base, error;
};

template <int kMost>
__device__ __forceinline__ Exact affine_code(Exact x, Exact low, Exact inv) {
  return clamped_round((x - low) * inv, 0.0f, kMost);
}

template <int kMost>
__device__ __forceinline__ Affine search_affine(const Exact (&x)[32], Exact (&weight)[32]) {
  Exact low = 0.0f, high = x[0], square = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    low = least(low, x[i]), high = most(high, x[i]);
    square = square + x[i] * x[i];
  }
  const Exact rms = __fsqrt_rn((square * (1.0f / 32)).v);
  Exact w = 0.0f, wx = 0.0f;
  Affine best{0.0f, low, 0.0f};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    weight[i] = rms + most(x[i], Exact(0.0f) - x[i]);
    w = w + weight[i];
    wx = wx + weight[i] * x[i];
    best.error = best.error + weight[i] * (low - x[i]) * (low - x[i]);
  }
  const Exact step = inverse_above(high - low);
  constexpr int kCandidates = kMost == 15 ? 22 : 17;
  constexpr float kFirst = kMost == 15 ? -1.0f : -0.5f;
#pragma unroll 1
  for (int k = 0; k < kCandidates; ++k) {
    const Exact inv = (Exact(kMost + kFirst) + Exact(0.1f) * static_cast<float>(k)) * step;
    Exact wq = 0.0f, wqq = 0.0f, wxq = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const Exact q = affine_code<kMost>(x[i], low, inv), weighted = weight[i] * q;
      wq = wq + weighted;
      wqq = wqq + weighted * q;
      wxq = wxq + weighted * x[i];
    }
    // The least-squares fit.  Codes that are nearly all the same, or a base above zero, leave the scale alone.
    const Exact determinant = w * wqq - wq * wq, bound = Exact(1e-6f) * w * wqq;
    const Exact inverse_determinant = inverse_above(determinant), alone = wxq * inverse_above(wqq);
    const Exact base = select_le(determinant, bound, 1.0f, (wqq * wx - wq * wxq) * inverse_determinant);
    Affine fit{select_le(base, 0.0f, (w * wxq - wx * wq) * inverse_determinant, alone),
               select_le(base, 0.0f, base, 0.0f), 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const Exact missed = fit.scale * affine_code<kMost>(x[i], low, inv) + fit.base - x[i];
      fit.error = fit.error + weight[i] * missed * missed;
    }
    best.scale = select_le(best.error, fit.error, best.scale, fit.scale);
    best.base = select_le(best.error, fit.error, best.base, fit.base);
    best.error = least(best.error, fit.error);
  }
  return best;
}

// What a sub-block is stored as: value = d * scale * code - dmin * min; d and dmin are the same in all eight.
struct SuperMin {
  Exact d, dmin, scale, min, error;

  template <int kMost>
  __device__ __forceinline__ Exact code(Exact x) const {
    return clamped_round((x + dmin * min) * inverse_above(d * scale), 0.0f, kMost);
  }
  template <int kMost>
  __device__ __forceinline__ void measure(const Exact (&x)[32], const Exact (&weight)[32]) {
    error = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const Exact missed = d * scale * code<kMost>(x[i]) - dmin * min - x[i];
      error = error + weight[i] * missed * missed;
    }
  }
};

// Number j of eight, by the thread of sub-block j.
__device__ __forceinline__ Exact of_eight(Exact x, int j) {
  return __shfl_sync(0xffffffffu, x.v, static_cast<int>(threadIdx.x % 32 / 8 * 8) + j);
}

// A common unit, f16, of eight numbers from 0 up, so that they are 0 .. 63 units.
__device__ __forceinline__ Exact unit_of(Exact value) {
  Exact peak = most(0.0f, value);
#pragma unroll
  for (int lane = 1; lane < 8; lane *= 2) peak = most(peak, __shfl_xor_sync(0xffffffffu, peak.v, lane));
  return rounded_to_half(peak / 63.0f);
}

__device__ __forceinline__ Exact sum_of_eight(Exact value) {
  Exact sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = sum + of_eight(value, j);
  return sum;
}

__device__ __forceinline__ double difference(double a, double b, double c, double d) {
  return __dadd_rn(__dmul_rn(a, b), -__dmul_rn(c, d));
}

// Fits d and dmin of the super-block to all its codes by least squares.
template <int kMost>
__device__ __forceinline__ void refit(const Exact (&x)[32], const Exact (&weight)[32], SuperMin& s) {
  Exact terms[5] = {0.0f, 0.0f, 0.0f, 0.0f,
                    0.0f};  // of the normal equations: aa ab bb xa xb, for x = d * a - dmin * b
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const Exact a = s.scale * s.code<kMost>(x[i]), wa = weight[i] * a, wb = weight[i] * s.min;
    terms[0] = terms[0] + wa * a;
    terms[1] = terms[1] + wa * s.min;
    terms[2] = terms[2] + wb * s.min;
    terms[3] = terms[3] + wa * x[i];
    terms[4] = terms[4] + wb * x[i];
  }
  double sum[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    sum[i] = 0;
    for (int j = 0; j < 8; ++j) sum[i] = __dadd_rn(sum[i], of_eight(terms[i], j).v);
  }
  const double determinant = difference(sum[0], sum[2], sum[1], sum[1]);
  double fit_d = sum[0] > 0 ? sum[3] / sum[0] : 0, fit_min = 0;
  if (determinant > __dmul_rn(__dmul_rn(1e-6, sum[0]), sum[2])) {
    const double e = difference(sum[3], sum[1], sum[4], sum[0]) / determinant;
    if (e > 0) fit_d = difference(sum[3], sum[2], sum[4], sum[1]) / determinant, fit_min = e;
  }
  s.d = rounded_to_half(static_cast<float>(fit_d > 0 ? fit_d : 0));
  s.dmin = rounded_to_half(static_cast<float>(fit_min));
}

template <int kMost>
__device__ __forceinline__ SuperMin encode(const Exact (&x)[32], Exact (&weight)[32]) {
  const Affine found = search_affine<kMost>(x, weight);
  const Exact scales = most(found.scale, 0.0f), mins = Exact(0.0f) - found.base;
  SuperMin best{unit_of(scales), unit_of(mins), 0.0f, 0.0f, 3e38f};
  const Exact scale = scales * inverse_above(best.d), min = mins * inverse_above(best.dmin);
#pragma unroll 1
  for (int k = 0; k < 9; ++k) {
    SuperMin next = best;
    next.scale = clamped_round(scale + static_cast<float>(k / 3 - 1), 0.0f, 63.0f);
    next.min = clamped_round(min + static_cast<float>(k % 3 - 1), 0.0f, 63.0f);
    next.measure<kMost>(x, weight);
    best.scale = select_le(best.error, next.error, best.scale, next.scale);
    best.min = select_le(best.error, next.error, best.min, next.min);
    best.error = least(best.error, next.error);
  }
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    SuperMin next = best;
    refit<kMost>(x, weight, next);
    next.measure<kMost>(x, weight);
    const Exact before = sum_of_eight(best.error), after = sum_of_eight(next.error);
    best.d = select_le(before, after, best.d, next.d);
    best.dmin = select_le(before, after, best.dmin, next.dmin);
    best.measure<kMost>(x, weight);
  }
  return best;
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    quantize_super_min_kernel(Format source_format, const uint8_t* __restrict__ source, int64_t num_values,
                              uint8_t* __restrict__ blocks, unsigned long long* num_bad) {
  constexpr int kMost = (1 << F::kBits) - 1;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 32;
  const int j = threadIdx.x % 8;
  Exact x[32], weight[32];
  take_values<32, 8>(source_format, source, first, num_values, num_bad, x);
  const SuperMin stored = encode<kMost>(x, weight);
#pragma unroll
  for (int i = 0; i < 32; ++i) x[i] = stored.code<kMost>(x[i]);
  uint32_t codes[8], bits = 0;
  join_codes(x, codes);

  uint8_t* block = blocks + first / 256 * F::kBlockBytes;
  const bool is_there = first < num_values;
  const uint32_t scale = code_of(stored.scale), min = code_of(stored.min);
  const uint32_t later_scale = __shfl_xor_sync(0xffffffffu, scale, 4);
  const uint32_t later_min = __shfl_xor_sync(0xffffffffu, min, 4);
  if (is_there && j == 0) {
    store_u16(block, half_bits(stored.d));
    store_u16(block + 2, half_bits(stored.dmin));
  }
  if (is_there && j < 4) {
    block[4 + j] = static_cast<uint8_t>(scale | later_scale >> 4 << 6);
    block[8 + j] = static_cast<uint8_t>(min | later_min >> 4 << 6);
    block[12 + j] = static_cast<uint8_t>((later_scale & 15) | later_min << 4);
  }
  if constexpr (F::kBits == 5) {
    uint32_t fifths = 0, word = 0;  // of this thread's 32 codes; of four columns in all sub-blocks
#pragma unroll
    for (int i = 0; i < 32; ++i) fifths |= (codes[i / 4] >> (8 * (i % 4) + 4) & 1) << i;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
      const uint32_t other =
          __shfl_sync(0xffffffffu, fifths, static_cast<int>(threadIdx.x % 32 / 8 * 8) + lane);
#pragma unroll
      for (int b = 0; b < 4; ++b) word |= (other >> (4 * j + b) & 1) << (8 * b + lane);
    }
    if (is_there) store_u32(block + 16 + 4 * j, word);
    bits = 32;
  }
  // Two neighbouring sub-blocks share 32 bytes, of which each thread writes half.
  const bool is_odd = j % 2 == 1;
  uint8_t* nibbles = block + 16 + bits + j / 2 * 32 + (is_odd ? 16 : 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, is_odd ? codes[k] : codes[4 + k], 1);
    const uint32_t low = is_odd ? other : codes[k], high = is_odd ? codes[4 + k] : other;
    if (is_there) store_u32(nibbles + 4 * k, (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4);
  }
}

// --- Q6_K ------------------------------------------------------------------------------------------------------------

// The scale of a sub-block of 16 with codes -32 .. 31.  Values weigh as their squares.
__device__ __forceinline__ Exact search_symmetric(const Exact (&x)[16]) {
  Exact low = 0.0f, high = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) low = least(low, x[i]), high = most(high, x[i]);
  const Exact depth = Exact(0.0f) - low;
  const Exact sign = select_le(high, depth, 1.0f, -1.0f);  // the peak's code is negative
  const Exact step = inverse_above(select_le(high, depth, depth, high)) * sign;
  Exact scale = 0.0f, best = 0.0f;
#pragma unroll 1
  for (int k = -9; k <= 9; ++k) {
    const Exact inv = (Exact(32.0f) + Exact(0.1f) * static_cast<float>(k)) * step;
    Exact wxq = 0.0f, wqq = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const Exact q = clamped_round(x[i] * inv, -32.0f, 31.0f), weighted = x[i] * x[i] * q;
      wxq = wxq + weighted * x[i];
      wqq = wqq + weighted * q;
    }
    const Exact fit = wxq * inverse_above(wqq), gain = fit * wxq;
    scale = select_le(gain, best, scale, fit);
    best = most(gain, best);
  }
  return scale;
}

__global__ void __launch_bounds__(kThreads)
    quantize_q6_k_kernel(Format source_format, const uint8_t* __restrict__ source, int64_t num_values,
                         uint8_t* __restrict__ blocks, unsigned long long* num_bad) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16;
  const int j = threadIdx.x % 16;
  Exact x[16];
  take_values<16, 16>(source_format, source, first, num_values, num_bad, x);
  const Exact found = search_symmetric(x);
  Exact low = found, high = found;
#pragma unroll
  for (int lane = 1; lane < 16; lane *= 2) {
    low = least(low, __shfl_xor_sync(0xffffffffu, low.v, lane));
    high = most(high, __shfl_xor_sync(0xffffffffu, high.v, lane));
  }
  const Exact d = rounded_to_half(peak_of(low, high) / -128.0f);
  const Exact scale = clamped_round(found * inverse(d), -128.0f, 127.0f), step = inverse(d * scale);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = clamped_round(x[i] * step, -32.0f, 31.0f) + 32.0f;
  uint32_t codes[4];
  join_codes(x, codes);

  uint8_t* block = blocks + first / 256 * Q6_K::kBlockBytes;
  const bool is_there = first < num_values;
  const int half = j / 8, run = j % 8 / 2, part = j % 2;  // of 128 columns, of 32, of 16
  if (is_there) block[192 + j] = static_cast<uint8_t>(code_of(scale));
  if (is_there && j == 0) store_u16(block + 208, half_bits(d));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t later = __shfl_xor_sync(0xffffffffu, codes[k], 4);
    uint32_t upper = (codes[k] >> 4 & 0x03030303u) << (2 * run);
    upper |= __shfl_xor_sync(0xffffffffu, upper, 2);
    upper |= __shfl_xor_sync(0xffffffffu, upper, 4);
    if (is_there && run < 2) {
      store_u32(block + 64 * half + 32 * run + 16 * part + 4 * k,
                (codes[k] & 0x0f0f0f0fu) | (later & 0x0f0f0f0fu) << 4);
    }
    if (is_there && run == k) store_u32(block + 128 + 32 * half + 16 * part + 4 * k, upper);
  }
}

}  // namespace

void quantize_cuda(int source_format, const uint8_t* source, int64_t num_values, int format, uint8_t* blocks,
                   unsigned long long* num_bad, void* stream) {
  if (num_values == 0) return;
  const auto run = [&](auto kernel, int64_t each) {
    const int64_t grid = (num_values + kThreads * each - 1) / (kThreads * each);
    launch_kernel(kernel, {dim3(static_cast<unsigned>(grid)), dim3(kThreads), stream},
                  static_cast<Format>(source_format), source, num_values, blocks, num_bad);
  };
  switch (static_cast<Format>(format)) {
    case Format::kQ8_0: return run(quantize_block_kernel<Q8_0>, 32);
    case Format::kQ4_0: return run(quantize_block_kernel<Q4_0>, 32);
    case Format::kQ5_0: return run(quantize_block_kernel<Q5_0>, 32);
    case Format::kQ5_1: return run(quantize_block_kernel<Q5_1>, 32);
    case Format::kQ4_K: return run(quantize_super_min_kernel<Q4_K>, 32);
    case Format::kQ5_K: return run(quantize_super_min_kernel<Q5_K>, 32);
    case Format::kQ6_K: return run(quantize_q6_k_kernel, 16);
    default: throw std::invalid_argument("quantize: a device has no encoder of this format");
  }
}

}  // namespace helexa
