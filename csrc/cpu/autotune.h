// Algorithms chosen by the clock: what convext.autotune() has "auto" do.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cpu/kernels/conv2d.h"

namespace convext::cpu {

// How long each algorithm took, problem by problem. From any thread.
class MeasuredTimes {
 public:
  using Seconds = std::map<std::string, double>;  // by the algorithm's name
  using Table = std::map<std::string, Seconds>;   // by describe(call)

  // The fastest algorithm for a call that is complete but for its output. Measures them on the
  // first sight of a problem. Null where there is nothing to measure: an empty result, or no two
  // algorithms that can do it.
  const Conv2dAlgorithm* fastest(const char* op, const Conv2dCall&, bool winograd_allowed);

  Table table() const;
  // Leaves alone what was measured here.
  void add(const Table&);

 private:
  // A call as numbers, quicker to look up than its description: sizes, pass, dtype, layout,
  // permission, threads and ISA.
  using Key = std::array<int64_t, sizeof(Conv2dProblem) / sizeof(int64_t) + 6>;
  static Key key_of(const Conv2dCall&, bool winograd_allowed);

  const Conv2dAlgorithm* find(const Key&) const;

  mutable std::mutex mutex_;  // never held while measuring
  Table table_;
  std::map<Key, const Conv2dAlgorithm*> fastest_;
};

// Whose times "auto" goes by in the calling thread; null, as at first, for the table of reasons.
MeasuredTimes* autotuning();
std::shared_ptr<MeasuredTimes> exchange_autotuning(std::shared_ptr<MeasuredTimes> times);

}  // namespace convext::cpu
