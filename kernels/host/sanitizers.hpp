// What the compiler's sanitizers are told, so that they find in kernels what compute-sanitizer finds on a card:
// `cargo xtask test --sanitize`.
//
// address  like memcheck: reading or writing memory that is not the kernel's, shared memory too; and undefined arithmetic
// thread   like racecheck, in a card's own memory too: a block's threads are threads, ordered by barriers, __syncwarp, and
//          the launch's beginning and end, not by shuffles or a warp's products. A copy of cp_async writes when it begins
//          and when it has been waited for. Of two blocks it sees what runs on two CPU threads
//
// What is found is printed, and fails the launch. Without a sanitizer all this is nothing.
#pragma once

#include <cstddef>

#ifdef SANITIZE_ADDRESS
#include <sanitizer/asan_interface.h>
#endif
#ifdef SANITIZE_THREAD
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* from, unsigned long bytes);
void __tsan_write_range(void* to, unsigned long bytes);
}
#endif

namespace host::sanitizer {

// Memory around that of a kernel.
#ifdef SANITIZE_ADDRESS
inline void forbid(const void* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void allow(const void* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

#ifdef SANITIZE_THREAD

// A thread as the sanitizer knows it.
struct Thread {
    void* thread = __tsan_create_fiber(0);
    ~Thread() { __tsan_destroy_fiber(thread); }
    Thread() = default;
    Thread(const Thread&) = delete;
};
inline void* running() { return __tsan_get_current_fiber(); }
inline void switch_to(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

// What happened before arrive() in one thread is seen behind pass() in another.
inline void arrive(void* gate) { __tsan_release(gate); }
inline void pass(void* gate) { __tsan_acquire(gate); }

inline void reads(const void* from, size_t bytes) { __tsan_read_range(const_cast<void*>(from), bytes); }
inline void writes(void* to, size_t bytes) { __tsan_write_range(to, bytes); }

// The shim's own tables, not a kernel's memory.
struct Unwatched {
    Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

#else

struct Thread { void* thread = nullptr; };
inline void* running() { return nullptr; }
inline void switch_to(void*) {}
inline void arrive(void*) {}
inline void pass(void*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}
struct Unwatched { Unwatched() {} };

#endif

}  // namespace host::sanitizer
