// SPDX-License-Identifier: GPL-3.0-or-later
// Products of quantized weights with 1 to 16 rows, which memory's bandwidth bounds.
//
// A block (matvec_block.cuh) has a unit at a time, one or a few tiles of 16 weight rows of one weight (gated: 32 rows of both), so that even
// a small matrix keeps many warps busy.
//
// matvec.cuh has the products.  1 row takes kSplit 8, 2 to 4 rows kSplit 2, 5 to 8 rows kSplit 1; beyond, there are 2 tiles of 8 rows,
// and more than 16 rows are launched 16 at a time.  Weights of float formats, which are small or rare, are multiplied by a plain
// loop of each warp over whole rows.
#include <algorithm>
#include <stdexcept>

#include "ops/matvec_block.cuh"

namespace helexa {
namespace {

using namespace matvec;

constexpr int kMaxWarps = 16;
// One row takes few registers: three blocks of 8 warps share a multiprocessor.  Of more rows the values of a warp would not fit into as
// many registers, and what goes through the caches instead costs more.  A single block that stays for several units keeps all
// multiprocessors busy alike.
__host__ __device__ constexpr int block_warps(int num_tokens) {
  return num_tokens == 1 || num_tokens > 8 ? 8 : 16;
}
__host__ __device__ constexpr int blocks_per_multiprocessor(int num_tokens) {
  return num_tokens == 1 ? 3 : 1;
}
constexpr int kMaxTokens = 16;  // of a launch; of more the sums of a warp do not fit into its registers
constexpr int kMaxUnitTiles = 4;
constexpr int kGatedRows = 32;  // outputs of a gated unit: one block of columns of the next matmul
constexpr int kGatedTiles = 4;

// Copies the sums of squares of the rows to shared memory, each warp those of its own rows: warp, warp + num_warps, ….
__device__ __forceinline__ void fetch_squares(const Arguments& a, float* squares, int warp, int num_warps,
                                              int lane) {
  if (a.squares == nullptr) return;
  const int count = static_cast<int>(activation_squares(a.cols));
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    for (int i = 4 * lane; i < count; i += 128)
      ptx::copy_async(squares + token * count + i, a.squares + token * count + i);
  }
}

// What the products of each row are multiplied by, computed by the warps that have fetched the squares.  A barrier comes after.
__device__ __forceinline__ void find_factors(const Arguments& a, const float* squares, float* factors,
                                             int warp, int num_warps, int lane) {
  if (a.squares != nullptr) {
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncwarp();
  }
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    const float factor = a.squares == nullptr
                             ? 1.0f
                             : norm_factor(squares + token * activation_squares(a.cols), a.cols, a.eps);
    if (lane == 0) factors[token] = factor;
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <class F,     // of all weights, or void
          int kSplit,  // how many steps share the columns of a matrix instruction; up to 8 / kSplit rows
          int kTiles>  // tiles of 8 rows
__global__ void __launch_bounds__(32 * block_warps(8 / kSplit * kTiles),
                                  blocks_per_multiprocessor(8 / kSplit * kTiles))
    matvec_kernel(const __grid_constant__ Arguments a) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  constexpr int kTokens = 8 / kSplit;     // of a tile of input rows
  float* sums = dynamic_shared<float>();  // of multiply_unit
  float* gated = sums + (a.gated != nullptr ? kGatedTiles : a.unit_tiles) * kTiles * num_slots(a) *
                            SumsInMemory<kSplit>::kFloats;
  __shared__ uint64_t barriers[block_warps(8 / kSplit * kTiles) * kMaxStages];
  __shared__ float factors[8 * kTiles];
  float* squares = gated + (a.gated != nullptr ? 2 * 8 * kTiles * kGatedRows : 0);
  uint8_t* rings = reinterpret_cast<uint8_t*>(
      squares + (a.squares != nullptr ? a.num_tokens * activation_squares(a.cols) : 0));
  ptx::allow_consumers();
  Ring<F> ring;
  ring.start(a, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, warp, num_warps,
             lane);
  Input<kSplit, kTiles> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  fetch_squares(a, squares, warp, num_warps, lane);

  for (int unit = static_cast<int>(blockIdx.x); unit < a.num_units; unit += static_cast<int>(gridDim.x)) {
    const UnitTiles tiles(a, unit);
    multiply_unit(sums, a, input, ring, tiles, warp, num_warps, lane);
    if (unit == static_cast<int>(blockIdx.x)) find_factors(a, squares, factors, warp, num_warps, lane);
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < tiles.count * kTiles * kTokens * kTileRows;
         k += static_cast<int>(blockDim.x)) {
      const int r = k % kTileRows, i = k / (kTileRows * kTokens * kTiles);
      const int n = k / (kTileRows * kTokens) % kTiles, token = k / kTileRows % kTokens;
      const Part& part = a.parts[tiles.part(i)];
      const int row = tiles.tile(i) * kTileRows + r, input_row = 8 * n + token;
      if (row >= part.rows || input_row >= a.num_tokens) continue;
      float sum = find_product<F, kSplit, kTiles>(sums, a, part.format, i, n, token, r);
      sum *= factors[input_row];
      if (part.bias != nullptr) sum += part.bias[row];
      if (a.gated == nullptr) {
        a.out[static_cast<int64_t>(input_row) * a.out_stride + part.column + row] = sum;
      } else {
        gated[(i % 2 * 8 * kTiles + input_row) * kGatedRows + i / 2 * kTileRows + r] = sum;
      }
    }
    __syncthreads();  // the next unit's sums may come
    if (a.gated == nullptr) continue;
    const int rows = a.parts[0].rows;
    for (int token = warp; token < a.num_tokens; token += num_warps) {
      const float* gate = gated + token * kGatedRows;
      const float* up = gate + 8 * kTiles * kGatedRows;
      const bool exists = unit * kGatedRows + lane < rows;
      quantize_lanes(exists ? silu(gate[lane]) * up[lane] : 0.0f,
                     a.gated + token * activation_row_bytes(rows), rows, unit);
    }
  }
}

