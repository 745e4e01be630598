// SPDX-License-Identifier: GPL-3.0-or-later
// What the kernels of a mixture of experts share.
//
// A pair is one token's choice of one expert: pair t * top_k + j.  Pairs are sorted by expert, and the pairs of an expert are cut
// into groups, since one reading of an expert's weights serves as many tokens as a block takes.
#pragma once

#include "core/cuda.cuh"

namespace helexa::moe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kBatch = 8;  // few rows are taken so many at a time: tokens of a matrix instruction

struct Group {
  int expert;
  int first;  // position of its first pair in the sorted order
  int count;
  int unused;
};

// Groups that num_pairs pairs may need, whatever they choose.
inline int max_groups(int64_t num_pairs, int64_t num_experts, int group_size) {
  const int64_t active = num_pairs < num_experts ? num_pairs : num_experts;
  return static_cast<int>((num_pairs + (group_size - 1) * active) / group_size);
}

// Of many rows, in device memory; written by the kernels that route.
struct Plan {
  int* num_groups;
  Group* groups;  // [max_groups]
  int* order;     // [pairs]: the pair at a position
  int max_groups;
};

// Floats of a token's logits: of the experts, of the shared one's gate, and the factor that ends the norm of the token's row.
__host__ __device__ constexpr int logits_stride(int num_experts) { return num_experts + 2; }

// Cuts a workspace into arrays.
class Workspace {
 public:
  explicit Workspace(uint8_t* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return taken;
  }
  Plan take_plan(int64_t num_pairs, int64_t num_experts, int group_size) {
    const int groups = max_groups(num_pairs, num_experts, group_size);
    return {take<int>(1), take<Group>(groups), take<int>(num_pairs), groups};
  }
  int64_t bytes() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

// What routing of many rows writes: weights has a column more than top_k where there is a shared expert.
struct Routes {
  int* ids;        // [num_tokens, top_k]
  float* weights;  // [num_tokens, slots]
  int slots;
  Plan plan;
};

// Of the current device: bytes that a block may have, and of the cache.
inline int64_t shared_memory() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(227 * 1024);
}
inline int64_t second_level_cache() { return device_attribute<cudaDevAttrL2CacheSize>(50 * 1024 * 1024); }

}  // namespace helexa::moe
