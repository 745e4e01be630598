// SPDX-License-Identifier: GPL-3.0-or-later
// Which experts each token goes to, and which tokens each expert gets.  For few rows one launch does all of it: a warp computes the
// logits of one expert for a batch of tokens, and the last block to finish for a batch picks their experts and sorts the pairs.
#include "ops/moe_route_cuda.cuh"

namespace helexa::moe {
namespace {

constexpr int kRouterWarps = 4;
constexpr int kRuns = 16;  // of 128 columns of a row that are on their way at once
constexpr int kPlanThreads = 1024;
constexpr uint32_t kAll = 0xffffffffu;

// What other blocks of the same launch have written.
template <class T>
__device__ T fresh(const T* p) {
  return *static_cast<const volatile T*>(p);
}

// Four consecutive values of a row.
__device__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <class T>
__device__ float4 load4(const T* p) {
  return {to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

// Ordered as the values are; NaN comes last.  Zero is below all.
__device__ uint32_t order_key(float value) {
  if (value != value) return 1;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// One warp: the top_k largest of a token's logits in falling order, the lower id first where equal, and their softmax.
template <int kPerLane>
__device__ void pick(const float* logits, int num_experts, int top_k, bool normalize, int* ids,
                     float* weights) {
  const int lane = threadIdx.x % 32;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + 32 * i;
    keys[i] = expert < num_experts ? order_key(fresh(logits + expert)) : 0;
  }
  float all = 0.0f, most = 0.0f, mine = 0.0f;
  for (int j = 0; j < top_k; ++j) {
    uint32_t best = 0, id = kAll;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(kAll, best);
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i)
      if (keys[i] == best) id = lane + 32 * i;
    id = __reduce_min_sync(kAll, id);
    if (j == 0) {
      most = key_value(best);
      if (!normalize) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (keys[i] != 0) all += expf(key_value(keys[i]) - most);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (id == static_cast<uint32_t>(lane + 32 * i)) keys[i] = 0;
    if (lane == j) {
      mine = expf(key_value(best) - most);
      ids[j] = static_cast<int>(id);
    }
  }
  const float total = warp_sum(normalize ? mine : all);
  if (lane < top_k) weights[lane] = mine / total;
}

__device__ void route_token(const float* logits, const float* shared_logit, int token, int num_experts,
                            int top_k, bool normalize, const Routes& routes) {
  int* ids = routes.ids + static_cast<int64_t>(token) * top_k;
  float* weights = routes.weights + static_cast<int64_t>(token) * routes.slots;
  if (num_experts <= 128) {
    pick<4>(logits, num_experts, top_k, normalize, ids, weights);
  } else if (num_experts <= 256) {
    pick<8>(logits, num_experts, top_k, normalize, ids, weights);
  } else if (num_experts <= 512) {
    pick<16>(logits, num_experts, top_k, normalize, ids, weights);
  } else {
    pick<32>(logits, num_experts, top_k, normalize, ids, weights);
  }
  if (routes.slots > top_k && threadIdx.x % 32 == 0) {
    weights[top_k] = shared_logit == nullptr ? 1.0f : 1.0f / (1.0f + expf(-fresh(shared_logit)));
  }
}

__device__ int inclusive_scan(int value) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(kAll, value, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) value += below;
  }
  return value;
}

// One block.  Where a pair stands within its expert is left to chance: no result depends on it.
__device__ void sort_pairs(const int* ids, int num_pairs, int num_experts, int group_size, const Plan& plan) {
  __shared__ int next[kMaxExperts];  // pairs of an expert, then the position of its next pair
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) next[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < num_pairs; p += blockDim.x) atomicAdd(&next[fresh(ids + p)], 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    int position = 0, num_groups = 0;
    for (int e0 = 0; e0 < num_experts; e0 += 32) {
      const int e = e0 + threadIdx.x, count = e < num_experts ? next[e] : 0;
      const int groups = (count + group_size - 1) / group_size;
      const int positions = inclusive_scan(count), ends = inclusive_scan(groups);
      const int first = position + positions - count;
      if (e < num_experts) next[e] = first;
      for (int i = 0; i < groups; ++i) {
        plan.groups[num_groups + ends - groups + i] = {e, first + i * group_size,
                                                       min(group_size, count - i * group_size), 0};
      }
      position += __shfl_sync(kAll, positions, 31);
      num_groups += __shfl_sync(kAll, ends, 31);
    }
    if (threadIdx.x == 0) *plan.num_groups = num_groups;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < num_pairs; p += blockDim.x) {
    plan.order[atomicAdd(&next[fresh(ids + p)], 1)] = p;
  }
}

// Whether this block is the last of `count` that come here; if so, the counter is zero again.
__device__ bool is_last(int* counter, int count) {
  __shared__ int arrived;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrived = atomicAdd(counter, 1) + 1;
    if (arrived == count) *counter = 0;
  }
  __syncthreads();
  if (arrived == count) __threadfence();
  return arrived == count;
}

