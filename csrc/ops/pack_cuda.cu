// SPDX-License-Identifier: GPL-3.0-or-later
// From the file's layout to that of quant/tiles.cuh.  A block takes 16 rows times 256 columns: it brings their bytes to shared memory,
// puts the bits of every code where they belong, four codes of neighbouring columns at a time, since these share a word in every plane,
// and writes whole units.  The copy to the device before it takes ten times as long, so nothing here is worth more code.
#include "core/cuda.cuh"
#include "ops/pack.h"
#include "quant/file_blocks.cuh"
#include "quant/tiles.cuh"

namespace helexa {
namespace {

constexpr int kThreads = 128;
constexpr int kGroupCols = 256;

template <class F>
__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* __restrict__ raw,  // [num_rows] rows
                                                        uint8_t* __restrict__ tiles,      // of the first row
                                                        int64_t num_rows, int64_t cols) {
  using U = Unit<F>;
  constexpr int kUnits = kGroupCols / U::kCols;
  constexpr int kRawBytes = kGroupCols / F::kBlockSize * F::kBlockBytes;  // of one row
  __shared__ uint16_t shared_raw[kDeviceTileRows * kRawBytes / 2];
  __shared__ uint4 shared_units[kUnits * U::kBytes / 16];
  const int64_t tile = blockIdx.x;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * kGroupCols;
  const int num_cols = static_cast<int>(min(cols - first_col, static_cast<int64_t>(kGroupCols)));
  const int num_units = (num_cols + U::kCols - 1) / U::kCols;
  const int rows =
      static_cast<int>(min(num_rows - tile * kDeviceTileRows, static_cast<int64_t>(kDeviceTileRows)));

  const int64_t row_bytes = cols / F::kBlockSize * F::kBlockBytes;
  const int half_words = num_cols / F::kBlockSize * F::kBlockBytes / 2;  // of one row
  const uint8_t* from = raw + tile * kDeviceTileRows * row_bytes + first_col / F::kBlockSize * F::kBlockBytes;
  for (int row = 0; row < rows; ++row) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(from + row * row_bytes);
    for (int i = threadIdx.x; i < half_words; i += kThreads)
      shared_raw[row * (kRawBytes / 2) + i] = source[i];
  }
  for (int i = threadIdx.x; i < num_units * U::kBytes / 16; i += kThreads) {
    shared_units[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(shared_raw);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared_units);
  for (int i = threadIdx.x; i < rows * num_cols / 4; i += kThreads) {
    const int row = i % rows, col = i / rows * 4, in_unit = col % U::kCols;
    const uint8_t* block = bytes + row * kRawBytes + col / F::kBlockSize * F::kBlockBytes;
    uint32_t low = 0, high = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int code = unit_code<F>(block, col % F::kBlockSize + j);
      low |= (code & ((1u << U::kLowBits) - 1)) << (code_bit_position<F>(row, in_unit + j, 0) % 32);
      if constexpr (U::kHighBits > 0) {
        high |= static_cast<uint32_t>(code >> U::kLowBits)
                << (code_bit_position<F>(row, in_unit + j, U::kLowBits) % 32);
      }
    }
    uint32_t* unit = words + col / U::kCols * (U::kBytes / 4);
    atomicOr(unit + code_bit_position<F>(row, in_unit, 0) / 32, low);
    if constexpr (U::kHighBits > 0)
      atomicOr(unit + code_bit_position<F>(row, in_unit, U::kLowBits) / 32, high);
  }
  // Scales do not share words with codes.
  uint8_t* packed = reinterpret_cast<uint8_t*>(shared_units);
  for (int i = threadIdx.x; i < rows * num_cols / F::kBlockSize; i += kThreads) {
    const int row = i % rows, block = i / rows;
    place_scales<F>(bytes + row * kRawBytes + block * F::kBlockBytes, row, block % U::kBlocks,
                    packed + block / U::kBlocks * U::kBytes);
  }
  __syncthreads();

  uint4* to = reinterpret_cast<uint4*>(tiles + tile * device_tile_bytes<F>(cols) +
                                       static_cast<int64_t>(blockIdx.y) * kUnits * U::kBytes);
  for (int i = threadIdx.x; i < num_units * U::kBytes / 16; i += kThreads) to[i] = shared_units[i];
}

void copy_on_device(uint8_t* to, const uint8_t* from, int64_t nbytes, void* stream) {
#ifdef HELEXA_EMULATED_CUDA
  std::memcpy(to, from, static_cast<size_t>(nbytes));
#else
  CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(nbytes), cudaMemcpyDeviceToDevice,
                             static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace

int64_t tiled_bytes(int format, int64_t rows, int64_t cols) {
  return device_bytes(static_cast<Format>(format), rows, cols);
}

void pack_cuda(int format, const uint8_t* raw, int64_t first_row, int64_t num_rows, int64_t cols,
               uint8_t* tiles, void* stream) {
  if (num_rows == 0) return;
  with_format(static_cast<Format>(format), [&](auto f) {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      const int64_t row_bytes = cols * F::kBlockBytes;
      copy_on_device(tiles + first_row * row_bytes, raw, num_rows * row_bytes, stream);
    } else {
      const dim3 grid(static_cast<unsigned>((num_rows + kDeviceTileRows - 1) / kDeviceTileRows),
                      static_cast<unsigned>((cols + kGroupCols - 1) / kGroupCols));
      launch_kernel(pack_kernel<F>, {grid, dim3(kThreads), stream}, raw,
                    tiles + first_row / kDeviceTileRows * device_tile_bytes<F>(cols), num_rows, cols);
    }
  });
}

}  // namespace helexa
