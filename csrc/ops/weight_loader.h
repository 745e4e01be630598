// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace helexa {

// Where bytes come from: `offset` in the file behind a descriptor or, with descriptor -1, an address of main memory.
struct ByteRange {
  int descriptor;
  int64_t offset, nbytes;
};

// Weights on their way to a device, part by part; threads that have a WeightCarrier bring them.
class WeightLoader {
 public:
  // In the place of a part's format.  kCopy: the bytes go to `target` as they are.  kStore: from there to the range of main memory.
  // kKeep: to `target` in main memory as they are.  kPin: the pages at `target` in main memory are pinned.
  static constexpr int kCopy = -1, kStore = -2, kKeep = -3, kPin = -4;
  struct Part {
    int64_t number, nbytes;
    std::vector<ByteRange> ranges;  // one after the other; none if the carrier's owner has to fill the slot
    int format, source_format;      // of the bytes, if they are floats to be quantized; else as `format`
    int64_t first_row, num_rows, cols;
    uint8_t* target;
  };
  // Why a part could not be brought: its number, and errno, or 0 for a file that ends too early, or less the number of values that
  // cannot be quantized.
  using Failure = std::pair<int64_t, int>;

  // Adds rows [first_row, first_row + num_rows) of the packed matrix at `target`, in the file's layout; returns the part's number.
  int64_t add(std::vector<ByteRange> ranges, int64_t nbytes, int format, int source_format, int64_t first_row,
              int64_t num_rows, int64_t cols, std::uintptr_t target);
  // Says that no more parts will come.
  void close();
  // Has no further part begun.
  void cancel();
  // Bytes of the parts that have been read so far.
  int64_t done_bytes() const;
  std::optional<Failure> failure() const;

 private:
  friend class WeightCarrier;
  std::optional<Part> take();  // waits; nothing when all have been taken or on cancel
  void finished(int64_t nbytes);
  void failed(Failure failure);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Part> parts_;
  int64_t num_parts_ = 0, done_bytes_ = 0;
  bool is_closed_ = false;
  std::optional<Failure> failure_;
};

// Brings parts of a loader to the device that is current on its thread: a part is read into a slot of pinned memory, copied to the
// device and packed there while the next one is read into the other slot.  What stays in main memory is read into its place.
class WeightCarrier {
 public:
  // pinned, staged: slots of main memory and of the device, each large enough for every part.  encoded: memory of the device for the
  // blocks of a part that is quantized.  bad_values, pinned_bad_values: a number for each slot, on the device and in pinned memory.
  // These three only if there are such parts.
  WeightCarrier(WeightLoader& loader, std::vector<std::uintptr_t> pinned, std::vector<std::uintptr_t> staged,
                std::uintptr_t encoded, std::uintptr_t bad_values, std::uintptr_t pinned_bad_values,
                std::uintptr_t stream);
  ~WeightCarrier();
  WeightCarrier(const WeightCarrier&) = delete;

  // Brings parts until one comes that the caller has to fill, whose number is returned: its bytes go to slot(), then this is to be
  // called again.  Returns -1 when there are no more parts and all have arrived.
  int64_t work();
  std::uintptr_t slot() const { return reinterpret_cast<std::uintptr_t>(pinned_[current_]); }

 private:
  bool is_done(const WeightLoader::Part& part);
  bool fill(const WeightLoader::Part& part);
  void send(const WeightLoader::Part& part);
  void pack(const WeightLoader::Part& part);
  void store(const WeightLoader::Part& part);
  void wait_for_slot(size_t slot);

  WeightLoader& loader_;
  std::vector<uint8_t*> pinned_, staged_;
  uint8_t* encoded_;
  unsigned long long* bad_values_;
  const volatile unsigned long long* pinned_bad_values_;
  std::vector<int64_t> quantized_;  // the number of each slot's last part, if it was quantized, else -1
  std::vector<void*> events_;
  void* stream_;
  size_t current_ = 0;
  std::optional<WeightLoader::Part> waiting_;  // for its bytes from the caller
};

}  // namespace helexa
