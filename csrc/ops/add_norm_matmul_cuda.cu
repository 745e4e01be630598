// SPDX-License-Identifier: GPL-3.0-or-later
// The product that ends a block of a model, for 1 to 16 rows.  It adds the residual and begins the norm that follows: values times the norm's
// weights leave quantized, with the sum of squares of each 32 columns, and whoever multiplies them divides by the root mean square.  So no
// block needs to know another one's results.
#include <algorithm>

#include "ops/matvec_block.cuh"

namespace helexa {
namespace {

using namespace matvec;

constexpr int kBlockRows = 32;  // one block of columns of the next matmul
constexpr int kBlockTiles = 2;
constexpr int kMaxWarps = 16, kFewestWarps = 8;  // so that each of 8 input rows has a warp

// What a product writes that ends a block of a model: the residual with it added, and the next norm of that but for the division by
// the root mean square.
struct NormOutput {
  float* residual;      // [num_tokens, rows]
  const float* weight;  // [rows], the norm's; not __restrict__, such loads sink below the wait
  uint8_t* q8;          // [num_tokens, activation_row_bytes(rows)]
  float* x;             // [num_tokens, rows], or null
  float* squares;       // [num_tokens, activation_squares(rows)]
};

// A block has 32 weight rows: two tiles, and one block of columns of the next matmul.
template <class F, int kSplit>
__global__ void __launch_bounds__(kSplit == 8 ? 768 : 512)  // threads that there are registers for
    add_norm_kernel(const __grid_constant__ Arguments a, const __grid_constant__ NormOutput out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  float* sums = dynamic_shared<float>();  // of multiply_unit
  uint8_t* rings =
      reinterpret_cast<uint8_t*>(sums + kBlockTiles * num_slots(a) * SumsInMemory<kSplit>::kFloats);
  __shared__ uint64_t barriers[kMaxWarps * kMaxStages];
  const Part& part = a.parts[0];
  const UnitTiles tiles(a, static_cast<int>(blockIdx.x));
  ptx::allow_consumers();
  Ring<F> ring;
  ring.start(a, rings + warp * a.num_stages * a.stage_bytes, barriers + warp * kMaxStages, warp, num_warps,
             lane);
  // In the end a warp has a row, each of its lanes a column.
  const int block = static_cast<int>(blockIdx.x), column = block * kBlockRows + lane;
  const bool exists = warp < a.num_tokens && column < part.rows;
  const int64_t place = static_cast<int64_t>(warp) * part.rows + column;
  const float scale = exists ? out.weight[column] : 0.0f;
  const float bias = exists && part.bias != nullptr ? part.bias[column] : 0.0f;
  Input<kSplit, 1> input(a, lane);
  ptx::wait_for_producers();
  input.start(lane, warp);
  const float before = exists ? out.residual[place] : 0.0f;

  multiply_unit(sums, a, input, ring, tiles, warp, num_warps, lane);
  __syncthreads();
  if (warp >= a.num_tokens) return;

  float value = find_product<F, kSplit, 1>(sums, a, part.format, lane / kTileRows, 0, warp, lane % kTileRows);
  value = exists ? before + (value + bias) : 0.0f;
  const float square = warp_sum(value * value), scaled = value * scale;
  quantize_lanes(scaled, out.q8 + warp * activation_row_bytes(part.rows), part.rows, block);
  if (exists) {
    out.residual[place] = value;
    if (out.x != nullptr) out.x[place] = scaled;
  }
  const int count = static_cast<int>(activation_squares(part.rows));
  float* squares = out.squares + warp * count;
  if (lane == 0) squares[block] = square;
  if (column + 32 >= part.rows + lane && lane > 0 && block + lane < count) squares[block + lane] = 0.0f;
}

// Shared memory that a block may take of which `count` are to be on a multiprocessor; a single one leaves room for a block of the next
// launch, if its registers do.
int shared_memory_of(int count, bool leaves_room) {
#ifdef HELEXA_EMULATED_CUDA
  return 128 * 1024 / count;
#else
  const int total = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(0);
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(0);
  const int share = count == 1 && leaves_room ? total * 2 / 3 : total / count;
  return std::min(most, share - 1024) - 8 * kMaxWarps * kMaxStages;  // the system's 1 KiB, barriers
#endif
}

// Blocks have as many warps as their number allows to be on a multiprocessor at once.
void run_add_norm(Arguments a, NormOutput out, const WeightView& weight, void* stream) {
  a.num_parts = 1;
  a.num_chunks = (a.cols + kChunkCols - 1) / kChunkCols;
  a.stage_bytes = describe(a.parts[0], weight, a.cols, 0, 0);
  a.unit_tiles = kBlockTiles;
  a.num_groups = 1;
  const int rows = a.parts[0].rows, num_blocks = (rows + kBlockRows - 1) / kBlockRows;
  a.num_units = num_blocks;
  const int neighbours = std::min(3, (num_blocks + num_multiprocessors() - 1) / num_multiprocessors());
  int num_warps = neighbours == 1 ? kMaxWarps : kFewestWarps;
  auto bytes_of = [&](int warps, int stages) {
    const int sums = kBlockTiles * static_cast<int>(sizeof(float)) * SumsInMemory<1>::kFloats;
    return num_slots(a) * sums + warps * stages * a.stage_bytes;
  };
  if (bytes_of(num_warps, 2) > shared_memory_of(neighbours, true)) num_warps = kFewestWarps;
  if (a.num_chunks < num_warps) num_warps = std::max(kFewestWarps, a.num_chunks);
  const int rounds = (a.num_chunks + num_warps - 1) / num_warps;
  a.warp_chunks = a.num_chunks / num_warps;
  a.extra_chunks = a.num_chunks % num_warps;
  const int64_t row_bytes = activation_row_bytes(a.cols);
  for (int left = a.num_tokens; left > 0; left -= 8) {
    a.num_tokens = std::min(left, 8);
    const int shared = shared_memory_of(neighbours, a.num_tokens == 1);
    a.num_stages = 2;
    while (a.num_stages < std::min(kMaxStages, rounds * kBlockTiles) &&
           bytes_of(num_warps, a.num_stages + 1) <= shared) {
      ++a.num_stages;
    }
    with_only_format({weight}, [&](auto only) {
      using F = typename decltype(only)::Format;
      const auto kernel = a.num_tokens == 1   ? add_norm_kernel<F, 8>
                          : a.num_tokens <= 4 ? add_norm_kernel<F, 2>
                                              : add_norm_kernel<F, 1>;
      const size_t shared_bytes = static_cast<size_t>(bytes_of(num_warps, a.num_stages));
      launch_kernel(kernel, {dim3(num_blocks), dim3(32 * num_warps), stream, shared_bytes, true}, a, out);
    });
    a.q8 += 8 * row_bytes;
    if (a.x != nullptr) a.x += 8 * static_cast<int64_t>(a.cols);
    out.residual += 8 * static_cast<int64_t>(rows);
    out.q8 += 8 * activation_row_bytes(rows);
    if (out.x != nullptr) out.x += 8 * static_cast<int64_t>(rows);
    out.squares += 8 * activation_squares(rows);
  }
}

}  // namespace

void add_norm_matmul_cuda(const uint8_t* q8, const float* x, int64_t num_tokens, WeightView weight,
                          float* residual, const float* norm_weight, uint8_t* out_q8, float* out_x,
                          float* out_squares, void* stream) {
  if (num_tokens == 0) return;
  const Arguments a = input(q8, x, nullptr, 0.0f, num_tokens, {weight});
  run_add_norm(a, {residual, norm_weight, out_q8, out_x, out_squares}, weight, stream);
}

}  // namespace helexa
