// Runs the blocks of a launch: which thread goes on, and what ends the process when none can.
#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>

namespace emulator {

thread_local Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;  // below each stack, not to be touched
constexpr int kMostThreads = 1024;
constexpr size_t kMostSharedBytes = 227 << 10;  // of a block, on sm_90

int from_environment(const char* name, int usual) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : usual;
}

Settings from_environment() {
  const char* async = std::getenv("CONVEXT_EMULATOR_ASYNC");
  Settings s{from_environment("CONVEXT_EMULATOR_ORDER", 0), async && !std::strcmp(async, "early"),
             from_environment("CONVEXT_EMULATOR_THREADS", std::thread::hardware_concurrency())};
#if defined(__SANITIZE_ADDRESS__) || defined(CONVEXT_EMULATOR_RACES)
  s.threads = 1;  // with address, static shared memory is there once; races keeps one book
#endif
  return s;
}

// The workers of the launch that is running; held by one launch at a time.
std::mutex launching;
std::vector<std::unique_ptr<Worker>> workers;
std::atomic<uint64_t> total_switches{0};

// Waits until no block that was handed out earlier is in hand, so that which of several mistakes is
// reported does not depend on which OS thread was faster.
void wait_for_earlier_blocks(uint64_t position) {
  const auto earlier = [&](const auto& worker) { return worker->position < position; };
  while (std::any_of(workers.begin(), workers.end(), earlier)) usleep(1000);
}

}  // namespace

Settings settings;

void fail(const char* what, const char* place) {
  if (const Thread* t = current) {
    const Block& b = *t->block;
    wait_for_earlier_blocks(static_cast<const Worker&>(b).position);
    std::fprintf(stderr, "cuda emulator: %s: block (%u,%u,%u) thread (%u,%u,%u) at %s\n", what,
                 b.index.x, b.index.y, b.index.z, t->index.x, t->index.y, t->index.z, place);
  } else {
    std::fprintf(stderr, "cuda emulator: %s: at %s\n", what, place);
  }
  std::abort();
}

void fail(const char* what, Place place) {
  fail(what, (std::string(place.file_name()) + ":" + std::to_string(place.line())).c_str());
}

uint64_t switches() {
  return total_switches.exchange(0);
}

// --------------------------------------------------------------------------------------------------

Worker::~Worker() {
  for (auto& fiber : fibers_) {
    munmap(static_cast<char*>(fiber->context.stack) - kGuardBytes, kStackBytes + kGuardBytes);
  }
}

// What a fiber runs, for all its life: its thread's part of one block after another.
void Worker::entry() {
  entered();
  for (;;) {
    Worker& worker = this_worker();
    worker.body_(worker.argument_);
    Fiber& fiber = this_fiber();
    if (!fiber.copies.empty()) fail("a thread ends before its copies were waited for", fiber.place);
    if (current->block->threads >= 128 && !worker.warpgroup_of(fiber).issued.empty()) {
      fail("a thread ends before its products were waited for", fiber.place);
    }
    --worker.live_;
    worker.wait(State::done);
  }
}

void Worker::make_fibers(int count) {
  while (int(fibers_.size()) < count) {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory is left for stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber->context.stack = static_cast<char*>(memory) + kGuardBytes;
    fiber->context.stack_bytes = kStackBytes;
    const int number = int(fibers_.size());
    fiber->number = number;
    fiber->warp = number / 32;
    fiber->lane = number % 32;
    fiber->block = this;
    // Stacks that begin at the same place in a page would share a few sets of every cache.
    make_context(fiber->context, entry, size_t(number % 16) * 240 + 16);
    fibers_.push_back(std::move(fiber));
  }
}

