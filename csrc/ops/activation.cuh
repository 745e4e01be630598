// SPDX-License-Identifier: GPL-3.0-or-later
// Rows of int8 activations ("q8"), the input of matmuls with few rows.  Whoever computes such a row quantizes it with the functions
// of this file, so that no launch is spent on it.
//
// A row of `cols` values takes activation_row_bytes(cols) bytes and is a multiple of 64 columns wide, the rest being zeros:
//   codes   one byte per column, 64 per group of 64 columns
//   scales  16 bytes per group: float32 {scale, sum} of its first 32 columns, then of its last 32
// value = scale * code with scale = absmax / 127, and sum = scale * (sum of the 32 codes).  A scale is NaN if one of its values is NaN or
// infinite, so that bad numbers do not turn into harmless ones.
//
// In a group the codes lie in the order of the B operand of mma m16n8k32: lane 4g + t of a warp reads 16 bytes of row g at offset 16 t
// and has b[0], b[1] for the first 32 columns and b[0], b[1] for the last 32.  q8_offset says where a column is; four columns that
// start at a multiple of 4 stay together.
//
// Rows may come before the end of their norm (norm_factor): as values times the norm's weights, not yet divided by their root mean
// square.  Whoever multiplies them divides its sums instead, and has no need to wait until a whole row is known.
#pragma once

#include <cmath>

#include "core/cuda.cuh"

