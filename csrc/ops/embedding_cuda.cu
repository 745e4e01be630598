// SPDX-License-Identifier: GPL-3.0-or-later
// A block takes 256 columns of one token, four to a thread: the one row of a decode step is spread over many multiprocessors.
#include "core/cuda.cuh"
#include "ops/embedding.h"
#include "quant/file_blocks.cuh"
#include "quant/plain.cuh"
#include "quant/tiles.cuh"

namespace helexa {
namespace {

constexpr int kEach = 4;
constexpr int kThreads = 64;
constexpr int kGroupCols = kThreads * kEach;

// Four neighbouring columns of a row of a unit, of which `operand` gives the operands; `col` is a multiple of 4, so they have one scale.
template <class F, class Operand>
__device__ void four_values(const uint8_t* unit, int row, int col, Operand operand, float (&values)[kEach]) {
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
    values[i] = __fmul_rn(scale, static_cast<float>(operand(i)));
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
    if (known) {
      four_values<F>(unit, row, col, [&](int i) { return unit_operand<F>(unit, row, col + i); }, values);
    }
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  }
}

// The same by rows as they stand in a file, in memory that is far away: their bytes are fetched in one go, in whole words.
template <class F>
__global__ void __launch_bounds__(kThreads) table_kernel(
    const int32_t* token_ids,           // [num_tokens]; written by others while this runs
    const uint8_t* __restrict__ table,  // [rows], a multiple of 4; up to 3 bytes behind it are read
    float* __restrict__ out,            // [num_tokens, cols]
    int64_t rows, int64_t cols) {
  constexpr int kRawBytes = kGroupCols / F::kBlockSize * F::kBlockBytes;
  __shared__ uint32_t shared_words[kRawBytes / 4 + 2];
  ptx::wait_for_producers();
  ptx::allow_consumers();
  const int64_t id = token_ids[blockIdx.x];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kGroupCols;
  const int num_cols = static_cast<int>(min(cols - first, static_cast<int64_t>(kGroupCols)));
  const int col = static_cast<int>(threadIdx.x) * kEach;
  float* to = out + static_cast<int64_t>(blockIdx.x) * cols + first + col;
  if (id < 0 || id >= rows) {
    for (int i = 0; i < min(kEach, num_cols - col); ++i) to[i] = 0.0f;
    return;
  }

  const int64_t offset = (id * cols + first) / F::kBlockSize * F::kBlockBytes;
  const int skipped = static_cast<int>(offset % 4);
  const int num_words = (skipped + num_cols / F::kBlockSize * F::kBlockBytes + 3) / 4;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(table + (offset - skipped));
  for (int i = threadIdx.x; i < num_words; i += kThreads) shared_words[i] = source[i];
  __syncthreads();
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(shared_words) + skipped;

  if constexpr (F::kScales == Scales::kPlain) {
    for (int i = 0; i < min(kEach, num_cols - col); ++i) to[i] = plain_value<F>(bytes, col + i);
  } else {
    using U = Unit<F>;
    __shared__ uint4
        shared_units[kGroupCols / U::kCols * U::kBytes / 16];  // of which the first row's scales are used
    uint8_t* units = reinterpret_cast<uint8_t*>(shared_units);
    for (int i = threadIdx.x; i < num_cols / F::kBlockSize; i += kThreads) {
      place_scales<F>(bytes + i * F::kBlockBytes, 0, i % U::kBlocks, units + i / U::kBlocks * U::kBytes);
    }
    __syncthreads();
    if (col >= num_cols) return;
    const uint8_t* block = bytes + col / F::kBlockSize * F::kBlockBytes;
    const auto operand = [&](int i) { return code_operand<F>(unit_code<F>(block, col % F::kBlockSize + i)); };
    float values[kEach];
    four_values<F>(units + col / U::kCols * U::kBytes, 0, col % U::kCols, operand, values);
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  }
}

dim3 grid_of(int64_t num_tokens, int64_t cols) {
  return {static_cast<unsigned>(num_tokens), static_cast<unsigned>((cols + kGroupCols - 1) / kGroupCols)};
}

}  // namespace

void embedding_cuda(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* packed,
                    int64_t rows, int64_t cols, float* out, void* stream) {
  if (num_tokens == 0) return;
  with_format(static_cast<Format>(format), [&](auto f) {
    launch_kernel(embedding_kernel<decltype(f)>, {grid_of(num_tokens, cols), dim3(kThreads), stream, 0, true},
                  token_ids, packed, out, rows, cols);
  });
}

void embedding_table_cuda(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* table,
                          int64_t rows, int64_t cols, float* out, void* stream) {
  if (num_tokens == 0) return;
  with_format(static_cast<Format>(format), [&](auto f) {
    launch_kernel(table_kernel<decltype(f)>, {grid_of(num_tokens, cols), dim3(kThreads), stream, 0, true},
                  token_ids, table, out, rows, cols);
  });
}

}  // namespace helexa
