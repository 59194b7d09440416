// Many stacks on one thread of the operating system, switched by hand: a switch is a few nanoseconds, no system call.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(FASTLORA_MODEL_UCONTEXT)
#include <ucontext.h>
#define FASTLORA_MODEL_PORTABLE_FIBERS 1
#endif

namespace fastlora::model {

// Runs from start()'s entry when first resumed, until it suspends; the entry never returns. A fiber that is never
// resumed again is abandoned: destructors of what lies on its stack do not run.
class Fiber {
 public:
  static constexpr size_t STACK_BYTES = 64 * 1024;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { release(); }

  void start(void (*entry)());
  void resume();
  void suspend();
  // The stack goes back to the pool; the next start takes the one that was used last.
  void release();
  // Where the stack was at the last suspend too near its end to go on.
  bool overflowed() const;

 private:
  uint8_t* stack_ = nullptr;
#ifdef FASTLORA_MODEL_PORTABLE_FIBERS
  ucontext_t context_, outer_;
#else
  void* pointer_ = nullptr;
  void* outer_ = nullptr;
#endif
};

}  // namespace fastlora::model
