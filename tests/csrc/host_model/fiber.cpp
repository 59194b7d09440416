#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <vector>

namespace fastlora::model {

namespace {

std::vector<uint8_t*> free_stacks;

uint8_t* take_stack() {
  constexpr size_t STACKS = 64;
  if (free_stacks.empty()) {
    void* slab = mmap(nullptr, STACKS * Fiber::STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) std::abort();
    for (size_t i = STACKS; i-- > 0;) free_stacks.push_back(static_cast<uint8_t*>(slab) + i * Fiber::STACK_BYTES);
  }
  uint8_t* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

constexpr size_t MARGIN_BYTES = 8 * 1024;

}  // namespace

void Fiber::release() {
  if (stack_ != nullptr) free_stacks.push_back(stack_);
  stack_ = nullptr;
}

#ifdef FASTLORA_MODEL_PORTABLE_FIBERS

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = take_stack();
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = STACK_BYTES;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::resume() { swapcontext(&outer_, &context_); }

void Fiber::suspend() { swapcontext(&context_, &outer_); }

bool Fiber::overflowed() const { return false; }

#else

// Saves the callee-saved registers on the stack and the stack in *from, and goes on where ``to`` was saved.
extern "C" void fastlora_model_switch(void** from, void* to);
asm(R"(
.text
.align 16
.hidden fastlora_model_switch
.globl fastlora_model_switch
.type fastlora_model_switch, @function
fastlora_model_switch:
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
  ret
.size fastlora_model_switch, .-fastlora_model_switch
)");

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = take_stack();
  // Six registers, the entry as return address, and a return address of the entry, which is never used: at the entry
  // the stack is 8 bytes off a multiple of 16, as after a call.
  auto** top = reinterpret_cast<void**>(stack_ + STACK_BYTES);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  pointer_ = top;
}

void Fiber::resume() { fastlora_model_switch(&outer_, pointer_); }

void Fiber::suspend() { fastlora_model_switch(&pointer_, outer_); }

bool Fiber::overflowed() const { return static_cast<uint8_t*>(pointer_) < stack_ + MARGIN_BYTES; }

#endif

}  // namespace fastlora::model