void Worker::begin_launch(void (*body)(const void*), const void* argument, dim3 grid, dim3 block,
                          size_t shared_bytes) {
  body_ = body;
  argument_ = argument;
  this->grid = grid;
  size = block;
  threads = int(block.x * block.y * block.z);
  make_fibers(threads);
  warps_.resize((threads + 31) / 32);
  warpgroups_.resize((warps_.size() + 3) / 4);
  warp_order_.resize(warps_.size());
  std::iota(warp_order_.begin(), warp_order_.end(), 0);
  if (settings.order == 1) std::reverse(warp_order_.begin(), warp_order_.end());
  for (int i = 0; i < threads; ++i) {
    fiber(i).index = make_uint3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  memory.begin_launch(shared_bytes);
  shared = memory.dynamic();
  this->shared_bytes = shared_bytes;
  describe_own_stack(scheduler_);
}

void Worker::run_block(uint64_t number) {
  index = make_uint3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
  random.seed(uint64_t(settings.order) + 7919 * number);
  memory.begin_block();
  races::begin_block(*this, memory);
  live_ = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(i);
    f.state = State::ready;
    f.open_group = f.open_products = 0;
    f.products_fenced = false;
  }
  for (size_t w = 0; w < warps_.size(); ++w) {
    const int lanes = std::min(32, threads - int(w) * 32);
    warps_[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps_[w].gatherings = 0;
  }
  for (Warpgroup& group : warpgroups_) {
    group.arrived = 0;
    group.issued.clear();
  }
  for (Barrier& barrier : barriers_) barrier.arrived = barrier.trues = 0;

  // A warp goes on until all its lanes wait, so warps drift as far apart as barriers let them.
  while (live_) {
    if (settings.order >= 2) std::shuffle(warp_order_.begin(), warp_order_.end(), random);
    bool progress = false;
    for (int w : warp_order_) {
      if (!warps_[w].ready) continue;
      progress = true;
      Fiber& first = fiber(w * 32 + next_lane(warps_[w]));
      current = &first;
      ++switches;
      switch_context(scheduler_, first.context);
    }
    if (!progress && !land_tensor_copy()) report_deadlock();
  }
  current = nullptr;
  if (!tensor_copies.empty()) {
    fail("a block ends before its TMA copies have landed", tensor_copies.front().place);
  }
}

int Worker::next_lane(const Warp& warp) {
  const int order = settings.order;
  if (order == 0) return std::countr_zero(warp.ready);
  if (order == 1) return 31 - std::countl_zero(warp.ready);
  const int turned = int(random() % 32);
  return (std::countr_zero(std::rotr(warp.ready, turned)) + turned) % 32;
}

void Worker::wait(State state) {
  Fiber& from = this_fiber();
  Warp& warp = warp_of(from);
  from.state = state;
  warp.ready &= ~(1u << from.lane);
  // Straight to the next lane, but where the order is shuffled leave the warp now and then.
  const bool stay = warp.ready && (settings.order < 2 || random() % 64);
  if (stay) {
    Fiber& to = fiber(from.warp * 32 + next_lane(warp));
    current = &to;
    ++switches;
    switch_context(from.context, to.context);
  } else {
    switch_context(from.context, scheduler_);
  }
}

void Worker::wake(Fiber& fiber) {
  fiber.state = State::ready;
  warp_of(fiber).ready |= 1u << fiber.lane;
}

bool Worker::land_tensor_copy() {
  if (tensor_copies.empty()) return false;
  const size_t which = settings.order < 2 ? 0 : random() % tensor_copies.size();
  const TensorCopy copy = tensor_copies[which];
  tensor_copies.erase(tensor_copies.begin() + ptrdiff_t(which));
  current = copy.thread;
  land(copy);
  return true;
}

void Worker::report_deadlock() {
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(i);
    current = &f;
    if (f.state == State::at_barrier) {
      fail("deadlock: waits at a barrier that others never reach", f.place);
    }
    if (f.state == State::in_warp_operation) {
      fail("deadlock: waits in a warp operation that others never reach", f.place);
    }
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(i);
    current = &f;
    if (f.state == State::in_warpgroup) {
      fail("deadlock: waits in a wgmma that others of its warpgroup never reach", f.place);
    }
    if (f.state == State::at_mbarrier) fail_at_mbarrier(f);
  }
  fail("deadlock");
}

// --------------------------------------------------------------------------------------------------

