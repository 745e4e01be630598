// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>
#include <vector>

#include "core/cpu.h"

namespace helexa {

// One packed weight matrix [rows, cols] with an optional bias [rows].
struct WeightView {
  int format;
  const uint8_t* packed;
  int64_t rows, cols;
  const float* bias;
};

// out[:, n0 : n0 + rows_i] = x · weights_iᵀ + bias_i for weights that share the input x, side by side in out.
// x: [num_tokens, cols] float32.  out: [num_tokens, sum of rows] float32; must not overlap x.
//
// Quantized formats see x as int8 with one float32 scale per 32 columns (scale = absmax / 127), multiply integers exactly and sum
// the blocks in float32.  Float formats multiply in float32.
void quant_matmul_cpu(const float* x, int64_t num_tokens, std::vector<WeightView> weights, float* out);

// The same on a device for up to 16 rows; the weights are device tiles (quant/tiles.cuh).
// q8: [num_tokens, activation_row_bytes(cols)], see ops/activation.cuh.  x: the same rows as float32 [num_tokens, cols], or null; weights
// of float formats take them where they are there and the values of q8 otherwise.  At most kMaxMatvecWeights weights.
// squares: null, or [num_tokens, activation_squares(cols)] of rows that are not divided by their root mean square yet: the products are,
// with eps inside the root, before biases are added.
constexpr int kMaxMatvecWeights = 8;
void quant_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, float* out, void* stream);

// out = silu(x · weights_0ᵀ + bias_0) · (x · weights_1ᵀ + bias_1) as rows of q8, for two weights of the same shape.
void gated_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, uint8_t* out, void* stream);

// residual += x · weightᵀ + bias, and norm_weight times that as rows of q8 and, unless out_x is null, as floats: a norm but for the division
// by the root mean square, which quant_matmul_cuda makes good given out_squares [num_tokens, activation_squares(rows)].
// residual, out_x [num_tokens, rows].  norm_weight [rows].
void add_norm_matmul_cuda(const uint8_t* q8, const float* x, int64_t num_tokens, WeightView weight,
                          float* residual, const float* norm_weight, uint8_t* out_q8, float* out_x,
                          float* out_squares, void* stream);

// The same for more rows, in bfloat16 with float32 sums.  x: [num_rows, cols] bfloat16, cols a multiple of 8.  out: [num_rows, sum of
// rows], or [num_rows, rows_0] if gated, of dtype float32 or bfloat16.  workspace: zeros at first, and left so that the next call can
// use it; a multiple of 16.  Weights are rounded to bfloat16 as they are multiplied, whatever their format.
int64_t middle_matmul_workspace_bytes();
void middle_matmul_cuda(const void* x, int64_t num_rows, std::vector<WeightView> weights, bool gated,
                        void* out, int out_dtype, uint8_t* workspace, void* stream);

// Rows of x [num_tokens, cols] (dtype float32 or bfloat16) as q8.
void quantize_rows_cuda(const void* x, int64_t num_tokens, int64_t cols, int dtype, uint8_t* q8,
                        void* stream);

// The input as the integer kernels read it.  Tokens are taken in groups of `width`; a group is cols / 32 records, one for each
// block of 32 columns, so that a kernel walks one contiguous run:
//   int8 codes[width][32], float scale[width], float sum[width] (scale * sum of codes),
//   int32 negative_sum[width], int32 negative_sum16[2][width]
// Tokens that fill up a group are zeros.
constexpr int64_t group_record_bytes(int64_t width) { return width * (32 + 4 + 4 + 4 + 8); }

// What one call of the tile kernel covers: one or two neighbouring tiles of 16 weight rows against all tokens.
struct TileCall {
  const float* x;            // [num_tokens, cols]: the input of float formats
  const uint8_t* quantized;  // groups of records: the input of quantized formats
  int64_t num_tokens, cols;
  int format;
  const uint8_t* tile;
  const float* bias;  // [num_rows], or null
  int num_rows;       // rows that exist: 1..16 of one tile, 17..32 of two
  float* out;         // [num_tokens, out_stride] at the first row
  int64_t out_stride;
};

HELEXA_ISA_KERNEL(void, quant_matmul_tiles, const TileCall& call)
// Tiles that one call may cover.
HELEXA_ISA_KERNEL(int, max_tiles)
// Tokens per group while `remaining` are left.
HELEXA_ISA_KERNEL(int, token_group_width, int64_t remaining)
// Quantizes num_tokens <= width rows of x [num_tokens, cols] into the records of one group.
HELEXA_ISA_KERNEL(void, quantize_group, const float* x, int64_t num_tokens, int width, int64_t cols,
                  uint8_t* records)

}  // namespace helexa