// A row of floats of some type.
struct FloatRow {
  const void* data;
  DType dtype;

  __device__ FloatRow at(int64_t row, int cols) const {
    const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
    return {static_cast<const uint8_t*>(data) + row * cols * bytes, dtype};
  }
};

// A lane's part of kRuns runs of 128 columns of a row; zeros beyond its end.
template <class T>
__device__ void load_runs(const T* row, int first, int cols, float4 (&runs)[kRuns]) {
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int col = first + 128 * i + 4 * static_cast<int>(threadIdx.x % 32);
    runs[i] = col < cols ? load4(row + col) : float4{0, 0, 0, 0};
  }
}
__device__ void load_runs(const FloatRow& row, int first, int cols, float4 (&runs)[kRuns]) {
  switch (row.dtype) {
    case DType::kF32: return load_runs(static_cast<const float*>(row.data), first, cols, runs);
    case DType::kF16: return load_runs(static_cast<const __half*>(row.data), first, cols, runs);
    case DType::kBF16: return load_runs(static_cast<const __nv_bfloat16*>(row.data), first, cols, runs);
  }
}

template <int kTokens>  // of a batch
__global__ void __launch_bounds__(kRouterWarps * 32)
    router_kernel(const float* x,   // [num_tokens, cols]
                  FloatRow router,  // [num_experts, cols]
                  FloatRow shared,  // [cols], or null
                  float* logits,    // [num_tokens, num_experts + 1]
                  int* counters,    // [batches], zeros
                  Routes routes, int num_tokens, int cols, int num_experts, int top_k, bool normalize) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int expert = blockIdx.x * kRouterWarps + warp, stride = num_experts + 1;
  const int first = blockIdx.y * kBatch, count = min(kTokens, num_tokens - first);
  const bool has_row = expert < num_experts || (expert == num_experts && shared.data != nullptr);
  const FloatRow row = expert < num_experts ? router.at(expert, cols) : shared;
  float4 runs[kRuns];
  if (has_row) load_runs(row, 0, cols, runs);  // weights do not change: no need to wait for the producer
  ptx::wait_for_producers();
  ptx::allow_consumers();
  float sums[kTokens] = {};
  for (int col = 0; has_row && col < cols; col += 128 * kRuns) {
    if (col > 0) load_runs(row, col, cols, runs);
    // The order of a lane's sum is that of its columns, so it is the same for any number of tokens.
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      if (n >= count) break;
      float4 values[kRuns];
      load_runs(x + static_cast<int64_t>(first + n) * cols, col, cols, values);
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const float4 w = runs[i], v = values[i];
        sums[n] = fmaf(w.w, v.w, fmaf(w.z, v.z, fmaf(w.y, v.y, fmaf(w.x, v.x, sums[n]))));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTokens; ++n) {
    const float sum = warp_sum(sums[n]);
    if (lane == 0 && n < count && has_row) logits[static_cast<int64_t>(first + n) * stride + expert] = sum;
  }
  if (!is_last(counters + blockIdx.y, gridDim.x)) return;
  for (int n = warp; n < count; n += kRouterWarps) {
    const float* mine = logits + static_cast<int64_t>(first + n) * stride;
    route_token(mine, shared.data == nullptr ? nullptr : mine + num_experts, first + n, num_experts, top_k,
                normalize, routes);
  }
  __syncthreads();
  if (num_tokens == 1) {  // its pairs are groups as they are
    const Plan& plan = routes.plan;
    if (threadIdx.x == 0) *plan.num_groups = top_k;
    for (int j = threadIdx.x; j < top_k; j += blockDim.x) {
      plan.groups[j] = {fresh(routes.ids + j), j, 1, 0};
      plan.order[j] = j;
    }
    return;
  }
  sort_pairs(routes.ids + static_cast<int64_t>(first) * top_k, count * top_k, num_experts, kBatch,
             routes.plan.of_batch(blockIdx.y));
}

