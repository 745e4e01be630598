// SPDX-License-Identifier: GPL-3.0-or-later
// Blocks of quantized weights as they stand in files, for device code.
#pragma once

#include "core/cuda.cuh"
#include "quant/tiles.cuh"

namespace helexa {

// Where the scales stand in a block of the file: those that come first in a unit, and those behind them.
template <class F>
struct FileScales {
  static constexpr int kFirst = F::kScales == Scales::kSuper16        ? 192
                                : F::kScales == Scales::kSuper16Bits6 ? 96
                                                                      : 0;
  static constexpr int kSecond = F::kScales == Scales::kSuper16        ? 208
                                 : F::kScales == Scales::kSuper16Bits6 ? 108
                                                                       : 80;
  static constexpr int kSecondBytes = F::kScales == Scales::kSuper16 || F::kScales == Scales::kSuper16Bits6
                                          ? 2
                                      : F::kScales == Scales::kSuperMin16 ? 4
                                                                          : 0;
};

// The code of one column of a block of the file, bits as they stand there.
template <class F>
__device__ inline int file_code(const uint8_t* block, int col) {
  if constexpr (F::kBits == 8) {
    return block[2 + col];
  } else if constexpr (F::kBlockSize == 32) {
    constexpr int kNibbles = F::kBlockBytes - 16;
    const int low = block[kNibbles + col % 16] >> (4 * (col / 16)) & 15;
    if constexpr (F::kBits == 4) return low;
    return low | (block[kNibbles - 4 + col / 8] >> (col % 8) & 1) << 4;
  } else if constexpr (has_levels<F>) {
    return block[8 + col / 32 * 16 + col % 16] >> (col % 32 / 16 * 4) & 15;
  } else if constexpr (F::kScales == Scales::kSuperMin) {
    constexpr int kNibbles = F::kBits == 5 ? 48 : 16;
    const int low = block[kNibbles + col / 64 * 32 + col % 32] >> (col % 64 / 32 * 4) & 15;
    if constexpr (F::kBits == 4) return low;
    return low | (block[16 + col % 32] >> (col / 32) & 1) << 4;
  } else if constexpr (F::kBits == 6) {
    const int half = col / 128, run = col % 128 / 32, l = col % 32;
    const int low = block[64 * half + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
    return low | (block[128 + 32 * half + l] >> (2 * run) & 3) << 4;
  } else {
    constexpr int kPairs = F::kBits == 3 ? 32 : 16;
    const int low = block[kPairs + col / 128 * 32 + col % 32] >> (col % 128 / 32 * 2) & 3;
    if constexpr (F::kBits == 2) return low;
    return low | (block[col % 32] >> (col / 32) & 1) << 2;
  }
}

// The same as a unit of a tile has it: the top bit of codes with a zero point flipped.
template <class F>
__device__ inline int unit_code(const uint8_t* block, int col) {
  return file_code<F>(block, col) ^ (Unit<F>::kSigned && F::kBits < 8 ? 1 << (F::kBits - 1) : 0);
}

// Copies the scales of a block of the file to where they stand in the unit of a tile; `block`: which of its row's in the unit.
template <class F>
__device__ inline void place_scales(const uint8_t* source, int row, int block, uint8_t* unit) {
  using U = Unit<F>;
  constexpr int kEach = U::kScaleRowBytes / U::kBlocks;
  uint8_t* first = unit + U::kScaleOffset + row * U::kScaleRowBytes + block * kEach;
  for (int k = 0; k < kEach; ++k) first[k] = source[FileScales<F>::kFirst + k];
  uint8_t* second = unit + U::kSecondScaleOffset + row * FileScales<F>::kSecondBytes;
  for (int k = 0; k < FileScales<F>::kSecondBytes; ++k) second[k] = source[FileScales<F>::kSecond + k];
}

}  // namespace helexa
