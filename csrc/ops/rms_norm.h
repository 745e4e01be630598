// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// out[t, i] = x[t, i] * weight[i] / sqrt(mean_i(x[t, i]^2) + eps), summed in float32, for x [num_tokens, width] contiguous.
// With a residual (not null), residual += x comes first and the sum takes x's place.  out may be x; residual may be neither.
void rms_norm_cpu(const float* x, const float* weight, float* residual, float* out, int64_t num_tokens,
                  int64_t width, float eps);
// The same for x of float32 or bfloat16 and for widths up to 16,384; what is not null of q8 (rows of activation_row_bytes(width)),
// bf16 and plain gets the result in that form.  None of them may be x.
void rms_norm_cuda(const void* x, int x_dtype, const float* weight, float* residual, uint8_t* q8, void* bf16,
                   float* plain, int64_t num_tokens, int64_t width, float eps, void* stream);

HELEXA_ISA_KERNEL(void, rms_norm_rows, const float* x, const float* weight, float* residual, float* out,
                  int64_t num_tokens, int64_t width, float eps)

}  // namespace helexa
