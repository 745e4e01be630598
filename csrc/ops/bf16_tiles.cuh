// SPDX-License-Identifier: GPL-3.0-or-later
// Tiles of weights as bfloat16 operands of matrix instructions, for products with many rows: each warp streams its own tiles of 16 rows
// in runs of 256 columns and unpacks them in registers, once for all rows of the block.  A run's scales are first written out as
// floats, by the warp, to a table in shared memory.
#pragma once

#include <type_traits>

#include "core/cuda.cuh"
#include "quant/tiles.cuh"

namespace helexa::bf16_tiles {

constexpr int kRunCols = 256;

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class F>
constexpr int kUnitsPerRun = kRunCols / Unit<F>::kCols;

// Scales of a row of a run: one for each 32 columns, or 16.
template <class F>
constexpr int kRowEntries = kRunCols / 32 * Unit<F>::kHalves;

// A code becomes a float by standing in the fraction of a power of two, which the offset takes away again.  Formats with offsets have
// codes below 128, which stand right behind 2^7; the others' are signed bytes, which stand behind 2^15 with 128 added.
template <class F>
struct CodeFloat {
  static_assert(Unit<F>::kHasOffset == !(Unit<F>::kSigned || has_levels<F> || F::kBits == 8));
  static constexpr float kBias = Unit<F>::kHasOffset ? 128.0f : 32768.0f + 128.0f;

  // Byte i of a word of codes plus kBias; exact.
  static __device__ __forceinline__ float get(uint32_t codes, int i) {
    if constexpr (Unit<F>::kHasOffset) {
      return __uint_as_float(__byte_perm(codes, 0x43000000u, 0x7044 + (i << 8)));
    } else {
      return __uint_as_float(__byte_perm(codes ^ 0x80808080u, 0x47000000u, 0x7404 + (i << 4)));
    }
  }
};

// Scale and offset of a row's step or half of a step: value = scale * CodeFloat + offset.
struct Scaling {
  float scale, offset;
};

// The scales of a run: {scale, offset} of each row's entries, or only scales where offsets follow from these.
template <class F>
struct ScaleTable {
  static constexpr bool kHasOffset = Unit<F>::kHasOffset;
  using Entry = std::conditional_t<kHasOffset, float2, float>;
  static constexpr int kBytes = kDeviceTileRows * kRowEntries<F> * static_cast<int>(sizeof(Entry));
  Entry* entries;

  __device__ __forceinline__ explicit ScaleTable(void* memory) : entries(static_cast<Entry*>(memory)) {}

  __device__ __forceinline__ Scaling at(int row, int index) const {
    const Entry entry = entries[place(row, index)];
    if constexpr (kHasOffset) {
      return {entry.x, entry.y};
    } else {
      return {entry, -CodeFloat<F>::kBias * entry};
    }
  }

  // From a run in shared memory, by one warp.
  __device__ __forceinline__ void fill(const uint8_t* run, int num_units) const {
    using U = Unit<F>;
    constexpr int kPerUnit = U::kSteps * U::kHalves;
    const int row = threadIdx.x % 32 / 2, part = threadIdx.x % 2;
    RowScales<F> scales;
    if constexpr (kUnitsPerRun<F> == 1) {
      scales.load(run, row);
#pragma unroll
      for (int i = 0; i < kPerUnit / 2; ++i) {  // the first half of the entries by even lanes
        const int index = i + kPerUnit / 2 * part;
        put(row, index, scales, index / U::kHalves, i % U::kHalves);
      }
    } else {
      for (int unit = part; unit < num_units; unit += 2) {
        scales.load(run + unit * U::kBytes, row);
#pragma unroll
        for (int i = 0; i < kPerUnit; ++i) {
          put(row, unit * kPerUnit + i, scales, i / U::kHalves, i % U::kHalves);
        }
      }
    }
  }

 private:
  // In different banks for different rows.
  static __device__ __forceinline__ int place(int row, int index) {
    return row * kRowEntries<F> + (index ^ (row & 7));
  }
  __device__ __forceinline__ void put(int row, int index, const RowScales<F>& scales, int step,
                                      int half) const {
    const float scale = scales.scale(step, half);
    if constexpr (kHasOffset) {
      entries[place(row, index)] =
          make_float2(scale, fmaf(-CodeFloat<F>::kBias, scale, scales.offset(step, half)));
    } else {
      entries[place(row, index)] = scale;
    }
  }
};

// Four codes as two registers of the A operand: the columns 4t, 4t + 1 and 4t + 2, 4t + 3, which take the places 2t, 2t + 1 and
// 8 + 2t, 8 + 2t + 1 of the instruction; the other operand's columns do the same.
template <class F>
__device__ __forceinline__ void unpack_codes(uint32_t codes, Scaling s, uint32_t& first, uint32_t& second) {
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = fmaf(CodeFloat<F>::get(codes, j), s.scale, s.offset);
  first = pack_bf16(v[0], v[1]);
  second = pack_bf16(v[2], v[3]);
}

// The A operands of the pair-th 64 columns of a run: a[2 * step + half].
template <class F>
__device__ __forceinline__ void load_operands(const uint8_t* run, int pair, ScaleTable<F> table,
                                              uint32_t (&a)[4][4]) {
  using U = Unit<F>;
  const int lane = threadIdx.x % 32, row = lane / 4;
  PairCodes<F> codes;
  codes.load(run + pair / U::kPairs * U::kBytes, lane, pair % U::kPairs);
  auto unpack_step = [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    uint32_t operand[4];
    codes.template operand<kStep>(operand);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (2 * pair + kStep) * U::kHalves + (U::kHalves == 2 ? half : 0);
      uint32_t (&to)[4] = a[2 * kStep + half];
      unpack_codes<F>(operand[2 * half], table.at(row, index), to[0], to[2]);
      unpack_codes<F>(operand[2 * half + 1], table.at(row + 8, index), to[1], to[3]);
    }
  };
  unpack_step(std::integral_constant<int, 0>());
  unpack_step(std::integral_constant<int, 1>());
}

