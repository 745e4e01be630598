// SPDX-License-Identifier: GPL-3.0-or-later
// Fibers for the threads of a block: each has a stack of its own and runs until it waits.
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/cuda_error.h"
#include "emulation/cuda.h"

#ifndef __x86_64__
#error "the emulation of CUDA switches stacks with x86-64 instructions"
#endif

// void helexa_switch(void** from, void* to): saves what a callee must keep on this stack and continues on another.
asm(R"(
.text
.globl helexa_switch
.type helexa_switch, @function
helexa_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size helexa_switch, .-helexa_switch
)");
extern "C" void helexa_switch(void** from, void* to);

namespace helexa::emulation {

thread_local uint3 thread_index, block_index;
thread_local dim3 block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kErrorTrap = 716,
              kErrorTimeout = 702;  // as a device would report a trap and a kernel that does not end

enum class State { kReady, kMeeting, kAtBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// Lanes that meet: everything of one mask of one warp.  Two sets of slots take turns, since a lane may come to the next meeting
// before another has read the result of this one.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  unsigned generation = 0;
  std::vector<unsigned char> in[2], out[2];
};

struct Thread {
  State state = State::kReady;
  void* stack_pointer = nullptr;
  uint3 index;
  int number = 0;
  Meeting* meeting = nullptr;
  unsigned generation = 0;
  int vote = 0;
  std::vector<std::vector<Copy>> copies;  // the last group is open
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  void* scheduler = nullptr;
  int votes = 0;
  const char* trapped = nullptr;
};

Block* block = nullptr;  // the one that runs; run() holds a lock

// Stacks, kept for later blocks.
unsigned char* stack_of(size_t number) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[number];
}

void leave() { helexa_switch(&block->current->stack_pointer, block->scheduler); }

void begin() {
  (*block->body)();
  block->current->state = State::kDone;
  leave();
  std::abort();  // a thread that has ended is never resumed
}

void enter(Thread& thread) {
  block->current = &thread;
  thread_index = thread.index;
  helexa_switch(&block->scheduler, thread.stack_pointer);
}

void fail(int code, const std::string& reason) {
  throw CudaError(code, "emulated kernel, block (" + std::to_string(block_index.x) + ", " +
                            std::to_string(block_index.y) + ", " + std::to_string(block_index.z) +
                            "): " + reason);
}

void prepare(Thread& thread, size_t number, dim3 size) {
  thread.state = State::kReady;
  thread.number = static_cast<int>(number);
  thread.index = {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
                  static_cast<unsigned>(number / (static_cast<size_t>(size.x) * size.y))};
  thread.copies.assign(1, {});
  // A stack on which `begin` has just been called: aligned to 16 bytes before its return address.
  auto* top = reinterpret_cast<void**>(stack_of(number) + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&begin);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  thread.stack_pointer = top;
}

void run_block(const std::vector<size_t>& order) {
  Block& b = *block;
  size_t done = 0;
  while (done < b.threads.size()) {
    bool progress = false;
    for (size_t warp = 0; warp < b.warps.size(); ++warp) {
      bool again = true;
      while (again) {
        again = false;
        for (size_t l = 0; l < 32; ++l) {
          const size_t number = order[warp * 32 + l];
          if (number >= b.threads.size()) continue;
          Thread& thread = b.threads[number];
          if (thread.state == State::kMeeting && thread.meeting->generation != thread.generation)
            thread.state = State::kReady;
          if (thread.state != State::kReady) continue;
          enter(thread);
          if (b.trapped != nullptr) fail(kErrorTrap, b.trapped);
          done += thread.state == State::kDone;
          again = progress = true;
        }
      }
    }
    if (progress) continue;
    int waiting = 0, votes = 0;
    for (const Thread& thread : b.threads) {
      if (thread.state == State::kMeeting) {
        fail(kErrorTimeout, "thread " + std::to_string(thread.number) +
                                " waits for lanes of its warp that have ended or wait at another place");
      }
      if (thread.state == State::kAtBarrier) {
        ++waiting;
        votes += thread.vote != 0;
      }
    }
    if (waiting == 0) fail(kErrorTimeout, "nothing can run");
    b.votes = votes;
    for (Thread& thread : b.threads) {
      if (thread.state == State::kAtBarrier) thread.state = State::kReady;
    }
  }
}

