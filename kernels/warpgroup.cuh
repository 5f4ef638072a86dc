// Products of a warpgroup: Hopper's tensor cores, which read both sides from shared memory while threads go on (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions").
//
// For sources that are compiled for compute capability 9.0a alone. A warpgroup is four warps, from a multiple of 128 threads on;
// every thread of it takes part in everything here but async_proxy_fence. Like device.cuh this has a second definition, in
// host/warpgroup.hpp.
//
// In order: async_proxy_fence in the threads whose copies to shared memory have arrived, a barrier, warpgroup_begin, products,
// warpgroup_commit, which closes a group of them; warpgroup_wait before anything is copied to where they read, and pin before the
// sums are read.
#pragma once

#include "device.cuh"

// How rows lie in shared memory that the tensor cores read: as lines of 128, 64 or 16 bytes, eight of them a matrix. Of the longer
// ones a matrix begins at a multiple of its size, and their 16-byte pieces are swizzled: bits 4… of the address are XORed with bits 7….
enum class Lines : uint64_t { Of128 = 1, Of64 = 2, Of16 = 0 };

// Sums of a warpgroup's products with N columns. Of row 16 · (warp of the warpgroup) + g and of the eighth behind it lane
// 4g + t holds: [j][0, 1] row g, [j][2, 3] row g + 8, columns 8j + 2t, 8j + 2t + 1.
template <int N> using Sums = float[N / 8][4];

#ifdef __CUDACC__

// Where something lies in the shared memory of a block.
DEVICE uint64_t shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

// Lets the tensor cores see what this thread has written to shared memory.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the latest `pending` groups are done.
template <int pending> DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// Behind warpgroup_wait: keeps the compiler from reading these sums before it.
template <int N> DEVICE void pin(float (&sums)[N][4]) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}

#define WGMMA(before, n, operands, ...)                                                                                \
    if constexpr (std::is_same_v<T, f16>)                                                                              \
        asm volatile(before "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 " operands __VA_ARGS__);            \
    else asm volatile(before "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 " operands __VA_ARGS__)
#define FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TWENTY(j) FOUR(j), FOUR(j + 1), FOUR(j + 2), FOUR(j + 3), FOUR(j + 4)
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16 "%16, %17, %18, %19"
#define NAMES_20 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_40 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59"
#define NAMES_60 "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"

// d += a · b, 64 × 8 N results of depth 16, products of two T summed in f32; N is 8 or 20. Rows of a are along the depth, and those
// of b, its columns, unless `transposed`: then they are across it.
template <typename T, bool transposed, int N> DEVICE void wgmma_k16(float (&d)[N][4], uint64_t a, uint64_t b) {
    static_assert(N == 8 || N == 20);
    if constexpr (N == 8) {
        WGMMA("", "64", "{" NAMES_0 ", " NAMES_16 ", " NAMES_20 "}, %32, %33, 1, 1, 1, 0, %34;",
              : TWENTY(0), FOUR(5), FOUR(6), FOUR(7) : "l"(a), "l"(b), "n"(int{transposed}));
    } else {
        WGMMA("", "160", "{" NAMES_0 ", " NAMES_16 ", " NAMES_20 ", " NAMES_32 ", " NAMES_40 ", " NAMES_60 "}, %80, %81, 1, 1, 1, 0, %82;",
              : TWENTY(0), TWENTY(5), TWENTY(10), TWENTY(15) : "l"(a), "l"(b), "n"(int{transposed}));
    }
}

// The same with N of 4, 5, 8 or 10, where each warp has its rows of a in registers, as mma_m16n8k16 does. `add`: or d = a · b.
#define A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define ADD(n) "{\n.reg .pred add;\nsetp.ne.b32 add, %" n ", 0;\n"
template <typename T, bool transposed, bool add, int N>
DEVICE void wgmma_k16(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 4 || N == 5 || N == 8 || N == 10);
    if constexpr (N == 4) {
        WGMMA(ADD("22"), "32", "{" NAMES_0 "}, {%16, %17, %18, %19}, %20, add, 1, 1, %21;\n}",
              : FOUR(0), FOUR(1), FOUR(2), FOUR(3) : A, "l"(b), "n"(int{transposed}), "n"(int{add}));
    } else if constexpr (N == 5) {
        WGMMA(ADD("26"), "40", "{" NAMES_0 ", " NAMES_16 "}, {%20, %21, %22, %23}, %24, add, 1, 1, %25;\n}",
              : TWENTY(0) : A, "l"(b), "n"(int{transposed}), "n"(int{add}));
    } else if constexpr (N == 8) {
        WGMMA(ADD("38"), "64", "{" NAMES_0 ", " NAMES_16 ", " NAMES_20 "}, {%32, %33, %34, %35}, %36, add, 1, 1, %37;\n}",
              : TWENTY(0), FOUR(5), FOUR(6), FOUR(7) : A, "l"(b), "n"(int{transposed}), "n"(int{add}));
    } else {
        WGMMA(ADD("46"), "80", "{" NAMES_0 ", " NAMES_16 ", " NAMES_20 ", " NAMES_32 "}, {%40, %41, %42, %43}, %44, add, 1, 1, %45;\n}",
              : TWENTY(0), TWENTY(5) : A, "l"(b), "n"(int{transposed}), "n"(int{add}));
    }
}
#undef WGMMA
#undef FOUR
#undef TWENTY
#undef NAMES_0
#undef NAMES_16
#undef NAMES_20
#undef NAMES_32
#undef NAMES_40
#undef NAMES_60
#undef A
#undef ADD

#else
#include "host/warpgroup.hpp"
#endif

// What a product reads from `start` on. Rows along the depth: `down` bytes from eight rows to the next; `across` from a line to the
// next of the same row, with lines of 16 bytes alone. Rows across the depth: `down` from eight of the depth to the next, `across`
// from a line's numbers to those of the next; with lines of 16 bytes the other way round.
DEVICE uint64_t matrix_at(const void* start, Lines lines, unsigned down, unsigned across) {
    return (shared_address(start) & 0x3ffff) >> 4 | uint64_t{across >> 4} << 16 | uint64_t{down >> 4} << 32 | static_cast<uint64_t>(lines) << 62;
}
// The same so many bytes further on, a multiple of 16.
DEVICE uint64_t further(uint64_t matrix, unsigned bytes) { return matrix + (bytes >> 4); }
