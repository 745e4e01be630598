// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// The first launch: the largest logit of each row, with which greedy rows are done.
#include "ops/sample_row.cuh"

namespace helexa::sampling {

// grid: chunks, rows, jobs of a row
__global__ void __launch_bounds__(kThreads, 1) scan_kernel(const Call call) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int row = blockIdx.y;
  const bool is_report = blockIdx.z == 1;
  Job& job = call.workspace.jobs[blockIdx.z * call.num_rows + row];
  const int forced = call.forced[call.slots[row]];
  if (forced >= 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      if (!is_report) choose(call, row, forced, kForced, 0.0f);
      job.todo = kDone;
    }
    return;
  }
  const Row values = row_of(call, row, is_report);
  if (is_report && values.parameters.num_top < 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) job.todo = kDone;
    return;
  }
  float logits[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int token_id = blockIdx.x * kChunk + k * kThreads + threadIdx.x;
    logits[k] = token_id < call.vocab_size ? values.logit(token_id) : -INFINITY;
  }
  u64 best = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int token_id = blockIdx.x * kChunk + k * kThreads + threadIdx.x;
    if (token_id < call.vocab_size) best = max(best, ordered_key(logits[k], token_id));
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    best = max(best, static_cast<u64>(__shfl_xor_sync(0xffffffffu, best, offset)));
  }
  __shared__ u64 warp_bests[kWarps];
  if (threadIdx.x % 32 == 0) warp_bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) best = max(best, warp_bests[w]);
    atomicMax(&job.best, best);
  }
  if (!is_last_block(job) || threadIdx.x != 0) return;
  best = atomicExch(&job.best, 0ull);
  const float peak = logit_of_key(best);
  job.peak = peak;
  job.todo = kDone;
  if (is_report) {
    call.records[row].largest = peak;
    if (is_finite(peak)) job.todo = values.is_filtered(call.vocab_size) ? kGather : kDraw;
  } else if (!is_finite(peak)) {
    choose(call, row, 0, kNotFinite, peak);
  } else if (values.parameters.temperature == 0.0f) {
    choose(call, row, static_cast<int>(~static_cast<uint32_t>(best)), kSampled, peak);
  } else {
    job.todo = values.is_filtered(call.vocab_size) ? kGather : kDraw;
  }
}

}  // namespace helexa::sampling
