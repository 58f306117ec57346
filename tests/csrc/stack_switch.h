// Several stacks in one thread, and going from one to another. swapcontext would do, but for two
// system calls each time, which took a third of the time of a kernel on the host.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>

namespace on_host {

using Stack = void*;  // where it stands, with what its owner needs to go on

#if defined(__x86_64__)

[[gnu::naked, gnu::noinline]] inline void switch_stack(Stack* /*from*/, Stack /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

// A stack that begins with a call of `start`, which never returns.
inline Stack new_stack(char* memory, size_t bytes, void (*start)()) {
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(memory + bytes) & ~15ul);
  *--top = 0;  // where `start` would return to
  *--top = reinterpret_cast<uintptr_t>(start);
  return top - 6;  // what the registers hold that switch_stack saves
}

#else

// What a stack needs to go on lies on the stack itself.
inline void switch_stack(Stack* from, Stack to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

inline Stack new_stack(char* memory, size_t bytes, void (*start)()) {
  auto* context = reinterpret_cast<ucontext_t*>(memory);
  constexpr size_t kContext = (sizeof(ucontext_t) + 63) / 64 * 64;
  getcontext(context);
  context->uc_stack.ss_sp = memory + kContext;
  context->uc_stack.ss_size = bytes - kContext;
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}

#endif

}  // namespace on_host
