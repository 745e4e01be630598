// SPDX-License-Identifier: GPL-3.0-or-later
// The next token of each row, with the rules of python/helexa/engine/sampler.py, in up to three launches:
//
//   scan     the largest logit, after mask, penalties and bias.  Greedy rows are done then.
//   weigh    e^-gap of every token, where gap = (largest - logit) / temperature: their sum, and how many tokens lie how far below.
//            Rows without filters draw from that; for the others the counts bound the gap of whatever top_k, top_p or min_p can keep.
//   pick     what lies within that bound, a few dozen tokens as a rule, is gathered by all blocks; the last one of a row applies the
//            filters and draws.  Where the bound leaves too many tokens, one block goes over the whole row instead.
//
// A row is cut into chunks, one block each; the last block of a row to finish a launch does what needs all of them.  Weights are summed
// as integers, times 2^41, so that the result does not depend on the order: a seed gives one text whatever else is in the batch.  A row
// that reports logits is a second job beside the one that chooses: the same launches over what the model gave, with top_k = num_top.
#include "ops/sample_pick.cuh"
#include "ops/sample_scan.cuh"
#include "ops/sample_weigh.cuh"

namespace helexa {
using namespace sampling;

namespace {

// Cuts the workspace into its parts; returns how long it is.
int64_t divide(uint8_t* base, int64_t max_rows, int64_t num_chunks, Workspace* parts) {
  int64_t used = 0;
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + used);
    used += (count * static_cast<int64_t>(sizeof(*part)) + 255) / 256 * 256;
  };
  const int64_t jobs = 2 * max_rows;
  take(parts->jobs, jobs);
  take(parts->histograms, jobs * kBins);
  take(parts->sums, jobs * num_chunks);
  take(parts->places, jobs * num_chunks);
  take(parts->candidates, jobs * kGathered);
  return used;
}

}  // namespace

int64_t sample_workspace_bytes(int64_t max_rows, int64_t vocab_size) {
  Workspace parts;
  return divide(nullptr, max_rows, (vocab_size + kChunk - 1) / kChunk, &parts);
}

void sample_cuda(const float* logits, const int32_t* slots, const int32_t* positions,
                 const SampleParameters* parameters, const int32_t* forced, const uint32_t* masks,
                 int64_t mask_words, int32_t* last_tokens, SampleRecord* records, void* workspace,
                 int64_t max_rows, int64_t num_rows, int64_t vocab_size, bool greedy_only, void* stream) {
  if (num_rows == 0) return;
  const int64_t num_chunks = (vocab_size + kChunk - 1) / kChunk;
  Call call{logits,
            slots,
            positions,
            parameters,
            forced,
            masks,
            mask_words,
            last_tokens,
            records,
            static_cast<int>(num_rows),
            static_cast<int>(vocab_size),
            {}};
  divide(static_cast<uint8_t*>(workspace), max_rows, num_chunks, &call.workspace);
  Launch launch{dim3(static_cast<unsigned>(num_chunks), static_cast<unsigned>(num_rows), greedy_only ? 1 : 2),
                dim3(kThreads), stream, 0, true};
  launch_kernel(scan_kernel, launch, call);
  if (greedy_only) return;
  launch_kernel(weigh_kernel, launch, call);
  launch.shared_bytes = kGathered * sizeof(uint2);
  launch_kernel(pick_kernel, launch, call);
}

}  // namespace helexa
