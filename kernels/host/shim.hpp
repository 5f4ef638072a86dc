// CUDA's words, and those of device.cuh, on a CPU: a kernel's source compiles as C++17 and really runs.
//
// The threads of a block are fibers of one CPU thread. They run until a barrier or a warp function, where they wait for
// the others; a warp function passes values through a table that all lanes of the warp fill. Blocks run on all CPU threads,
// in any order, those of a cluster beside each other on one. What goes wrong on a card and is cheap to see is an error of the
// launch: threads that end while others wait, lanes that meet at different places, addresses that are not aligned, writes behind
// the end of shared memory. Shared memory begins as NaN. Copies of cp_async happen when they are waited for, no earlier. What is
// dear to see, sanitizers.hpp lets the compiler's sanitizers see.
#pragma once

#include "sanitizers.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define __restrict__ __restrict

namespace host {

struct Bounds {
    unsigned threads, blocks;
    constexpr Bounds(unsigned threads, unsigned blocks = 1) : threads(threads), blocks(blocks) {}
};

struct Kernel {
    const char* name;
    const char* file;                            // its source
    Bounds bounds;
    const char* signature;                       // a letter a parameter: see Letter
    void (*invoke)(const void* function, void** arguments);
    const void* function;
    Kernel* next;
};
void register_kernel(Kernel& kernel);

// What all blocks of a launch share. src/lib.rs has the same.
struct Launch {
    const Kernel* kernel;
    uint3 grid, size;
    unsigned shared_bytes, cluster;  // blocks in x that run together
    void** arguments;    // what cuLaunchKernel takes
    uint64_t schedule;   // of a block's threads: 0 their own order, others a random one
    mutable char begun, ended;  // a sanitizer's gates
};

// How a parameter is written in a signature: p pointer, i int32, u uint32, l int64, v uint64, f float, d double.
template <typename T> constexpr char letter() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, double>) return 'd';
    else {
        static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a kernel's parameter has another type");
        return sizeof(T) == 4 ? (std::is_signed_v<T> ? 'i' : 'u') : (std::is_signed_v<T> ? 'l' : 'v');
    }
}

template <typename... P> struct Entry {
    static constexpr char signature[] = {letter<P>()..., '\0'};
    template <size_t... I> static void unpack(void (*function)(P...), void** arguments, std::index_sequence<I...>) {
        function(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    }
    static void invoke(const void* function, void** arguments) {
        unpack(reinterpret_cast<void (*)(P...)>(const_cast<void*>(function)), arguments, std::index_sequence_for<P...>());
    }
};

struct Registration {
    Kernel kernel;
    template <typename... P> Registration(const char* name, const char* file, Bounds bounds, void (*function)(P...))
        : kernel{name, file, bounds, Entry<P...>::signature, Entry<P...>::invoke, reinterpret_cast<const void*>(function), nullptr} {
        register_kernel(kernel);
    }
};

// The thread that runs, and its block. POD in thread-local storage: every CPU thread may launch.
struct Place {
    uint3 thread, block, block_size, grid_size;
    unsigned cluster_size;
    unsigned char* shared;
};
extern __thread Place place;

// A table that the lanes of a warp fill; meet() returns when all have, to a table that stays until the next but one.
constexpr unsigned LANES = 32, DEPOSIT_BYTES = 64;
struct Deposits { alignas(16) unsigned char bytes[LANES][DEPOSIT_BYTES]; };
const Deposits& meet(const void* deposit, size_t bytes, const char* operation, int line);
void warp_barrier(int line);
int block_barrier(int line, int predicate = 0);  // whether any thread's predicate holds
unsigned lane();
[[noreturn]] void fail(const char* what, int line);
void take_turn();
void queue_copy(void* to, const void* from, bool valid);
void close_copies();
void finish_copies(int pending);

inline void check_alignment(const void* address, size_t bytes, const char* what, int line) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(what, line);
}

}  // namespace host

#define KERNEL(name, bounds, ...)                                                                \
    static void name(__VA_ARGS__);                                                               \
    static ::host::Registration registration_of_##name(#name, __BASE_FILE__, ::host::Bounds bounds, \
                                                       name);                                    \
    static void name(__VA_ARGS__)

