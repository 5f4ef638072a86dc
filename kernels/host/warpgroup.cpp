// What is behind warpgroup.hpp.

#include "block.hpp"

namespace host {

namespace {

constexpr uint32_t WINDOW = 1024;  // where a block's own shared memory begins: a card keeps what is before

// A matrix's place, as matrix_at wrote it.
struct Descriptor {
    uint32_t start, across, down, line_bytes, swizzle_mask;

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4), across((bits >> 16 & 0x3fff) << 4), down((bits >> 32 & 0x3fff) << 4),
          line_bytes(bits >> 62 == 0 ? 16 : 256 >> (bits >> 62)), swizzle_mask(line_bytes / 16 - 1) {}

    // Of a number: its row, and its place along the depth.
    uint32_t address(unsigned row, unsigned depth, bool transposed) const {
        uint32_t at = start;
        if (line_bytes == 16) {
            at += transposed ? depth / 8 * across + depth % 8 * 16 + row / 8 * down + row % 8 * 2
                             : row / 8 * down + row % 8 * 16 + depth / 8 * across + depth % 8 * 2;
        } else if (transposed) {
            at += depth / 8 * down + depth % 8 * line_bytes + row * 2 / line_bytes * across + row * 2 % line_bytes;
        } else {
            at += row / 8 * down + row % 8 * line_bytes + depth * 2;
        }
        return at ^ (at >> 7 & swizzle_mask) << 4;
    }
};

// Neighbours, of one piece of 16 bytes.
void read(uint16_t* to, int count, uint32_t address, int line) {
    uint32_t bytes = count * sizeof *to;
    if (address < WINDOW || address + bytes > WINDOW + cluster.launch->shared_bytes) {
        fail("a product reads outside of its shared memory", line);
    }
    if (address % 16 == 0) sanitizer::reads(place.shared + address - WINDOW, 16);
    std::memcpy(to, block->async_memory.data() + address - WINDOW, bytes);
}

Operands operands_of(const WarpgroupProduct& product, int line) {
    Operands operands = {};
    Descriptor a(product.a), b(product.b);
    unsigned number = block->running->number, first_row = number / 32 % 4 * 16 + lane() / 4, t = lane() % 4;
    auto row = [&](uint16_t (&to)[16], const Descriptor& matrix, unsigned row) {
        for (unsigned k = 0; k < 16; k += 8) read(to + k, 8, matrix.address(row, k, false), line);
    };
    for (unsigned i = 0; i < 2 && !product.in_registers; ++i) row(operands.a[i], a, first_row + 8 * i);
    for (int i = 0; i < product.columns; i += 2) {
        unsigned column = i / 2 * 8 + 2 * t;
        if (!product.transposed) row(operands.b[i], b, column), row(operands.b[i + 1], b, column + 1);
        for (unsigned k = 0; k < 16 && product.transposed; ++k) {
            uint16_t pair[2];
            read(pair, 2, b.address(column, k, true), line);
            operands.b[i][k] = pair[0], operands.b[i + 1][k] = pair[1];
        }
    }
    return operands;
}

void multiply(const WarpgroupProduct& product, const Operands& operands) {
    float a[2][16], b[16];
    for (int i = 0; i < 32; ++i) a[i / 16][i % 16] = product.value(operands.a[i / 16][i % 16]);
    for (int column = 0; column < product.columns; ++column) {
        for (int k = 0; k < 16; ++k) b[k] = product.value(operands.b[column][k]);
        for (int row = 0; row < 2; ++row) {
            float& sum = product.sums[column / 2][row * 2 + column % 2];
            if (!product.add) sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
        }
    }
}

// A lane's rows of a, of which it and three others hold fragments.
void gather_rows(uint16_t (&rows)[2][16], const uint32_t* a, int line) {
    const Deposits& table = meet(a, 4 * sizeof *a, "wgmma", line);
    sanitizer::Unwatched table_of_the_shim;
    for (unsigned k = 0; k < 16; k += 2) {
        const unsigned char* owner = table.bytes[lane() / 4 * 4 + k % 8 / 2];
        for (unsigned i = 0; i < 2; ++i) std::memcpy(&rows[i][k], owner + (k / 8 * 2 + i) * sizeof *a, sizeof *a);
    }
}

}  // namespace

uint32_t shared_address(const void* pointer, int line) {
    auto offset = static_cast<const unsigned char*>(pointer) - place.shared;
    if (offset < 0 || offset >= int64_t{cluster.launch->shared_bytes}) fail("not an address in shared memory", line);
    return static_cast<uint32_t>(offset) + WINDOW;
}

void show_async_proxy() {
    for (void* to : block->running->arrived) {
        auto offset = static_cast<unsigned char*>(to) - place.shared;
        std::memcpy(block->async_memory.data() + offset, to, COPY_BYTES);
    }
    block->running->arrived.clear();
}

void begin_products() { block->running->products.may_begin = true; }

// `a`: the lane's fragment, if the product has one.
void queue_product(const WarpgroupProduct& product, const uint32_t* a, int line) {
    unsigned number = block->running->number / WARPGROUP;
    if (number >= block->warpgroups.size()) fail("a product in a warpgroup of less than 128 threads", line);
    Products& products = block->running->products;
    if (!products.may_begin) fail("a product without warpgroup_begin before it", line);
    // The first warp that comes here says what the warpgroup does.
    auto& common = block->warpgroups[number];
    std::pair matrices(product.a, product.b);
    if (products.begun == common.size()) common.push_back(matrices);
    if (common[products.begun++] != matrices) fail("warps of a warpgroup want different products", line);
    Operands operands = operands_of(product, line);
    if (product.in_registers) gather_rows(operands.a, a, line);
    products.groups.back().push_back({product, operands});
}

void close_products() { block->running->products.groups.emplace_back(); }

void finish_products(int pending, int line) {
    Products& products = block->running->products;
    for (; products.groups.size() > size_t(pending) + 1; products.groups.erase(products.groups.begin())) {
        for (const auto& [product, began] : products.groups.front()) {
            Operands now = operands_of(product, line);
            if (product.in_registers) std::memcpy(now.a, began.a, sizeof now.a);
            if (std::memcmp(&now, &began, sizeof now) != 0) fail("shared memory changed while a product read it", line);
            multiply(product, now);
        }
    }
    if (pending == 0) products.may_begin = false;
}

void check_products() {
    const auto& groups = block->running->products.groups;
    if (groups.size() > 1 || !groups.back().empty()) fail("a thread ends before its products do", 0);
}

}  // namespace host
