// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/embedding.h"

#include <algorithm>

#include "core/parallel.h"
#include "quant/packed.h"

namespace helexa {
namespace {

// The code of one row at a column of a block of 32.
template <int kBits>
int code_at(const uint8_t* codes, int row, int col) {
  const int q = col / 4, byte = 4 * row + col % 4;
  const auto bit = [&](int offset) { return (codes[offset + byte] >> q) & 1; };
  const auto pair = [&](int offset) { return (codes[offset + 64 * (q / 4) + byte] >> (2 * (q % 4))) & 3; };
  if constexpr (kBits == 8) return codes[64 * q + byte];
  if constexpr (kBits == 2) return pair(0);
  if constexpr (kBits == 3) return pair(0) | (bit(128) << 2);
  const int low = (codes[64 * (q % 4) + byte] >> (q / 4 * 4)) & 15;
  if constexpr (kBits == 5) return low | (bit(256) << 4);
  if constexpr (kBits == 6) return low | (pair(256) << 4);
  return low;
}

// Number i of one row's n numbers of six bits.
int six_bits_at(const uint8_t* packed, int n, int row, int i) {
  const int low = (packed[16 * (i % (n / 2)) + row] >> (4 * (i / (n / 2)))) & 15;
  return low | (((packed[8 * n + 16 * (i % (n / 4)) + row] >> (2 * (i / (n / 4)))) & 3) << 4);
}

// Of 16 columns: value = scale * (code - zero) - min.
struct Step {
  float scale, min;
};

template <class F>
Step step_at(const uint8_t* unit, int row, int col) {
  const float d = f16_to_float(load_u16(unit + 2 * row));
  const auto times = [&](int factor) { return d * static_cast<float>(factor); };
  if constexpr (F::kScales == Scales::kSymmetric) return {d, 0.0f};
  if constexpr (F::kScales == Scales::kSuper32)
    return {times(six_bits_at(unit + 32, 8, row, col / 32) - 32), 0.0f};
  if constexpr (F::kScales == Scales::kSuper16)
    return {times(static_cast<int8_t>(unit[32 + 16 * (col / 16) + row])), 0.0f};
  if constexpr (F::kScales == Scales::kSuper16Bits6)
    return {times(six_bits_at(unit + 32, 16, row, col / 16) - 32), 0.0f};
  const float m = f16_to_float(load_u16(unit + 32 + 2 * row));
  if constexpr (F::kScales == Scales::kAffine) return {d, -m};
  if constexpr (F::kScales == Scales::kSuperMin)
    return {times(six_bits_at(unit + 64, 16, row, col / 32)),
            m * static_cast<float>(six_bits_at(unit + 64, 16, row, 8 + col / 32))};
  const int both = unit[64 + 16 * (col / 16) + row];
  return {times(both & 15), m * static_cast<float>(both >> 4)};
}

template <class F>
void decode_unit(const uint8_t* unit, int row, float* out) {
  if constexpr (F::kScales == Scales::kPlain) {
    out[0] = F::decode(unit + row * F::kBlockBytes);
  } else {
    for (int run = 0; run < F::kBlockSize; run += 16) {
      const Step step = step_at<F>(unit, row, run);
      for (int col = run; col < run + 16; ++col) {
        int code = code_at<F::kBits>(unit + codes_offset<F>(col / 32), row, col % 32);
        if constexpr (has_levels<F>) code = F::kLevels[code];
        out[col] = step.scale * static_cast<float>(code - F::kZero) - step.min;
      }
    }
  }
}

}  // namespace

void embedding_cpu(const int32_t* token_ids, int64_t num_tokens, int format, const uint8_t* packed,
                   int64_t rows, int64_t cols, float* out) {
  with_format(static_cast<Format>(format), [&](auto f) {
    using F = decltype(f);
    parallel_for(num_tokens, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* y = out + t * cols;
        const int64_t id = token_ids[t];
        if (id < 0 || id >= rows) {
          std::fill_n(y, cols, 0.0f);
          continue;
        }
        const uint8_t* tile = packed + id / kTileRows * tile_bytes<F>(cols);
        for (int64_t u = 0; u < cols / unit_cols<F>(); ++u) {
          decode_unit<F>(tile + u * unit_bytes<F>(), static_cast<int>(id % kTileRows),
                         y + u * unit_cols<F>());
        }
      }
    });
  });
}

}  // namespace helexa
