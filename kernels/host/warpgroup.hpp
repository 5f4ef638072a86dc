// Products of a warpgroup on a CPU: what they read is decoded from their descriptors, address by address.
//
// The tensor cores see what cp_async_16 copied only from async_proxy_fence on. A product is made when it is waited for, no
// earlier, and what it reads must be the same then as when it began. Warps of a warpgroup that want different products are
// an error of the launch.
#pragma once

namespace host {

// Of a product 64 × 160 × 16, what one thread needs: its two rows of a, its forty columns of b.
struct Operands { uint16_t a[2][16], b[40][16]; };

struct Product160 {
    uint64_t a, b;
    bool transposed;
    float (*sums)[4];
    float (*value)(uint16_t);  // of a number of its type
};

uint32_t shared_address(const void* pointer, int line);
void show_async_proxy();
void begin_products();
void queue_product(const Product160& product, int line);
void close_products();
void finish_products(int pending, int line);
void check_products();

template <typename T> float value_of(uint16_t bits) { return to_f32(T{bits}); }

}  // namespace host

DEVICE uint64_t shared_address(const void* pointer, int line = __builtin_LINE()) { return host::shared_address(pointer, line); }
DEVICE void async_proxy_fence() { host::show_async_proxy(); }
DEVICE void warpgroup_begin(int line = __builtin_LINE()) { host::meet("", 1, "warpgroup_begin", line), host::begin_products(); }
DEVICE void warpgroup_commit() { host::close_products(); }

template <int pending> DEVICE void warpgroup_wait(Sums160&, int line = __builtin_LINE()) {
    host::meet("", 1, "warpgroup_wait", line);
    host::finish_products(pending, line);
}

template <typename T, bool transposed>
DEVICE void wgmma_m64n160k16(Sums160& d, uint64_t a, uint64_t b, int line = __builtin_LINE()) {
    host::queue_product({a, b, transposed, d, host::value_of<T>}, line);
}
