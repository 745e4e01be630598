// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// What tests break a device with.  trap: a kernel that fails, after which the process can use the device no more.
void trap_cuda(void* stream);
// A kernel that runs for so many nanoseconds.
void spin_cuda(int64_t nanoseconds, void* stream);

}  // namespace helexa
