// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "ops/quant_matmul.h"

namespace helexa {

// The input of matmuls as the integer kernels read it (quant_matmul.h): runs of neighbouring rows, each cut into groups of its own, as
// those of one expert are.  Its memory grows to the largest input and is then reused.
class QuantizedInput {
 public:
  void begin(int64_t cols) {
    cols_ = cols;
    num_tokens_ = bytes_ = 0;
    groups_.clear();
    offsets_.clear();
  }

  // The next rows are a run.
  void add_run(int64_t num_tokens) {
    const auto group_width = pick_token_group_width();
    offsets_.push_back(bytes_);
    for (const int64_t end = num_tokens_ + num_tokens; num_tokens_ < end;) {
      const int width = group_width(end - num_tokens_);
      groups_.push_back({num_tokens_, std::min<int64_t>(end - num_tokens_, width), width, bytes_});
      bytes_ += cols_ / 32 * group_record_bytes(width);
      num_tokens_ += groups_.back().count;
    }
  }

  // rows(first, count) gives the address of so many rows [count, cols]; each row is asked for once, on any thread, also where nothing
  // is to be quantized.
  template <class Rows>
  void fill(bool quantize, Rows&& rows) {
    const auto quantize_group = pick_quantize_group();
    if (quantize && static_cast<int64_t>(records_.size()) < bytes_) records_.resize(bytes_);
    auto work = [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const Group& group = groups_[g];
        const float* x = rows(group.first, group.count);
        if (quantize) quantize_group(x, group.count, group.width, cols_, records_.data() + group.offset);
      }
    };
    const int64_t num_groups = static_cast<int64_t>(groups_.size());
    if (num_tokens_ * cols_ <= kSerialValues) {
      work(0, num_groups);
    } else {
      parallel_for(num_groups, 1, work);
    }
  }

  const uint8_t* records(size_t run) const { return records_.data() + offsets_[run]; }

 private:
  // Below this many values one thread is faster than two can be set to work.
  static constexpr int64_t kSerialValues = 32768;
  struct Group {
    int64_t first, count;
    int width;
    int64_t offset;  // in records_
  };
  int64_t cols_ = 0, num_tokens_ = 0, bytes_ = 0;
  std::vector<uint8_t> records_;
  std::vector<Group> groups_;
  std::vector<int64_t> offsets_;  // of each run in records_
};

}  // namespace helexa
