#include "cpu/run_kernel.h"

#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <utility>

namespace convext::cpu {
namespace {

constexpr int64_t kMostLeft = 8 << 20;      // bytes of workspace that a thread keeps
constexpr int64_t kMostCompared = 8 << 20;  // bytes of weights: beyond, packing costs no more

thread_local Memory left;

}  // namespace

// c10's memory, but not by its allocator: what is kept belongs to no call that is profiled.
Memory::Memory(int64_t bytes) : bytes_(bytes), data_(c10::alloc_cpu(bytes + Arena::kAlignment)) {}

void Memory::Free::operator()(void* data) const {
  c10::free_cpu(data);
}

Workspace::Workspace(int64_t bytes) {
  memory_ = std::exchange(left, Memory());
  if (memory_.bytes() < bytes || !memory_.data()) memory_ = Memory(bytes);
}

Workspace::~Workspace() {
  if (memory_.bytes() <= kMostLeft) left = std::move(memory_);
}

std::shared_ptr<const Plan> make_plan(const char* op, const Arena& counter) {
  TORCH_CHECK(!counter.overflowed(), op,
              "(): needs a workspace larger than the address space for this problem");
  return std::make_shared<const Plan>(
      Plan{counter.used(), counter.used_packed(), Memory(counter.used_kept())});
}

namespace {

// Of some of the weights. Training changes nearly all.
uint64_t sample_of(Weights weights) {
  constexpr int64_t kSamples = 16;
  const int64_t last = weights.bytes / 2 - 1;  // half of a float, or a 16-bit one
  uint64_t hash = 0;
  for (int64_t i = 0; i < kSamples && last >= 0; ++i) {
    uint16_t value = 0;
    std::memcpy(&value, static_cast<const char*>(weights.data) + i * last / kSamples * 2, 2);
    hash = hash_of(hash, value);
  }
  return hash;
}

}  // namespace

struct Packing::Packed {
  explicit Packed(uint64_t sample) : sample(sample) {}

  bool made_of(Weights others) const {
    return weights.data() && std::memcmp(weights.data(), others.data, others.bytes) == 0;
  }

  std::atomic<uint64_t> sample;  // of the weights seen last
  Memory weights, packed;        // none the first time
};

RecentlyUsed<Packing::Key, Packing::Packed>& Packing::store() {
  constexpr size_t kMost = 512;
  constexpr int64_t kMostBytes = 64 << 20;
  static auto& store = *new RecentlyUsed<Key, Packed>(kMost, kMostBytes);
  return store;
}

Packing::Packing(const std::shared_ptr<const Plan>& plan, Weights weights, void* fallback)
    : key_{plan, weights.data}, weights_(weights.data), memory_{fallback, false} {
  found_ = store().find(key_);
  if (found_ && found_->made_of(weights)) {
    memory_ = {found_->packed.data(), true};
    return;
  }
  const uint64_t sample = sample_of(weights);
  if (!found_) {
    made_ = std::make_shared<Packed>(sample);
    return;
  }
  const bool again = found_->sample.exchange(sample) == sample;
  const int64_t bytes = weights.bytes + plan->packed;
  if (!again || weights.bytes > kMostCompared || !store().has_room(bytes)) return;
  made_ = std::make_shared<Packed>(sample);
  made_->weights = Memory(weights.bytes);
  made_->packed = Memory(plan->packed);
  std::memcpy(made_->weights.data(), weights.data, weights.bytes);
  weights_ = made_->weights.data();
  memory_.base = made_->packed.data();
}

StoreSize packed_weights_size() {
  return Packing::store().size();
}

void Packing::done() {
  if (made_) store().insert(key_, made_, made_->weights.bytes() + made_->packed.bytes());
}

}  // namespace convext::cpu
