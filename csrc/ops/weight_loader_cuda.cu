// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/weight_loader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/cuda.cuh"
#include "ops/main_memory.h"
#include "ops/pack.h"
#include "ops/quantize.h"

namespace helexa {
namespace {

#ifdef HELEXA_EMULATED_CUDA
void* make_event() { return nullptr; }
void drop_event(void*) {}
void wait_for_event(void*) {}
void record_event(void*, void*) {}
void wait_for_stream(void*) {}
void copy_bytes(void* to, const void* from, int64_t nbytes, void*) { std::memcpy(to, from, nbytes); }
void zero_bytes(void* at, int64_t nbytes, void*) { std::memset(at, 0, nbytes); }
#else
void* make_event() {
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
  return event;
}
void drop_event(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
void wait_for_event(void* event) { CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event))); }
void record_event(void* event, void* stream) {
  CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}
void wait_for_stream(void* stream) { CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }
void copy_bytes(void* to, const void* from, int64_t nbytes, void* stream) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(nbytes), cudaMemcpyDefault,
                             static_cast<cudaStream_t>(stream)));
}
void zero_bytes(void* at, int64_t nbytes, void* stream) {
  CUDA_CHECK(cudaMemsetAsync(at, 0, static_cast<size_t>(nbytes), static_cast<cudaStream_t>(stream)));
}
#endif

// 0, an errno, or -1 where the file ends.
int read_range(const ByteRange& range, uint8_t* into) {
  if (range.descriptor < 0) {
    std::memcpy(into, reinterpret_cast<const void*>(range.offset), static_cast<size_t>(range.nbytes));
    return 0;
  }
  // The system reads from a disk in larger pieces when it knows what will be wanted.
  posix_fadvise(range.descriptor, range.offset, range.nbytes, POSIX_FADV_WILLNEED);
  for (int64_t done = 0; done < range.nbytes;) {
    const ssize_t count =
        pread(range.descriptor, into + done, static_cast<size_t>(range.nbytes - done), range.offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    if (count == 0) return -1;
    done += count;
  }
  return 0;
}

}  // namespace

int64_t WeightLoader::add(std::vector<ByteRange> ranges, int64_t nbytes, int format, int source_format,
                          int64_t first_row, int64_t num_rows, int64_t cols, std::uintptr_t target) {
  const std::lock_guard lock(mutex_);
  parts_.push_back({num_parts_, nbytes, std::move(ranges), format, source_format, first_row, num_rows, cols,
                    reinterpret_cast<uint8_t*>(target)});
  changed_.notify_one();
  return num_parts_++;
}

void WeightLoader::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  changed_.notify_all();
}

void WeightLoader::cancel() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  parts_.clear();
  changed_.notify_all();
}

int64_t WeightLoader::done_bytes() const {
  const std::lock_guard lock(mutex_);
  return done_bytes_;
}

std::optional<WeightLoader::Failure> WeightLoader::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

std::optional<WeightLoader::Part> WeightLoader::take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return is_closed_ || !parts_.empty(); });
  if (parts_.empty()) return std::nullopt;
  Part part = std::move(parts_.front());
  parts_.pop_front();
  return part;
}

void WeightLoader::finished(int64_t nbytes) {
  const std::lock_guard lock(mutex_);
  done_bytes_ += nbytes;
}

void WeightLoader::failed(Failure failure) {
  cancel();
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = failure;
}

WeightCarrier::WeightCarrier(WeightLoader& loader, std::vector<std::uintptr_t> pinned,
                             std::vector<std::uintptr_t> staged, std::uintptr_t encoded,
                             std::uintptr_t bad_values, std::uintptr_t pinned_bad_values,
                             std::uintptr_t stream)
    : loader_(loader),
      encoded_(reinterpret_cast<uint8_t*>(encoded)),
      bad_values_(reinterpret_cast<unsigned long long*>(bad_values)),
      pinned_bad_values_(reinterpret_cast<unsigned long long*>(pinned_bad_values)),
      quantized_(pinned.size(), -1),
      stream_(reinterpret_cast<void*>(stream)) {
  for (const std::uintptr_t slot : pinned) pinned_.push_back(reinterpret_cast<uint8_t*>(slot));
  for (const std::uintptr_t slot : staged) staged_.push_back(reinterpret_cast<uint8_t*>(slot));
  for (size_t i = 0; i < pinned_.size(); ++i) events_.push_back(make_event());
}

