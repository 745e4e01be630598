// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// Encodes num_values numbers of a float format (F32, F16 or BF16), rows one after the other, into blocks of `format`, which is one of
// Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K and whose block divides num_values.  The result depends neither on the number of threads
// nor on the instruction set.  *num_bad becomes the number of values that are NaN or beyond ±500000; blocks that hold one become zeros.
void quantize_cpu(int source_format, const uint8_t* source, int64_t num_values, int format, uint8_t* blocks,
                  int64_t* num_bad);

// The same on a device, whose memory all are in; source is a multiple of 16, blocks is even.  Adds to *num_bad.
void quantize_cuda(int source_format, const uint8_t* source, int64_t num_values, int format, uint8_t* blocks,
                   unsigned long long* num_bad, void* stream);

// The most values that one call of quantize_run takes; a multiple of every block.
constexpr int64_t kQuantizeRun = 4096;

// The same for up to kQuantizeRun values; returns the number of bad ones.
HELEXA_ISA_KERNEL(int64_t, quantize_run, int source_format, const uint8_t* source, int64_t num_values,
                  int format, uint8_t* blocks)

}  // namespace helexa
