// SPDX-License-Identifier: GPL-3.0-or-later
// What a warp does in a product of quantized weights and a few rows of int8 activations: 16 weight rows times 256 columns (a chunk:
// one unit of tiles.cuh or four) against up to 8 rows for each of kTiles, on the integer tensor cores.
//
// mma m16n8k32 multiplies a step, 16 weight rows x 32 columns, with 8 columns of activations.  8 rows of activations fill them (kSplit
// 1).  Fewer rows leave columns free, and these take other steps: column n stands for row n % (8 / kSplit) and for step or pair
// n / (8 / kSplit), the operand being zero everywhere else, so that the products of kSplit steps follow one another into one result
// whose columns are the steps' separate sums.  The scales, which cost most instructions, are then applied once to 8 useful columns
// instead of once per step to a few.
//
// Offsets (minimums) of 8 steps are a product of matrices by themselves, weight rows x steps times steps x sums of activations, and one
// mma m16n8k8 in tf32, in which they are exact.  The sums of activations come in two parts of 11 bits each.
//
// Sums of a row run in the same order whatever kSplit and kTiles are: in a chunk each pair of steps has a float32 sum of its own, first
// step before second; then (pair 0 + pair 1) + (pair 2 + pair 3) + offsets; then chunks by the slots of
// matvec_block.cuh.  So a row's result does not depend on the rows beside it.
#pragma once

#include "core/cuda.cuh"
#include "ops/activation.cuh"
#include "quant/tiles.cuh"

namespace helexa {

constexpr int kChunkCols = 256;
constexpr int kChunkPairs = 4;

template <class F>
constexpr int chunk_bytes() {
  return kChunkCols / Unit<F>::kCols * Unit<F>::kBytes;
}

// The rows of activations that a block multiplies.
struct InputRows {
  const uint8_t* q8;
  int num_rows, row_bytes, padded_cols;

  __device__ __forceinline__ InputRows(const uint8_t* rows, int num_rows, int cols)
      : q8(rows),
        num_rows(num_rows),
        row_bytes(static_cast<int>(activation_row_bytes(cols))),
        padded_cols(static_cast<int>(activation_padded_cols(cols))) {}

  // Row r, or the last one for those beyond it, whose results nobody reads.
  __device__ __forceinline__ const uint8_t* row(int r) const { return q8 + min(r, num_rows - 1) * row_bytes; }
};

// What of the activations a lane reads; with g = lane / 4 and t = lane % 4 as everywhere.
template <int kSplit>
struct LaneColumns {
  static_assert(kSplit == 1 || kSplit == 2 || kSplit == 8);
  static constexpr int kRows = 8 / kSplit;  // of activations per tile
  static constexpr int kOwnPairs = kSplit == 1   ? 4
                                   : kSplit == 2 ? 2
                                                 : 1;  // pairs of a chunk that a column stands for

  // Operand: the lane supplies column g.
  static __device__ __forceinline__ int operand_row(int g) { return g & (kRows - 1); }
  static __device__ __forceinline__ int operand_pair(int g, int j) {
    return kSplit == 8 ? g >> 1 : kSplit == 2 ? (g >> 2) * 2 + j : j;
  }
  // Result: the lane holds columns 2t and 2t + 1, which stand for the same pair.
  static __device__ __forceinline__ int result_row(int t, int i) { return (2 * t + i) & (kRows - 1); }
  static __device__ __forceinline__ int result_pair(int t, int j) {
    return kSplit == 8 ? t : kSplit == 2 ? (t >> 1) * 2 + j : j;
  }
};

// Integer sums become floats without a conversion: they start at the bits of 1.5 * 2^23, whose last place is one.
constexpr int kSumStart = 0x4b400000;
constexpr float kSumBias = 12582912.0f;

// What a lane holds of the sums of a tile of activations: [2 * r + i] for the weight row g + 8r and the lane's i-th result column.  With
// kSplit 8 both columns belong to one row, whose sum is that of i = 0; lanes whose t is 4 / kSplit or more have the same as others.
using LaneSums = float[4];

// Where a warp keeps the sums of 16 weight rows and 8 / kSplit rows in memory: each lane that has some, side by side.
template <int kSplit>
struct SumsInMemory {
  static constexpr int kFloats = kDeviceTileRows * 8 / kSplit;
  static constexpr int kLanes = kSplit == 8 ? 1 : 4 / kSplit;  // of four neighbours

