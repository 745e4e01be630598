// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/attention_cuda.cuh"

namespace helexa {

void attention_128_cuda(const AttentionCall& call, void* stream) {
  attention_tiled::launch<128>(call, stream);
}

}  // namespace helexa
