#include "cpu/autotune.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <sstream>
#include <utility>
#include <vector>

#include "cpu/kernels/conv2d_choice.h"
#include "cpu/run_kernel.h"

namespace convext::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using Candidates = std::vector<const Conv2dAlgorithm*>;

// Measuring a problem ends after so many seconds or so many runs of each algorithm, but not before
// each has run once.
constexpr double kSeconds = 0.1;
constexpr int kMostRuns = 25;
// A first run as long as this needs no other to warm up for.
constexpr double kSecondsOfWarmRun = 0.02;
// One that took this many times as long as the fastest is out of the race.
constexpr double kHopeless = 3;

constexpr double kNever = std::numeric_limits<double>::infinity();

// Every size and setting that a kernel can see. The file of convext.autotune(cache=...) has it.
std::string describe(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  std::ostringstream text;
  const char* passes[] = {"forward", "grad_input", "grad_weight"};
  text << passes[int(call.pass)] << ", " << p.batch << 'x' << p.in_channels << 'x' << p.in_height
       << 'x' << p.in_width << " by " << p.out_channels << 'x' << p.group_in_channels() << 'x'
       << p.kernel_height << 'x' << p.kernel_width;
  const auto setting = [&](const char* name, int64_t height, int64_t width, int64_t usual) {
    if (height != usual || width != usual) text << ", " << name << ' ' << height << 'x' << width;
  };
  setting("stride", p.stride_height, p.stride_width, 1);
  setting("padding", p.padding_height, p.padding_width, 0);
  setting("dilation", p.dilation_height, p.dilation_width, 1);
  if (p.groups != 1) text << ", groups " << p.groups;
  const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  text << ", " << dtypes[int(call.dtype)] << (call.layout == Layout::nhwc ? " NHWC, " : " NCHW, ")
       << call.threads << (call.threads == 1 ? " thread, " : " threads, ") << call.isa->name;
  return text.str();
}

std::array<int64_t, 4> result_size(const Conv2dCall& call) {
  const Conv2dProblem& p = call.problem;
  switch (call.pass) {
    case Conv2dPass::forward:
      return {p.batch, p.out_channels, p.out_height(), p.out_width()};
    case Conv2dPass::backward_input:
      return {p.batch, p.in_channels, p.in_height, p.in_width};
    default:
      return {p.out_channels, p.group_in_channels(), p.kernel_height, p.kernel_width};
  }
}

