// Blocks that run beside each other, read each other's shared memory, and copies that reach all of them: Hopper's clusters (PTX
// ISA, "barrier.cluster", "mapa", "mbarrier", "cp.async.bulk").
//
// For sources that are compiled for compute capability 9.0a alone. A cluster is some neighbours in x; without one a block is alone
// in its own. Shared memory is laid out alike in all of them. Like device.cuh this has a second definition, in host/cluster.hpp.
//
// A Barrier is in a block's shared memory, and counts arrivals, and the bytes that copies bring. One thread begins it, and a
// barrier of the cluster shows that to all. Its times follow each other: one is over when as many have arrived as it was begun for, and what
// any of them expects has come; copies may come from any block, before they are expected too. What a bulk copy brings the tensor
// cores see without a fence.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__

using Barrier = uint64_t;

#define SHARED_ADDRESS(pointer) static_cast<uint32_t>(__cvta_generic_to_shared(pointer))

DEVICE unsigned cluster_size() {
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}
// A block's place in its cluster.
DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of a cluster, behind which they see what the others wrote before it; or, relaxed, which takes less time,
// begun Barriers alone.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What lies in the shared memory of the block of a rank where `from` is in this one's: 8 or 16 aligned bytes. That block has to be
// there until it is read: a barrier of the cluster behind the reads sees to that, another before them to what is there.
template <typename V> DEVICE V load_from_rank(const V* from, unsigned rank) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16);
    union { V value; uint32_t words[sizeof(V) / 4]; } read;
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(SHARED_ADDRESS(from)), "r"(rank));
    if constexpr (sizeof(V) == 8) {
        asm volatile("ld.shared::cluster.v2.b32 {%0, %1}, [%2];"
                     : "=r"(read.words[0]), "=r"(read.words[1]) : "r"(there) : "memory");
    } else {
        asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(read.words[0]), "=r"(read.words[1]), "=r"(read.words[2]), "=r"(read.words[3]) : "r"(there) : "memory");
    }
    return read.value;
}

DEVICE void begin_barrier(Barrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;"
                 ::"r"(SHARED_ADDRESS(barrier)), "r"(arrivals) : "memory");
}
// Arrives, and expects so many bytes.
DEVICE void expect(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SHARED_ADDRESS(barrier)), "r"(bytes) : "memory");
}
// Arrives at that of the block of a rank.
DEVICE void arrive_at(Barrier* barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(SHARED_ADDRESS(barrier)), "r"(rank) : "memory");
}
// Waits until the latest time that is odd, or even, is over: the first is even, and the one before it is.
DEVICE void wait_for(Barrier* barrier, unsigned odd) {
    unsigned over = 0;
    while (!over) {
        asm volatile("{\n"
                     ".reg .pred over;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, over;\n"
                     "}" : "=r"(over) : "r"(SHARED_ADDRESS(barrier)), "r"(odd) : "memory");
    }
}

// Copies aligned multiples of 16 bytes in the background to `to` of this block, or of all blocks of the cluster, where they
// count at `barrier`.
DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(SHARED_ADDRESS(to)), "l"(from), "r"(bytes), "r"(SHARED_ADDRESS(barrier)) : "memory");
}
DEVICE void bulk_copy_to_all(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(SHARED_ADDRESS(to)), "l"(from), "r"(bytes), "r"(SHARED_ADDRESS(barrier)),
                   "h"(static_cast<uint16_t>((1u << cluster_size()) - 1)) : "memory");
}
// Has the second-level cache fetch aligned multiples of 16 bytes: a hint.
DEVICE void bulk_prefetch(const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
#undef SHARED_ADDRESS

#else
#include "host/cluster.hpp"
#endif