namespace helexa {

constexpr int kQ8GroupCols = 64;
constexpr int kQ8GroupBytes = 80;  // of codes and scales

__host__ __device__ constexpr int64_t activation_padded_cols(int64_t cols) {
  return (cols + kQ8GroupCols - 1) / kQ8GroupCols * kQ8GroupCols;
}

__host__ __device__ constexpr int64_t activation_row_bytes(int64_t cols) {
  return activation_padded_cols(cols) / kQ8GroupCols * kQ8GroupBytes;
}

// Floats per row of the sums of squares that stand for such a division: one for each 32 columns, of the values without the weights, and
// zeros up to a multiple of 4.
__host__ __device__ constexpr int64_t activation_squares(int64_t cols) { return (cols + 127) / 128 * 4; }

// What the products of such a row are multiplied by, from its sums of squares (global or shared memory).  For a whole warp, each lane of
// which gets it; the order of the sum depends on `cols` alone.
__device__ inline float norm_factor(const float* squares, int64_t cols, float eps) {
  const int lane = static_cast<int>(threadIdx.x % 32), count = static_cast<int>(activation_squares(cols));
  float sum = 0.0f;
  for (int i = 4 * lane; i < count; i += 128) {
    const float4 four = *reinterpret_cast<const float4*>(squares + i);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  return rsqrtf(fmaf(warp_sum(sum), 1.0f / static_cast<float>(cols), eps));
}

// Where the code of a column lies in its row.
__host__ __device__ constexpr int64_t q8_offset(int64_t col) {
  const int64_t in_group = col % 64;
  return col - in_group + in_group % 16 / 4 * 16 + in_group / 32 * 8 + in_group % 32 / 16 * 4 + in_group % 4;
}

// {scale, sum} of each 32 columns of a row.
__device__ inline const float2* q8_scales(const uint8_t* row, int64_t cols) {
  return reinterpret_cast<const float2*>(row + activation_padded_cols(cols));
}

// The value of a column as matmuls see it.
__device__ inline float q8_value(const uint8_t* row, int64_t cols, int64_t col) {
  return static_cast<float>(static_cast<int8_t>(row[q8_offset(col)])) * q8_scales(row, cols)[col / 32].x;
}

// One block of 32 values that is being quantized: what a code is multiplied by, and its inverse.
struct Q8Scale {
  float scale, inverse;

  // `most` is the largest q8_magnitude of the block.
  __device__ explicit Q8Scale(float most)
      : scale(most < INFINITY ? most / 127.0f : NAN), inverse(most > 0.0f ? 127.0f / most : 0.0f) {}

  __device__ int code(float x) const { return __float2int_rn(fminf(fmaxf(x * inverse, -127.0f), 127.0f)); }
};

// |x|, infinity if x is NaN.
__device__ inline float q8_magnitude(float x) {
  const float magnitude = fabsf(x);
  return magnitude < INFINITY ? magnitude : INFINITY;
}

// Writes {scale, sum} of a block, and zeros where a row of an odd number of blocks is filled up.  `lane` counts 8 threads.
__device__ inline void store_q8_scale(uint8_t* row, int64_t cols, int64_t block, int lane, float scale,
                                      int sum) {
  float2* scales = reinterpret_cast<float2*>(row + activation_padded_cols(cols));
  if (lane == 0) scales[block] = make_float2(scale, scale * static_cast<float>(sum));
  if (block % 2 == 0 && (block + 1) * 32 >= cols) {
    if (lane == 0) scales[block + 1] = make_float2(0.0f, 0.0f);
    *reinterpret_cast<uint32_t*>(row + q8_offset(32 * (block + 1) + 4 * lane)) = 0;
  }
}

// Quantizes the values of 8 neighbouring lanes (the first is a multiple of 8), four consecutive columns each, as the given 32 columns of
// `row`: kCount such blocks side by side.  All lanes of the warp have to call it; groups of 8 lanes whose block lies beyond the row write
// nothing.  Columns beyond `cols` have to be passed as zeros.
template <int kCount>
__device__ inline void quantize_quads(const float4 (&x)[kCount], uint8_t* row, int64_t cols,
                                      const int64_t (&blocks)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x % 8);
  float most[kCount], scales[kCount];
  uint32_t codes[kCount];
  int sums[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    most[k] = fmaxf(fmaxf(q8_magnitude(x[k].x), q8_magnitude(x[k].y)),
                    fmaxf(q8_magnitude(x[k].z), q8_magnitude(x[k].w)));
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) most[k] = fmaxf(most[k], __shfl_xor_sync(0xffffffffu, most[k], offset));
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const Q8Scale scale(most[k]);
    const int c0 = scale.code(x[k].x), c1 = scale.code(x[k].y), c2 = scale.code(x[k].z),
              c3 = scale.code(x[k].w);
    scales[k] = scale.scale;
    sums[k] = c0 + c1 + c2 + c3;
    codes[k] = (c0 & 255) | (c1 & 255) << 8 | (c2 & 255) << 16 | static_cast<uint32_t>(c3) << 24;
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (blocks[k] * 32 >= cols) continue;
    *reinterpret_cast<uint32_t*>(row + q8_offset(32 * blocks[k] + 4 * lane)) = codes[k];
    store_q8_scale(row, cols, blocks[k], lane, scales[k], sums[k]);
  }
}
__device__ inline void quantize_quads(float4 x, uint8_t* row, int64_t cols, int64_t block) {
  const float4 values[1] = {x};
  const int64_t blocks[1] = {block};
  quantize_quads(values, row, cols, blocks);
}

// The same for one column per lane of a whole warp: lane l has column 32 * block + l.
__device__ inline void quantize_lanes(float x, uint8_t* row, int64_t cols, int64_t block) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float most = q8_magnitude(x);
  for (int offset = 16; offset > 0; offset /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
  const Q8Scale scale(most);
  const int code = scale.code(x);
  int sum = code;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  uint32_t packed = code & 255;
  packed |= __shfl_down_sync(0xffffffffu, packed, 1) << 8;
  packed |= __shfl_down_sync(0xffffffffu, packed, 2) << 16;
  if (block * 32 >= cols) return;
  if (lane % 4 == 0) *reinterpret_cast<uint32_t*>(row + q8_offset(32 * block + lane)) = packed;
  if (lane < 8) store_q8_scale(row, cols, block, lane, scale.scale, sum);
}

}  // namespace helexa
