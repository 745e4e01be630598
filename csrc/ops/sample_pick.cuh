// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// The third launch: candidates near the largest logit are gathered, filtered and drawn from, or reported.
#include "ops/sample_among.cuh"

namespace helexa::sampling {

struct Candidate {
  int token_id;
  float gap;
};

// The filters of the parameters, one after the other, over candidates in order of their tokens.
template <class CandidateOf>
struct Filters {
  int count;
  CandidateOf candidate_of;
  Border nearest, nucleus, typical;
  float least = 0.0f;
  double mean_gap = 0.0;

  // The weight of a candidate, 0 if it is left out.
  __device__ float weight(int index, const Candidate& candidate) const {
    const float weight = weight_of(candidate.gap);
    if (!nearest.holds(__float_as_uint(candidate.gap), index) || !nucleus.holds(rarity(weight), index) ||
        weight < least || !typical.holds(strangeness(candidate.gap), index)) {
      return 0.0f;
    }
    return weight;
  }
  __device__ static uint32_t rarity(float weight) { return 0x3f800000u - __float_as_uint(weight); }
  // How much the surprise of a token, its gap plus a constant, differs from what is expected.
  __device__ uint32_t strangeness(float gap) const {
    return __float_as_uint(static_cast<float>(fabs(gap - mean_gap)));
  }

  __device__ u64 total() const {
    u64 sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += fixed(weight(i, candidate_of(i)));
    return block_total(sum);
  }

  __device__ void apply_nearest(int top_k) {
    nearest = border_at(count, static_cast<u64>(top_k),
                        [&](int i) -> Item { return {__float_as_uint(candidate_of(i).gap), 1}; });
  }
  __device__ void apply(const SampleParameters& p, int top_k, u64 total_of_all) {
    if (top_k > 0) apply_nearest(top_k);
    if (p.top_p < 1.0) {
      const u64 target = share_of(p.top_p, top_k > 0 ? total() : total_of_all);
      const Border border = border_at(count, target, [&](int i) -> Item {
        const float w = weight(i, candidate_of(i));
        return {rarity(w), fixed(w)};
      });
      nucleus = border;
    }
    least = p.min_p;
    if (p.typical_p < 1.0) apply_typical(p.typical_p);
  }
  __device__ void apply_typical(double mass) {
    double weights = 0.0, gaps = 0.0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Candidate candidate = candidate_of(i);
      const double w = weight(i, candidate);
      weights += w;
      if (w > 0.0) gaps += w * candidate.gap;
    }
    weights = block_total(weights);
    mean_gap = block_total(gaps) / weights;
    const u64 target = share_of(mass, total());
    const Border border = border_at(count, target, [&](int i) -> Item {
      const Candidate candidate = candidate_of(i);
      return {strangeness(candidate.gap), fixed(weight(i, candidate))};
    });
    typical = border;
  }
};

// What the last block of a row does with its candidates.
template <class CandidateOf>
__device__ void finish(const Call& call, int row, const Row& values, const Job& job, int count,
                       CandidateOf candidate_of) {
  Filters<CandidateOf> filters{count, candidate_of, {}, {}, {}};
  const int top_k = values.top_k(call.vocab_size);
  if (!values.is_report) {
    filters.apply(values.parameters, top_k, job.total);
    const u64 target = random_below(filters.total(), values.parameters.seed, call.positions[row] + 1);
    const int index =
        first_beyond(count, target, [&](int i) { return fixed(filters.weight(i, candidate_of(i))); });
    if (threadIdx.x == 0) choose(call, row, candidate_of(index).token_id, kSampled, job.peak);
    return;
  }
  __shared__ u64 top[kMaxTop];
  __shared__ int num_top;
  if (threadIdx.x == 0) num_top = 0;
  filters.apply_nearest(top_k);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate candidate = candidate_of(i);
    const uint32_t gap = __float_as_uint(candidate.gap);
    if (filters.nearest.holds(gap, i)) {
      top[atomicAdd(&num_top, 1)] = static_cast<u64>(gap) << 32 | static_cast<uint32_t>(candidate.token_id);
    }
  }
  __syncthreads();
  SampleRecord& record = call.records[row];
  if (static_cast<int>(threadIdx.x) < num_top) {
    int rank = 0;
    for (int i = 0; i < num_top; ++i) rank += top[i] < top[threadIdx.x];
    record.top_ids[rank] = static_cast<int32_t>(top[threadIdx.x]);
    record.top_logits[rank] = __uint_as_float(static_cast<uint32_t>(top[threadIdx.x] >> 32));
  }
  if (threadIdx.x == 0) record.num_top = num_top;
}

