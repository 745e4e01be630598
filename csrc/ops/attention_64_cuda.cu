// SPDX-License-Identifier: GPL-3.0-or-later
#include "ops/attention_cuda.cuh"

namespace helexa {

void attention_64_cuda(const AttentionCall& call, void* stream) { attention_tiled::launch<64>(call, stream); }

}  // namespace helexa
