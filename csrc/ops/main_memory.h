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

}  // namespace helexa