WeightCarrier::~WeightCarrier() {
  for (void* event : events_) drop_event(event);
}

int64_t WeightCarrier::work() {
  if (waiting_) {
    send(*waiting_);
    waiting_.reset();
  }
  while (std::optional<WeightLoader::Part> part = loader_.take()) {
    if (is_done(*part)) continue;
    wait_for_slot(current_);
    if (part->ranges.empty()) {
      waiting_ = std::move(part);
      return waiting_->number;
    }
    if (part->format == WeightLoader::kStore) {
      store(*part);
    } else if (fill(*part)) {
      send(*part);
    }
  }
  wait_for_stream(stream_);
  for (size_t slot = 0; slot < pinned_.size(); ++slot) wait_for_slot(slot);
  return -1;
}

// Waits until the slot's last part has left, and looks what became of it.
void WeightCarrier::wait_for_slot(size_t slot) {
  wait_for_event(events_[slot]);
  if (quantized_[slot] < 0) return;
  if (const unsigned long long bad = pinned_bad_values_[slot]; bad > 0) {
    loader_.failed({quantized_[slot], -static_cast<int>(std::min(bad, 1ull << 30))});
  }
  quantized_[slot] = -1;
}

// Does what needs no slot.
bool WeightCarrier::is_done(const WeightLoader::Part& part) {
  if (part.format == WeightLoader::kPin) {
    pin(reinterpret_cast<std::uintptr_t>(part.target), part.nbytes);
    return true;
  }
  if (part.format != WeightLoader::kKeep || part.ranges.empty()) return false;
  if (fill(part)) loader_.finished(part.nbytes);
  return true;
}

bool WeightCarrier::fill(const WeightLoader::Part& part) {
  uint8_t* into = part.format == WeightLoader::kKeep ? part.target : pinned_[current_];
  for (const ByteRange& range : part.ranges) {
    if (const int error = read_range(range, into); error != 0) {
      loader_.failed({part.number, std::max(error, 0)});
      return false;
    }
    into += range.nbytes;
  }
  return true;
}

void WeightCarrier::store(const WeightLoader::Part& part) {
  // Nothing is gained by a second slot: other threads' copies fill the time.
  copy_bytes(pinned_[current_], part.target, part.nbytes, stream_);
  wait_for_stream(stream_);
  std::memcpy(reinterpret_cast<void*>(part.ranges[0].offset), pinned_[current_],
              static_cast<size_t>(part.nbytes));
  loader_.finished(part.nbytes);
}

void WeightCarrier::send(const WeightLoader::Part& part) {
  if (part.format == WeightLoader::kKeep) {
    std::memcpy(part.target, pinned_[current_], static_cast<size_t>(part.nbytes));
    loader_.finished(part.nbytes);
    return;
  }
  if (part.format == WeightLoader::kCopy) {
    copy_bytes(part.target, pinned_[current_], part.nbytes, stream_);
  } else {
    copy_bytes(staged_[current_], pinned_[current_], part.nbytes, stream_);
    pack(part);
  }
  record_event(events_[current_], stream_);
  current_ = (current_ + 1) % pinned_.size();
  loader_.finished(part.nbytes);
}

void WeightCarrier::pack(const WeightLoader::Part& part) {
  const uint8_t* raw = staged_[current_];
  if (part.source_format != part.format) {
    unsigned long long* bad = bad_values_ + current_;
    zero_bytes(bad, sizeof *bad, stream_);
    quantize_cuda(part.source_format, raw, part.num_rows * part.cols, part.format, encoded_, bad, stream_);
    copy_bytes(const_cast<unsigned long long*>(pinned_bad_values_ + current_), bad, sizeof *bad, stream_);
    quantized_[current_] = part.number;
    raw = encoded_;
  }
  pack_cuda(part.format, raw, part.first_row, part.num_rows, part.cols, part.target, stream_);
}

}  // namespace helexa
