// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace helexa {

// A recorded sequence of CPU op calls, replayed as one call: the CPU's counterpart of a CUDA graph.  It holds addresses, so the
// buffers it was captured with must stay alive; whatever changes from step to step is read from them.
class CpuGraph {
 public:
  // While a thread captures, its op calls are recorded and not run.  Throws std::logic_error if it captures already.
  void begin_capture();
  void end_capture();
  void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void replay() const {
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }

  // The graph that this thread captures into, or null.
  static CpuGraph* capturing();

 private:
  std::vector<std::function<void()>> calls_;
};

// Runs `call` now, or records it if this thread is capturing.
template <class F>
void launch(F&& call) {
  if (CpuGraph* graph = CpuGraph::capturing()) {
    graph->append(std::forward<F>(call));
  } else {
    call();
  }
}

}  // namespace helexa
