// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>
#include <vector>

#include "core/cpu.h"
#include "ops/quant_matmul.h"

namespace helexa {

// The top_k most likely of num_experts for each token: ids and softmax(logits) of theirs, divided by their sum if normalize.
// logits [num_tokens, num_experts]; ids, weights [num_tokens, top_k], by falling probability, the lower id first where equal.
void moe_route_cpu(const float* logits, int32_t* ids, float* weights, int64_t num_tokens, int64_t num_experts,
                   int64_t top_k, bool normalize);

// out[t] = sum over j of weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t])), e = ids[t, j], plus shared[t] times
// sigmoid(shared_gate[t]) where shared is not null (times one where shared_gate is null).
//
// gate_up are one or two stacks of num_experts matrices [rows_i, cols] whose rows_i are multiples of 16 and together 2 F: the gate's
// F rows of an expert, then the up's.  down is a stack of [cols, F] matrices.  A stack is packed as one matrix
// [num_experts * rows_i, cols].  x, shared, out [num_tokens, cols]; out must not overlap the others.
void moe_mlp_cpu(const float* x, const int32_t* ids, const float* weights, std::vector<WeightView> gate_up,
                 std::vector<WeightView> down, const float* shared, const float* shared_gate, float* out,
                 int64_t num_tokens, int64_t num_experts, int64_t top_k);

// The same as moe_route_cpu on a device.
void moe_route_cuda(const float* logits, int32_t* ids, float* weights, int64_t num_tokens,
                    int64_t num_experts, int64_t top_k, bool normalize, void* stream);

// The weights of one layer on a device.
struct MoeWeights {
  WeightView router;                      // [num_experts, cols], F32, F16 or BF16
  std::vector<WeightView> shared_router;  // none, or [1, cols], likewise: the gate of the shared expert
  std::vector<WeightView> gate_up;        // as of moe_mlp_cpu
  WeightView down;
  std::vector<WeightView> shared_gate_up;  // none, or one or two matrices with 2 S rows together
  std::vector<WeightView> shared_down;     // none, or [cols, S]
};

// out = what moe_route_cpu and moe_mlp_cpu make of x, the shared expert included, for up to 16 rows.
// x [num_tokens, cols], and the same rows as q8 (ops/activation.cuh); squares: null, or what ends their norm, with eps inside the root
// (quant_matmul_cuda).  The workspace is a multiple of 256 and has moe_few_workspace_bytes.
int64_t moe_few_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k);
void moe_few_cuda(const float* x, const uint8_t* q8, const float* squares, float eps, MoeWeights weights,
                  bool normalize, float* out, uint8_t* workspace, int64_t num_tokens, int64_t top_k,
                  void* stream);

// The same for many rows, from bfloat16 x [num_tokens, cols] and the logits that the routers make of it: [num_tokens, num_experts] and,
// of the shared expert's gate, [num_tokens] or null.  shared: what the shared expert makes of x, [num_tokens, cols], or null.
// The weights of shared experts are not looked at.
int64_t moe_many_workspace_bytes(const MoeWeights& weights, int64_t num_tokens, int64_t top_k);
void moe_many_cuda(const void* x, const float* logits, const float* shared_logits, MoeWeights weights,
                   bool normalize, const void* shared, int shared_dtype, void* out, int out_dtype,
                   uint8_t* workspace, int64_t num_tokens, int64_t top_k, void* stream);

HELEXA_ISA_KERNEL(void, moe_route_rows, const float* logits, int32_t* ids, float* weights, int64_t num_tokens,
                  int64_t num_experts, int64_t top_k, bool normalize)
// out[i] = (accumulate ? out[i] : 0) + factor * x[i]
HELEXA_ISA_KERNEL(void, moe_add_scaled, const float* x, float factor, float* out, int64_t width,
                  bool accumulate)

}  // namespace helexa
