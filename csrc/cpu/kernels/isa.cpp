#include "cpu/kernels/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace convext::cpu {
namespace {

const IsaKernels* find(const char* name) {
  for (int i = 0; i < isa_count(); ++i) {
    const IsaKernels& isa = isa_at(i);
    if (std::strcmp(isa.name, name) == 0) return isa.runs_here() ? &isa : nullptr;
  }
  return nullptr;
}

const IsaKernels* widest() {
  const IsaKernels* best = &scalar_kernels();
  for (int i = 0; i < isa_count(); ++i) {
    if (isa_at(i).runs_here()) best = &isa_at(i);
  }
  return best;
}

const char* requested() {
  const char* name = std::getenv("CONVEXT_CPU_ISA");
  return name && *name ? name : nullptr;
}

std::atomic<const IsaKernels*>& in_use() {
  static std::atomic<const IsaKernels*> table = [] {
    const char* name = requested();
    const IsaKernels* forced = name ? find(name) : nullptr;
    return forced ? forced : widest();
  }();
  return table;
}

}  // namespace

const IsaKernels& kernels() {
  return *in_use().load(std::memory_order_relaxed);
}

int isa_count() {
#if defined(__x86_64__)
  return 3;
#else
  return 1;
#endif
}

const IsaKernels& isa_at(int index) {
#if defined(__x86_64__)
  if (index == 1) return avx2_kernels();
  if (index == 2) return avx512_kernels();
#endif
  (void)index;
  return scalar_kernels();
}

bool set_isa(const char* name) {
  const IsaKernels* isa = find(name);
  if (isa) in_use().store(isa);
  return isa != nullptr;
}

const char* refused_isa() {
  const char* name = requested();
  return name && !find(name) ? name : nullptr;
}

}  // namespace convext::cpu
