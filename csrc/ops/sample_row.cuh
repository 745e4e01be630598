// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// What the launches of sample_cuda.cu share: the state of a row between them, sums over a block, numbers, and logits as a row sees them.
#include "core/cuda.cuh"
#include "ops/sample.h"

namespace helexa::sampling {

using u64 = unsigned long long;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kEach = 4;  // tokens of a thread: all its loads are under way at once
constexpr int kChunk = kThreads * kEach;
constexpr int kMaxChunks = kMaxVocabulary / kChunk;
constexpr float kOne =
    2199023255552.0f;  // 2^41: the largest that 2^18 terms of, in parts of 14 bits, fit in 32 bits
// Distances below the largest logit, 32 steps per octave from 2^-12 on, in which weights differ by less than a 32nd of the gap.
constexpr int kBins = 1024, kBinShift = 18, kFirstBin = (127 - 12) << 5;
constexpr int kGathered = 4096;  // candidates of a row at most; more do not fit into a block's shared memory

enum Todo { kDone, kDraw, kGather, kScanAll };

// State of a row between launches, for choosing or for reporting; zeros before the first.
struct Job {
  u64 best;   // the largest of ordered_key
  u64 total;  // of all weights
  float peak;
  int todo;
  unsigned arrived;  // blocks that have finished this launch
  unsigned cursor;   // candidates gathered
  int bound;         // the last bin of candidates
  int num_candidates;
};

struct Workspace {
  Job* jobs;             // [2 * max_rows]: choosing, then from num_rows on reporting
  u64* sums;             // [jobs, num_chunks] of weights
  unsigned* histograms;  // [jobs, kBins], zeros between calls
  int2* places;          // [jobs, num_chunks]: where the candidates of a chunk begin, and how many they are
  uint2* candidates;     // [jobs, kGathered]: token and gap
};

struct Call {
  const float* logits;
  const int32_t* slots;
  const int32_t* positions;
  const SampleParameters* parameters;
  const int32_t* forced;
  const uint32_t* masks;
  int64_t mask_words;
  int32_t* last_tokens;
  SampleRecord* records;
  int num_rows;
  int vocab_size;
  Workspace workspace;
};

// --- blocks ------------------------------------------------------------------------------------------------------------------------
// The sum of the values of the threads before this one; `total` gets that of all.
template <class T>
__device__ T block_sums(T value, T* total) {
  __shared__ T warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T through = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += before;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  T before_warp = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before_warp = all;
    all += warp_sums[w];
  }
  __syncthreads();
  *total = all;
  return before_warp + through - value;
}

template <class T>
__device__ T block_total(T value) {
  T total;
  block_sums(value, &total);
  return total;
}

// Whether this block is the last of its row to get here; what the others wrote before is visible then.
__device__ inline bool is_last_block(Job& job) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for all of the block, which the barriers put before and behind it
    is_last = atomicAdd(&job.arrived, 1u) == gridDim.x - 1;
    if (is_last) job.arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// --- numbers -----------------------------------------------------------------------------------------------------------------------
__device__ inline u64 mix(u64 value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

// A number below `total`, in proportion to 53 random bits that depend on seed and position alone (SplitMix64).
__device__ inline u64 random_below(u64 total, u64 seed, u64 position) {
  const u64 state = mix(seed + 0x9E3779B97F4A7C15ull);
  const u64 bits = mix(state + (position + 1) * 0x9E3779B97F4A7C15ull) >> 11;
  return __umul64hi(bits, total) << 11 | (bits * total) >> 53;
}

// Orders logits as numbers, NaN above all, and of equal ones the lower token above the higher.
__device__ inline u64 ordered_key(float logit, int token_id) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // one zero for both
  const uint32_t ordered = logit != logit ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | static_cast<uint32_t>(~token_id);
}
__device__ inline float logit_of_key(u64 key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ inline bool is_finite(float x) { return fabsf(x) < INFINITY; }

__device__ inline float weight_of(float gap) { return expf(-gap); }
__device__ inline u64 fixed(float weight) { return static_cast<u64>(weight * kOne); }
__device__ inline u64 share_of(double share, u64 total) {
  return max(static_cast<u64>(ceil(share * static_cast<double>(total))), static_cast<u64>(1));
}

__device__ inline int bin_of(float gap) {
  const int bin = static_cast<int>(__float_as_uint(gap) >> kBinShift) - kFirstBin;
  return min(max(bin, 0), kBins - 1);
}
__device__ inline float least_of_bin(int bin) {
  return bin == 0 ? 0.0f : __uint_as_float(static_cast<uint32_t>(bin + kFirstBin) << kBinShift);
}

// --- rows --------------------------------------------------------------------------------------------------------------------------
// One row of logits as a job sees it.
struct Row {
  const float* logits;
  const uint32_t* mask;  // null: every token may come
  int mask_words;
  SampleParameters parameters;
  bool is_report;

  // The logit of a token, after mask and, for the choice, penalties and bias.
  __device__ float logit(int token_id) const {
    float x = logits[token_id];
    if (mask != nullptr && (token_id / 32 >= mask_words || !(mask[token_id / 32] >> token_id % 32 & 1))) {
      return -INFINITY;
    }
    if (is_report) return x;
    const SampleParameters& p = parameters;
    const int32_t count = p.counts == nullptr ? 0 : p.counts[token_id];
    if (count != 0) {
      x = x < 0.0f ? x * p.repetition_penalty : x / p.repetition_penalty;
      const int times = count >> 1;
      const double less = static_cast<double>(p.frequency_penalty * static_cast<float>(times)) +
                          (times > 0 ? p.presence_penalty : 0.0);
      x = static_cast<float>(static_cast<double>(x) - less);
    }
    return p.bias == nullptr ? x : x + p.bias[token_id];
  }
  __device__ float gap(float logit, float peak) const {
    return is_report ? peak - logit : (peak - logit) / parameters.temperature;
  }
  __device__ int top_k(int vocab_size) const {
    if (is_report) return min(parameters.num_top, vocab_size);
    return parameters.top_k < vocab_size ? parameters.top_k : 0;
  }
  __device__ bool is_filtered(int vocab_size) const {
    const SampleParameters& p = parameters;
    return top_k(vocab_size) > 0 || (!is_report && (p.top_p < 1.0 || p.min_p > 0.0f || p.typical_p < 1.0));
  }
};

__device__ inline Row row_of(const Call& call, int row, bool is_report) {
  const int slot = call.slots[row];
  const bool is_masked = call.forced[slot] == kMaskedTokens;
  return {call.logits + static_cast<int64_t>(row) * call.vocab_size,
          is_masked ? call.masks + slot * call.mask_words : nullptr, static_cast<int>(call.mask_words),
          call.parameters[slot], is_report};
}

// One thread's: hands a token over to host, next step and counts.
__device__ inline void choose(const Call& call, int row, int token_id, int status, float peak) {
  const int slot = call.slots[row];
  SampleRecord& record = call.records[row];
  record.token_id = token_id;
  record.status = status;
  record.position = call.positions[row] + 1;
  record.asked = call.parameters[slot].num_top;
  record.peak = peak;
  record.logit = call.logits[static_cast<int64_t>(row) * call.vocab_size + token_id];
  call.last_tokens[slot] = token_id;
  int32_t* counts = const_cast<int32_t*>(call.parameters[slot].counts);
  if (counts != nullptr) counts[token_id] += 2;
}

}  // namespace helexa::sampling
