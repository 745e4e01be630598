// SPDX-License-Identifier: GPL-3.0-or-later
// A block takes 256 columns of one token, four to a thread: the one row of a decode step is spread over many multiprocessors.
#include "core/cuda.cuh"
#include "ops/embedding.h"
#include "quant/plain.cuh"
#include "quant/tiles.cuh"

namespace helexa {
namespace {

constexpr int kEach = 4;
constexpr int kThreads = 64;

// Four neighbouring columns of a row of a unit; `col` is a multiple of 4, so they have one scale.
template <class F>
__device__ void unit_values(const uint8_t* unit, int row, int col, float (&values)[kEach]) {
  using U = Unit<F>;
  RowScales<F> scales;
  scales.load(unit, row);
  float scale = 0.0f, offset = 0.0f;
  // Chosen among constants, so that the scales stay in registers.
#pragma unroll
  for (int i = 0; i < U::kSteps * U::kHalves; ++i) {
    if (i == col * U::kHalves / 32) {
      scale = scales.scale(i / U::kHalves, i % U::kHalves);
      offset = scales.offset(i / U::kHalves, i % U::kHalves);
    }
  }
  for (int i = 0; i < kEach; ++i) {
    // Rounded like the CPU's product and sum, not fused.
    values[i] = __fmul_rn(scale, static_cast<float>(unit_operand<F>(unit, row, col + i)));
    if constexpr (U::kHasOffset) values[i] = __fadd_rn(values[i], offset);
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const int32_t* token_ids,            // [num_tokens]; written by others while this runs
                     const uint8_t* __restrict__ packed,  // the weight
                     float* __restrict__ out,             // [num_tokens, cols]
                     int64_t rows, int64_t cols) {
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int64_t id = token_ids[blockIdx.x];
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kEach;
  if (first >= cols) return;
  float* to = out + static_cast<int64_t>(blockIdx.x) * cols + first;
  const bool known = id >= 0 && id < rows;
  if constexpr (F::kScales == Scales::kPlain) {
    for (int i = 0; i < min(static_cast<int64_t>(kEach), cols - first); ++i) {
      to[i] = known ? plain_value<F>(packed, id * cols + first + i) : 0.0f;
    }
  } else {
    const uint8_t* unit =
        packed + id / kDeviceTileRows * device_tile_bytes<F>(cols) + first / Unit<F>::kCols * Unit<F>::kBytes;
    const int row = static_cast<int>(id % kDeviceTileRows), col = static_cast<int>(first % Unit<F>::kCols);
    float values[kEach] = {};
    if (known) unit_values<F>(unit, row, col, values);
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  }
}

}  // namespace

void embedding_cuda(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* packed,
                    int64_t rows, int64_t cols, float* out, void* stream) {
  if (num_tokens == 0) return;
  with_format(static_cast<Format>(format), [&](auto f) {
    constexpr int kCols = kThreads * kEach;
    const dim3 grid(static_cast<unsigned>(num_tokens), static_cast<unsigned>((cols + kCols - 1) / kCols));
    launch_kernel(embedding_kernel<decltype(f)>, {grid, dim3(kThreads), stream, 0, true}, token_ids, packed,
                  out, rows, cols);
  });
}

}  // namespace helexa
