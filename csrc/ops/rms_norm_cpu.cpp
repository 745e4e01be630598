// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/rms_norm.h"

#include "core/parallel.h"

namespace helexa {
namespace {

// Values per claimed range: some microseconds of work.  Smaller inputs stay on the calling thread.
constexpr int64_t kGrainValues = 32768;

}  // namespace

void rms_norm_cpu(const float* x, const float* weight, float* residual, float* out, int64_t num_tokens,
                  int64_t width, float eps) {
  const auto rms_norm_rows = pick_rms_norm_rows();
  parallel_for(num_tokens, kGrainValues / width + 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * width;
    rms_norm_rows(x + offset, weight, residual == nullptr ? nullptr : residual + offset, out + offset,
                  end - begin, width, eps);
  });
}

}  // namespace helexa