template <class F>
using Float = std::conditional_t<std::is_same_v<F, F32>, float,
                                 std::conditional_t<std::is_same_v<F, F16>, __half, __nv_bfloat16>>;

// The same of a tile of floats with `rows` rows, row by row; zeros beyond the last row and column.  `cols` is a multiple of 4.
template <class T>
__device__ void load_float_operands(const uint8_t* data, int rows, int first_col, int cols,
                                    uint32_t (&a)[4][4]) {
  const T* tile = reinterpret_cast<const T*>(data);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int col = first_col + 16 * k + lane % 4 * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + 8 * r;
      float v[4] = {};
      if (col < cols && row < rows) {
        const T* from = tile + static_cast<int64_t>(row) * cols + col;
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = to_float(from[j]);
      }
      a[k][r] = pack_bf16(v[0], v[1]);
      a[k][2 + r] = pack_bf16(v[2], v[3]);
    }
  }
}

// A warp's tile of weights with its ring of kSlots runs.
template <int kSlots>
struct Tile {
  const uint8_t* data;  // null where the matrix has no such tile
  uint8_t* ring;        // [kSlots, slot_bytes]
  uint8_t* table;
  int format, rows;
  int run_bytes;  // 0 for float formats, which are read where they are
  int bytes, slot_bytes;

  __device__ uint8_t* slot(int run) const { return ring + run % kSlots * slot_bytes; }

  __device__ void issue(int run) const {
    const int begin = run * run_bytes, count = min(run_bytes, bytes - begin);
    for (int at = 16 * static_cast<int>(threadIdx.x % 32); at < count; at += 512) {
      ptx::copy_async(slot(run) + at, data + begin + at);
    }
  }

  // Once a run has come, before its operands are taken; the warp has to meet in between.
  __device__ void begin_run(int run) const {
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: return begin_run_of<type>(run);
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  }

  // The A operands of the pair-th 64 columns of `cols`.
  __device__ void operands(int pair, int cols, uint32_t (&a)[4][4]) const {
    switch (static_cast<Format>(format)) {
#define HELEXA_FORMAT(type, name) \
  case Format::k##type: return operands_of<type>(pair, cols, a);
#include "quant/formats.def"
#undef HELEXA_FORMAT
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void begin_run_of(int run) const {
    if constexpr (F::kScales != Scales::kPlain) {
      const int num_units = min(run_bytes, bytes - run * run_bytes) / Unit<F>::kBytes;
      ScaleTable<F>(table).fill(slot(run), num_units);
    }
  }
  template <class F>
  __device__ __forceinline__ void operands_of(int pair, int cols, uint32_t (&a)[4][4]) const {
    if constexpr (F::kScales != Scales::kPlain) {
      load_operands<F>(slot(pair / 4), pair % 4, ScaleTable<F>(table), a);
    } else {
      load_float_operands<Float<F>>(data, rows, 64 * pair, cols, a);
    }
  }
};

// Bytes of a tile, of a run and of its table; the last two are 0 for float formats.
struct TileSizes {
  int64_t tile;
  int run, table;
};

inline TileSizes tile_sizes(int format, int64_t cols) {
  return with_format(static_cast<Format>(format), [&](auto f) -> TileSizes {
    using F = decltype(f);
    if constexpr (F::kScales == Scales::kPlain) {
      return {device_tile_bytes<F>(cols), 0, 0};
    } else {
      return {device_tile_bytes<F>(cols), kUnitsPerRun<F> * Unit<F>::kBytes, ScaleTable<F>::kBytes};
    }
  });
}

// Where 16 bytes (chunk 0 … 7) of the 64 columns of a row of the input lie in shared memory: rows that are read together differ in their
// place.
__device__ __forceinline__ int stage_offset(int row, int chunk) {
  return row * 128 + (chunk ^ (row % 4 * 2)) * 16;
}

// The B operand of row 8n + g's columns 16 k … of the 64 that are at `stage`.
__device__ __forceinline__ void load_input(const uint8_t* stage, int n, int k, uint32_t (&b)[2]) {
  const int lane = threadIdx.x % 32;
  const uint2 v = *reinterpret_cast<const uint2*>(
      stage + stage_offset(8 * n + lane / 4, 2 * k + lane % 4 / 2) + lane % 2 * 8);
  b[0] = v.x, b[1] = v.y;
}

}  // namespace helexa::bf16_tiles
