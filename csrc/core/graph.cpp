// SPDX-License-Identifier: GPL-3.0-or-later
#include "core/graph.h"

#include <stdexcept>

namespace helexa {
namespace {
thread_local CpuGraph* current = nullptr;
}  // namespace

void CpuGraph::begin_capture() {
  if (current != nullptr) throw std::logic_error("this thread captures another graph already");
  calls_.clear();
  current = this;
}

void CpuGraph::end_capture() {
  if (current != this) throw std::logic_error("this thread does not capture this graph");
  current = nullptr;
}

CpuGraph* CpuGraph::capturing() { return current; }

}  // namespace helexa
