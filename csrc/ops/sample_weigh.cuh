// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// The second launch: what all tokens of a row weigh, from which rows without filters draw.
#include "ops/sample_among.cuh"

namespace helexa::sampling {

// Draws from all tokens: finds the chunk by the chunks' sums, and the token by adding up its chunk again.
__device__ inline void draw_from_all(const Call& call, int row, const Row& values, const Job& job,
                                     const u64* sums) {
  const int num_chunks = gridDim.x;
  u64 target = random_below(job.total, values.parameters.seed, call.positions[row] + 1);
  const int chunk = first_beyond(num_chunks, target, [&](int c) { return sums[c]; });
  target -= block_total(static_cast<int>(threadIdx.x) < chunk ? sums[threadIdx.x] : 0ull);
  const int first = chunk * kChunk;
  const int token = first_beyond(min(kChunk, call.vocab_size - first), target, [&](int i) {
    return fixed(weight_of(values.gap(values.logit(first + i), job.peak)));
  });
  if (threadIdx.x == 0) choose(call, row, first + token, kSampled, job.peak);
}

// Sets how far below the peak the candidates of a filtered row may lie, and how many they are.
__device__ inline void bound_candidates(const Call& call, const Row& values, Job& job, unsigned* histogram) {
  constexpr int kMine = kBins / kThreads;
  __shared__ int bound;
  const SampleParameters& p = values.parameters;
  const int top_k = values.top_k(call.vocab_size);
  if (threadIdx.x == 0) bound = kBins - 1;
  unsigned counts[kMine];
  u64 count = 0, all;
  float mass = 0.0f, all_mass;
  for (int k = 0; k < kMine; ++k) {
    const int bin = threadIdx.x * kMine + k;
    counts[k] = histogram[bin];
    histogram[bin] = 0;
    count += counts[k];
    mass += static_cast<float>(counts[k]) * weight_of(least_of_bin(bin));
  }
  u64 before = block_sums(count, &all);
  const float mass_before = block_sums(mass, &all_mass);
  if (top_k > 0) {
    for (int k = 0; k < kMine; ++k) {
      before += counts[k];
      if (before >= static_cast<u64>(top_k)) atomicMin(&bound, static_cast<int>(threadIdx.x) * kMine + k);
    }
  } else if (p.typical_p == 1.0) {  // that filter may keep the least likely tokens
    // Whatever lies in later bins holds less than the filters leave out.  Bins overstate their mass, and the sums may be off by
    // rounding; one bin more is for tokens whose weights are equal although their gaps are not.
    float behind = all_mass - mass_before;
    const double spare = (1.0 - p.top_p) * static_cast<double>(job.total) / kOne - 1e-5 * all_mass;
    for (int k = 0; k < kMine; ++k) {
      const int bin = threadIdx.x * kMine + k;
      behind -= static_cast<float>(counts[k]) * weight_of(least_of_bin(bin));
      if (p.top_p < 1.0 && behind <= spare) atomicMin(&bound, min(bin + 1, kBins - 1));
    }
    if (threadIdx.x == 0 && p.min_p > 0.0f) {
      atomicMin(&bound, min(bin_of(0.0f - logf(p.min_p)) + 1, kBins - 1));
    }
  }
  __syncthreads();
  u64 candidates = 0;
  for (int k = 0; k < kMine; ++k) {
    if (static_cast<int>(threadIdx.x) * kMine + k <= bound) candidates += counts[k];
  }
  candidates = block_total(candidates);
  if (threadIdx.x == 0) {
    job.bound = bound;
    job.num_candidates = static_cast<int>(candidates);
    job.todo = candidates <= kGathered ? kGather : kScanAll;
  }
}

__global__ void __launch_bounds__(kThreads, 1) weigh_kernel(const Call call) {
  __shared__ unsigned counts[kBins];
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int row = blockIdx.y, index = blockIdx.z * call.num_rows + row;
  Job& job = call.workspace.jobs[index];
  if (job.todo == kDone) return;
  const bool is_filtered = job.todo == kGather;
  u64* sums = call.workspace.sums + static_cast<int64_t>(index) * gridDim.x;
  unsigned* histogram = call.workspace.histograms + static_cast<int64_t>(index) * kBins;
  const Row values = row_of(call, row, blockIdx.z == 1);
  __syncthreads();
  u64 sum = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int token_id = blockIdx.x * kChunk + k * kThreads + threadIdx.x;
    if (token_id >= call.vocab_size) continue;
    const float gap = values.gap(values.logit(token_id), job.peak);
    sum += fixed(weight_of(gap));
    if (is_filtered) atomicAdd(&counts[bin_of(gap)], 1u);
  }
  sum = block_total(sum);  // a barrier
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  if (is_filtered) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
    }
  }
  if (!is_last_block(job)) return;
  const u64 total = block_total(threadIdx.x < gridDim.x ? sums[threadIdx.x] : 0ull);
  if (threadIdx.x == 0) {
    job.total = total;
    if (values.is_report) {
      call.records[row].total = total;
      call.records[row].num_top = 0;
    }
  }
  __syncthreads();
  if (is_filtered) {
    bound_candidates(call, values, job, histogram);
    return;
  }
  if (!values.is_report) draw_from_all(call, row, values, job, sums);
  if (threadIdx.x == 0) job.todo = kDone;
}

}  // namespace helexa::sampling
