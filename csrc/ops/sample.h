// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <cstdint>

namespace helexa {

// How the tokens of one slot are chosen; python/helexa/ops/sample.py has the same layout.
struct SampleParameters {
  double top_p;
  double typical_p;
  double presence_penalty;
  uint64_t seed;
  const int32_t*
      counts;         // [vocab_size], 2 * (how often it was generated) + (whether the prompt has it), or null
  const float* bias;  // [vocab_size], or null
  float temperature;  // 0: the largest logit
  float min_p;
  float repetition_penalty;
  float frequency_penalty;
  int32_t top_k;    // 0: all
  int32_t num_top;  // alternatives to report with their logits; -1: no logits at all
};

constexpr int kMaxVocabulary = 1 << 18;  // more would overflow sums of weights
constexpr int kMaxTop = 20;

// What the host is told about one row, in int32.
struct SampleRecord {
  int32_t token_id;
  int32_t status;    // kSampled, kNotFinite or kForced
  int32_t position;  // of the token
  int32_t num_top;
  float peak;   // the largest adjusted logit, which is what was not finite
  float logit;  // of the token, as the model has it
  float
      largest;  // of the logits as the model has them; that and what follows only where num_top is asked for
  int32_t asked;   // the parameters' num_top
  uint64_t total;  // the sum of e^(logit - largest), times 2^41
  int32_t top_ids[kMaxTop];
  float top_logits[kMaxTop];  // below `largest` by so much, ascending
};

constexpr int kSampled = 0, kNotFinite = 1, kForced = 2;
// What `forced` says of a slot besides a token.
constexpr int kAnyToken = -1, kMaskedTokens = -2;

// Bytes of a workspace for up to max_rows rows; it starts as zeros, and each call leaves it ready for the next.
int64_t sample_workspace_bytes(int64_t max_rows, int64_t vocab_size);

// Chooses one token per row of logits [num_rows, vocab_size].  Row r belongs to slots[r], which owns a row of parameters, of forced, of
// masks [num_slots, mask_words] (bit i % 32 of word i / 32: token i may come) and of last_tokens, where its token goes, also counted in
// its counts.  positions [num_rows] are those of the tokens that the logits follow.  records [num_rows].  workspace: for max_rows.
// greedy_only: no row has a temperature above 0 or wants logits reported.
void sample_cuda(const float* logits, const int32_t* slots, const int32_t* positions,
                 const SampleParameters* parameters, const int32_t* forced, const uint32_t* masks,
                 int64_t mask_words, int32_t* last_tokens, SampleRecord* records, void* workspace,
                 int64_t max_rows, int64_t num_rows, int64_t vocab_size, bool greedy_only, void* stream);

}  // namespace helexa
