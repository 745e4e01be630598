// SPDX-License-Identifier: GPL-3.0-or-later
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace helexa {
namespace {

// How long a waiting thread polls before it gives its core away.  A decode step has gaps of a few microseconds between
// parallel ops, so polling catches those; beside another busy process every polled microsecond is taken from somebody.
constexpr int kHelperPolls = 4000;  // about 60-100 us
constexpr int kCallerPolls = 600;   // about 10-15 us

void pause_core() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  if (word.load() == expected) std::this_thread::yield();
#endif
}

void futex_wake(std::atomic<uint32_t>& word, int count) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  (void)word;
  (void)count;
#endif
}

// One pool: the owning thread plus num_threads - 1 helpers.
class Pool {
 public:
  explicit Pool(int num_threads) {
    // Where the system allows no more threads, those that there are do all the work.
    try {
      for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this] { help(); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    stopping_.store(true);
    epoch_.fetch_add(1);
    futex_wake(epoch_, INT_MAX);
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  void run(int64_t n, int64_t grain, RangeFn fn) {
    const int64_t num_chunks = (n + grain - 1) / grain;
    const uint32_t job = static_cast<uint32_t>(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    // The ticket is closed before the job's fields change: a helper that read the last job's ticket then fails to claim.
    ticket_.store(make_ticket(job, kClosed), std::memory_order_seq_cst);
    object_.store(fn.object, std::memory_order_relaxed);
    call_.store(fn.call, std::memory_order_relaxed);
    n_.store(n, std::memory_order_relaxed);
    grain_.store(grain, std::memory_order_relaxed);
    num_chunks_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
    remaining_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
    ticket_.store(make_ticket(job, 0), std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) futex_wake(epoch_, INT_MAX);
    claim_all();
    for (int polls = 0;; ++polls) {
      const uint32_t left = remaining_.load(std::memory_order_acquire);
      if (left == 0) return;
      if (polls < kCallerPolls) {
        pause_core();
      } else {
        caller_sleeps_.store(true, std::memory_order_seq_cst);
        futex_wait(remaining_, left);
        caller_sleeps_.store(false, std::memory_order_relaxed);
      }
    }
  }

 private:
  static constexpr uint32_t kClosed = 0xffffffffu;

  static uint64_t make_ticket(uint32_t job, uint32_t next) {
    return (static_cast<uint64_t>(job) << 32) | next;
  }

  void claim_all() {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
      const uint32_t next = static_cast<uint32_t>(ticket);
      if (next >= num_chunks_.load(std::memory_order_relaxed)) return;
      void* object = object_.load(std::memory_order_relaxed);
      const auto call = call_.load(std::memory_order_relaxed);
      const int64_t n = n_.load(std::memory_order_relaxed);
      const int64_t grain = grain_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_seq_cst)) continue;
      const int64_t begin = static_cast<int64_t>(next) * grain;
      call(object, begin, std::min(n, begin + grain));
      if (remaining_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
          caller_sleeps_.load(std::memory_order_seq_cst)) {
        futex_wake(remaining_, 1);
      }
    }
  }

  void help();

  std::atomic<uint64_t> ticket_{0};  // job number << 32 | next chunk to claim
  std::atomic<void*> object_{nullptr};
  std::atomic<void (*)(void*, int64_t, int64_t)> call_{nullptr};
  std::atomic<int64_t> n_{0}, grain_{1};
  std::atomic<uint32_t> num_chunks_{0};
  alignas(64) std::atomic<uint32_t> remaining_{0};
  std::atomic<bool> caller_sleeps_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> helpers_;
};

thread_local bool inside_parallel = false;

void Pool::help() {
  inside_parallel = true;
  uint32_t seen = 0;
  while (!stopping_.load()) {
    for (int polls = 0; polls < kHelperPolls && epoch_.load(std::memory_order_acquire) == seen; ++polls)
      pause_core();
    if (epoch_.load(std::memory_order_acquire) == seen) {
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      futex_wait(epoch_, seen);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      continue;
    }
    seen = epoch_.load(std::memory_order_acquire);
    claim_all();
  }
}

// The number in a file of /sys, or `otherwise` if there is none.  C streams: those of C++ crash in a process whose other libraries
// bring a standard library of their own.
int read_number(const std::string& path, int otherwise) {
  int number = otherwise;
  if (FILE* file = std::fopen(path.c_str(), "r")) {
    if (std::fscanf(file, "%d", &number) != 1) number = otherwise;
    std::fclose(file);
  }
  return number;
}

// Physical cores among the CPUs that this process may run on: two hyper-threads of one core share its vector units.
int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::pair<int, int>> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      cores.emplace(read_number(topology + "physical_package_id", 0), read_number(topology + "core_id", cpu));
    }
    if (!cores.empty()) return static_cast<int>(cores.size());
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

thread_local int wanted_threads = 0;
thread_local std::unique_ptr<Pool> pool;

Pool& current_pool() {
  if (!pool) pool = std::make_unique<Pool>(wanted_threads > 0 ? wanted_threads : physical_cores());
  return *pool;
}

}  // namespace

void set_num_threads(int num_threads) {
  wanted_threads = num_threads;
  pool.reset();
}

int num_threads() { return current_pool().size(); }

void parallel_for_ranges(int64_t n, int64_t grain, RangeFn fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (n <= grain || inside_parallel) {
    fn.call(fn.object, 0, n);
    return;
  }
  Pool& p = current_pool();
  if (p.size() == 1) {
    fn.call(fn.object, 0, n);
    return;
  }
  inside_parallel = true;
  p.run(n, grain, fn);
  inside_parallel = false;
}

}  // namespace helexa