  // One of them.
  static __device__ __forceinline__ int place(int row, int weight_row) {
    if constexpr (kSplit == 8) return weight_row % 8 * 2 + weight_row / 8;
    return (weight_row % 8 * kLanes + row / 2) * 4 + weight_row / 8 * 2 + row % 2;
  }

  // Adds the lane's, or sets them.
  static __device__ __forceinline__ void add(float* sums, const LaneSums& lane_sums, bool set, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if (t >= kLanes) return;
    if constexpr (kSplit == 8) {
      float2* at = reinterpret_cast<float2*>(sums) + g;
      const float2 old = set ? make_float2(0.0f, 0.0f) : *at;
      *at = make_float2(old.x + lane_sums[0], old.y + lane_sums[2]);
    } else {
      float4* at = reinterpret_cast<float4*>(sums) + g * kLanes + t;
      const float4 old = set ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *at;
      *at =
          make_float4(old.x + lane_sums[0], old.y + lane_sums[1], old.z + lane_sums[2], old.w + lane_sums[3]);
    }
  }
};

// A lane's part of one chunk of activations, of one tile of rows.
template <int kSplit>
struct LaneActivations {
  using Columns = LaneColumns<kSplit>;
  static constexpr int kOwnPairs = Columns::kOwnPairs;
  uint32_t code[kOwnPairs][2][2];  // [pair][step][word of the operand]
  float4 scale;                    // {scale, sum} of both steps of pair t, of the row of the lane's column