// Threads by warp and lane; the order within is another one for each seed.
std::vector<size_t> thread_order(size_t num_warps, std::mt19937* random) {
  std::vector<size_t> warps(num_warps), order;
  std::iota(warps.begin(), warps.end(), size_t{0});
  if (random != nullptr) std::shuffle(warps.begin(), warps.end(), *random);
  for (const size_t warp : warps) {
    std::vector<size_t> lanes(32);
    std::iota(lanes.begin(), lanes.end(), 32 * warp);
    if (random != nullptr) std::shuffle(lanes.begin(), lanes.end(), *random);
    order.insert(order.end(), lanes.begin(), lanes.end());
  }
  return order;
}

}  // namespace

int lane() { return block->current->number % 32; }

void* dynamic_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block->shared.data()) + 127) / 128 * 128);
}

void trap(const char* reason) {
  block->trapped = reason;
  leave();
  std::abort();
}

int count_block(int value) {
  block->current->vote = value;
  block->current->state = State::kAtBarrier;
  leave();
  return block->votes;
}

void sync_block() { count_block(0); }

void meet(unsigned mask, const void* in, size_t in_bytes, Combine combine, void* out, size_t out_bytes) {
  Thread& self = *block->current;
  if (!(mask >> (self.number % 32) & 1)) trap("a lane takes part in a collective whose mask leaves it out");
  auto& meetings = block->warps[static_cast<size_t>(self.number / 32)].meetings;
  auto found = std::find_if(meetings.begin(), meetings.end(), [&](const auto& m) { return m->mask == mask; });
  if (found == meetings.end()) {
    found = meetings.insert(meetings.end(), std::make_unique<Meeting>());
    (*found)->mask = mask;
    for (auto* slots : {&(*found)->in[0], &(*found)->in[1], &(*found)->out[0], &(*found)->out[1]})
      slots->resize(32 * kSlot);
  }
  Meeting& meeting = **found;
  const unsigned set = meeting.generation % 2;
  std::memcpy(meeting.in[set].data() + (self.number % 32) * kSlot, in, in_bytes);
  meeting.arrived |= 1u << (self.number % 32);
  if (meeting.arrived == mask) {
    combine(meeting.in[set].data(), meeting.out[set].data());
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    self.state = State::kMeeting;
    self.meeting = &meeting;
    self.generation = meeting.generation;
    leave();
  }
  std::memcpy(out, meeting.out[set].data() + (self.number % 32) * kSlot, out_bytes);
}

void copy_later(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % 16 != 0)
    trap("a misaligned copy");
  block->current->copies.back().push_back({to, from, valid});
}

void end_copy_group() { block->current->copies.emplace_back(); }

void finish_copies(int pending_groups) {
  auto& groups = block->current->copies;
  while (groups.size() - 1 > static_cast<size_t>(pending_groups)) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> guard(mutex);
  const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535) {
    throw CudaError(9, "emulated kernel: grid or block of a size that no device takes");
  }
  if (shared_bytes > 227 * 1024)
    throw CudaError(1, "emulated kernel: more than 227 KiB of dynamic shared memory");
  const char* seed = std::getenv("HELEXA_EMULATION_SEED");
  std::mt19937 random(seed == nullptr ? 0u : static_cast<unsigned>(std::atoi(seed)));
  Block running;
  block = &running;
  running.body = &thread;
  running.threads.resize(count);
  const size_t num_warps = (count + 31) / 32;
  block_size = size;
  grid_size = grid;
  const auto order = thread_order(num_warps, nullptr);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        running.warps.resize(num_warps);
        for (Warp& warp : running.warps) {
          for (auto& meeting : warp.meetings) meeting->arrived = 0;
        }
        running.shared.assign(shared_bytes + 128, 0xff);  // NaN, as floats
        for (size_t i = 0; i < count; ++i) prepare(running.threads[i], i, size);
        run_block(seed == nullptr ? order : thread_order(num_warps, &random));
      }
    }
  }
}

}  // namespace helexa::emulation