Candidates candidates_for(const Conv2dCall& call, bool winograd_allowed) {
  Candidates candidates;
  for (int i = 0; i < conv2d_algorithm_count(); ++i) {
    const Conv2dAlgorithm& algorithm = conv2d_algorithm(i);
    if (is_winograd(algorithm) && !winograd_allowed) continue;
    if (!algorithm.declines(call)) candidates.push_back(&algorithm);
  }
  return candidates;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The workspace is part of what an algorithm costs.
double time_of(const char* op, const Conv2dAlgorithm& algorithm, const Conv2dCall& call) {
  const Clock::time_point start = Clock::now();
  run_kernel(op, call, algorithm.run);
  return seconds_since(start);
}

double median(std::vector<double> times) {
  const auto middle = times.begin() + times.size() / 2;
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

// Leaves out algorithms that fail, as one does whose workspace is larger than the memory. A fused
// block's convolution is measured without what the block adds, which costs them all the same, so
// that it takes the algorithm, and has the bits, of one that stands alone.
MeasuredTimes::Seconds measure(const char* op, Conv2dCall call, const Candidates& candidates) {
  const at::ScalarType dtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  const at::Tensor scratch = at::zeros(result_size(call), at::dtype(dtypes[int(call.dtype)]));
  call.output = scratch.mutable_data_ptr();
  struct Runner {
    const Conv2dAlgorithm* algorithm;
    std::vector<double> times;
  };
  std::vector<Runner> runners;
  double best = kNever;
  const Clock::time_point start = Clock::now();
  for (const Conv2dAlgorithm* algorithm : candidates) {
    try {
      double time = time_of(op, *algorithm, call);
      if (time < kSecondsOfWarmRun) time = time_of(op, *algorithm, call);
      runners.push_back({algorithm, {time}});
      best = std::min(best, time);
    } catch (const std::exception&) {
    }
  }
  // In turn, so that what slows the machine down for a while slows all of them down.
  for (int run = 1; run < kMostRuns && seconds_since(start) < kSeconds; ++run) {
    for (Runner& runner : runners) {
      if (runner.times[0] > kHopeless * best) continue;
      runner.times.push_back(time_of(op, *runner.algorithm, call));
    }
  }
  MeasuredTimes::Seconds seconds;
  for (const Runner& runner : runners) seconds[runner.algorithm->name] = median(runner.times);
  return seconds;
}

bool has_all(const MeasuredTimes::Seconds& seconds, const Candidates& candidates) {
  return std::all_of(candidates.begin(), candidates.end(), [&](const Conv2dAlgorithm* algorithm) {
    return seconds.count(algorithm->name) != 0;
  });
}

// Null where none of them has a time.
const Conv2dAlgorithm* fastest_of(const Candidates& candidates,
                                  const MeasuredTimes::Seconds& seconds) {
  const Conv2dAlgorithm* fastest = nullptr;
  double best = kNever;
  for (const Conv2dAlgorithm* algorithm : candidates) {
    const auto time = seconds.find(algorithm->name);
    if (time == seconds.end() || time->second >= best) continue;
    best = time->second;
    fastest = algorithm;
  }
  return fastest;
}

}  // namespace

MeasuredTimes::Key MeasuredTimes::key_of(const Conv2dCall& call, bool winograd_allowed) {
  Key key;
  std::memcpy(key.data(), &call.problem, sizeof call.problem);
  const int64_t rest[] = {int64_t(call.pass),        int64_t(call.dtype), int64_t(call.layout),
                          int64_t(winograd_allowed), call.threads,        int64_t(call.isa)};
  std::copy(std::begin(rest), std::end(rest), key.end() - std::size(rest));
  return key;
}

const Conv2dAlgorithm* MeasuredTimes::find(const Key& key) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = fastest_.find(key);
  return found == fastest_.end() ? nullptr : found->second;
}

const Conv2dAlgorithm* MeasuredTimes::fastest(const char* op, const Conv2dCall& call,
                                              bool winograd_allowed) {
  const Key key = key_of(call, winograd_allowed);
  if (const Conv2dAlgorithm* known = find(key)) return known;
  for (const int64_t size : result_size(call)) {
    if (size == 0) return nullptr;
  }
  const Candidates candidates = candidates_for(call, winograd_allowed);
  if (candidates.size() < 2) return nullptr;

  // One at a time: what runs beside a measurement is part of it. Another thread may have measured
  // this very problem meanwhile.
  static std::mutex measuring;
  const std::lock_guard<std::mutex> alone(measuring);
  if (const Conv2dAlgorithm* known = find(key)) return known;
  const std::string problem = describe(call);
  Seconds seconds = table()[problem];
  if (!has_all(seconds, candidates)) seconds = measure(op, call, candidates);

  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [name, time] : seconds) table_[problem][name] = time;
  const Conv2dAlgorithm* fastest = fastest_of(candidates, seconds);
  if (fastest) fastest_[key] = fastest;
  return fastest;
}

MeasuredTimes::Table MeasuredTimes::table() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

void MeasuredTimes::add(const Table& table) {
  const std::lock_guard<std::mutex> lock(mutex_);
  table_.insert(table.begin(), table.end());
}

namespace {

thread_local std::shared_ptr<MeasuredTimes> in_use;

}  // namespace

MeasuredTimes* autotuning() {
  return in_use.get();
}

std::shared_ptr<MeasuredTimes> exchange_autotuning(std::shared_ptr<MeasuredTimes> times) {
  return std::exchange(in_use, std::move(times));
}

}  // namespace convext::cpu
