// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

#include "core/cpu.h"

namespace helexa {

// x[i] *= sigmoid(gate[i]) for i < num_values; gate must not overlap x.
void sigmoid_mul_cpu(float* x, const float* gate, int64_t num_values);

HELEXA_ISA_KERNEL(void, sigmoid_mul_values, float* x, const float* gate, int64_t num_values)

}  // namespace helexa
