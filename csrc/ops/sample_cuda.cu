// SPDX-License-Identifier: GPL-3.0-or-later
// The next token of each row, with the rules of python/helexa/engine/sampler.py, in up to three launches:
//
//   scan     the largest logit, after mask, penalties and bias.  Greedy rows are done then.
//   weigh    e^-gap of every token, where gap = (largest - logit) / temperature: their sum, and how many tokens lie how far below.
//            Rows without filters draw from that; for the others the counts bound the gap of whatever top_k, top_p or min_p can keep.
//   pick     what lies within that bound, a few dozen tokens as a rule, is gathered by all blocks; the last one of a row applies the
//            filters and draws.  Where the bound leaves too many tokens, one block goes over the whole row instead.
//
// A row is cut into chunks, one block each; the last block of a row to finish a launch does what needs all of them.  Weights are summed
// as integers, times 2^41, so that the result does not depend on the order: a seed gives one text whatever else is in the batch.  A row
// that reports logits is a second job beside the one that chooses: the same launches over what the model gave, with top_k = num_top.
#include <climits>

#include "core/cuda.cuh"
#include "ops/sample.h"

namespace helexa {
namespace {

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
__device__ bool is_last_block(Job& job) {
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
__device__ u64 mix(u64 value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

// A number below `total`, in proportion to 53 random bits that depend on seed and position alone (SplitMix64).
__device__ u64 random_below(u64 total, u64 seed, u64 position) {
  const u64 state = mix(seed + 0x9E3779B97F4A7C15ull);
  const u64 bits = mix(state + (position + 1) * 0x9E3779B97F4A7C15ull) >> 11;
  return __umul64hi(bits, total) << 11 | (bits * total) >> 53;
}

// Orders logits as numbers, NaN above all, and of equal ones the lower token above the higher.
__device__ u64 ordered_key(float logit, int token_id) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // one zero for both
  const uint32_t ordered = logit != logit ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | static_cast<uint32_t>(~token_id);
}
__device__ float logit_of_key(u64 key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

__device__ float weight_of(float gap) { return expf(-gap); }
__device__ u64 fixed(float weight) { return static_cast<u64>(weight * kOne); }
__device__ u64 share_of(double share, u64 total) {
  return max(static_cast<u64>(ceil(share * static_cast<double>(total))), static_cast<u64>(1));
}

__device__ int bin_of(float gap) {
  const int bin = static_cast<int>(__float_as_uint(gap) >> kBinShift) - kFirstBin;
  return min(max(bin, 0), kBins - 1);
}
__device__ float least_of_bin(int bin) {
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

__device__ Row row_of(const Call& call, int row, bool is_report) {
  const int slot = call.slots[row];
  const bool is_masked = call.forced[slot] == kMaskedTokens;
  return {call.logits + static_cast<int64_t>(row) * call.vocab_size,
          is_masked ? call.masks + slot * call.mask_words : nullptr, static_cast<int>(call.mask_words),
          call.parameters[slot], is_report};
}

// One thread's: hands a token over to host, next step and counts.
__device__ void choose(const Call& call, int row, int token_id, int status, float peak) {
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

// --- scan --------------------------------------------------------------------------------------------------------------------------
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

// --- choosing among many -----------------------------------------------------------------------------------------------------------
// Functions of a whole block over `count` things.

// What they share among threads, once for all that they are compiled for.
struct Shared {
  int found;
  int digit;
  u64 held, inside;
  unsigned parts[3][256];
};
__device__ Shared& shared() {
  __shared__ Shared instance;
  return instance;
}

// The first index at which the cumulative sum of measure_of(index) passes `target`; count - 1 if it never does.
template <class Measure>
__device__ int first_beyond(int count, u64 target, Measure measure_of) {
  int& found = shared().found;
  if (threadIdx.x == 0) found = count - 1;
  const int each = (count + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, count), end = min(begin + each, count);
  u64 sum = 0, total;
  for (int i = begin; i < end; ++i) sum += measure_of(i);
  u64 before = block_sums(sum, &total);  // a barrier, behind which `found` is set
  if (before <= target && target < before + sum) {
    for (int i = begin; i < end; ++i) {
      before += measure_of(i);
      if (before > target) {
        found = i;
        break;
      }
    }
  }
  __syncthreads();
  const int result = found;
  __syncthreads();
  return result;
}

// Where a set ends that is ordered by key and then by index.
struct Border {
  uint32_t key = 0xffffffffu;
  int last = INT_MAX;

  __device__ bool holds(uint32_t other, int index) const {
    return other < key || (other == key && index <= last);
  }
};

struct Item {
  uint32_t key;
  u64 measure;  // 0: not there
};

// The border of the first items whose measures reach `target`: a radix search by eight bits of the key at a time.  Measures go into
// three parts of 14 bits each, since shared memory adds 32 bits at once.
template <class ItemOf>
__device__ Border border_at(int count, u64 target, ItemOf item_of) {
  constexpr int kDigits = 256;
  auto& [found, digit, held, inside, parts] = shared();
  uint32_t prefix = 0;
  u64 before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 3 * kDigits; i += kThreads) parts[i / kDigits][i % kDigits] = 0;
    if (threadIdx.x == 0) digit = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Item item = item_of(i);
      if (item.measure == 0 || (shift < 24 && item.key >> (shift + 8) != prefix)) continue;
      const int place = item.key >> shift & (kDigits - 1);
      for (int part = 0; part < 3; ++part) {
        const unsigned bits = static_cast<unsigned>(item.measure >> 14 * part & 0x3fff);
        if (bits != 0) atomicAdd(&parts[part][place], bits);
      }
    }
    __syncthreads();
    const int place = threadIdx.x;
    u64 mine = 0, total;
    if (place < kDigits) {
      mine = parts[0][place] + (static_cast<u64>(parts[1][place]) << 14) +
             (static_cast<u64>(parts[2][place]) << 28);
    }
    const u64 through = before + block_sums(mine, &total) + mine;
    if (mine != 0 && through - mine < target && target <= through) {
      digit = place;
      held = through - mine;
      inside = mine;
    }
    __syncthreads();
    if (digit < 0) return {};  // all of them do not reach it
    prefix = prefix << 8 | static_cast<uint32_t>(digit);
    before = held;
    const bool is_whole = before + inside == target && shift == 0;
    __syncthreads();
    if (is_whole) return {prefix, INT_MAX};
  }
  const int last = first_beyond(count, target - before - 1, [&](int i) {
    const Item item = item_of(i);
    return item.key == prefix ? item.measure : 0ull;
  });
  return {prefix, last};
}

// --- weigh -------------------------------------------------------------------------------------------------------------------------
// Draws from all tokens: finds the chunk by the chunks' sums, and the token by adding up its chunk again.
__device__ void draw_from_all(const Call& call, int row, const Row& values, const Job& job, const u64* sums) {
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
__device__ void bound_candidates(const Call& call, const Row& values, Job& job, unsigned* histogram) {
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

// --- pick --------------------------------------------------------------------------------------------------------------------------
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
__device__ void gather(const Call& call, const Row& values, Job& job, int2* place, uint2* candidates) {
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

// Cuts the workspace into its parts; returns how long it is.
int64_t divide(uint8_t* base, int64_t max_rows, int64_t num_chunks, Workspace* parts) {
  int64_t used = 0;
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + used);
    used += (count * static_cast<int64_t>(sizeof(*part)) + 255) / 256 * 256;
  };
  const int64_t jobs = 2 * max_rows;
  take(parts->jobs, jobs);
  take(parts->histograms, jobs * kBins);
  take(parts->sums, jobs * num_chunks);
  take(parts->places, jobs * num_chunks);
  take(parts->candidates, jobs * kGathered);
  return used;
}

}  // namespace

int64_t sample_workspace_bytes(int64_t max_rows, int64_t vocab_size) {
  Workspace parts;
  return divide(nullptr, max_rows, (vocab_size + kChunk - 1) / kChunk, &parts);
}

void sample_cuda(const float* logits, const int32_t* slots, const int32_t* positions,
                 const SampleParameters* parameters, const int32_t* forced, const uint32_t* masks,
                 int64_t mask_words, int32_t* last_tokens, SampleRecord* records, void* workspace,
                 int64_t max_rows, int64_t num_rows, int64_t vocab_size, bool greedy_only, void* stream) {
  if (num_rows == 0) return;
  const int64_t num_chunks = (vocab_size + kChunk - 1) / kChunk;
  Call call{logits,
            slots,
            positions,
            parameters,
            forced,
            masks,
            mask_words,
            last_tokens,
            records,
            static_cast<int>(num_rows),
            static_cast<int>(vocab_size),
            {}};
  divide(static_cast<uint8_t*>(workspace), max_rows, num_chunks, &call.workspace);
  Launch launch{dim3(static_cast<unsigned>(num_chunks), static_cast<unsigned>(num_rows), greedy_only ? 1 : 2),
                dim3(kThreads), stream, 0, true};
  launch_kernel(scan_kernel, launch, call);
  if (greedy_only) return;
  launch_kernel(weigh_kernel, launch, call);
  launch.shared_bytes = kGathered * sizeof(uint2);
  launch_kernel(pick_kernel, launch, call);
}

}  // namespace helexa
