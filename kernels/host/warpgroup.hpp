// Products of a warpgroup on a CPU: what they read is decoded from their descriptors, address by address.
//
// The tensor cores see what cp_async_16 copied only from async_proxy_fence on. A product is made when it is waited for, no
// earlier, and what it reads must be the same then as when it began. Warps of a warpgroup that want different products are
// an error of the launch.
#pragma once

namespace host {

// Of a product 64 × 8 N × 16, what one thread needs: its two rows of a, its 2 N columns of b.
struct Operands { uint16_t a[2][16], b[40][16]; };

struct WarpgroupProduct {
    uint64_t a, b;
    bool transposed, in_registers, add;  // a in registers has no address
    int columns;  // of the thread: 2 N
    float (*sums)[4];
    float (*value)(uint16_t);  // of a number of its type
};

uint32_t shared_address(const void* pointer, int line);
void show_async_proxy();
void begin_products();
void queue_product(const WarpgroupProduct& product, const uint32_t* a, int line);
void close_products();
void finish_products(int pending, int line);
void check_products();

template <typename T> float value_of(uint16_t bits) { return to_f32(T{bits}); }

}  // namespace host

DEVICE uint64_t shared_address(const void* pointer, int line = __builtin_LINE()) { return host::shared_address(pointer, line); }
DEVICE void async_proxy_fence() { host::show_async_proxy(); }
DEVICE void warpgroup_begin(int line = __builtin_LINE()) { host::meet("", 1, "warpgroup_begin", line), host::begin_products(); }
DEVICE void warpgroup_commit() { host::close_products(); }

template <int N> DEVICE void pin(float (&)[N][4]) {}
template <int pending> DEVICE void warpgroup_wait(int line = __builtin_LINE()) {
    host::meet("", 1, "warpgroup_wait", line);
    host::finish_products(pending, line);
}

template <typename T, bool transposed, int N>
DEVICE void wgmma_k16(float (&d)[N][4], uint64_t a, uint64_t b, int line = __builtin_LINE()) {
    host::queue_product({a, b, transposed, false, true, 2 * N, d, host::value_of<T>}, nullptr, line);
}

template <typename T, bool transposed, bool add, int N>
DEVICE void wgmma_k16(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, int line = __builtin_LINE()) {
    host::queue_product({0, b, transposed, true, add, 2 * N, d, host::value_of<T>}, a, line);
}