// One warp to a token.
__global__ void __launch_bounds__(128)
    route_kernel(const float* logits,         // [num_tokens, num_experts]
                 const float* shared_logits,  // [num_tokens], or null
                 Routes routes, int num_tokens, int num_experts, int top_k, bool normalize) {
  const int token = blockIdx.x * 4 + threadIdx.x / 32;
  ptx::wait_for_producers();
  ptx::allow_consumers();
  if (token >= num_tokens) return;
  route_token(logits + static_cast<int64_t>(token) * num_experts,
              shared_logits == nullptr ? nullptr : shared_logits + token, token, num_experts, top_k,
              normalize, routes);
}

__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int* ids, int num_pairs, int num_experts, int group_size, Plan plan) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  sort_pairs(ids, num_pairs, num_experts, group_size, plan);
}

}  // namespace

void route_few(const float* x, const WeightView& router, const WeightView* shared_gate, float* logits,
               int* counters, const Routes& routes, int64_t num_tokens, int64_t top_k, bool normalize,
               void* stream) {
  const int num_experts = static_cast<int>(router.rows), cols = static_cast<int>(router.cols);
  // The numbers of the float formats are those of their types.
  auto row = [](const WeightView* w) -> FloatRow {
    if (w == nullptr) return {nullptr, DType::kF32};
    return {w->packed, static_cast<DType>(w->format)};
  };
  const int rows = num_experts + (shared_gate == nullptr ? 0 : 1);
  const dim3 grid((rows + kRouterWarps - 1) / kRouterWarps,
                  static_cast<unsigned>((num_tokens + kBatch - 1) / kBatch));
  launch_kernel(num_tokens == 1 ? router_kernel<1> : router_kernel<kBatch>,
                {grid, dim3(kRouterWarps * 32), stream, 0, true}, x, row(&router), row(shared_gate), logits,
                counters, routes, num_tokens, cols, num_experts, top_k, normalize);
}

void route_many(const float* logits, const float* shared_logits, const Routes& routes, int64_t num_tokens,
                int64_t num_experts, int64_t top_k, bool normalize, int group_size, void* stream) {
  launch_kernel(route_kernel, {dim3(static_cast<unsigned>((num_tokens + 3) / 4)), dim3(128), stream, 0, true},
                logits, shared_logits, routes, num_tokens, num_experts, top_k, normalize);
  if (routes.plan.order == nullptr) return;
  launch_kernel(plan_kernel, {dim3(1), dim3(kPlanThreads), stream, 0, true}, routes.ids, num_tokens * top_k,
                num_experts, group_size, routes.plan);
}

}  // namespace helexa::moe

namespace helexa {

void moe_route_cuda(const float* logits, int32_t* ids, float* weights, int64_t num_tokens,
                    int64_t num_experts, int64_t top_k, bool normalize, void* stream) {
  if (num_tokens == 0) return;
  const moe::Routes routes{ids, weights, static_cast<int>(top_k), {}};
  moe::route_many(logits, nullptr, routes, num_tokens, num_experts, top_k, normalize, 1, stream);
}

}  // namespace helexa
