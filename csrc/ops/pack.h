// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// Bytes of a packed weight matrix (quant/packed.h has the layout).
int64_t packed_bytes(int format, int64_t rows, int64_t cols);

// Packs num_rows rows of a matrix, whose first is row first_row (a multiple of 16), from the file's layout `raw` into `packed`.
// Rows that fill the last tile become zeros.
void pack_cpu(int format, const uint8_t* raw, int64_t first_row, int64_t num_rows, int64_t cols,
              uint8_t* packed);

// The same for the layout of devices (quant/tiles.cuh); raw, which is even, and tiles, a multiple of 16, are on the device.
int64_t tiled_bytes(int format, int64_t rows, int64_t cols);
void pack_cuda(int format, const uint8_t* raw, int64_t first_row, int64_t num_rows, int64_t cols,
               uint8_t* tiles, void* stream);

}  // namespace helexa
