// SPDX-License-Identifier: GPL-3.0-or-later
// One warp to a head, whether of q, k or v.
#include "ops/rope.cuh"

namespace helexa {
namespace {

constexpr int kTableThreads = 256;
// Heads of a block.  Few, so that one token's heads are spread over many multiprocessors.
constexpr int kWarps = 4;

__global__ void __launch_bounds__(kTableThreads)
    rope_table_kernel(const int32_t* positions,  // [num_tokens]
                      const float* inv_freq,     // [num_pairs]
                      float2* table,             // [num_tokens, num_pairs]
                      int64_t num_tokens, int64_t num_pairs, float magnitude) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  if (i >= num_tokens * num_pairs) return;
  const float angle = static_cast<float>(positions[i / num_pairs]) * inv_freq[i % num_pairs];
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  table[i] = make_float2(cosine * magnitude, sine * magnitude);
}

struct Append {
  HeadTransform how;
  const int32_t* slots;  // [num_tokens]
  void* k_cache;         // [pages, num_kv_heads, kPageTokens, head_dim]
  void* v_cache;
  int64_t qkv_stride;
  int num_heads, num_kv_heads, head_dim;
};

template <class X,      // type of qkv
          class C,      // type of the caches
          class Q,      // type of q_out
          int kValues>  // of a lane
__global__ void __launch_bounds__(32 * kWarps)
    rope_append_kernel(const X* qkv,  // [num_tokens, qkv_stride]
                       Q* q_out,      // [num_tokens, num_heads, head_dim]
                       const Append call) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int D = call.head_dim, H = call.num_heads, Hkv = call.num_kv_heads;
  const int lane = threadIdx.x % 32;
  const int head = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (head >= H + 2 * Hkv) return;
  const int64_t t = blockIdx.y;
  const int64_t slot = head < H ? 0 : call.slots[t];
  if (slot < 0) return;

  float* x = dynamic_shared<float>() + threadIdx.x / 32 * D;
  const bool is_value = head >= H + Hkv;
  Head<kValues> values;
  values.read(qkv + t * call.qkv_stride + static_cast<int64_t>(head) * D, D,
              head < H   ? call.how.q_norm
              : is_value ? nullptr
                         : call.how.k_norm,
              is_value ? nullptr : call.how.table + t * call.how.num_pairs, call.how.num_pairs);
  values.transform(call.how, D, x);
  if (head < H) {
    Q* q = q_out + (t * H + head) * D;
    for (int i = lane; i < D; i += 32) assign(q[i], x[i]);
  } else {
    append_head(x, D, static_cast<C*>(is_value ? call.v_cache : call.k_cache), Hkv, (head - H) % Hkv, slot);
  }
}

}  // namespace

void rope_table_cuda(const int32_t* positions, const float* inv_freq, float* table, int64_t num_tokens,
                     int64_t num_pairs, float magnitude, void* stream) {
  const int64_t num_blocks = (num_tokens * num_pairs + kTableThreads - 1) / kTableThreads;
  if (num_blocks == 0) return;
  launch_kernel(rope_table_kernel,
                {dim3(static_cast<unsigned>(num_blocks)), dim3(kTableThreads), stream, 0, true}, positions,
                inv_freq, reinterpret_cast<float2*>(table), num_tokens, num_pairs, magnitude);
}

void rope_append_cuda(const void* qkv, int qkv_dtype, int64_t qkv_stride, const float* table,
                      const int32_t* slots, void* k_cache, void* v_cache, int cache_dtype, void* q_out,
                      const float* q_norm, const float* k_norm, float eps, int64_t num_tokens,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_pairs,
                      bool interleaved, void* stream) {
  const int64_t num_blocks = (num_heads + 2 * num_kv_heads + kWarps - 1) / kWarps;
  // The second dimension of a grid ends at 65,535.
  constexpr int64_t kMaxTokens = 65535;
  const Append call{
      {reinterpret_cast<const float2*>(table), q_norm, k_norm, eps, static_cast<int>(num_pairs), interleaved},
      slots,
      k_cache,
      v_cache,
      qkv_stride,
      static_cast<int>(num_heads),
      static_cast<int>(num_kv_heads),
      static_cast<int>(head_dim)};
  auto append = [&](auto x, auto c, auto q) {
    using X = decltype(x);
    using C = decltype(c);
    using Q = decltype(q);
    const auto kernel =
        head_dim <= 128 ? rope_append_kernel<X, C, Q, 4> : rope_append_kernel<X, C, Q, kMaxHeadDim / 32>;
    for (int64_t first = 0; first < num_tokens; first += kMaxTokens) {
      const int64_t count = num_tokens - first < kMaxTokens ? num_tokens - first : kMaxTokens;
      Append part = call;
      part.how.table += first * num_pairs;
      part.slots += first;
      launch_kernel(kernel,
                    {dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(count)), dim3(32 * kWarps),
                     stream, kWarps * head_dim * sizeof(float), true},
                    static_cast<const X*>(qkv) + first * qkv_stride,
                    static_cast<Q*>(q_out) + first * num_heads * head_dim, part);
    }
  };
  auto to_caches = [&](auto x) {
    if (cache_dtype == kE4M3) return append(x, __nv_fp8_e4m3(), __half());
    if (cache_dtype == kInt8) return append(x, int8_t(), __half());
    with_dtype(static_cast<DType>(cache_dtype), [&](auto c) { append(x, c, c); });
  };
  static_cast<DType>(qkv_dtype) == DType::kF32 ? to_caches(float()) : to_caches(__nv_bfloat16());
}

}  // namespace helexa
