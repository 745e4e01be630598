// SPDX-License-Identifier: GPL-3.0-or-later
#include "core/cuda.cuh"
#include "ops/fault.h"

namespace helexa {
namespace {

__global__ void trap_kernel() { __trap(); }

__global__ void spin_kernel(uint64_t nanoseconds) {
  const uint64_t start = ptx::global_ns();
  while (ptx::global_ns() - start < nanoseconds) __nanosleep(1000);
}

}  // namespace

void trap_cuda(void* stream) { launch_kernel(trap_kernel, {dim3(1), dim3(1), stream}); }

void spin_cuda(int64_t nanoseconds, void* stream) {
  launch_kernel(spin_kernel, {dim3(1), dim3(1), stream}, static_cast<uint64_t>(nanoseconds));
}

}  // namespace helexa
