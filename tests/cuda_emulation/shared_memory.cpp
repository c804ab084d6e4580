#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int kPoison = 0xff;
constexpr size_t kAlignment = 1024;  // of dynamic shared memory, which swizzles repeat within
constexpr size_t kGrain = 64;        // in which written parts are looked for

}  // namespace

SharedMemory::~SharedMemory() {
  std::free(dynamic_);
}

void SharedMemory::begin_launch(size_t dynamic_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  const bool fits =
      dynamic_room_ == dynamic_bytes;  // the end must be where the sanitizer guards it
#else
  const bool fits = dynamic_room_ >= dynamic_bytes;
#endif
  if (!fits) {
    std::free(dynamic_);
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, dynamic_bytes)) fail("no memory is left");
    dynamic_ = static_cast<unsigned char*>(memory);
    dynamic_room_ = dynamic_bytes;
  }
  dynamic_bytes_ = dynamic_bytes;
  find_static();
  blocks_ = 0;
}

void SharedMemory::begin_block() {
  if (dynamic_bytes_) std::memset(dynamic_, kPoison, dynamic_bytes_);
  if (static_) poison_static();
  ++blocks_;
}

bool SharedMemory::contains(const void* address) const {
  const auto* byte = static_cast<const unsigned char*>(address);
#if defined(__SANITIZE_ADDRESS__)
  return true;  // static shared memory is anywhere among the library's variables
#endif
  return (byte >= dynamic_ && byte < dynamic_ + dynamic_bytes_) ||
         (byte >= static_ && byte < static_ + static_bytes_);
}

#if defined(__SANITIZE_ADDRESS__)
void SharedMemory::find_static() {}
#else
void SharedMemory::find_static() {
  struct Search {
    const unsigned char* member;
    unsigned char* begin;
    size_t bytes;
  } search{reinterpret_cast<const unsigned char*>(&current), nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        auto& search = *static_cast<Search*>(argument);
        auto* begin = static_cast<unsigned char*>(module->dlpi_tls_data);
        if (!begin || search.member < begin) return 0;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& header = module->dlpi_phdr[i];
          if (header.p_type != PT_TLS || search.member >= begin + header.p_memsz) continue;
          search.begin = begin;
          search.bytes = header.p_memsz;
          return 1;
        }
        return 0;
      },
      &search);
  static_ = search.begin;
  static_bytes_ = search.bytes;
}
#endif

void SharedMemory::poison_static() {
  Thread* const kept = current;  // lies there too
  if (blocks_ == 0) {
    std::memset(static_, kPoison, static_bytes_);
  } else {
    // The first block has written what the others will; looked up again now and then.
    if ((blocks_ & (blocks_ - 1)) == 0) find_written();
    for (auto [begin, end] : written_) std::memset(static_ + begin, kPoison, end - begin);
  }
  current = kept;
}

void SharedMemory::find_written() {
  const size_t grains = (static_bytes_ + kGrain - 1) / kGrain;
  if (blocks_ == 1) grain_written_.assign(grains, false);
  written_.clear();
  unsigned char poison[kGrain];
  std::memset(poison, kPoison, kGrain);
  for (size_t grain = 0; grain < grains; ++grain) {
    const size_t begin = grain * kGrain, end = std::min(begin + kGrain, static_bytes_);
    if (std::memcmp(static_ + begin, poison, end - begin) != 0) grain_written_[grain] = true;
    if (!grain_written_[grain]) continue;
    if (!written_.empty() && written_.back().second == begin) {
      written_.back().second = end;
    } else {
      written_.emplace_back(begin, end);
    }
  }
}

}  // namespace emulator
