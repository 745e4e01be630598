// SPDX-License-Identifier: GPL-3.0-or-later
// Which kernel attends, and the one for shapes without a kernel on tensor cores: heads of odd sizes and float32 caches, as tests have
// them.  There a block computes one head of one query; each warp takes 32 keys at a time, one to a lane for the scores, and then all
// lanes share the dims of v.
#include "ops/attention_cuda.cuh"

#include "ops/rope.h"

namespace helexa {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneDims = kMaxHeadDim / 32;
constexpr float kLowest = -1e30f;

__device__ float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

template <class C>  // type of the caches
__global__ void __launch_bounds__(kThreads) plain_kernel(const AttentionCall call) {
  using Q = typename Cache<C>::Operand;
  ptx::wait_for_producers();
  ptx::allow_consumers();
  __shared__ float q[kMaxHeadDim], weights[kWarps][32], warp_best[kWarps], warp_total[kWarps];
  __shared__ float sums[kWarps][kMaxHeadDim];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int D = static_cast<int>(call.head_dim), H = static_cast<int>(call.num_heads);
  const int head = blockIdx.x;
  const int64_t row = blockIdx.y, token = call.first_row + row;
  int s = 0;
  while (s < call.num_sequences && token >= call.query_start[s + 1]) ++s;
  if (s == call.num_sequences || token < call.query_start[s]) return;
  const int num_keys = call.kv_lengths[s] - (call.query_start[s + 1] - static_cast<int>(token)) + 1;

  for (int d = threadIdx.x; d < D; d += kThreads)
    q[d] = to_float(static_cast<const Q*>(call.q)[(token * H + head) * D + d]) * call.scale;
  __syncthreads();

  float best = kLowest, total = 0.0f, sum[kLaneDims];
#pragma unroll
  for (float& x : sum) x = 0.0f;
  const int64_t kv_head = head / (H / call.num_kv_heads);
  for (int first = 32 * warp; first < num_keys; first += 32 * kWarps) {
    const int64_t page = call.page_table[s * call.max_pages + first / kPageTokens];
    const int64_t first_value = (page * call.num_kv_heads + kv_head) * Cache<C>::head_stride(D);
    const C* const k_page = static_cast<const C*>(call.k_cache) + first_value;
    const C* const v_page = static_cast<const C*>(call.v_cache) + first_value;
    const C* k = k_page + first % kPageTokens * D;
    const C* v = v_page + first % kPageTokens * D;
    // Of this lane's key and value.
    auto scale_in = [&](const C* values) { return scales_of(values, D)[first % kPageTokens + lane]; };
    const int count = min(32, num_keys - first);
    float score = -INFINITY;
    if (lane < count) {
      score = 0.0f;
      for (int d = 0; d < D; ++d) score += q[d] * to_float(k[lane * D + d]);
      if constexpr (Cache<C>::kScaled) score *= scale_in(k_page);
    }
    const float former = best;
    best = fmaxf(best, warp_max(score));
    const float factor = expf(former - best), weight = expf(score - best);
    total = total * factor + weight;
    weights[warp][lane] = weight;
    if constexpr (Cache<C>::kScaled) {
      if (lane < count) weights[warp][lane] *= scale_in(v_page);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = 32 * i + lane;
      if (d >= D) break;
      sum[i] *= factor;
      for (int j = 0; j < count; ++j) sum[i] += weights[warp][j] * to_float(v[j * D + d]);
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) sums[warp][32 * i + lane] = sum[i];
  total = warp_sum(total);
  if (lane == 0) {
    warp_best[warp] = best;
    warp_total[warp] = total;
  }
  __syncthreads();

  best = kLowest;
  for (int w = 0; w < kWarps; ++w) best = fmaxf(best, warp_best[w]);
  total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += warp_total[w] * expf(warp_best[w] - best);
  const float inverse = total != 0.0f ? 1.0f / total : 0.0f;
  for (int d = threadIdx.x; d < D; d += kThreads) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w) value += sums[w][d] * expf(warp_best[w] - best);
    value *= inverse;
    if (call.gate != nullptr) {
      const int64_t at = row * call.gate_stride + static_cast<int64_t>(head) * D + d;
      const float gate = static_cast<DType>(call.gate_dtype) == DType::kF32
                             ? static_cast<const float*>(call.gate)[at]
                             : to_float(static_cast<const __nv_bfloat16*>(call.gate)[at]);
      value *= 1.0f / (1.0f + expf(-gate));
    }
    call.x[(row * H + head) * D + d] = value;
  }
}

