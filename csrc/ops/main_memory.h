// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// Whether kernels of a device find main memory that is pinned at its own addresses.
bool reads_main_memory(int device);

// Pins whole pages for kernels of all devices; throws CudaError if the system refuses.
void pin(std::uintptr_t address, int64_t nbytes);

// Ends what `pin` did piece by piece, each of `piece_bytes` but the last; pieces that are not pinned are left alone.
void unpin(std::uintptr_t address, int64_t nbytes, int64_t piece_bytes);

// Copies runs of bytes, each `stride` behind the one before, between main memory and the device.
void copy_runs_cuda(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride,
                    int64_t run_bytes, int64_t num_runs, void* stream);

}  // namespace helexa
