// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include "ops/moe.h"
#include "ops/moe_cuda.cuh"

namespace helexa::moe {

// Logits of few rows, from which whoever needs a token's experts chooses them (moe_choose.cuh).
// router and shared_gate (or null) are of float formats, row by row.   logits: [num_tokens, logits_stride(num_experts)].   squares: null,
// or what ends the norm of x.
void route_few(const float* x, const float* squares, float eps, const WeightView& router,
               const WeightView* shared_gate, float* logits, int64_t num_tokens, void* stream);

// Routes of many rows from their logits [num_tokens, num_experts] and [num_tokens] (or null); no plan if plan.order is null.
void route_many(const float* logits, const float* shared_logits, const Routes& routes, int64_t num_tokens,
                int64_t num_experts, int64_t top_k, bool normalize, int group_size, void* stream);

}  // namespace helexa::moe
