#include "context.h"

#include <pthread.h>

namespace emulator {

#if defined(CONVEXT_EMULATOR_SWITCH)

// A jump rather than a return: the processor predicts returns by the calls that it has seen.
asm(R"(
  .text
  .globl convext_emulator_switch
  .hidden convext_emulator_switch
  .type convext_emulator_switch, @function
convext_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size convext_emulator_switch, . - convext_emulator_switch
)");

void make_context(Context& context, void (*entry)(), size_t skipped) {
  void** top =
      reinterpret_cast<void**>(static_cast<char*>(context.stack) + context.stack_bytes - skipped);
  *--top = nullptr;  // where entry would return to: a debugger's walk ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_registers = 0; saved_registers < 6; ++saved_registers) *--top = nullptr;
  context.pointer = top;
}

#else

void make_context(Context& context, void (*entry)(), size_t skipped) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = context.stack;
  context.state.uc_stack.ss_size = context.stack_bytes - skipped;
  makecontext(&context.state, entry, 0);
}

#endif

void describe_own_stack([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &context.stack, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
#endif
}

}  // namespace emulator