template <class C>
void attention_plain(const AttentionCall& call, void* stream) {
  constexpr int64_t kMaxRows = 65535;  // the end of a grid's second dimension
  AttentionCall part = call;
  for (; part.first_row < call.end_row; part.first_row += kMaxRows) {
    const int64_t rows = call.end_row - part.first_row < kMaxRows ? call.end_row - part.first_row : kMaxRows;
    launch_kernel(plain_kernel<C>,
                  {dim3(static_cast<unsigned>(call.num_heads), static_cast<unsigned>(rows)), dim3(kThreads),
                   stream, 0, true},
                  part);
    part.x += rows * call.num_heads * call.head_dim;
    if (part.gate != nullptr) {
      const int64_t bytes = static_cast<DType>(call.gate_dtype) == DType::kF32 ? 4 : 2;
      part.gate = static_cast<const uint8_t*>(part.gate) + rows * call.gate_stride * bytes;
    }
  }
}

void attention_plain(const AttentionCall& call, void* stream) {
  if (call.cache_dtype == kE4M3) return attention_plain<__nv_fp8_e4m3>(call, stream);
  if (call.cache_dtype == kInt8) return attention_plain<int8_t>(call, stream);
  with_dtype(static_cast<DType>(call.cache_dtype),
             [&](auto value) { attention_plain<decltype(value)>(call, stream); });
}

}  // namespace

bool is_attention_tiled(int64_t head_dim, int cache_dtype) {
  return (head_dim == 64 || head_dim == 128 || head_dim == 256) &&
         static_cast<DType>(cache_dtype) != DType::kF32;
}

void attention_cuda(const void* q, void* k_cache, void* v_cache, int cache_dtype, const int32_t* page_table,
                    const int32_t* query_start, const int32_t* kv_lengths, int64_t num_tokens,
                    int64_t num_sequences, int64_t max_pages, int64_t num_heads, int64_t num_kv_heads,
                    int64_t head_dim, float scale, int64_t first_row, int64_t end_row, const void* gate,
                    int gate_dtype, int64_t gate_stride, uint8_t* q8, void* bf16, float* x,
                    int64_t split_queries, uint32_t* counters, void* partial, int64_t max_splits,
                    const float* qkv, int64_t qkv_stride, const int32_t* slots, const float* table,
                    const float* q_norm, const float* k_norm, float eps, int64_t num_pairs, bool interleaved,
                    void* stream) {
  if (num_sequences == 0 || (first_row >= end_row && qkv == nullptr)) return;
  AttentionCall call = {};
  call.q = q;
  call.k_cache = k_cache;
  call.v_cache = v_cache;
  call.cache_dtype = cache_dtype;
  call.page_table = page_table;
  call.query_start = query_start;
  call.kv_lengths = kv_lengths;
  call.num_tokens = num_tokens;
  call.num_sequences = num_sequences;
  call.max_pages = max_pages;
  call.num_heads = num_heads;
  call.num_kv_heads = num_kv_heads;
  call.head_dim = head_dim;
  call.scale = scale;
  call.first_row = first_row;
  call.end_row = end_row;
  call.gate = gate;
  call.gate_dtype = gate_dtype;
  call.gate_stride = gate_stride;
  call.q8 = q8;
  call.bf16 = bf16;
  call.x = x;
  call.split_queries = split_queries;
  call.counters = counters;
  call.partial = partial;
  call.max_splits = max_splits;
  call.group = static_cast<int>(num_heads / num_kv_heads);
  call.group_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + call.group - 1) / call.group);
  call.qkv = qkv;
  call.qkv_stride = qkv_stride;
  call.slots = slots;
  call.how = {
      reinterpret_cast<const float2*>(table), q_norm, k_norm, eps, static_cast<int>(num_pairs), interleaved};
  if (!is_attention_tiled(head_dim, cache_dtype)) return attention_plain(call, stream);
  switch (head_dim) {
    case 64: return attention_64_cuda(call, stream);
    case 128: return attention_128_cuda(call, stream);
    default: return attention_256_cuda(call, stream);
  }
}

}  // namespace helexa