int barrier(int number, int threads, bool predicate, Place place) {
  Worker& worker = this_worker();
  Fiber& fiber = this_fiber();
  Barrier& b = worker.named_barrier(number);
  fiber.place = place;
  if (b.arrived == 0) {
    b.expected = threads;
    b.place = place;
    b.trues = 0;
  }
  if (b.expected != threads) fail("a barrier is reached with differing counts of threads", place);
  if (number == 0 && !same(b.place, place)) {
    fail("__syncthreads is reached at two places by threads of one block (divergent barrier)",
         place);
  }
  b.trues += predicate;
  fiber.barrier = number;
  fiber.state = State::at_barrier;
  if (++b.arrived < b.expected) {
    worker.wait(State::at_barrier);
    return b.result;  // nobody completes this barrier again before this thread comes back to it
  }
  b.result = b.trues;
  b.arrived = 0;
  races::Group group;
  for (int i = 0; i < worker.threads; ++i) {
    Fiber& other = worker.fiber(i);
    if (other.state != State::at_barrier || other.barrier != number) continue;
    group.add(i);
    worker.wake(other);
  }
  group.join();
  return b.result;
}

// --------------------------------------------------------------------------------------------------

namespace {

// The block that is handed out at a position: in order, in reverse or shuffled.
uint64_t block_at(uint64_t position, uint64_t blocks) {
  const uint64_t order = uint64_t(settings.order);
  if (order == 0) return position;
  if (order == 1) return blocks - 1 - position;
  uint64_t step = (order * 0x9e3779b9u) % blocks | 1;
  while (std::gcd(step, blocks) != 1) step += 2;
  return (position % blocks * (step % blocks) + order) % blocks;
}

// OS threads that help the one that launches, started once and then waiting for work.
class Helpers {
 public:
  // Calls work(0) here and work(1), ... work(count - 1) on others; returns when all have.
  template <class Work>
  void run(int count, const Work& work) {
    std::unique_lock lock(mutex_);
    while (int(threads_.size()) < count - 1) {
      threads_.emplace_back([this, index = int(threads_.size()) + 1] { serve(index); });
      threads_.back().detach();
    }
    call_ = [](const void* work, int index) { (*static_cast<const Work*>(work))(index); };
    work_ = &work;
    count_ = count;
    busy_ = count - 1;
    ++turn_;
    if (count > 1) start_.notify_all();
    lock.unlock();
    work(0);
    lock.lock();
    finished_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return turn_ != seen && index < count_; });
      seen = turn_;
      lock.unlock();
      call_(work_, index);
      lock.lock();
      if (--busy_ == 0) finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, finished_;
  std::vector<std::thread> threads_;
  void (*call_)(const void*, int) = nullptr;
  const void* work_ = nullptr;
  int count_ = 0, busy_ = 0;
  uint64_t turn_ = 0;
};

void check(dim3 grid, dim3 block, size_t shared_bytes, Place place) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.z > 64) {
    fail("launch: a block has 1 to 1024 threads, 64 at most along z", place);
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    fail("launch: a grid has 1 to 2147483647, 65535 and 65535 blocks along x, y and z", place);
  }
  if (shared_bytes > kMostSharedBytes) {
    fail("launch: more shared memory than the 227 KiB that a block can have", place);
  }
}

}  // namespace

void run(void (*body)(const void*), const void* argument, dim3 grid, dim3 block,
         size_t shared_bytes, Place place) {
  check(grid, block, shared_bytes, place);
  static Helpers& helpers = *new Helpers;  // never destroyed: its threads use it until the end
  std::lock_guard lock(launching);
  settings = from_environment();
  races::begin_launch();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const int count = int(std::min<uint64_t>(std::max(settings.threads, 1), blocks));
  while (int(workers.size()) < count) workers.push_back(std::make_unique<Worker>());
  std::atomic<uint64_t> next{0};
  helpers.run(count, [&](int index) {
    Worker& worker = *workers[index];
    worker.begin_launch(body, argument, grid, block, shared_bytes);
    for (;;) {
      const uint64_t position = next++;
      worker.position = position < blocks ? position : ~uint64_t{0};
      if (position >= blocks) break;
      worker.run_block(block_at(position, blocks));
    }
    total_switches += std::exchange(worker.switches, 0);
  });
}

}  // namespace emulator
