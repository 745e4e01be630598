// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/rope.h"

#include <math.h>

#include "core/simd.h"
#include "ops/attention.h"

namespace helexa {
namespace HELEXA_ISA {
namespace {

// One token's rotation, apart into cosines and sines so that the loop over a head runs on whole vectors.
struct Rotation {
  float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
  int64_t num_pairs;
  bool interleaved;

  void read(const float* table_row) {
    for (int64_t i = 0; i < num_pairs; ++i) {
      cosines[i] = table_row[2 * i];
      sines[i] = table_row[2 * i + 1];
    }
  }

  void apply(float* x) const {
    if (interleaved) {
      for (int64_t i = 0; i < num_pairs; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cosines[i] - b * sines[i];
        x[2 * i + 1] = b * cosines[i] + a * sines[i];
      }
    } else {
      for (int64_t i = 0; i < num_pairs; ++i) {
        const float a = x[i], b = x[num_pairs + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[num_pairs + i] = b * cosines[i] + a * sines[i];
      }
    }
  }
};

// Copies a head to `out`, with the norm if there is a weight.
void norm_head(const float* x, const float* weight, float eps, int64_t head_dim, float* out) {
  if (weight == nullptr) {
    std::memcpy(out, x, static_cast<size_t>(head_dim) * sizeof(float));
    return;
  }
  f32x16 sums = zero();
  for (int64_t i = 0; i < head_dim; i += 16) {
    const f32x16 value = head_dim - i < 16 ? load_n(x + i, head_dim - i) : load(x + i);
    sums = fma(value, value, sums);
  }
  const float scale = 1.0f / sqrtf(reduce_add(sums) / static_cast<float>(head_dim) + eps);
  for (int64_t i = 0; i < head_dim; ++i) out[i] = x[i] * scale * weight[i];
}

template <class T>
void write_head(const float* x, int64_t head_dim, T* out) {
  int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) store(out + i, load(x + i));
  if (i < head_dim) store_n(out + i, load_n(x + i, head_dim - i), head_dim - i);
}

template <class T>
void append_rows(const RopeAppend& call, int64_t begin, int64_t end) {
  const int64_t D = call.head_dim, H = call.num_heads, Hkv = call.num_kv_heads;
  Rotation rotation;
  rotation.num_pairs = call.num_pairs;
  rotation.interleaved = call.interleaved;
  float head[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t) {
    const float* q = call.qkv + t * (H + 2 * Hkv) * D;
    const float* k = q + H * D;
    const float* v = k + Hkv * D;
    rotation.read(call.table + 2 * t * call.num_pairs);
    for (int64_t h = 0; h < H; ++h) {
      float* out = call.q_out + (t * H + h) * D;
      norm_head(q + h * D, call.q_norm, call.eps, D, out);
      rotation.apply(out);
    }
    const int64_t slot = call.slots[t];
    if (slot < 0) continue;
    for (int64_t h = 0; h < Hkv; ++h) {
      const int64_t offset = ((slot / kPageTokens * Hkv + h) * kPageTokens + slot % kPageTokens) * D;
      norm_head(k + h * D, call.k_norm, call.eps, D, head);
      rotation.apply(head);
      write_head(head, D, static_cast<T*>(call.k_cache) + offset);
      write_head(v + h * D, D, static_cast<T*>(call.v_cache) + offset);
    }
  }
}

}  // namespace

void rope_append_rows(const RopeAppend& call, int64_t begin, int64_t end) {
  switch (static_cast<DType>(call.cache_dtype)) {
    case DType::kF32: return append_rows<float>(call, begin, end);
    case DType::kF16: return append_rows<f16>(call, begin, end);
    case DType::kBF16: return append_rows<bf16>(call, begin, end);
  }
}

}  // namespace HELEXA_ISA
}  // namespace helexa
