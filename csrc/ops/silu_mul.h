// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// out[t, i] = silu(g) * u, silu(g) = g / (1 + e^-g), for g = gate_up[t, i] and u = gate_up[t, width + i];
// gate_up [num_tokens, 2 * width], out [num_tokens, width], no overlap.
void silu_mul_cpu(const float* gate_up, float* out, int64_t num_tokens, int64_t width);
// The same for gate_up of float32 or bfloat16; out is q8, rows of activation_row_bytes(width), or bf16 where q8 is null.
void silu_mul_cuda(const void* gate_up, int dtype, uint8_t* q8, void* bf16, int64_t num_tokens, int64_t width,
                   void* stream);

HELEXA_ISA_KERNEL(void, silu_mul_rows, const float* gate_up, float* out, int64_t num_tokens, int64_t width)

}  // namespace helexa
