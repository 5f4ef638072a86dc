// What blocks of a cluster do together, on a CPU.
//
// A bulk copy is made when it begins, or not before it is waited for: which of the two is drawn where the order of threads is,
// and else it is the latter.
#pragma once

// Of a time that is not over: the bytes that are expected and have not come, and how many have not arrived of `arrivals`.
struct alignas(8) Barrier {
    int bytes;
    uint8_t missing, arrivals, odd, begun;
};

namespace host {

void cluster_arrive(int line);
void cluster_wait(int line);
const void* at_rank(const void* own, size_t bytes, unsigned rank, int line);
void begin_barrier(Barrier* barrier, unsigned arrivals, int line);
void arrive_at(Barrier* barrier, unsigned rank, unsigned bytes, int line);
void wait_for(Barrier* barrier, unsigned odd, int line);
void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier, bool to_all, int line);
void bulk_prefetch(const void* from, unsigned bytes, int line);

}  // namespace host

DEVICE unsigned cluster_size() { return host::place.cluster_size; }
DEVICE unsigned cluster_rank() { return host::place.block.x % host::place.cluster_size; }
DEVICE void cluster_arrive(int line = __builtin_LINE()) { host::cluster_arrive(line); }
DEVICE void cluster_wait(int line = __builtin_LINE()) { host::cluster_wait(line); }
DEVICE void cluster_arrive_relaxed(int line = __builtin_LINE()) { host::cluster_arrive(line); }
template <typename V> DEVICE V load_from_rank(const V* from, unsigned rank, int line = __builtin_LINE()) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16);
    return load_vector<V>(host::at_rank(from, sizeof(V), rank, line), line);
}
DEVICE void begin_barrier(Barrier* barrier, unsigned arrivals, int line = __builtin_LINE()) {
    host::begin_barrier(barrier, arrivals, line);
}
DEVICE void expect(Barrier* barrier, unsigned bytes, int line = __builtin_LINE()) {
    host::arrive_at(barrier, cluster_rank(), bytes, line);
}
DEVICE void arrive_at(Barrier* barrier, unsigned rank, int line = __builtin_LINE()) { host::arrive_at(barrier, rank, 0, line); }
DEVICE void wait_for(Barrier* barrier, unsigned odd, int line = __builtin_LINE()) { host::wait_for(barrier, odd, line); }
DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier, int line = __builtin_LINE()) {
    host::bulk_copy(to, from, bytes, barrier, false, line);
}
DEVICE void bulk_copy_to_all(void* to, const void* from, unsigned bytes, Barrier* barrier, int line = __builtin_LINE()) {
    host::bulk_copy(to, from, bytes, barrier, true, line);
}
DEVICE void bulk_prefetch(const void* from, unsigned bytes, int line = __builtin_LINE()) { host::bulk_prefetch(from, bytes, line); }
