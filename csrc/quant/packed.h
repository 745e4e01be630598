// SPDX-License-Identifier: GPL-3.0-or-later
// The layout that the CPU kernels read.  A weight matrix [N, K] becomes ceil(N / 16) tiles, one after the other; a tile is 16 rows
// (missing rows are zeros) and runs through all of K, so that a kernel streams it once from front to back.
//
// Lane r of a 64-byte vector is row r and holds 4 consecutive columns, one per byte: what one 8-bit dot instruction eats.  The 32
// columns of a block are 8 such column quads:
//   2 bits   2 vectors; pair i of vector h belongs to quad 4 h + i
//   3 bits   the same, then 1 vector of third bits: bit q of a byte belongs to quad q
//   4 bits   4 vectors; vector j holds quad j in its low nibbles and quad j + 4 in its high ones
//   5 bits   the same, then 1 vector of fifth bits: bit q of a byte belongs to quad q
//   6 bits   the same as 4, then 2 vectors of bit pairs as those of 2 bits
//   8 bits   8 vectors
// Scales stand before the codes they belong to, each as 16 values, one per row:
//   kSymmetric     [f16 d] codes                                              per block of 32
//   kAffine        [f16 d] [f16 m] codes                                      per block of 32
//   kSuper32       [f16 d] [8 six-bit scales] 8 x codes                       per 256
//   kSuper16       [f16 d] 16 x [i8 scale] 8 x codes                          per 256
//   kSuper16Bits6  [f16 d] [16 six-bit scales] 8 x codes                      per 256
//   kSuperMin      [f16 d] [f16 dmin] [8 six-bit scales, 8 mins] 8 x codes    per 256
//   kSuperMin16    [f16 d] [f16 dmin] 16 x [scale, min: nibbles] 8 x codes    per 256
//   kPlain         no codes: column by column, 16 values of the file's type
// Of n six-bit numbers, n / 2 vectors of 16 bytes come first: vector i holds the low nibbles of the numbers i and n / 2 + i; then n / 4
// vectors, of which pair k of vector i holds the upper bits of the number k * n / 4 + i.
// Values are those of the file, bit for bit, and take as many bytes as there.
#pragma once

#include "quant/formats.h"

namespace helexa {

constexpr int kTileRows = 16;

constexpr int code_bytes(int bits) { return 16 * 32 * bits / 8; }  // of one block of 32 columns, 16 rows

// Columns of the unit that repeats along a tile, and its bytes.
template <class F>
constexpr int unit_cols() {
  return F::kBlockSize;
}

template <class F>
constexpr int unit_bytes() {
  return kTileRows * F::kBlockBytes;
}

template <class F>
constexpr int64_t tile_bytes(int64_t cols) {
  return cols / unit_cols<F>() * unit_bytes<F>();
}

// Offset in a unit of the codes of its block-th run of 32 columns.
template <class F>
constexpr int codes_offset(int block) {
  return unit_bytes<F>() - (F::kBlockSize / 32 - block) * code_bytes(F::kBits);
}

inline int64_t packed_tile_bytes(Format format, int64_t cols) {
  return with_format(format, [&](auto f) { return tile_bytes<decltype(f)>(cols); });
}

// Whether a format has codes, whose kernels multiply integers.
inline bool is_quantized(int format) {
  return with_format(static_cast<Format>(format),
                     [](auto f) { return decltype(f)::kScales != Scales::kPlain; });
}

}  // namespace helexa
