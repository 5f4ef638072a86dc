// The fibers behind shim.hpp, and the launch.

#include "block.hpp"

#include <cstdio>
#include <cstdlib>

namespace host {

__thread Place place;
thread_local Cluster cluster;
thread_local Block* block;

namespace {

Kernel* kernels = nullptr;

void describe(const char* what, int line) {
    char text[512];
    std::snprintf(text, sizeof text, "%s, line %d: %s (block %u %u %u, thread %u %u %u)", cluster.launch->kernel->name, line, what,
                  place.block.x, place.block.y, place.block.z, place.thread.x, place.thread.y, place.thread.z);
    cluster.error = text;
}

void resume(Thread& thread) {
    block->running = &thread;
    place.thread = thread.index;
    thread.fiber.resume();
    block->running = nullptr;
}

// From now on it is this block that runs.
void enter(Block& next) {
    block = &next;
    place.block = next.index;
    place.shared = next.shared;
}

// As many threads as a block has, which stand at the kernel's first instruction. After an error they are made anew.
void prepare_threads(bool anew) {
    if (anew) block->all.clear();
    while (block->all.size() < cluster.threads) block->all.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < cluster.threads; ++i) {
        Thread& thread = *block->all[i];
        thread.state = State::Ready;
        thread.number = i;
        thread.barriers = thread.clusters = thread.left_clusters = 0;
        thread.turn = false;
        thread.groups.assign(1, {});
        thread.arrived.clear();
        thread.products = {};
        uint3 size = place.block_size;
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    }
    block->warps.assign((cluster.threads + LANES - 1) / LANES, Warp());
    block->warpgroups.assign(cluster.threads / WARPGROUP, {});
    block->copies.clear();
}

// Whether a thread waits for what another block may do.
bool waits_outside(const Thread& thread) { return thread.state == State::AtCluster || thread.state == State::AtArrivals; }

// Has each thread of the block run that can, in their own order or in one drawn.
void run_threads() {
    std::vector<unsigned> order(cluster.threads);
    for (unsigned i = 0; i < cluster.threads; ++i) order[i] = i;
    if (cluster.launch->schedule != 0) std::shuffle(order.begin(), order.end(), cluster.random);
    for (unsigned number : order) {
        Thread& thread = *block->all[number];
        if (thread.state != State::Ready && !waits_outside(thread)) continue;
        cluster.moved |= thread.state == State::Ready;
        resume(thread);
        if (!cluster.error.empty()) return;
    }
}

bool all_are(State state) {
    return std::all_of(block->all.begin(), block->all.begin() + cluster.threads,
                       [&](const auto& thread) { return thread->state == state; });
}

// Whether a thread is at another barrier than the first is.
bool is_elsewhere(const std::unique_ptr<Thread>& thread) { return thread->line != block->all[0]->line; }

// Where all threads of the block wait, they go on.
void open_barrier() {
    auto end = block->all.begin() + cluster.threads;
    if (!all_are(State::AtBarrier) || std::any_of(block->all.begin(), end, is_elsewhere)) return;
    block->any = 0;
    for (unsigned i = 0; i < cluster.threads; ++i) {
        block->all[i]->state = State::Ready;
        block->any |= block->all[i]->predicate != 0;
    }
    cluster.moved = true;
}

// Why no thread of the block can go on, though not all are done.
void describe_standstill() {
    const Thread* stuck = nullptr;
    for (unsigned i = 0; i < cluster.threads; ++i) {
        const Thread& thread = *block->all[i];
        bool at_barrier = thread.state == State::AtBarrier;
        if (at_barrier ? !stuck || is_elsewhere(block->all[i]) : thread.state != State::Done) stuck = &thread;
        if (!at_barrier && stuck == &thread) break;
    }
    place.thread = stuck->index;
    describe(all_are(State::AtBarrier)           ? "threads of a block wait at different barriers"
             : stuck->state == State::InWarp     ? "lanes of a warp wait for one that ended or is elsewhere"
             : stuck->state == State::AtCluster  ? "threads wait at a cluster's barrier for others that ended or are elsewhere"
             : stuck->state == State::AtArrivals ? "a thread waits for copies that nobody makes, or for others that do not arrive"
                                                 : "threads wait at a barrier for others that ended",
             stuck->line);
}

// Runs the blocks to their end: whether they came there. All of them in turn; or, in an order drawn, each only while those before
// cannot go on: so the first is as far ahead of the last as can be.
bool run_blocks() {
    std::vector<Block*> order;
    for (auto& each : cluster.blocks) order.push_back(each.get());
    if (cluster.launch->schedule != 0) std::shuffle(order.begin(), order.end(), cluster.random);
    do {
        cluster.moved = false;
        for (Block* each : order) {
            enter(*each);
            run_threads();
            if (!cluster.error.empty()) return false;
            open_barrier();
            if (cluster.moved && cluster.launch->schedule != 0) break;
        }
    } while (cluster.moved);
    for (Block* each : order) {
        enter(*each);
        if (!all_are(State::Done)) return describe_standstill(), false;
    }
    return true;
}

// 1024-byte aligned, between guards.
void prepare_shared_memory(unsigned bytes) {
    sanitizer::allow(block->memory.data(), block->memory.size());
    block->memory.assign(bytes + 2 * GUARD_BYTES + ALIGNMENT, UNWRITTEN);
    block->async_memory.assign(bytes, UNWRITTEN);
    auto start = reinterpret_cast<uintptr_t>(block->memory.data()) + GUARD_BYTES;
    block->shared = reinterpret_cast<unsigned char*>((start + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    sanitizer::forbid(block->shared - GUARD_BYTES, GUARD_BYTES);
    sanitizer::forbid(block->shared + bytes, GUARD_BYTES);
}

bool guards_are_whole(unsigned shared_bytes) {
    auto whole = [](const unsigned char* from) {
        sanitizer::allow(from, GUARD_BYTES);
        return std::all_of(from, from + GUARD_BYTES, [](unsigned char byte) { return byte == UNWRITTEN; });
    };
    return whole(place.shared - GUARD_BYTES) && whole(place.shared + shared_bytes);
}

float widen(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

const float* all_f16_values() {
    static float values[1 << 16];
    for (unsigned bits = 0; bits < 1 << 16; ++bits) values[bits] = widen(static_cast<uint16_t>(bits));
    return values;
}

}  // namespace

const float* const f16_values = all_f16_values();

uint16_t f16_from(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // In the smallest normal's unit and below, a number is an integer multiple of 2^-24; nearbyint ties to even.
    if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
    unsigned bits = __float_as_uint(magnitude);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

void leave(State state, int line) {
    block->running->state = state;
    block->running->line = line;
    block->running->fiber.give_way();
}

// A fiber's body.
void run_thread() {
    for (;;) {
        sanitizer::pass(&block->begun);
        const Kernel* kernel = cluster.launch->kernel;
        kernel->invoke(kernel->function, cluster.launch->arguments);
        finish_copies(0);
        check_products();
        if (!block->running->turn) fail("a thread ends that has not taken its turn", 0);
        leave(State::Done, 0);
    }
}

void register_kernel(Kernel& kernel) {
    kernel.next = kernels;
    kernels = &kernel;
}

unsigned lane() { return block->running->number % LANES; }

void fail(const char* what, int line) {
    describe(what, line);
    block->running->fiber.give_way();
    std::abort();  // nobody resumes it
}

int block_barrier(int line, int predicate) {
    char* gate = &block->barriers[block->running->barriers++ % 2];
    block->running->predicate = predicate;
    sanitizer::arrive(gate);
    leave(State::AtBarrier, line);
    sanitizer::pass(gate);
    return block->any;
}

const Deposits& meet(const void* deposit, size_t bytes, const char* operation, int line) {
    unsigned number = block->running->number, first = number / LANES * LANES;
    if (first + LANES > cluster.threads) fail("a warp function in a warp of less than 32 threads", line);
    Warp& warp = block->warps[number / LANES];
    Deposits& table = warp.deposits[warp.round % 2];
    {
        sanitizer::Unwatched table_of_the_shim;
        std::memcpy(table.bytes[number % LANES], deposit, bytes);
    }
    if (warp.arrived == 0) warp.operation = operation, warp.line = line;
    if (std::strcmp(warp.operation, operation) != 0 || warp.line != line) fail("lanes of a warp are at different places", line);
    if (++warp.arrived < LANES) {
        leave(State::InWarp, line);
    } else {
        warp.arrived = 0;
        ++warp.round;
        for (unsigned i = first; i < first + LANES; ++i) block->all[i]->state = State::Ready;
    }
    return table;
}

void warp_barrier(int line) {
    Warp& warp = block->warps[block->running->number / LANES];
    char* gate = &warp.gates[warp.round % 2];
    sanitizer::arrive(gate);
    meet("", 1, "__syncwarp", line);
    sanitizer::pass(gate);
}

void take_turn() { block->running->turn = true; }

void queue_copy(void* to, const void* from, bool valid) {
    if (!block->running->turn) fail("a copy begins before its thread has taken its turn", 0);
    if (valid) sanitizer::reads(from, COPY_BYTES);
    sanitizer::writes(to, COPY_BYTES);
    block->running->groups.back().push_back({to, from, valid});
}
void close_copies() { block->running->groups.emplace_back(); }
void finish_copies(int pending) {
    auto& groups = block->running->groups;
    size_t closed = groups.size() - 1, finished = closed > size_t(pending) ? closed - pending : 0;
    for (size_t i = 0; i < finished; ++i) {
        for (const Copy& copy : groups[i]) {
            sanitizer::writes(copy.to, COPY_BYTES);
            if (copy.valid) std::memcpy(copy.to, copy.from, COPY_BYTES);
            else std::memset(copy.to, 0, COPY_BYTES);
            block->running->arrived.push_back(copy.to);
        }
    }
    groups.erase(groups.begin(), groups.begin() + finished);
}

// A sanitizer has printed something.
void report_finding() {
    if (block && block->running && cluster.error.empty()) describe("a sanitizer found what is printed above", 0);
}

const Kernel* find(const char* name) {
    const Kernel* kernel = kernels;
    while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    return kernel;
}

}  // namespace host

using namespace host;

// The kernel, or null with a reason in host_last_error() why it cannot be launched so.
extern "C" const Kernel* host_launchable(const char* name, uint3 grid, uint3 size, unsigned shared_bytes, unsigned cluster_size) {
    auto refuse = [&](const char* why) { return cluster.error = std::string(name) + ": " + why, nullptr; };
    const Kernel* kernel = find(name);
    if (!kernel) return refuse("no such kernel");
    unsigned threads = size.x * size.y * size.z;
    if (threads == 0 || threads > MAX_THREADS) return refuse("a block has 1 to 1024 threads");
    if (threads > kernel->bounds.threads) return refuse("more threads than the kernel's bounds");
    if (shared_bytes > MAX_SHARED_BYTES) return refuse("more shared memory than 227 KiB");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return refuse("a grid that no card takes");
    if (cluster_size == 0 || cluster_size > MAX_CLUSTER) return refuse("a cluster has 1 to 8 blocks");
    if (grid.x % cluster_size != 0) return refuse("a grid that is no whole clusters");
    return kernel;
}

// Whoever launches calls these around its blocks, which nothing orders.
extern "C" void host_begin(const Launch* launch) { sanitizer::arrive(&launch->begun); }
extern "C" void host_end(const Launch* launch) { sanitizer::pass(&launch->ended); }

// Runs one cluster of blocks, whose first is `index`, on any CPU thread: 0, or 1 with a reason in host_last_error().
extern "C" int host_run_cluster(const Launch* launch, uint3 index) {
    sanitizer::pass(&launch->begun);
    bool failed_before = !cluster.error.empty();
    cluster.error.clear();
    cluster.launch = launch;
    cluster.threads = launch->size.x * launch->size.y * launch->size.z;
    cluster.arrived = cluster.rounds = 0;
    uint3 grid = launch->grid;
    if (launch->schedule != 0) cluster.random.seed(launch->schedule + index.x + grid.x * (index.y + uint64_t{grid.y} * index.z));
    place.block_size = launch->size;
    place.grid_size = grid;
    place.cluster_size = launch->cluster;
    cluster.blocks.resize(launch->cluster);
    for (auto& each : cluster.blocks) {
        if (!each) each = std::make_unique<Block>();
        each->index = index;
        ++index.x;
        block = each.get();
        prepare_threads(failed_before);
        prepare_shared_memory(launch->shared_bytes);
        sanitizer::arrive(&block->begun);
    }
    bool ran = run_blocks();
    for (auto& each : cluster.blocks) {
        enter(*each);
        if (ran && !guards_are_whole(launch->shared_bytes)) describe("writes outside of its shared memory", 0);
        if (ran && !each->copies.empty()) describe("a block ends before copies to it do", 0);
    }
    sanitizer::arrive(&launch->ended);
    return !cluster.error.empty();
}

// Why something failed that this CPU thread called last.
extern "C" const char* host_last_error() { return cluster.error.c_str(); }

// A letter a parameter (p pointer, i int32, u uint32, l int64, v uint64, f float, d double), or null if there is no such kernel.
extern "C" const char* host_signature(const char* name) {
    const Kernel* kernel = find(name);
    return kernel ? kernel->signature : nullptr;
}

// The path of a kernel's source, as it was compiled, or null if there is no such kernel.
extern "C" const char* host_file(const char* name) {
    const Kernel* kernel = find(name);
    return kernel ? kernel->file : nullptr;
}

// The name of kernel `index`, in no order; null behind the last.
extern "C" const char* host_kernel_name(unsigned index) {
    const Kernel* kernel = kernels;
    while (kernel && index-- > 0) kernel = kernel->next;
    return kernel ? kernel->name : nullptr;
}

// What the sanitizers' libraries look for.
#ifdef SANITIZE_ADDRESS
extern "C" void __asan_on_error() { report_finding(); }
extern "C" void __ubsan_on_report() { report_finding(); }
extern "C" const char* __asan_default_options() {
    return "halt_on_error=0:detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0";
}
#endif
#ifdef SANITIZE_THREAD
extern "C" void __tsan_on_report(void*) { report_finding(); }
// Only kernels are watched: of Rust's threads it sees neither what they do nor what orders it.
extern "C" const char* __tsan_default_options() {
    return "ignore_interceptors_accesses=1:suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0";
}
#endif

// Memory that no kernel may use: nothing without a sanitizer.
extern "C" void host_forbid(const void* from, size_t bytes) { sanitizer::forbid(from, bytes); }
extern "C" void host_allow(const void* from, size_t bytes) { sanitizer::allow(from, bytes); }
