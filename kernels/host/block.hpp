// What runs: a cluster of blocks, their warps and threads. shim.cpp has the scheduler, warpgroup.cpp the products of warpgroups,
// cluster.cpp what blocks of a cluster do together.
#pragma once

#include "../cluster.cuh"
#include "../warpgroup.cuh"
#include "fiber.hpp"

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace host {

constexpr size_t GUARD_BYTES = 4096, COPY_BYTES = 16, ALIGNMENT = 1024;
constexpr unsigned MAX_THREADS = 1024, MAX_SHARED_BYTES = 227 << 10, MAX_CLUSTER = 8;
constexpr unsigned WARPGROUP = 128;
constexpr unsigned char UNWRITTEN = 0xff;  // a NaN in f16, bf16, f32

enum class State { Ready, AtBarrier, InWarp, AtCluster, AtArrivals, Done };

struct Copy { void* to; const void* from; bool valid; };
struct BulkCopy { unsigned char* to; const void* from; unsigned bytes; Barrier* barrier; };

// A thread's part in those of its warpgroup.
struct Products {
    std::vector<std::vector<std::pair<WarpgroupProduct, Operands>>> groups = {{}};  // with what they read; the last one is open
    size_t begun = 0;
    bool may_begin = false;
};

void run_thread();
void leave(State state, int line);  // the thread that runs gives way; it goes on there when the scheduler resumes it

struct Thread {
    Fiber fiber{run_thread};
    State state;
    int line, predicate;
    bool turn;  // it has been taken
    unsigned barriers = 0;  // that it reached
    unsigned clusters = 0, left_clusters = 0;  // barriers of its cluster that it reached, and left
    uint3 index;
    unsigned number;
    std::vector<std::vector<Copy>> groups;  // of cp_async_16; the last one is open
    std::vector<void*> arrived;             // of these: what the async proxy has not been shown
    Products products;
};

struct Warp {
    Deposits deposits[2];
    char gates[2];
    unsigned arrived = 0, round = 0;
    const char* operation;
    int line;
};

struct Block {
    uint3 index;
    unsigned char* shared;
    std::vector<std::unique_ptr<Thread>> all;  // kept from block to block
    std::vector<Warp> warps;
    std::vector<unsigned char> memory;        // with guards
    std::vector<unsigned char> async_memory;  // what is between them, as the async proxy sees it
    std::vector<std::vector<std::pair<uint64_t, uint64_t>>> warpgroups;  // the products of each: what they multiply
    std::vector<BulkCopy> copies;             // to its shared memory, which have not been made yet
    int any;  // of the predicates at the latest barrier
    Thread* running = nullptr;
    char begun, barriers[2];  // a sanitizer's gates; who has not left a barrier meets nobody at the next but one
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;  // kept from cluster to cluster
    const Launch* launch;
    unsigned threads;                  // of a block
    unsigned arrived = 0, rounds = 0;  // at its barrier; how often all were there
    bool moved;                        // a thread did, since it was last set
    char gates[2];
    std::mt19937_64 random;
    std::string error;
};

extern thread_local Cluster cluster;
extern thread_local Block* block;  // that runs

}  // namespace host
