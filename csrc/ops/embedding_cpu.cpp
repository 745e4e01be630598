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
  if constexpr (kBits == 8) return codes[64 * q + byte];
  const int low = (codes[64 * (q % 4) + byte] >> (q / 4 * 4)) & 15;
  if constexpr (kBits == 5) return low | (((codes[256 + byte] >> q) & 1) << 4);
  if constexpr (kBits == 6) return low | (((codes[256 + 64 * (q / 4) + byte] >> (2 * (q % 4))) & 3) << 4);
  return low;
}

template <class F>
void decode_unit(const uint8_t* unit, int row, float* out) {
  if constexpr (F::kScales == Scales::kPlain) {
    out[0] = F::decode(unit + row * F::kBlockBytes);
    return;
  } else {
    const float d = f16_to_float(load_u16(unit + 2 * row));
    for (int col = 0; col < F::kBlockSize; ++col) {
      const int block = col / 32;
      const int code = code_at<F::kBits>(unit + codes_offset<F>(block), row, col % 32);
      if constexpr (F::kScales == Scales::kSymmetric) {
        out[col] = d * static_cast<float>(code - F::kZero);
      } else if constexpr (F::kScales == Scales::kAffine) {
        out[col] = d * static_cast<float>(code) + f16_to_float(load_u16(unit + 32 + 2 * row));
      } else if constexpr (F::kScales == Scales::kSuperMin) {
        const float dmin = f16_to_float(load_u16(unit + 32 + 2 * row));
        const float scale = d * static_cast<float>(unit[64 + 16 * block + row]);
        const float min = dmin * static_cast<float>(unit[192 + 16 * block + row]);
        out[col] = scale * static_cast<float>(code) - min;
      } else {
        const float scale = d * static_cast<float>(static_cast<int8_t>(unit[32 + 16 * (col / 16) + row]));
        out[col] = scale * static_cast<float>(code - F::kZero);
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