// Appends the candidates of this block's chunk to those of the job, in order of their tokens.
__device__ inline void gather(const Call& call, const Row& values, Job& job, int2* place, uint2* candidates) {
  __shared__ int counts[kEach * kWarps], offsets[kEach * kWarps], base;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float gaps[kEach];
  unsigned votes[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int token_id = blockIdx.x * kChunk + k * kThreads + threadIdx.x;
    bool is_near = false;
    if (token_id < call.vocab_size) {
      gaps[k] = values.gap(values.logit(token_id), job.peak);
      is_near = bin_of(gaps[k]) <= job.bound;
    }
    votes[k] = __ballot_sync(0xffffffffu, is_near);
    if (lane == 0) counts[k * kWarps + warp] = __popc(votes[k]);
  }
  __syncthreads();
  int total;
  const bool is_counter = threadIdx.x < kEach * kWarps;
  const int before = block_sums(is_counter ? counts[threadIdx.x] : 0, &total);
  if (is_counter) offsets[threadIdx.x] = before;
  if (threadIdx.x == 0) {
    base = static_cast<int>(total == 0 ? 0 : atomicAdd(&job.cursor, static_cast<unsigned>(total)));
    *place = make_int2(base, total);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (!(votes[k] >> lane & 1)) continue;
    const int index = base + offsets[k * kWarps + warp] + __popc(votes[k] & ((1u << lane) - 1));
    const int token_id = blockIdx.x * kChunk + k * kThreads + threadIdx.x;
    candidates[index] = make_uint2(static_cast<uint32_t>(token_id), __float_as_uint(gaps[k]));
  }
}

__global__ void __launch_bounds__(kThreads, 1) pick_kernel(const Call call) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int row = blockIdx.y, index = blockIdx.z * call.num_rows + row;
  Job& job = call.workspace.jobs[index];
  if (job.todo == kDone) return;
  const Row values = row_of(call, row, blockIdx.z == 1);
  if (job.todo == kScanAll) {
    if (blockIdx.x == 0) {
      finish(call, row, values, job, call.vocab_size,
             [&](int i) -> Candidate { return {i, values.gap(values.logit(i), job.peak)}; });
    }
    return;
  }
  int2* places = call.workspace.places + static_cast<int64_t>(index) * gridDim.x;
  uint2* candidates = call.workspace.candidates + static_cast<int64_t>(index) * kGathered;
  gather(call, values, job, places + blockIdx.x, candidates);
  if (!is_last_block(job)) return;
  if (threadIdx.x == 0) job.cursor = 0;
  uint2* ordered = dynamic_shared<uint2>();
  __shared__ int first[kMaxChunks];
  int count;
  const int begins = block_sums(threadIdx.x < gridDim.x ? places[threadIdx.x].y : 0, &count);
  if (threadIdx.x < gridDim.x) first[threadIdx.x] = begins;
  __syncthreads();
  for (int chunk = threadIdx.x / 32; chunk < static_cast<int>(gridDim.x); chunk += kWarps) {
    const int2 place = places[chunk];
    for (int i = threadIdx.x % 32; i < place.y; i += 32) ordered[first[chunk] + i] = candidates[place.x + i];
  }
  __syncthreads();
  finish(call, row, values, job, count,
         [&](int i) -> Candidate { return {static_cast<int>(ordered[i].x), __uint_as_float(ordered[i].y)}; });
}

}  // namespace helexa::sampling
