// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>
#include <vector>

#include "ops/quant_matmul.h"

namespace helexa {

// out = the packed weight matrices [rows_i, cols] one below the other, as float32 or bfloat16; biases do not matter.  Whole tiles of 16
// rows from within a matrix are a matrix too.
// out: [sum of rows_i, cols], rows out_stride values apart, 16 bytes aligned where the format is quantized; out_stride is a multiple of 4.
void dequantize_cuda(std::vector<WeightView> weights, void* out, int64_t out_stride, int dtype, void* stream);

}  // namespace helexa
