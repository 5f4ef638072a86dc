// Stacks that take turns on one CPU thread.
//
// A switch is a longjmp, which asks the system for nothing. Sanitizers take the library's for an error: it leaves no frame of
// the stack that it is called on. They do not see the compiler's own.
#pragma once

#include "sanitizers.hpp"

#include <csetjmp>
#include <cstddef>
#include <memory>

#include <ucontext.h>

#if defined(SANITIZE_ADDRESS) || defined(SANITIZE_THREAD)
using Jump = void* [5];
#define SAVE_JUMP(jump) __builtin_setjmp(jump)
#define TAKE_JUMP(jump) __builtin_longjmp(jump, 1)
#else
using Jump = jmp_buf;
#define SAVE_JUMP(jump) _setjmp(jump)
#define TAKE_JUMP(jump) _longjmp(jump, 1)
#endif

namespace host {

class Fiber {
public:
    // `body` never returns.
    explicit Fiber(void (*body)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_.get();
        context_.uc_stack.ss_size = STACK_BYTES;
        context_.uc_link = nullptr;
        makecontext(&context_, body, 0);
    }
    // Runs the body, from its beginning or from where it gave way, until it gives way.
    __attribute__((noinline)) void resume() {
        outside_known_ = sanitizer::running();
        sanitizer::switch_to(known_.thread);
        if (SAVE_JUMP(outside_) == 0) enter();
        asm volatile("");  // behind it, so that it does not take this call's place
        sanitizer::pass(this);
    }
    // Called inside: resume() returns. Who resumed sees what has been done; what it does itself is seen inside by
    // way of other gates alone.
    __attribute__((noinline)) void give_way() {
        sanitizer::arrive(this);
        sanitizer::switch_to(outside_known_);
        if (SAVE_JUMP(inside_) == 0) leave();
        asm volatile("");
    }

private:
    __attribute__((noinline)) void enter() {
        if (entered_) TAKE_JUMP(inside_);
        entered_ = true;
        setcontext(&context_);
    }
    __attribute__((noinline)) void leave() { TAKE_JUMP(outside_); }

    static constexpr size_t STACK_BYTES = 128 << 10;
    std::unique_ptr<unsigned char[]> stack_{new unsigned char[STACK_BYTES]};
    ucontext_t context_;
    Jump inside_, outside_;
    bool entered_ = false;
    sanitizer::Thread known_;
    void* outside_known_ = nullptr;
};

}  // namespace host
