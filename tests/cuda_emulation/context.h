// A stack and what is running on it, and the switch from one to another.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
// Elsewhere than on x86-64 the C library switches, some ten times slower.
#if defined(__x86_64__) && !defined(CONVEXT_EMULATOR_UCONTEXT)
#define CONVEXT_EMULATOR_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
  void* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
#if defined(CONVEXT_EMULATOR_SWITCH)
  void* pointer = nullptr;  // of the stack, where everything that must be kept was pushed
#else
  ucontext_t state;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* sanitizer = nullptr;
#endif
};

#if defined(CONVEXT_EMULATOR_SWITCH)
// Pushes the registers that a function must keep, exchanges the stack pointers, pops. In
// context.cpp.
extern "C" void convext_emulator_switch(void** save, void* load);
#endif

inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#endif
#if defined(CONVEXT_EMULATOR_SWITCH)
  convext_emulator_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

// The first switch to `context` calls entry(), which calls entered() first and never returns. The
// stack begins `skipped` bytes, a multiple of 16, below its highest address.
void make_context(Context& context, void (*entry)(), size_t skipped);

inline void entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Fills in the bounds of the stack that the caller runs on, for the sanitizer.
void describe_own_stack(Context& context);

}  // namespace emulator
