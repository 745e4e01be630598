// SPDX-License-Identifier: GPL-3.0-or-later
// A warp unpacks 16 rows times 256 columns: it reads them as the matmul kernels do (16 bytes a lane, operands of mma) and so has the rows
// g and g + 8 in lane 4g + t, four neighbouring columns at a time, which it stores side by side.
#include "core/cuda.cuh"
#include "ops/dequantize.h"
#include "quant/plain.cuh"
#include "quant/tiles.cuh"

namespace helexa {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kGroupCols = 256;
constexpr int kPlainEach = 4;  // values of a thread, of matrices of floats

__device__ __forceinline__ void store_four(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store_four(__nv_bfloat16* to, const float (&v)[4]) {
  const __nv_bfloat162 first = __floats2bfloat162_rn(v[0], v[1]), second = __floats2bfloat162_rn(v[2], v[3]);
  *reinterpret_cast<uint2*>(to) =
      make_uint2(reinterpret_cast<const uint32_t&>(first), reinterpret_cast<const uint32_t&>(second));
}

// Stores the operands of one step of one row: columns 4t … of both halves.
template <class F, class T>
__device__ __forceinline__ void store_step(const RowScales<F>& scales, int step, uint32_t first,
                                           uint32_t second, T* to) {
  constexpr bool kBiased = Unit<F>::kSigned || has_levels<F>;  // a signed byte is an unsigned one minus 128
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int of = Unit<F>::kHalves == 2 ? half : 0;
    const float scale = scales.scale(step, of), offset = scales.offset(step, of);
    const uint32_t operand = (half == 0 ? first : second) ^ (kBiased ? 0x80808080u : 0u);
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Rounded like the CPU's product and sum, not fused.
      values[j] = __fmul_rn(scale, tiles::byte_to_float(operand, j, kBiased ? 128.0f : 0.0f));
      if constexpr (Unit<F>::kHasOffset) values[j] = __fadd_rn(values[j], offset);
    }
    store_four(to + 16 * half, values);
  }
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ tiles,  // of the first row
                      T* __restrict__ out,                // [num_rows, cols], rows out_stride apart
                      int64_t num_rows, int64_t cols, int64_t out_stride) {
  using U = Unit<F>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t first_col = (static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / 32) * kGroupCols;
  ptx::wait_for_producers();
  ptx::allow_consumers();
  if (first_col >= cols) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeviceTileRows + g;
  const uint8_t* unit = tiles + blockIdx.x * device_tile_bytes<F>(cols) + first_col / U::kCols * U::kBytes;
#pragma unroll
  for (int u = 0; u < kGroupCols / U::kCols; ++u, unit += U::kBytes) {
    if (first_col + u * U::kCols >= cols) return;
    RowScales<F> upper, lower;
    upper.load(unit, g);
    lower.load(unit, g + 8);
#pragma unroll
    for (int pair = 0; pair < U::kPairs; ++pair) {
      PairCodes<F> codes;
      codes.load(unit, lane, pair);
      uint32_t a[2][4];
      codes.template operand<0>(a[0]);
      codes.template operand<1>(a[1]);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t col = first_col + u * U::kCols + pair * 64 + s * 32;
        if (col >= cols) return;
        T* to = out + row * out_stride + col + 4 * t;
        if (row < num_rows) store_step(upper, 2 * pair + s, a[s][0], a[s][2], to);
        if (row + 8 < num_rows) store_step(lower, 2 * pair + s, a[s][1], a[s][3], to + 8 * out_stride);
      }
    }
  }
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const uint8_t* __restrict__ values,  // [num_rows, cols]
                   T* __restrict__ out,                 // [num_rows, cols], rows out_stride apart
                   int64_t cols, int64_t out_stride) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int64_t row = blockIdx.x;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kThreads) * kPlainEach + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPlainEach; ++i) {
    const int64_t col = first + i * kThreads;
    if (col < cols) out[row * out_stride + col] = from_float<T>(plain_value<F>(values, row * cols + col));
  }
}

template <class T>
void dequantize(const WeightView& weight, T* out, int64_t out_stride, void* stream) {
  with_format(static_cast<Format>(weight.format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      constexpr int kEach = kThreads * kPlainEach;
      const dim3 grid(static_cast<unsigned>(weight.rows),
                      static_cast<unsigned>((weight.cols + kEach - 1) / kEach));
      launch_kernel(convert_kernel<F, T>, {grid, dim3(kThreads), stream, 0, true}, weight.packed, out,
                    weight.cols, out_stride);
    } else {
      constexpr int kEach = kWarps * kGroupCols;
      const dim3 grid(static_cast<unsigned>((weight.rows + kDeviceTileRows - 1) / kDeviceTileRows),
                      static_cast<unsigned>((weight.cols + kEach - 1) / kEach));
      launch_kernel(dequantize_kernel<F, T>, {grid, dim3(kThreads), stream, 0, true}, weight.packed, out,
                    weight.rows, weight.cols, out_stride);
    }
  });
}

template <class T>
void dequantize_all(const std::vector<WeightView>& weights, T* out, int64_t out_stride, void* stream) {
  for (const WeightView& weight : weights) {
    if (weight.rows > 0) dequantize(weight, out, out_stride, stream);
    out += weight.rows * out_stride;
  }
}

}  // namespace

void dequantize_cuda(std::vector<WeightView> weights, void* out, int64_t out_stride, int dtype,
                     void* stream) {
  if (static_cast<DType>(dtype) == DType::kBF16) {
    dequantize_all(weights, static_cast<__nv_bfloat16*>(out), out_stride, stream);
  } else {
    dequantize_all(weights, static_cast<float*>(out), out_stride, stream);
  }
}

}  // namespace helexa
