// Runs a kernel with the memory it asks for, which costs next to nothing from the second call on: a
// thread keeps its workspace, calls of equal description share a plan, and what was made of weights
// serves as long as they stay the same.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "common/arena.h"
#include "cpu/kernels/call_key.h"
#include "cpu/recently_used.h"

namespace convext::cpu {

class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes);

  // Aligned; null where there is none.
  void* data() const { return Arena::aligned(data_.get()); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* data) const;
  };
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> data_;
};

// Workspace of one call: what this thread's last call has left, where that is large enough. A call
// within a call finds nothing left.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;

  void* data() const { return memory_.data(); }

 private:
  Memory memory_;
};

// What calls of equal description share.
struct Plan {
  int64_t workspace;  // bytes
  int64_t packed;     // see Arena::pack
  Memory kept;        // see Arena::keep
};

// From what a kernel asked of a counting arena.
std::shared_ptr<const Plan> make_plan(const char* op, const Arena& counter);

template <class Call>
struct PlanKey {
  void (*kernel)(const Call&, Arena&);
  Call description;

  bool operator==(const PlanKey&) const = default;
  uint64_t hash() const { return hash_of(uintptr_t(kernel), description.hash()); }
};

template <class Call>
RecentlyUsed<PlanKey<Call>, const Plan>& plans() {
  constexpr size_t kMost = 256;
  constexpr int64_t kMostBytes = 32 << 20;
  // Never destroyed: threads may outlive static objects.
  static auto& store = *new RecentlyUsed<PlanKey<Call>, const Plan>(kMost, kMostBytes);
  return store;
}

// Where one call packs its weights, or finds them packed. Weights may change behind any counter and
// any address (numpy and DLPack share memory, .data hides from versions), so that only their bytes
// can tell: packed weights lie beside a copy of what they were made of. To compare costs a fraction
// of packing. The copy is made when the same weights are seen a second time, which in training
// hardly happens.
class Packing {
 public:
  // `fallback` has room for plan->packed bytes.
  Packing(const std::shared_ptr<const Plan>& plan, Weights weights, void* fallback);

  Arena::Lasting memory() const { return memory_; }
  // The weights to pack: a copy that nobody changes, where it is to be kept.
  const void* weights() const { return weights_; }
  // To be said when the kernel has run.
  void done();

 private:
  friend StoreSize packed_weights_size();
  struct Packed;
  struct Key {
    std::shared_ptr<const Plan> plan;  // held, so that no other plan takes its address
    const void* weights;

    bool operator==(const Key&) const = default;
    uint64_t hash() const { return hash_of(uintptr_t(plan.get()), uintptr_t(weights)); }
  };
  static RecentlyUsed<Key, Packed>& store();

  Key key_;
  const void* weights_;
  Arena::Lasting memory_;
  std::shared_ptr<Packed> found_, made_;
};

StoreSize packed_weights_size();

template <class Call>
void run_kernel(const char* op, Call call, void (*kernel)(const Call&, Arena&)) {
  const PlanKey<Call> key{kernel, call.description()};
  std::shared_ptr<const Plan> plan = plans<Call>().find(key);
  const bool planned = plan != nullptr;
  if (!planned) {
    Arena counter(nullptr, {}, {});
    kernel(call, counter);
    plan = make_plan(op, counter);
  }
  const Workspace workspace(plan->workspace + plan->packed);
  const auto run = [&](Arena::Lasting packed) {
    Arena arena(workspace.data(), {plan->kept.data(), planned}, packed);
    kernel(call, arena);
  };
  void* packed = static_cast<char*>(workspace.data()) + plan->workspace;
  if constexpr (requires { call.weights(); }) {
    if (planned && plan->packed > 0) {
      Packing packing(plan, call.weights(), packed);
      call.set_weights(packing.weights());
      run(packing.memory());
      packing.done();
      return;
    }
  }
  run({packed, false});
  if (!planned) plans<Call>().insert(key, plan, plan->kept.bytes());
}

}  // namespace convext::cpu
