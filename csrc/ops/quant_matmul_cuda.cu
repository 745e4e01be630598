// SPDX-License-Identifier: GPL-3.0-or-later
// Products of quantized weights with 1 to 16 rows, which memory's bandwidth bounds.
//
// A block (matvec_block.cuh) has one or a few tiles of 16 weight rows of one weight (gated: 32 rows of both), so that even a small matrix
// keeps many warps busy.
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

constexpr int kMaxWarps = 8;
// Blocks for which registers and rings leave room: where there are fewer, the blocks of many a matrix come in two rounds, but what does
// not fit into the registers goes through the caches, and costs more.
constexpr int blocks_per_multiprocessor(int num_tokens) {
  return num_tokens == 1 ? 3 : num_tokens <= 8 ? 2 : 1;
}
constexpr int kMaxTokens = 16;  // of a launch; of more the sums of a warp do not fit into its registers
constexpr int kMaxBlockTiles = 4;
constexpr int kMinBlocksPerMultiprocessor = 6;  // of a block with several tiles
constexpr int kGatedRows = 32;  // outputs of a gated block: one block of columns of the next matmul
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

template <int kSplit,  // how many steps share the columns of a matrix instruction; up to 8 / kSplit rows
          int kTiles>  // tiles of 8 rows
__global__ void __launch_bounds__(32 * kMaxWarps, blocks_per_multiprocessor(8 / kSplit * kTiles))
    matvec_kernel(const __grid_constant__ Arguments a) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  constexpr int kTokens = 8 / kSplit;     // of a tile of input rows
  float* sums = dynamic_shared<float>();  // of multiply_tiles
  float* gated = sums + (a.gated != nullptr ? kGatedTiles : a.block_tiles) * kTiles * num_warps *
                            SumsInMemory<kSplit>::kFloats;
  const BlockTiles tiles(a);
  __shared__ uint64_t barriers[kMaxWarps * kMaxStages];
  __shared__ float factors[8 * kTiles];
  float* squares = gated + (a.gated != nullptr ? 2 * 8 * kTiles * kGatedRows : 0);
  uint8_t* rings = reinterpret_cast<uint8_t*>(
      squares + (a.squares != nullptr ? a.num_tokens * activation_squares(a.cols) : 0));
  ptx::allow_consumers();
  Ring ring;
  ring.start(a, tiles, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, warp,
             num_warps, lane);
  Input<kSplit, kTiles> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  fetch_squares(a, squares, warp, num_warps, lane);

  multiply_tiles(sums, a, input, ring, tiles, warp, num_warps, lane);
  find_factors(a, squares, factors, warp, num_warps, lane);
  __syncthreads();

  for (int k = static_cast<int>(threadIdx.x); k < tiles.count * kTiles * kTokens * kTileRows;
       k += static_cast<int>(blockDim.x)) {
    const int r = k % kTileRows, i = k / (kTileRows * kTokens * kTiles);
    const int n = k / (kTileRows * kTokens) % kTiles, token = k / kTileRows % kTokens;
    const Part& part = a.parts[tiles.part(i)];
    const int row = tiles.tile(i) * kTileRows + r, input_row = 8 * n + token;
    if (row >= part.rows || input_row >= a.num_tokens) continue;
    float sum = find_product<kSplit, kTiles>(sums, a, part.format, i, n, token, r, num_warps);
    sum *= factors[input_row];
    if (part.bias != nullptr) sum += part.bias[row];
    if (a.gated == nullptr) {
      a.out[static_cast<int64_t>(input_row) * a.out_stride + part.column + row] = sum;
    } else {
      gated[(i % 2 * 8 * kTiles + input_row) * kGatedRows + i / 2 * kTileRows + r] = sum;
    }
  }

  if (a.gated == nullptr) return;
  __syncthreads();
  const int rows = a.parts[0].rows;
  for (int token = warp; token < a.num_tokens; token += num_warps) {
    const float* gate = gated + token * kGatedRows;
    const float* up = gate + 8 * kTiles * kGatedRows;
    const bool exists = static_cast<int>(blockIdx.x) * kGatedRows + lane < rows;
    quantize_lanes(exists ? silu(gate[lane]) * up[lane] : 0.0f, a.gated + token * activation_row_bytes(rows),
                   rows, blockIdx.x);
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

// Shared memory that a block may take so that `blocks` of them fit on a multiprocessor of this device.
int shared_memory_per_block(int blocks) {
#ifdef HELEXA_EMULATED_CUDA
  return 72 * 1024;
#else
  const int total = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(0);
  const int fixed = 8 * kMaxWarps * kMaxStages + 4 * kMaxTokens;  // barriers, factors
  return total / blocks - 1024 - fixed;                           // 1 KiB is the system's
#endif
}

template <int kSplit, int kTiles>
void launch_matvec(const Arguments& a, int num_blocks, int num_warps, size_t shared_bytes, void* stream) {
  launch_kernel(matvec_kernel<kSplit, kTiles>,
                {dim3(num_blocks), dim3(32 * num_warps), stream, shared_bytes, true}, a);
}

// Fills in what follows from the shapes and launches.
void run_matvec(Arguments a, const std::vector<WeightView>& weights, void* stream) {
  if (weights.empty() || weights.size() > kMaxMatvecWeights) {
    throw std::invalid_argument("quant_matmul: too many weights for one launch");
  }
  a.num_parts = static_cast<int>(weights.size());
  a.num_chunks = (a.cols + kChunkCols - 1) / kChunkCols;
  int64_t num_tiles = 0;
  for (const WeightView& w : weights) num_tiles += (w.rows + kTileRows - 1) / kTileRows;
  // Of a large matrix a block takes several tiles, so that it seldom starts and ends, but not so many that there are fewer than two
  // waves of blocks.
  a.block_tiles = static_cast<int>(std::clamp<int64_t>(
      num_tiles / (kMinBlocksPerMultiprocessor * num_multiprocessors()), 1, kMaxBlockTiles));
  int num_blocks = 0, column = 0, stage_bytes = 0;
  for (int i = 0; i < a.num_parts; ++i) {
    Part& part = a.parts[i];
    stage_bytes = std::max(stage_bytes, describe(part, weights[i], a.cols, column, num_blocks));
    column += part.rows;
    const int tiles = (part.rows + kTileRows - 1) / kTileRows;
    num_blocks += (tiles + a.block_tiles - 1) / a.block_tiles;
  }
  a.out_stride = column;
  a.stage_bytes = stage_bytes;
  if (a.gated != nullptr) num_blocks = (a.parts[0].rows + kGatedRows - 1) / kGatedRows;

  const int num_warps = std::min(kMaxWarps, a.num_chunks);
  const int64_t row_bytes = activation_row_bytes(a.cols), gated_bytes = activation_row_bytes(a.parts[0].rows);
  const int64_t squares = activation_squares(a.cols);
  a.warp_chunks = a.num_chunks / num_warps;
  a.extra_chunks = a.num_chunks % num_warps;
  for (int left = a.num_tokens; left > 0; left -= kMaxTokens) {
    a.num_tokens = std::min(left, kMaxTokens);
    const int tiles = a.num_tokens <= 8 ? 1 : 2,
              block_tiles = a.gated != nullptr ? kGatedTiles : a.block_tiles;
    const int sums = a.num_tokens == 1   ? SumsInMemory<8>::kFloats
                     : a.num_tokens <= 4 ? SumsInMemory<2>::kFloats
                                         : SumsInMemory<1>::kFloats;
    const size_t fixed_bytes = sizeof(float) * (block_tiles * tiles * num_warps * sums +
                                                (a.gated != nullptr ? 2 * 8 * tiles * kGatedRows : 0) +
                                                (a.squares != nullptr ? a.num_tokens * squares : 0));
    // As deep as the memory allows, but no deeper than a warp has chunks; two stages where that is too little.
    const int chunks_per_warp = (a.num_chunks + num_warps - 1) / num_warps * block_tiles;
    const int stages_bytes = std::max(1, num_warps * stage_bytes);
    const int memory = shared_memory_per_block(std::max(2, blocks_per_multiprocessor(a.num_tokens)));
    const int affordable = (memory - static_cast<int>(fixed_bytes)) / stages_bytes;
    a.num_stages = std::min(std::clamp(affordable, 2, kMaxStages), chunks_per_warp);
    const size_t shared_bytes = fixed_bytes + static_cast<size_t>(a.num_stages) * num_warps * stage_bytes;

    const auto launch = a.num_tokens == 1   ? launch_matvec<8, 1>
                        : a.num_tokens <= 4 ? launch_matvec<2, 1>
                        : tiles == 1        ? launch_matvec<1, 1>
                                            : launch_matvec<1, 2>;
    launch(a, num_blocks, num_warps, shared_bytes, stream);
    a.q8 += a.num_tokens * row_bytes;
    if (a.x != nullptr) a.x += static_cast<int64_t>(a.num_tokens) * a.cols;
    if (a.squares != nullptr) a.squares += a.num_tokens * squares;
    if (a.gated != nullptr) {
      a.gated += a.num_tokens * gated_bytes;
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
