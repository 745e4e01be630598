// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/quantize.h"

#include <algorithm>
#include <atomic>

#include "core/parallel.h"
#include "quant/formats.h"

namespace helexa {

void quantize_cpu(int source_format, const uint8_t* source, int64_t num_values, int format, uint8_t* blocks,
                  int64_t* num_bad) {
  const auto quantize_run = pick_quantize_run();
  const int64_t value_bytes = with_format(static_cast<Format>(source_format),
                                          [](auto f) -> int64_t { return decltype(f)::kBlockBytes; });
  const int64_t run_bytes = with_format(static_cast<Format>(format), [](auto f) -> int64_t {
    return kQuantizeRun / decltype(f)::kBlockSize * decltype(f)::kBlockBytes;
  });
  std::atomic<int64_t> bad{0};
  parallel_for((num_values + kQuantizeRun - 1) / kQuantizeRun, 4, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t first = run * kQuantizeRun;
      bad += quantize_run(source_format, source + first * value_bytes,
                          std::min(kQuantizeRun, num_values - first), format, blocks + run * run_bytes);
    }
  });
  *num_bad = bad;
}

}  // namespace helexa
