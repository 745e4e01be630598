// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/attention_cuda.cuh"

namespace helexa {

void attention_256_cuda(const AttentionCall& call, void* stream) {
  attention_tiled::launch<256>(call, stream);
}

}  // namespace helexa
