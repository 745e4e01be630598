// SPDX-License-Identifier: GPL-3.0-or-later
// Kernels that use what csrc/emulation stands in for, compared with plain loops.  Prints what is wrong; nothing where all is well.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "core/cuda.cuh"

namespace helexa {
namespace {

int failures = 0;
void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s\n", what);
  ++failures;
}

__global__ void sum_kernel(const float* x, float* out, int count) {
  __shared__ float sums[8];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += x[blockIdx.x * count + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += sums[w];
    out[blockIdx.x] = sum;
  }
}

// Each thread reads what its neighbour wrote; without the barrier that depends on who runs first.
template <bool kBarrier>
__global__ void neighbour_kernel(int* out) {
  int* shared = dynamic_shared<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void copy_kernel(const uint4* from, uint4* to, bool wait) {
  uint4* shared = dynamic_shared<uint4>();
  ptx::copy_async(&shared[threadIdx.x], &from[threadIdx.x]);
  ptx::commit_copies();
  if (wait) ptx::wait_for_copies<0>();
  to[threadIdx.x] = shared[threadIdx.x];
}

// The 16 x 8 product of a [16, 16] and b [16, 8], in bfloat16, by way of shared memory.
__global__ void product_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  __shared__ __align__(16) __nv_bfloat16 left[16 * 16];
  __shared__ __align__(16) __nv_bfloat16 right[16 * 8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  uint32_t ra[4], rb[2];
  float sum[4] = {};
  ptx::load_matrices(ra, left + (lane % 16) * 16 + lane / 16 * 8);
  ptx::load_matrices_transposed(rb, right + (lane % 16) * 8);
  ptx::mma_bf16(sum, ra, rb);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
}

__global__ void half_barrier_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0xffffffffu, 1, 0);
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const CudaError& error) {
    return error.what();
  }
  return "";
}

void check() {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> small(-4, 4);
  std::vector<float> x(3 * 100), sums(3, -1.0f);
  for (float& value : x) value = static_cast<float>(small(random));
  launch_kernel(sum_kernel, {dim3(3), dim3(64), nullptr}, x.data(), sums.data(), 100);
  for (int row = 0; row < 3; ++row) {
    float sum = 0.0f;
    for (int i = 0; i < 100; ++i) sum += x[row * 100 + i];
    expect(sum == sums[row], "a sum over warps and a block is wrong");
  }

  int wrong[2] = {0, 0};
  for (const bool barrier : {false, true}) {
    for (const char* seed : {"1", "2", "3"}) {
      setenv("HELEXA_EMULATION_SEED", seed, 1);
      std::vector<int> out(64);
      launch_kernel(barrier ? neighbour_kernel<true> : neighbour_kernel<false>,
                    {dim3(1), dim3(64), nullptr, 256}, out.data());
      for (int i = 0; i < 64; ++i) wrong[barrier] += out[i] != (i + 1) % 64;
    }
  }
  expect(wrong[1] == 0, "a barrier does not hold");
  expect(wrong[0] > 0, "a missing barrier is not seen");

  std::vector<uint4> from(32, uint4{1, 2, 3, 4}), to(32);
  launch_kernel(copy_kernel, {dim3(1), dim3(32), nullptr, 512}, from.data(), to.data(), true);
  expect(to[31].w == 4, "an asynchronous copy is lost");
  launch_kernel(copy_kernel, {dim3(1), dim3(32), nullptr, 512}, from.data(), to.data(), false);
  expect(to[31].w != 4, "a copy that nobody waited for is there");

  std::vector<__nv_bfloat16> a(256), b(128);
  for (auto& value : a) value = __float2bfloat16(static_cast<float>(small(random)));
  for (auto& value : b) value = __float2bfloat16(static_cast<float>(small(random)));
  std::vector<float> d(128);
  launch_kernel(product_kernel, {dim3(1), dim3(32), nullptr}, a.data(), b.data(), d.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += __bfloat162float(a[i * 16 + k]) * __bfloat162float(b[k * 8 + j]);
      expect(sum == d[i * 8 + j], "a product of a warp is wrong");
    }
  }

  const auto error = error_of([] { launch_kernel(half_barrier_kernel, {dim3(1), dim3(32), nullptr}); });
  expect(error.find("waits for lanes") != std::string::npos,
         "a shuffle that half of the warp misses is not reported");
}

}  // namespace
}  // namespace helexa

int main() {
  helexa::check();
  return helexa::failures != 0;
}
