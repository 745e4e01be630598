// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// out[t] = row token_ids[t] of a packed weight matrix, as float32; a token id outside [0, rows) gives zeros.
// token_ids: [num_tokens].  out: [num_tokens, cols].
void embedding_cpu(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* packed,
                   int64_t rows, int64_t cols, float* out);
void embedding_cuda(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* packed,
                    int64_t rows, int64_t cols, float* out, void* stream);
// The same by rows as they stand in a file, in memory that the device can read, such as pinned main memory; `table` is a multiple of 4,
// and up to 3 bytes behind it are read.
void embedding_table_cuda(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* table,
                          int64_t rows, int64_t cols, float* out, void* stream);

}  // namespace helexa
