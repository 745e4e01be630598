// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/pack.h"

#include <algorithm>

#include "core/parallel.h"
#include "quant/packed.h"

namespace helexa {
namespace {

uint32_t quad(const uint8_t* codes, int index) { return load_u32(codes + 4 * index); }

void store_quad(uint8_t* vector, int row, uint32_t value) { std::memcpy(vector + 4 * row, &value, 4); }

void or_quad(uint8_t* vector, int row, uint32_t value) {
  store_quad(vector, row, load_u32(vector + 4 * row) | value);
}

// Bits [shift, shift + 2) of each code, into two zeroed vectors of bit pairs.
void place_pairs(const uint8_t* codes, int shift, int row, uint8_t* out) {
  for (int q = 0; q < 8; ++q)
    or_quad(out + 64 * (q / 4), row, ((quad(codes, q) >> shift) & 0x03030303u) << (2 * (q % 4)));
}

// Bit `shift` of each code, into a zeroed vector.
void place_bits(const uint8_t* codes, int shift, int row, uint8_t* out) {
  for (int q = 0; q < 8; ++q) or_quad(out, row, ((quad(codes, q) >> shift) & 0x01010101u) << q);
}

// Places the 32 codes of one row into the zeroed code vectors of its block.
template <int kBits>
void place_codes(const uint8_t* codes, int row, uint8_t* out) {
  if constexpr (kBits == 8) {
    for (int q = 0; q < 8; ++q) store_quad(out + 64 * q, row, quad(codes, q));
    return;
  }
  if constexpr (kBits < 4) {
    place_pairs(codes, 0, row, out);
    if constexpr (kBits == 3) place_bits(codes, 2, row, out + 128);
    return;
  }
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = quad(codes, j) & 0x0f0f0f0fu;
    const uint32_t high = quad(codes, j + 4) & 0x0f0f0f0fu;
    store_quad(out + 64 * j, row, low | (high << 4));
  }
  if constexpr (kBits == 5) place_bits(codes, 4, row, out + 256);
  if constexpr (kBits == 6) place_pairs(codes, 4, row, out + 256);
}

// Places one row's n numbers of six bits into zeroed vectors.
void place_six_bits(const uint8_t* numbers, int n, int row, uint8_t* out) {
  for (int i = 0; i < n; ++i) {
    out[16 * (i % (n / 2)) + row] |= (numbers[i] & 15) << (4 * (i / (n / 2)));
    out[8 * n + 16 * (i % (n / 4)) + row] |= (numbers[i] >> 4) << (2 * (i / (n / 4)));
  }
}

void store_f16(uint8_t* values, int row, uint16_t bits) { std::memcpy(values + 2 * row, &bits, 2); }

template <class F>
void place_scales(const BlockScales& s, int row, uint8_t* unit) {
  store_f16(unit, row, s.d);
  if constexpr (F::kScales == Scales::kAffine) store_f16(unit + 32, row, s.m);
  if constexpr (F::kScales == Scales::kSuper32) place_six_bits(s.scale, 8, row, unit + 32);
  if constexpr (F::kScales == Scales::kSuper16Bits6) place_six_bits(s.scale, 16, row, unit + 32);
  if constexpr (F::kScales == Scales::kSuper16) {
    for (int b = 0; b < 16; ++b) unit[32 + 16 * b + row] = s.scale[b];
  }
  if constexpr (F::kScales == Scales::kSuperMin) {
    store_f16(unit + 32, row, s.m);
    uint8_t numbers[16];
    std::memcpy(numbers, s.scale, 8);
    std::memcpy(numbers + 8, s.min, 8);
    place_six_bits(numbers, 16, row, unit + 64);
  }
  if constexpr (F::kScales == Scales::kSuperMin16) {
    store_f16(unit + 32, row, s.m);
    for (int b = 0; b < 16; ++b) unit[64 + 16 * b + row] = s.scale[b] | (s.min[b] << 4);
  }
}

template <class F>
void pack_tile(const uint8_t* raw, int num_rows, int64_t cols, uint8_t* tile) {
  const int64_t units = cols / unit_cols<F>();
  const int64_t row_bytes = units * F::kBlockBytes;
  for (int64_t u = 0; u < units; ++u) {
    uint8_t* unit = tile + u * unit_bytes<F>();
    std::memset(unit, 0, unit_bytes<F>());
    for (int row = 0; row < num_rows; ++row) {
      const uint8_t* block = raw + row * row_bytes + u * F::kBlockBytes;
      if constexpr (F::kScales == Scales::kPlain) {
        std::memcpy(unit + row * F::kBlockBytes, block, F::kBlockBytes);
      } else {
        uint8_t codes[F::kBlockSize];
        BlockScales scales;
        F::codes(block, codes);
        F::scales(block, scales);
        place_scales<F>(scales, row, unit);
        for (int b = 0; b < F::kBlockSize / 32; ++b) {
          place_codes<F::kBits>(codes + 32 * b, row, unit + codes_offset<F>(b));
        }
      }
    }
  }
}

}  // namespace

int64_t packed_bytes(int format, int64_t rows, int64_t cols) {
  return (rows + kTileRows - 1) / kTileRows * packed_tile_bytes(static_cast<Format>(format), cols);
}

void pack_cpu(int format, const uint8_t* raw, int64_t first_row, int64_t num_rows, int64_t cols,
              uint8_t* packed) {
  with_format(static_cast<Format>(format), [&](auto f) {
    using F = decltype(f);
    const int64_t row_bytes = cols / unit_cols<F>() * F::kBlockBytes;
    const int64_t tiles = (num_rows + kTileRows - 1) / kTileRows;
    uint8_t* out = packed + first_row / kTileRows * tile_bytes<F>(cols);
    parallel_for(tiles, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * kTileRows;
        const int rows_here = static_cast<int>(std::min<int64_t>(kTileRows, num_rows - row));
        pack_tile<F>(raw + row * row_bytes, rows_here, cols, out + t * tile_bytes<F>(cols));
      }
    });
  });
}

}  // namespace helexa