  // Pair j of the chunk that begins with pair `first_pair` and has `num_pairs` (4 if kWhole).  `row`: of the lane's column.
  template <bool kWhole>
  __device__ __forceinline__ void load_codes(const uint8_t* row, int lane, int first_pair, int num_pairs,
                                             int j) {
    const int g = lane >> 2, t = lane & 3;
    const uint8_t* from =
        row + 64 * (first_pair + existing<kWhole>(Columns::operand_pair(g, j), num_pairs)) + 16 * t;
    if constexpr (kSplit == 8) {
      // The column stands for one step, so that the other one's words are not needed.
      const uint2 v = *reinterpret_cast<const uint2*>(from + 8 * (g & 1));
      code[j][0][0] = code[j][1][0] = v.x, code[j][0][1] = code[j][1][1] = v.y;
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      code[j][0][0] = v.x, code[j][0][1] = v.y, code[j][1][0] = v.z, code[j][1][1] = v.w;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_scales(const uint8_t* row, int padded_cols, int lane, int first_pair,
                                              int num_pairs) {
    const int pair = first_pair + existing<kWhole>(lane & 3, num_pairs);
    scale = *reinterpret_cast<const float4*>(row + padded_cols + 16 * pair);
    if (!kWhole && (lane & 3) >= num_pairs) scale = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // The whole chunk.
  template <bool kWhole>
  __device__ __forceinline__ void load(const uint8_t* row, int padded_cols, int lane, int first_pair,
                                       int num_pairs) {
#pragma unroll
    for (int j = 0; j < kOwnPairs; ++j) load_codes<kWhole>(row, lane, first_pair, num_pairs, j);
    load_scales<kWhole>(row, padded_cols, lane, first_pair, num_pairs);
  }

 private:
  // The pair, or the chunk's last one for those beyond it, whose products are scaled by zero.
  template <bool kWhole>
  static __device__ __forceinline__ int existing(int pair, int num_pairs) {
    return kWhole ? pair : min(pair, num_pairs - 1);
  }
};

// The scales of a lane's part of one chunk of activations, ready for products.
template <int kSplit>
struct LaneScales {
  using Columns = LaneColumns<kSplit>;
  static constexpr int kResults = kSplit == 8 ? 1 : 2;
  float step[Columns::kOwnPairs][2][kResults];  // [pair][step][result column]
  uint32_t high[2], low[2];  // parts of the sums of the steps of pair t, of the lane's column of the operand

  // All lanes of the warp have to take part.
  __device__ __forceinline__ LaneScales(const LaneActivations<kSplit>& x, int lane) {
    const int t = lane & 3;
    const float own[2] = {x.scale.x, x.scale.z}, sums[2] = {x.scale.y, x.scale.w};
#pragma unroll
    for (int j = 0; j < Columns::kOwnPairs; ++j) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
          const int from = 4 * Columns::result_row(t, i) + Columns::result_pair(t, j);
          step[j][s][i] = kSplit == 8 ? own[s] : __shfl_sync(0xffffffffu, own[s], from);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      high[s] = __float_as_uint(sums[s]) & 0xffffe000u;
      low[s] = ptx::to_tf32(sums[s] - __uint_as_float(high[s]));
    }
  }
};

// The integer sums of the steps of pair j of one tile of activations.
template <class F, int kSplit>
struct StepProducts {
  using U = Unit<F>;
  using Columns = LaneColumns<kSplit>;
  static constexpr int kResults = kSplit == 8 ? 1 : 2;  // with kSplit 8 both steps are columns of one result
  int dot[kResults][U::kHalves][4];

  // Adds the products of the step `step` of a pair that stands in columns `q`.  The first addition starts the sum.
  __device__ __forceinline__ void add(const uint32_t (&a)[4], const LaneActivations<kSplit>& x, int j,
                                      int step, int g, int q, const int (&start)[4]) {
    bool mine = true;
    if constexpr (kSplit == 8) mine = g == 2 * q + step;
    if constexpr (kSplit == 2) mine = g >> 2 == q;
    const uint32_t b[2] = {mine ? x.code[j][step][0] : 0, mine ? x.code[j][step][1] : 0};
    const bool first = q == 0 && (kSplit != 8 || step == 0);
    const int result = kSplit == 8 ? 0 : step;
    if constexpr (U::kHalves == 1) {
      if (first) {
        ptx::mma_s8(dot[result][0], a, b, start);
      } else {
        ptx::mma_s8(dot[result][0], a, b);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t half[2] = {a[2 * h], a[2 * h + 1]};
        if (first) {
          ptx::mma_s8(dot[result][h], half, b[h], start);
        } else {
          ptx::mma_s8(dot[result][h], half, b[h]);
        }
      }
    }
  }

  // The sum of both steps' scaled products; `weights` are the scales of the rows g and g + 8, in which the pair's first step is number
  // `first_step`, x_scales those of the activations.
  __device__ __forceinline__ void scale(LaneSums& sum, const RowScales<F> (&weights)[2], int first_step,
                                        const float (&x_scales)[2][kResults],
                                        const LaneActivations<kSplit>& x, int j,
                                        const int (&start)[4]) const {
    float half_sum[kResults][2][2];  // [step][column][half]: of formats with an offset per half
    if constexpr (U::kHalves == 2 && U::kHasOffset) sum_halves(half_sum, x, j, start);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float w = weights[r].scale(first_step + step, 0);
        const float unbias = -kSumBias * w;  // exact: a scale has 19 bits
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
          const int result = kSplit == 8 ? 0 : step, place = 2 * r + (kSplit == 8 ? step : i);
          float product = fmaf(__int_as_float(dot[result][0][place]), w, unbias);
          if constexpr (U::kHalves == 2) {
            product = fmaf(__int_as_float(dot[result][1][place]) - kSumBias,
                           weights[r].scale(first_step + step, 1), product);
            if constexpr (U::kHasOffset) {
              const int column = kSplit == 8 ? step : i;
              product = fmaf(half_sum[result][column][0], weights[r].offset(first_step + step, 0), product);
              product = fmaf(half_sum[result][column][1], weights[r].offset(first_step + step, 1), product);
            }
          }
          float& s = sum[2 * r + i];
          s = step == 0 ? product * x_scales[step][i] : fmaf(product, x_scales[step][i], s);
        }
      }
    }
  }

 private:
  // The sums of the codes of each half of the steps: products with ones.
  __device__ __forceinline__ void sum_halves(float (&out)[kResults][2][2], const LaneActivations<kSplit>& x,
                                             int j, const int (&start)[4]) const {
    const uint32_t ones[2] = {0x01010101u, 0x01010101u};
#pragma unroll
    for (int result = 0; result < kResults; ++result) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int d[4];
        ptx::mma_s8(d, ones, x.code[j][result][h], start);
        out[result][0][h] = __int_as_float(d[0]) - kSumBias;
        out[result][1][h] = __int_as_float(d[1]) - kSumBias;
      }
    }
  }
};

