// SPDX-License-Identifier: GPL-3.0-or-later
// Which experts each token goes to.  For few rows only logits are computed, a block those of one or two experts for a batch of tokens, since
// their consumers choose by themselves; for many rows which tokens each expert gets as well.
#include "ops/moe_route_cuda.cuh"

#include <algorithm>

#include "ops/activation.cuh"
#include "ops/moe_choose.cuh"

namespace helexa::moe {
namespace {

constexpr int kRouterWarps = 8;
constexpr int kRuns = 2;  // of 128 columns of a row that a warp has on their way at once
constexpr int kPlanThreads = 1024;
constexpr uint32_t kAll = 0xffffffffu;

// Four consecutive values of a row.
__device__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <class T>
__device__ float4 load4(const T* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  const T* v = reinterpret_cast<const T*>(&bits);
  return {to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])};
}

// By one warp.
__device__ void route_token(const float* logits, const float* shared_logit, int token, int num_experts,
                            int top_k, bool normalize, const Routes& routes) {
  const int lane = threadIdx.x % 32;
  const Choice choice = choose(logits, num_experts, top_k, normalize);
  float* weights = routes.weights + static_cast<int64_t>(token) * routes.slots;
  if (lane < top_k) {
    routes.ids[static_cast<int64_t>(token) * top_k + lane] = choice.expert;
    weights[lane] = choice.weight;
  }
  if (routes.slots > top_k && lane == 0) weights[top_k] = shared_weight(shared_logit);
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

// A row of floats of some type.
struct FloatRow {
  const void* data;
  DType dtype;

  __device__ FloatRow at(int64_t row, int cols) const {
    const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
    return {static_cast<const uint8_t*>(data) + row * cols * bytes, dtype};
  }
};

// The first of a lane's four columns in the warp's i-th run of 128.
__device__ int column_of(int first, int i) {
  return first + 128 * i * kRouterWarps + 4 * static_cast<int>(threadIdx.x);
}

// A lane's part of this warp's runs of a row; zeros beyond its end.
template <class T>
__device__ void load_runs(const T* row, int first, int cols, float4 (&runs)[kRuns]) {
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int col = column_of(first, i);
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

// A block has kRows rows of the router, of whose columns each thread has its own, and the order of their sum is the same for any number
// of tokens.
template <int kTokens, int kRows>  // of a batch, of a block
__global__ void __launch_bounds__(kRouterWarps * 32)
    router_kernel(const float* x,        // [num_tokens, cols]
                  const float* squares,  // [num_tokens, activation_squares(cols)], or null
                  float eps,
                  FloatRow router,  // [num_experts, cols]
                  FloatRow shared,  // [cols], or null
                  float* logits,    // [num_tokens, logits_stride(num_experts)]
                  int num_tokens, int cols, int num_experts) {
  constexpr int kSums = kTokens * kRows;
  static_assert(kSums <= 32, "one warp adds up what the warps have");
  __shared__ float parts[kRouterWarps][kSums];
  __shared__ float factors[kTokens];
  float* own_squares = dynamic_shared<float>();  // of the token that the warp ends the norm of
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_rows = num_experts + (shared.data == nullptr ? 0 : 1);
  const int first = blockIdx.y * kBatch, count = min(kTokens, num_tokens - first);
  float4 runs[kRows][kRuns];
  auto load_weights = [&](int col) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = min(static_cast<int>(blockIdx.x) * kRows + r, num_rows - 1);
      load_runs(row < num_experts ? router.at(row, cols) : shared, col, cols, runs[r]);
    }
  };
  load_weights(0);  // they do not change: no need to wait for the producer
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int num_squares = static_cast<int>(activation_squares(cols));
  own_squares += warp * num_squares;
  if (squares != nullptr && warp < count) {
    for (int i = 4 * lane; i < num_squares; i += 128) {
      ptx::copy_async(own_squares + i, squares + static_cast<int64_t>(first + warp) * num_squares + i);
    }
  }
  ptx::commit_copies();
  float sums[kTokens][kRows] = {};
  for (int col = 0; col < cols; col += 128 * kRouterWarps * kRuns) {
    if (col > 0) load_weights(col);
    float4 values[kTokens][kRuns];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const float* row = x + static_cast<int64_t>(first + min(n, count - 1)) * cols;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {  // weights beyond the end are zeros: any value will do
        values[n][i] = load4(row + min(column_of(col, i), cols - 4));
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          const float4 w = runs[r][i], v = values[n][i];
          float& sum = sums[n][r];
          sum = fmaf(w.w, v.w, fmaf(w.z, v.z, fmaf(w.y, v.y, fmaf(w.x, v.x, sum))));
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float sum = warp_sum(sums[i / kRows][i % kRows]);
    if (lane == 0) parts[warp][i] = sum;
  }
  ptx::wait_for_copies<0>();
  __syncwarp();
  if (warp < count) {
    const float factor = squares == nullptr ? 1.0f : norm_factor(own_squares, cols, eps);
    if (lane == 0) factors[warp] = factor;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int token = threadIdx.x / kRows, row = blockIdx.x * kRows + threadIdx.x % kRows;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kRouterWarps; ++w) sum += parts[w][threadIdx.x];
    float* own = logits + static_cast<int64_t>(first + token) * logits_stride(num_experts);
    if (token < count && row < num_rows) own[row] = sum * factors[token];
    if (token < count && row == 0) own[num_experts + 1] = factors[token];
  }
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

void route_few(const float* x, const float* squares, float eps, const WeightView& router,
               const WeightView* shared_gate, float* logits, int64_t num_tokens, void* stream) {
  const int num_experts = static_cast<int>(router.rows), cols = static_cast<int>(router.cols);
  // The numbers of the float formats are those of their types.
  auto row = [](const WeightView* w) -> FloatRow {
    if (w == nullptr) return {nullptr, DType::kF32};
    return {w->packed, static_cast<DType>(w->format)};
  };
  const int rows = num_experts + (shared_gate == nullptr ? 0 : 1);
  const bool is_one = num_tokens == 1;
  const dim3 grid(is_one ? rows : (rows + 1) / 2, static_cast<unsigned>((num_tokens + kBatch - 1) / kBatch));
  const size_t shared_bytes =
      squares == nullptr ? 0
                         : std::min<int64_t>(num_tokens, kBatch) * activation_squares(cols) * sizeof(float);
  launch_kernel(is_one ? router_kernel<1, 1> : router_kernel<kBatch, 2>,
                {grid, dim3(kRouterWarps * 32), stream, shared_bytes, true}, x, squares, eps, row(&router),
                row(shared_gate), logits, num_tokens, cols, num_experts);
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
