// Products of a warpgroup: Hopper's tensor cores, which read both sides from shared memory while threads go on (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions").
//
// For sources that are compiled for compute capability 9.0a alone. A warpgroup is four warps, from a multiple of 128 threads on;
// every thread of it takes part in everything here but async_proxy_fence. Like device.cuh this has a second definition, in
// host/warpgroup.hpp.
//
// In order: async_proxy_fence in the threads whose copies to shared memory have arrived, a barrier, warpgroup_begin, products,
// warpgroup_commit, which closes a group of them; warpgroup_wait before the sums are read or anything is copied to where they read.
#pragma once

#include "device.cuh"

// How rows lie in shared memory that the tensor cores read: as lines of 128 or 64 bytes, eight of them a matrix, the first at a
// multiple of its size. Their 16-byte pieces are swizzled: bits 4… of the address are XORed with bits 7….
enum class Lines : uint64_t { Of128 = 1, Of64 = 2 };

// Sums of a warpgroup's products with 160 columns. Of row 16 · (warp of the warpgroup) + g and of the eighth behind it lane
// 4g + t holds: [j][0, 1] row g, [j][2, 3] row g + 8, columns 8j + 2t, 8j + 2t + 1.
using Sums160 = float[20][4];

#ifdef __CUDACC__

// Where something lies in the shared memory of a block.
DEVICE uint64_t shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

// Lets the tensor cores see what this thread has written to shared memory.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the latest `pending` groups are done.
template <int pending> DEVICE void warpgroup_wait(Sums160& sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
    if constexpr (pending == 0) {
        // Nothing reads them before.
#pragma unroll
        for (int i = 0; i < 80; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
    }
}

// d += a · b, 64 × 160 results of depth 16, products of two T summed in f32. Rows of a are along the depth, and those of b, its
// columns, unless `transposed`: then they are across it.
#define FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WGMMA(type)                                                                                                      \
    asm volatile(                                                                                                        \
        "wgmma.mma_async.sync.aligned.m64n160k16.f32." type "." type " "                                                 \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "                     \
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "            \
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "            \
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "           \
        "%80, %81, 1, 1, 1, 0, %82;"                                                                                     \
        : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10), FOUR(11),    \
          FOUR(12), FOUR(13), FOUR(14), FOUR(15), FOUR(16), FOUR(17), FOUR(18), FOUR(19)                                  \
        : "l"(a), "l"(b), "n"(int{transposed}))
template <typename T, bool transposed> DEVICE void wgmma_m64n160k16(Sums160& d, uint64_t a, uint64_t b) {
    if constexpr (std::is_same_v<T, f16>) WGMMA("f16");
    else WGMMA("bf16");
}
#undef WGMMA
#undef FOUR

#else
#include "host/warpgroup.hpp"
#endif

// What a product reads from `start` on. Rows along the depth: `down` bytes from eight rows to the next; `across` is not used.
// Rows across the depth: `down` from eight of the depth to the next, `across` from a line's numbers to those of the next.
DEVICE uint64_t matrix_at(const void* start, Lines lines, unsigned down, unsigned across) {
    return (shared_address(start) & 0x3ffff) >> 4 | uint64_t{across >> 4} << 16 | uint64_t{down >> 4} << 32 | static_cast<uint64_t>(lines) << 62;
}
