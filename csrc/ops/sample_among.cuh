// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// Choosing among many: functions of a whole block over `count` things.
#include <climits>

#include "ops/sample_row.cuh"

namespace helexa::sampling {

// What they share among threads, once for all that they are compiled for.
struct Shared {
  int found;
  int digit;
  u64 held, inside;
  unsigned parts[3][256];
};
__device__ inline Shared& shared() {
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

}  // namespace helexa::sampling