constexpr int kQuantizeWarps = 4;

template <class T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_rows_kernel(const T* x,   // [num_tokens, cols]
                         uint8_t* q8,  // [num_tokens, activation_row_bytes(cols)]
                         int64_t cols) {
  ptx::allow_consumers();
  ptx::wait_for_producers();
  const int64_t row = blockIdx.y;
  const int64_t col = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  float v[4] = {};
  for (int i = 0; i < 4; ++i) {
    if (col + i < cols) v[i] = to_float(x[row * cols + col + i]);
  }
  quantize_quads(make_float4(v[0], v[1], v[2], v[3]), q8 + row * activation_row_bytes(cols), cols, col / 32);
}

// Shared memory that a block for so many rows may take so that as many as are wanted fit on a multiprocessor of this device.
int shared_memory_per_block(int num_tokens) {
  const int blocks = blocks_per_multiprocessor(num_tokens);
#ifdef HELEXA_EMULATED_CUDA
  return 216 * 1024 / blocks;
#else
  const int total = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(0);
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(0);
  // Barriers, factors; of more than 8 rows there may be a launch of 8.
  const int fixed = 8 * (num_tokens == 1 ? block_warps(1) : kMaxWarps) * kMaxStages + 4 * kMaxTokens;
  return std::min(most, total / blocks - 1024) - fixed;  // 1 KiB is the system's
#endif
}

template <class F, int kSplit, int kTiles>
void launch_matvec(const Arguments& a, int num_blocks, int num_warps, size_t shared_bytes, void* stream) {
  launch_kernel(matvec_kernel<F, kSplit, kTiles>,
                {dim3(num_blocks), dim3(32 * num_warps), stream, shared_bytes, true}, a);
}

