// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/main_memory.h"

#include <cstring>

#include "core/cuda.cuh"

namespace helexa {

#ifdef HELEXA_EMULATED_CUDA

bool reads_main_memory(int) { return true; }
void pin(std::uintptr_t, int64_t) {}
void unpin(std::uintptr_t, int64_t, int64_t) {}
void copy_runs_cuda(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride,
                    int64_t run_bytes, int64_t num_runs, void*) {
  for (int64_t i = 0; i < num_runs; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(run_bytes));
  }
}

#else

bool reads_main_memory(int device) {
  int found = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&found, cudaDevAttrCanUseHostPointerForRegisteredMem, device));
  return found != 0;
}

void pin(std::uintptr_t address, int64_t nbytes) {
  CUDA_CHECK(cudaHostRegister(reinterpret_cast<void*>(address), static_cast<size_t>(nbytes),
                              cudaHostRegisterPortable | cudaHostRegisterMapped));
}

void unpin(std::uintptr_t address, int64_t nbytes, int64_t piece_bytes) {
  for (int64_t at = 0; at < nbytes; at += piece_bytes) {
    cudaHostUnregister(reinterpret_cast<void*>(address + static_cast<std::uintptr_t>(at)));
  }
  cudaGetLastError();  // of a piece that was not pinned, or of a device that is lost: its memory goes with the process
}

void copy_runs_cuda(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride,
                    int64_t run_bytes, int64_t num_runs, void* stream) {
  CUDA_CHECK(cudaMemcpy2DAsync(to, static_cast<size_t>(to_stride), from, static_cast<size_t>(from_stride),
                               static_cast<size_t>(run_bytes), static_cast<size_t>(num_runs),
                               cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace helexa
