// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// out[n] = row first_row + n of a packed weight matrix [rows, cols], as float32 or bfloat16; first_row is a multiple of 16.
// out: [num_rows, cols], rows out_stride values apart, 16 bytes aligned where the format is quantized; out_stride is a multiple of 4.
void dequantize_cuda(int format, const uint8_t* packed, int64_t rows, int64_t cols, int64_t first_row,
                     int64_t num_rows, void* out, int64_t out_stride, int dtype, void* stream);

}  // namespace helexa