// sum[2 * r + i] += the chunk's offsets of the rows g + 8r times the sums of the activations; for formats with an offset per step.  The
// lane's steps are those of pair t, whose scales are `weights`.
template <class F, int kSplit>
__device__ __forceinline__ void add_offsets(LaneSums& sum, const RowScales<F> (&weights)[2],
                                            const LaneScales<kSplit>& x, int t) {
  const uint32_t a[4] = {weights[0].exact_offset(t, 0), weights[1].exact_offset(t, 0),
                         weights[0].exact_offset(t, 1), weights[1].exact_offset(t, 1)};
  float products[4] = {};
  ptx::mma_tf32(products, a, x.high);
  ptx::mma_tf32(products, a, x.low);
#pragma unroll
  for (int i = 0; i < 4; i += kSplit == 8 ? 2 : 1)
    sum[i] = fmaf(weights[i / 2].offset_scale(), products[i], sum[i]);
}

struct NoRefill {
  __device__ __forceinline__ void operator()(int) const {}
};

// sums = chunk · activations.  `chunk`: shared (or global) memory with num_pairs (1 … 4) pairs of 64 columns.  Calls refill(j) when the
// codes of the lane's pair j were used and may be overwritten.
template <class F, int kSplit, int kTiles, class Refill = NoRefill>
__device__ __forceinline__ void multiply_chunk(LaneSums (&sums)[kTiles], const uint8_t* chunk, int lane,
                                               int num_pairs, const LaneActivations<kSplit> (&x)[kTiles],
                                               const LaneScales<kSplit> (&x_scales)[kTiles],
                                               Refill&& refill = {}) {
  static_assert(kSplit == 1 || kTiles == 1);
  using U = Unit<F>;
  using Columns = LaneColumns<kSplit>;
  constexpr bool kWhole = U::kPairs == kChunkPairs;  // a chunk is one unit, which is never cut short
  constexpr int kGroups = kChunkPairs / Columns::kOwnPairs;
  const int g = lane >> 2, t = lane & 3;
  // Where sums start often, the registers of this start are kept; elsewhere they are not worth their place.
  int start[4] = {kSumStart, kSumStart, kSumStart, kSumStart};
  if constexpr (kSplit != 8) {
#pragma unroll
    for (int& value : start) value = ptx::opaque(value);
  }
  // Pairs beyond the end of the row are the last one again, times zero.
  auto unit_of = [&](int pair) { return kWhole ? chunk : chunk + min(pair, num_pairs - 1) * U::kBytes; };
  RowScales<F> scales[2];
  auto load_scales = [&](int pair) {
    const uint8_t* unit = unit_of(pair);
    scales[0].load(unit, g), scales[1].load(unit, g + 8);
  };
  if constexpr (kWhole) load_scales(0);
  LaneSums pair_sums[kTiles][Columns::kOwnPairs];
#pragma unroll
  for (int j = 0; j < Columns::kOwnPairs; ++j) {
    PairCodes<F> codes[kGroups];
    // With one tile of rows each pair's codes are used once, and loaded then.
    auto load = [&](int q) {
      const int pair = q * Columns::kOwnPairs + j;
      codes[q].load(unit_of(pair), lane, kWhole ? pair : 0);
    };
    if constexpr (kTiles > 1) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) load(q);
    }
    const int pair = Columns::result_pair(t, j);
    if constexpr (!kWhole) load_scales(pair);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      StepProducts<F, kSplit> products;
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        if constexpr (kTiles == 1) load(q);
        uint32_t a[4];
        codes[q].template operand<0>(a);
        products.add(a, x[n], j, 0, g, q, start);
        codes[q].template operand<1>(a);
        products.add(a, x[n], j, 1, g, q, start);
      }
      products.scale(pair_sums[n][j], scales, kWhole ? 2 * pair : 0, x_scales[n].step[j], x[n], j, start);
    }
    refill(j);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += kSplit == 8 ? 2 : 1) {
      float half = pair_sums[n][0][i];
      if constexpr (kSplit == 8) half += __shfl_xor_sync(0xffffffffu, half, 1);
      if constexpr (kSplit != 8) half += pair_sums[n][1][i];
      if constexpr (kSplit == 1) {
        sums[n][i] = half + (pair_sums[n][2][i] + pair_sums[n][3][i]);
      } else {
        sums[n][i] = half + __shfl_xor_sync(0xffffffffu, half, 2);
      }
    }
  }
  if constexpr (U::kHasOffset && U::kHalves == 1) {
    if constexpr (!kWhole && kSplit != 8) load_scales(t);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) add_offsets(sums[n], scales, x_scales[n], t);
  }
}

}  // namespace helexa
