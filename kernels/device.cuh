// What every kernel is written in: CUDA C++, and below it the few words that CUDA C++ lacks.
//
// nvcc compiles a kernel for compute capability 8.0 and up. A C++ compiler compiles the same source for a CPU, where
// host/shim.hpp supplies CUDA's own words and a second definition of everything here. No other file but warpgroup.cuh and
// cluster.cuh holds PTX, asks for the compiler, or differs between the two.
//
// KERNEL(name, (threads, blocks), parameters…) is an entry point: at most `threads` to a block, and registers to hold
// `blocks` of them on a multiprocessor (may be left out). It calls take_turn() before it touches the card's memory. Shared memory is
// dynamic, 1024-byte aligned: shared_memory().
// Every member of a warp takes part in warp functions, in the mma_ and ldmatrix_ functions too.
#pragma once

#ifdef __CUDACC__

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <type_traits>

using f16 = __half;
using bf16 = __nv_bfloat16;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(name, bounds, ...) extern "C" __global__ void __launch_bounds__ bounds name(__VA_ARGS__)

// Waits until every launch before is done and what it wrote can be seen; then lets the next come to the card, where it waits in
// turn. So a launch is on its way while another runs (programmatic dependent launch, Hopper's). On other cards, and of launches
// that were not asked to come early, there is nothing to wait for.
DEVICE void take_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

// ---- storage types ----

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(f16 x) { return __half2float(x); }
DEVICE float to_f32(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T> DEVICE T from_f32(float x) {
    if constexpr (std::is_same_v<T, f16>) return __float2half_rn(x);
    else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
    else return x;
}

// Two numbers of a 16-bit type in a register, the first in the low half.
template <typename T> DEVICE uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, f16>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename T> DEVICE float2 unpack(uint32_t packed) {
    if constexpr (std::is_same_v<T, bf16>) return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(packed);
    raw.y = static_cast<unsigned short>(packed >> 16);
    return __half22float2(raw);
}

// ---- memory ----

// V is float2, float4, uint2, uint4…; `from` and `to` are aligned to its size.
template <typename V> DEVICE V load_vector(const void* from) { return *static_cast<const V*>(from); }
template <typename V> DEVICE void store_vector(void* to, V value) { *static_cast<V*>(to) = value; }

// Copies 16 aligned bytes to shared memory in the background; zeros instead of them unless `valid`; nothing unless `wanted`, which
// makes no branch.
DEVICE void cp_async_16(void* to_shared, const void* from_global, bool valid = true, bool wanted = true) {
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
    int bytes = valid ? 16 : 0;
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.b32 wanted, %3, 0;\n"
                 "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
                 "}" ::"r"(to), "l"(from_global), "r"(bytes), "r"(static_cast<int>(wanted)) : "memory");
}
// Has the second-level cache fetch the 128 bytes that an address of the card's memory is in: a hint, whatever is written there yet.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// Adds one to what is at a place in the card's memory, which other blocks do too: returns what was there. Whoever comes later sees
// what this thread saw or wrote before, as it sees theirs who came earlier.
DEVICE unsigned count_arrival(unsigned* at) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}
// Closes a group of copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the latest `pending` groups of this thread have arrived.
template <int pending> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// ---- arithmetic ----

// 2^x with a relative error of 2^-22; 0 for x = −∞.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x with a relative error of 2^-23; 0 for x = ∞.
DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- matrix fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16") ----
// Lane 4g + t of a warp holds of A (16 × 16): a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9],
// a[3] = A[g+8][2t+8, 2t+9]; of B (16 × 8): b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; of C and D (16 × 8, f32):
// d[0, 1] = D[g][2t, 2t+1], d[2, 3] = D[g+8][2t, 2t+1]. A product of depth 8 has the first half of a and b.

// d += a · b, 16 × 8 results, products of two T summed in f32.
template <typename T> DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, f16>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}
template <typename T> DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    if constexpr (std::is_same_v<T, f16>) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(a1), "r"(b));
    } else {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(a1), "r"(b));
    }
}

// Reads four (two) 8 × 8 matrices of 16-bit numbers. Lane 8i + r gives the address of row r of matrix i in shared
// memory, 16-byte aligned; lane 4g + t receives numbers 2t, 2t+1 of row g of matrix i in r[i]. Of a matrix transposed, it
// receives rows 2t, 2t+1 of column g. ldmatrix_x2 ignores the addresses of lanes 16–31.
#define LDMATRIX_ADDRESS static_cast<uint32_t>(__cvta_generic_to_shared(row))
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(LDMATRIX_ADDRESS) : "memory");
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(LDMATRIX_ADDRESS) : "memory");
}
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(LDMATRIX_ADDRESS) : "memory");
}
DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(LDMATRIX_ADDRESS) : "memory");
}
#undef LDMATRIX_ADDRESS

#else
#include "host/shim.hpp"
#endif

// Calls f with 0 … N − 1, constants once all is inlined: where nvcc leaves a loop that it was told to unroll.
template <int N, typename F, typename... Numbers> DEVICE void call_with_numbers(F f, Numbers... numbers) {
    if constexpr (sizeof...(Numbers) < N) call_with_numbers<N>(f, numbers..., int(sizeof...(Numbers)));
    else f(numbers...);
}

// Whether this block is the last of `blocks` to come here: then all its threads see what the others wrote before. `arrivals`
// is 0 before the first comes, and again behind the last.
DEVICE bool arrives_last(unsigned* arrivals, unsigned blocks) {
    bool last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = count_arrival(arrivals) == blocks - 1;
        if (last) *arrivals = 0;
    }
    return __syncthreads_or(last);
}

// ---- sums over a warp and a block, the same in every thread ----

constexpr unsigned ALL_LANES = 0xffffffffu;

DEVICE float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

DEVICE float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// `scratch`: 32 floats of shared memory that nothing else uses. Blocks are one-dimensional, whole warps.
DEVICE float block_sum(float x, float* scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
    __syncthreads();
    return x;
}
