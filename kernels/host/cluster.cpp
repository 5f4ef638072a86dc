// What is behind cluster.hpp.

#include "block.hpp"

#include <algorithm>

namespace host {

namespace {

constexpr uint8_t BEGUN = 0x5e;

// Where memory of the block that runs is in another of its cluster.
template <typename T> T* in(const Block& other, T* own) {
    auto offset = reinterpret_cast<const unsigned char*>(own) - place.shared;
    return reinterpret_cast<T*>(other.shared + offset);
}

const Block& of_rank(unsigned rank, int line) {
    if (rank >= cluster.blocks.size()) fail("no block of a cluster has this rank", line);
    return *cluster.blocks[rank];
}

Barrier peek(const Barrier& barrier) {
    sanitizer::Unwatched barrier_of_the_shim;
    return barrier;
}

// The thread that runs has what it waited for.
void go_on() {
    block->running->state = State::Ready;
    cluster.moved = true;
}

void end_time(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.arrivals;
    barrier.odd ^= 1;
}

void make(Block& to, const BulkCopy& copy) {
    sanitizer::writes(copy.to, copy.bytes);
    sanitizer::Unwatched barrier_of_the_shim;
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memcpy(to.async_memory.data() + (copy.to - to.shared), copy.to, copy.bytes);
    copy.barrier->bytes -= static_cast<int>(copy.bytes);
    end_time(*copy.barrier);
}

void make_those_of(const Barrier* barrier) {
    auto made = [&](const BulkCopy& copy) { return copy.barrier == barrier && (make(*block, copy), true); };
    block->copies.erase(std::remove_if(block->copies.begin(), block->copies.end(), made), block->copies.end());
}

bool has_ended(const Block& other) {
    return std::all_of(other.all.begin(), other.all.begin() + cluster.threads,
                       [](const auto& thread) { return thread->state == State::Done; });
}

void check(const Barrier* barrier, int line) {
    check_alignment(barrier, sizeof *barrier, "a barrier at an address that is not aligned", line);
    host::shared_address(barrier, line);
    if (peek(*barrier).begun != BEGUN) fail("a barrier that nobody began", line);
}

}  // namespace

void cluster_arrive(int line) {
    Thread& thread = *block->running;
    if (thread.clusters != thread.left_clusters) fail("a thread comes to its cluster's barrier again before it has left it", line);
    sanitizer::arrive(&cluster.gates[thread.clusters++ % 2]);
    if (++cluster.arrived == cluster.threads * cluster.blocks.size()) cluster.arrived = 0, ++cluster.rounds;
}

void cluster_wait(int line) {
    Thread& thread = *block->running;
    if (thread.clusters == thread.left_clusters) fail("a thread waits at its cluster's barrier before it has come there", line);
    while (cluster.rounds < thread.clusters) leave(State::AtCluster, line);
    go_on();
    sanitizer::pass(&cluster.gates[thread.left_clusters++ % 2]);
}

// For reading, which the kernel does itself: so a sanitizer sees it.
const void* at_rank(const void* own, size_t bytes, unsigned rank, int line) {
    check_alignment(own, bytes, "load_from_rank reads an address that is not aligned", line);
    const Block& other = of_rank(rank, line);
    if (has_ended(other)) fail("shared memory is read of a block that has ended", line);
    host::shared_address(own, line);
    host::shared_address(static_cast<const unsigned char*>(own) + bytes - 1, line);
    return in(other, own);
}

void begin_barrier(Barrier* barrier, unsigned arrivals, int line) {
    check_alignment(barrier, sizeof *barrier, "a barrier at an address that is not aligned", line);
    host::shared_address(barrier, line);
    sanitizer::writes(barrier, sizeof *barrier);
    sanitizer::Unwatched barrier_of_the_shim;
    *barrier = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, BEGUN};
}

void arrive_at(Barrier* barrier, unsigned rank, unsigned bytes, int line) {
    check(barrier, line);
    const Block& other = of_rank(rank, line);
    if (has_ended(other)) fail("an arrival at a barrier of a block that has ended", line);
    barrier = in(other, barrier);
    sanitizer::arrive(barrier);
    if (peek(*barrier).missing == 0) fail("an arrival at a barrier before the time is over for which all have arrived", line);
    sanitizer::Unwatched barrier_of_the_shim;
    barrier->bytes += static_cast<int>(bytes);
    --barrier->missing;
    end_time(*barrier);
}

void wait_for(Barrier* barrier, unsigned odd, int line) {
    check(barrier, line);
    auto is_here = [&] {
        sanitizer::pass(barrier);
        make_those_of(barrier);
        sanitizer::arrive(barrier);
        return peek(*barrier).odd != odd;
    };
    while (!is_here()) leave(State::AtArrivals, line);
    go_on();
}

void bulk_prefetch(const void* from, unsigned bytes, int line) {
    check_alignment(from, COPY_BYTES, "what is copied begins at an address that is not aligned", line);
    if (bytes == 0 || bytes % COPY_BYTES != 0) fail("what is copied is no whole pieces of 16 bytes", line);
    sanitizer::reads(from, bytes);
}

void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier, bool to_all, int line) {
    if (!block->running->turn) fail("a copy begins before its thread has taken its turn", line);
    check(barrier, line);
    check_alignment(to, COPY_BYTES, "bulk_copy writes an address that is not aligned", line);
    bulk_prefetch(from, bytes, line);
    host::shared_address(to, line);
    host::shared_address(static_cast<unsigned char*>(to) + bytes - 1, line);
    for (auto& other : cluster.blocks) {
        if (!to_all && other.get() != block) continue;
        if (has_ended(*other)) fail("a copy to a block that has ended", line);
        BulkCopy copy{in(*other, static_cast<unsigned char*>(to)), from, bytes, in(*other, barrier)};
        sanitizer::writes(copy.to, bytes);
        if (cluster.launch->schedule != 0 && cluster.random() % 2) make(*other, copy);
        else other->copies.push_back(copy);
        sanitizer::arrive(copy.barrier);
    }
}

}  // namespace host