#define threadIdx (::host::place.thread)
#define blockIdx (::host::place.block)
#define blockDim (::host::place.block_size)
#define gridDim (::host::place.grid_size)

DEVICE void take_turn() { host::take_turn(); }
DEVICE unsigned char* shared_memory() { return host::place.shared; }
DEVICE void __syncthreads(int line = __builtin_LINE()) { host::block_barrier(line); }
DEVICE int __syncthreads_or(int predicate, int line = __builtin_LINE()) { return host::block_barrier(line, predicate); }
DEVICE void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) { host::warp_barrier(line); }

// ---- CUDA's arithmetic ----

using std::isfinite;
using std::max;
using std::min;
constexpr float CUDART_INF_F = std::numeric_limits<float>::infinity();
constexpr float CUDART_PI_F = 3.14159265358979f;
DEVICE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
DEVICE unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
DEVICE float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
DEVICE float exp2_approx(float x) { return std::exp2(x); }
DEVICE float reciprocal_approx(float x) { return 1.0f / x; }

// ---- storage types ----

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

namespace host {
extern const float* const f16_values;  // of all 65536 bit patterns
uint16_t f16_from(float x);
inline uint16_t bf16_from(float x) {
    unsigned u = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace host

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(f16 x) { return host::f16_values[x.bits]; }
DEVICE float to_f32(bf16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
template <typename T> DEVICE T from_f32(float x) {
    if constexpr (std::is_same_v<T, f16>) return {host::f16_from(x)};
    else if constexpr (std::is_same_v<T, bf16>) return {host::bf16_from(x)};
    else return x;
}
template <typename T> DEVICE uint32_t pack(float low, float high) {
    return from_f32<T>(low).bits | uint32_t{from_f32<T>(high).bits} << 16;
}
template <typename T> DEVICE float2 unpack(uint32_t packed) {
    return {to_f32(T{static_cast<uint16_t>(packed)}), to_f32(T{static_cast<uint16_t>(packed >> 16)})};
}

// ---- memory ----

template <typename V> DEVICE V load_vector(const void* from, int line = __builtin_LINE()) {
    host::check_alignment(from, sizeof(V), "load_vector reads an address that is not aligned", line);
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <typename V> DEVICE void store_vector(void* to, V value, int line = __builtin_LINE()) {
    host::check_alignment(to, sizeof(V), "store_vector writes an address that is not aligned", line);
    std::memcpy(to, &value, sizeof value);
}
DEVICE void cp_async_16(void* to, const void* from, bool valid = true, bool wanted = true, int line = __builtin_LINE()) {
    if (!wanted) return;
    host::check_alignment(to, 16, "cp_async_16 writes an address that is not aligned", line);
    host::check_alignment(from, 16, "cp_async_16 reads an address that is not aligned", line);
    host::queue_copy(to, from, valid);
}
DEVICE void prefetch(const void*) {}
// Whoever adds sees what was written before those that added earlier: a block's threads share a CPU thread, so that orders all of
// them, and a fence has nothing left to do.
DEVICE unsigned count_arrival(unsigned* at) { return __atomic_fetch_add(at, 1u, __ATOMIC_ACQ_REL); }
DEVICE void cp_async_commit() { host::close_copies(); }
template <int pending> DEVICE void cp_async_wait() { host::finish_copies(pending); }

// ---- warp functions ----

namespace host {

template <typename V> V take(const Deposits& deposits, unsigned lane) {
    sanitizer::Unwatched table_of_the_shim;
    V value;
    std::memcpy(&value, deposits.bytes[lane], sizeof value);
    return value;
}
template <typename V> V from_lane(unsigned mask, V value, unsigned source, const char* operation, int line) {
    if (mask != ~0u) fail("a warp function without all lanes", line);
    return take<V>(meet(&value, sizeof value, operation, line), source);
}

template <typename T, int depth> struct Fragments { float a[depth / 2], b[depth / 4]; };

template <typename T, int depth> void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, int line) {
    Fragments<T, depth> own;
    for (int i = 0; i < depth / 4; ++i) {
        float2 pair = unpack<T>(a[i]);
        own.a[2 * i] = pair.x, own.a[2 * i + 1] = pair.y;
    }
    for (int i = 0; i < depth / 8; ++i) {
        float2 pair = unpack<T>(b[i]);
        own.b[2 * i] = pair.x, own.b[2 * i + 1] = pair.y;
    }
    const Deposits& table = meet(&own, sizeof own, "mma", line);
    sanitizer::Unwatched table_of_the_shim;
    auto of = [&](unsigned lane) -> const Fragments<T, depth>& {
        return *reinterpret_cast<const Fragments<T, depth>*>(table.bytes[lane]);
    };
    unsigned g = lane() / 4, t = lane() % 4;
    for (int k = 0; k < depth; ++k) {
        unsigned owner = k % 8 / 2, half = k / 8, element = k % 2;
        const auto& row = of(4 * g + owner);
        const auto& left = of(4 * (2 * t) + owner);
        const auto& right = of(4 * (2 * t + 1) + owner);
        float upper = row.a[4 * half + element], lower = row.a[4 * half + 2 + element];
        d[0] += upper * left.b[2 * half + element];
        d[1] += upper * right.b[2 * half + element];
        d[2] += lower * left.b[2 * half + element];
        d[3] += lower * right.b[2 * half + element];
    }
}

template <int matrices, bool transposed> void ldmatrix(uint32_t (&r)[matrices], const void* row, int line) {
    uint16_t own[8] = {};
    if (lane() < 8 * matrices) {
        check_alignment(row, sizeof own, "ldmatrix reads an address that is not aligned", line);
        std::memcpy(own, row, sizeof own);
    }
    const Deposits& table = meet(own, sizeof own, "ldmatrix", line);
    sanitizer::Unwatched table_of_the_shim;
    unsigned g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < matrices; ++i) {
        auto number = [&](unsigned row, unsigned column) -> uint32_t {
            return reinterpret_cast<const uint16_t*>(table.bytes[8 * i + row])[column];
        };
        r[i] = transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16 : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
    }
}

}  // namespace host

template <typename V> DEVICE V __shfl_sync(unsigned mask, V value, int source, int width = 32, int line = __builtin_LINE()) {
    unsigned segment = host::lane() / width * width;
    return host::from_lane(mask, value, segment + source % width, "__shfl_sync", line);
}
template <typename V> DEVICE V __shfl_xor_sync(unsigned mask, V value, int bits, int line = __builtin_LINE()) {
    return host::from_lane(mask, value, host::lane() ^ bits, "__shfl_xor_sync", line);
}
template <typename V> DEVICE V __shfl_down_sync(unsigned mask, V value, int lanes, int line = __builtin_LINE()) {
    unsigned source = host::lane() + lanes;
    return host::from_lane(mask, value, source < 32 ? source : host::lane(), "__shfl_down_sync", line);
}
template <typename V> DEVICE V __shfl_up_sync(unsigned mask, V value, int lanes, int line = __builtin_LINE()) {
    int source = static_cast<int>(host::lane()) - lanes;
    return host::from_lane(mask, value, source >= 0 ? source : host::lane(), "__shfl_up_sync", line);
}
DEVICE unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    if (mask != ~0u) host::fail("a warp function without all lanes", line);
    const host::Deposits& table = host::meet(&predicate, sizeof predicate, "__ballot_sync", line);
    unsigned ballot = 0;
    for (unsigned i = 0; i < 32; ++i) ballot |= unsigned{host::take<int>(table, i) != 0} << i;
    return ballot;
}
DEVICE int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
DEVICE int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) == ~0u;
}

template <typename T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
    host::mma<T, 16>(d, a, b, line);
}
template <typename T> DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, int line = __builtin_LINE()) {
    uint32_t a[2] = {a0, a1};
    host::mma<T, 8>(d, a, &b, line);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    host::ldmatrix<4, false>(r, row, line);
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    host::ldmatrix<4, true>(r, row, line);
}
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
    host::ldmatrix<2, false>(r, row, line);
}
DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
    host::ldmatrix<2, true>(r, row, line);
}
