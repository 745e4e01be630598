// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>
#include <type_traits>

namespace helexa {

// A type-erased reference to a callable `void(int64_t begin, int64_t end)`; it must outlive the call it is passed to.
struct RangeFn {
  void* object;
  void (*call)(void* object, int64_t begin, int64_t end);
};

// Each OS thread that runs ops drives a pool of its own (thread-local), as a CUDA stream belongs to the thread that set it.
// The calling thread counts as one of the pool's threads.  num_threads = 0 stands for the number of physical cores that
// this process may use.
void set_num_threads(int num_threads);
int num_threads();

// Calls fn on sub-ranges of [0, n) of `grain` items each, claimed one by one by whichever thread is free, and returns when all
// are done.  A helper thread that the system has not scheduled yet is not waited for: only claimed ranges are.
void parallel_for_ranges(int64_t n, int64_t grain, RangeFn fn);

template <class F>
void parallel_for(int64_t n, int64_t grain, F&& fn) {
  using Callable = std::remove_reference_t<F>;
  parallel_for_ranges(
      n, grain, {const_cast<void*>(static_cast<const void*>(&fn)), [](void* f, int64_t begin, int64_t end) {
                   (*static_cast<Callable*>(f))(begin, end);
                 }});
}

}  // namespace helexa