// Fills in what follows from the shapes and launches.
void run_matvec(Arguments a, const std::vector<WeightView>& weights, void* stream) {
  if (weights.empty() || weights.size() > kMaxMatvecWeights) {
    throw std::invalid_argument("quant_matmul: too many weights for one launch");
  }
  a.num_parts = static_cast<int>(weights.size());
  a.num_chunks = (a.cols + kChunkCols - 1) / kChunkCols;
  const bool is_gated = a.gated != nullptr;
  a.num_groups = is_gated && weights[0].format != weights[1].format ? 2 : 1;
  int64_t num_tiles = 0, stage_bytes = 0;
  for (const WeightView& w : weights) num_tiles += (w.rows + kTileRows - 1) / kTileRows;
  for (int left = a.num_tokens; left > 0; left -= a.num_tokens) {
    a.num_tokens = std::min(left, kMaxTokens);
    const int blocks = blocks_per_multiprocessor(a.num_tokens), places = blocks * num_multiprocessors();
    const int memory = shared_memory_per_block(a.num_tokens);
    // A block that is alone has all its tiles in one unit, if they are few.  Where there are several, one starts while others work, and
    // units have several tiles only if that leaves two rounds of them.
    const int64_t share = blocks == 1 ? (num_tiles + places - 1) / places : num_tiles / (2 * places);
    a.unit_tiles = static_cast<int>(std::clamp<int64_t>(share, 1, kMaxUnitTiles));
    int column = 0;
    a.num_units = 0;
    for (int i = 0; i < a.num_parts; ++i) {
      Part& part = a.parts[i];
      stage_bytes = std::max<int64_t>(stage_bytes, describe(part, weights[i], a.cols, column, a.num_units));
      column += part.rows;
      const int tiles = (part.rows + kTileRows - 1) / kTileRows;
      a.num_units += (tiles + a.unit_tiles - 1) / a.unit_tiles;
    }
    a.out_stride = column;
    a.stage_bytes = static_cast<int>(stage_bytes);
    if (is_gated) a.num_units = (a.parts[0].rows + kGatedRows - 1) / kGatedRows;

    const int unit_tiles = is_gated ? kGatedTiles : a.unit_tiles;
    auto fixed_bytes = [&] {
      const int tiles = a.num_tokens <= 8 ? 1 : 2;
      const int floats = a.num_tokens == 1   ? SumsInMemory<8>::kFloats
                         : a.num_tokens <= 4 ? SumsInMemory<2>::kFloats
                                             : SumsInMemory<1>::kFloats;
      return static_cast<int>(sizeof(float) *
                              (unit_tiles * tiles * num_slots(a) * floats +
                               (is_gated ? 2 * 8 * tiles * kGatedRows : 0) +
                               (a.squares != nullptr ? a.num_tokens * activation_squares(a.cols) : 0)));
    };
    // Devices with little memory take fewer rows at a time, and fewer warps.
    auto fits = [&](int warps, int stages) { return fixed_bytes() + warps * stages * stage_bytes <= memory; };
    if (a.num_tokens > 8 && !fits(8, 2)) a.num_tokens = 8;
    int num_warps = block_warps(a.num_tokens);
    if (!fits(num_warps, 2)) num_warps = 8;
    num_warps = std::min(num_warps, a.num_chunks);
    a.warp_chunks = a.num_chunks / num_warps;
    a.extra_chunks = a.num_chunks % num_warps;
    // As deep as the memory allows, but no deeper than a warp has chunks.
    const int units_per_block = (a.num_units + places - 1) / places;
    const int warp_chunks = (a.num_chunks + num_warps - 1) / num_warps * unit_tiles * units_per_block;
    a.num_stages = 1;
    while (a.num_stages < std::min(warp_chunks, kMaxStages) && fits(num_warps, a.num_stages + 1))
      ++a.num_stages;

    // Where a multiprocessor has several blocks, each takes units in turn only if that makes little difference to what they get.
    const int grid = blocks == 1 || a.num_units >= 4 * places ? std::min(a.num_units, places) : a.num_units;
    with_only_format(weights, [&](auto only) {
      using F = typename decltype(only)::Format;
      const auto launch = a.num_tokens == 1   ? launch_matvec<F, 8, 1>
                          : a.num_tokens <= 4 ? launch_matvec<F, 2, 1>
                          : a.num_tokens <= 8 ? launch_matvec<F, 1, 1>
                                              : launch_matvec<void, 1, 2>;
      launch(a, grid, num_warps, fixed_bytes() + a.num_stages * num_warps * stage_bytes, stream);
    });
    a.q8 += a.num_tokens * activation_row_bytes(a.cols);
    if (a.x != nullptr) a.x += static_cast<int64_t>(a.num_tokens) * a.cols;
    if (a.squares != nullptr) a.squares += a.num_tokens * activation_squares(a.cols);
    if (is_gated) {
      a.gated += a.num_tokens * activation_row_bytes(a.parts[0].rows);
    } else {
      a.out += static_cast<int64_t>(a.num_tokens) * a.out_stride;
    }
  }
}

}  // namespace

void quant_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, float* out, void* stream) {
  if (num_tokens == 0) return;
  Arguments a = input(q8, x, squares, eps, num_tokens, weights);
  a.out = out;
  run_matvec(a, weights, stream);
}

void gated_matmul_cuda(const uint8_t* q8, const float* x, const float* squares, float eps, int64_t num_tokens,
                       std::vector<WeightView> weights, uint8_t* out, void* stream) {
  if (num_tokens == 0) return;
  Arguments a = input(q8, x, squares, eps, num_tokens, weights);
  a.gated = out;
  run_matvec(a, weights, stream);
}

void quantize_rows_cuda(const void* x, int64_t num_tokens, int64_t cols, int dtype, uint8_t* q8,
                        void* stream) {
  if (num_tokens == 0) return;
  const int64_t quads = (cols + 31) / 32 * 8;
  const dim3 grid(static_cast<unsigned>((quads + 32 * kQuantizeWarps - 1) / (32 * kQuantizeWarps)),
                  static_cast<unsigned>(num_tokens));
  with_dtype(static_cast<DType>(dtype), [&](auto value) {
    using T = decltype(value);
    launch_kernel(quantize_rows_kernel<T>, {grid, dim3(32 * kQuantizeWarps), stream, 0, true},
                  static_cast<const T*>(x), q8, cols);
  });
}

}  // namespace helexa
