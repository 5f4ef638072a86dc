// What the products are made of: what a row of the left side gathers, and what becomes of a sum.
//
// A phase is the pixels of a result that lie `step` apart on both axes, from pixel `phase` on. For all pixels of a phase alike,
// a tap reads the source at a fixed distance from where the pixel's own place is: a product over a phase is a convolution
// of stride `multiple` with some of the taps. Where nothing is interleaved the only phase is the whole image.
//
//                          step      multiple  taps of an axis
//     forward, stride s    1         s         all
//     gradient, stride s   s         1         those that hit a pixel of the phase, 1 of s
#pragma once

#include "activation.cuh"

enum class Direction { Forward, Gradient };

// The parameters of a kernel; see product.cu.
template <typename T> struct Product {
    T* c;
    float* partial;
    const T *a, *w, *bias, *image_bias, *residual, *gates;
    T* gated;
    int images, height, width, n, source_height, source_width, channels;
    int kernel_height, kernel_width, stride, top, left;
    int c_stride, a_stride, w_stride, residual_stride, image_bias_stride;
    float scale;
    int splits;
    unsigned* arrivals;

    DEVICE_MEMBER int pixels() const { return images * height * width; }
};

// ---- the gather ----

// One axis of a phase. A source pixel's number is multiple · (number in the phase) + first + (a tap's distance).
template <Direction D> struct Axis {
    int size, source_size, kernel, stride, padding, phase;
    int step, multiple, count, taps, first;
    int skipped;  // gradient: a tap that cannot hit the phase

    DEVICE_MEMBER Axis(int size, int source_size, int kernel, int stride, int padding, int phase)
        : size(size), source_size(source_size), kernel(kernel), stride(stride), padding(padding), phase(phase) {
        step = D == Direction::Forward ? 1 : stride;
        multiple = D == Direction::Forward ? stride : 1;
        count = (size - phase + step - 1) / step;
        skipped = (phase + padding) % stride;
        int hits = kernel > skipped ? (kernel - skipped + stride - 1) / stride : 0;
        taps = D == Direction::Forward ? kernel : hits;
        first = taps == 0 ? 0 : offset(D == Direction::Forward ? 0 : hits - 1);
    }
    // Which of the kernel's taps is number i, and the source pixel that it reads for the phase's first.
    DEVICE_MEMBER int tap(int i) const { return D == Direction::Forward ? i : skipped + stride * i; }
    DEVICE_MEMBER int offset(int i) const {
        if (D == Direction::Gradient) return (phase + padding - tap(i)) / stride;  // without rest
        return i - padding;
    }
    // Bit d: the source has a pixel at distance d for pixel i of the phase.
    DEVICE_MEMBER unsigned existing(int i) const {
        int from = multiple * i + first, low = min(max(-from, 0), 16), high = min(max(source_size - from, 0), 16);
        return ((1u << high) - 1) & ~((1u << low) - 1);
    }
};

// A tap for all rows: where its weights begin behind those of tap 0, how many pixels away it reads, and which two bits of a
// row's mask say whether that exists. 16 bytes.
struct alignas(16) Tap { int weight, pixels; unsigned bits, unused; };

// A row: its source pixel at distance 0, which need not exist, and which do (bits from 0 vertically, from 16 horizontally).
struct alignas(8) Row { int pixel; unsigned existing; };

constexpr int MAX_TAPS = 64;

template <typename T, Direction D> struct Gather {
    const Product<T>& p;
    Axis<D> y, x;
    int rows, taps;

    DEVICE_MEMBER static int phases_of_axis(const Product<T>& p) { return D == Direction::Forward ? 1 : p.stride; }
    DEVICE_MEMBER Gather(const Product<T>& p, int phase)
        : p(p),
          y(p.height, p.source_height, p.kernel_height, p.stride, p.top, phase / phases_of_axis(p)),
          x(p.width, p.source_width, p.kernel_width, p.stride, p.left, phase % phases_of_axis(p)) {
        rows = p.images * y.count * x.count;
        taps = y.taps * x.taps;
    }
    // What all steps of a block look up; each thread fills in its part.
    DEVICE_MEMBER void list(Tap* tap_list, Row* row_list, int first_row, int count) const {
        int tap_size = D == Direction::Forward ? p.channels : p.n;
        for (int i = threadIdx.x; i < taps; i += blockDim.x) {
            int vertical = i / x.taps, horizontal = i % x.taps;
            int down = y.offset(vertical) - y.first, right = x.offset(horizontal) - x.first;
            tap_list[i] = {(y.tap(vertical) * p.kernel_width + x.tap(horizontal)) * tap_size, down * p.source_width + right,
                           1u << down | 1u << (16 + right), 0};
        }
        for (int i = threadIdx.x; i < count; i += blockDim.x) row_list[i] = row(first_row + i);
    }
    DEVICE_MEMBER Row row(int number) const {
        if (number >= rows) return {0, 0};
        unsigned line = unsigned(number) / unsigned(x.count), image = line / unsigned(y.count);
        int column = number - line * x.count, within = line - image * y.count;
        int source_line = image * p.source_height + y.multiple * within + y.first;
        return {source_line * p.source_width + x.multiple * column + x.first, y.existing(within) | x.existing(column) << 16};
    }
    // Its number in the result.
    DEVICE_MEMBER int pixel(int number) const {
        if (y.step == 1) return number;
        unsigned line = unsigned(number) / unsigned(x.count), image = line / unsigned(y.count);
        int column = number - line * x.count, within = line - image * y.count;
        return (image * p.height + within * y.step + y.phase) * p.width + column * x.step + x.phase;
    }
};

// ---- what becomes of sums ----

// Eight neighbours as they lie in memory, read at once: 16-byte aligned.
template <typename T> struct Eight { uint4 at[sizeof(T) / 2]; };

template <typename T> DEVICE Eight<T> load_8(const T* from) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) eight.at[i] = load_vector<uint4>(from + i * 16 / sizeof(T));
    return eight;
}
// Those before `end` of a row, from `column` on, one by one, and zeros.
template <typename T> DEVICE Eight<T> load_some(const T* from, int column, int end) {
    alignas(16) T some[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) some[j] = column + j < end ? from[j] : from_f32<T>(0.0f);
    return load_8(some);
}

template <typename T> DEVICE void add_8(float (&to)[8], const Eight<T>& eight) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) {
        unsigned words[4] = {eight.at[i].x, eight.at[i].y, eight.at[i].z, eight.at[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (sizeof(T) == 4) {
                to[4 * i + j] += __uint_as_float(words[j]);
            } else {
                float2 pair = unpack<T>(words[j]);
                to[2 * j] += pair.x, to[2 * j + 1] += pair.y;
            }
        }
    }
}

template <typename T> DEVICE void store_8(T* to, const float (&from)[8]) {
    if constexpr (sizeof(T) == 4) {
        store_vector(to, float4{from[0], from[1], from[2], from[3]});
        store_vector(to + 4, float4{from[4], from[5], from[6], from[7]});
    } else {
        store_vector(to, uint4{pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
                               pack<T>(from[6], from[7])});
    }
}

// From row to row of partial sums.
DEVICE int partial_stride(int n) { return (n + 7) / 8 * 8; }

// Whether rows of results, and of what is added to them, can be taken in eights.
template <typename T> DEVICE bool in_eights(const Product<T>& p) {
    auto address = [](const T* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    uintptr_t addresses = address(p.c) | address(p.bias) | address(p.image_bias) | address(p.residual) | address(p.gates);
    return addresses % 16 == 0 && (p.n | p.c_stride | p.image_bias_stride | p.residual_stride) % 8 == 0;
}

// What a thread makes of sums of COUNT pixels, from `column` on, a multiple of 8; in place of those that do not exist, behind the
// first `existing`, the first is named once more, and read in vain: all that a thread reads is on its way before anything is used, without
// a branch in between, so that it waits for memory once.
template <bool EIGHTS, typename T, int COUNT> struct Results {
    const Product<T>& p;
    const int (&pixels)[COUNT];
    int existing, column;

    DEVICE_MEMBER Eight<T> load(const T* from) const {
        if constexpr (EIGHTS) return load_8(from);
        else return load_some(from, column, p.n);
    }
    // From rows of a matrix whose number and first column a function has.
    template <typename Begin> DEVICE_MEMBER void load(Eight<T> (&to)[COUNT], const T* from, Begin begin) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) to[i] = load(from + begin(static_cast<int64_t>(pixels[i])) + column);
    }
    // Eight, or those that there are.
    DEVICE_MEMBER void store(T* to, const float (&from)[8]) const {
        if constexpr (EIGHTS) {
            store_8(to, from);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (column + j < p.n) to[j] = from_f32<T>(from[j]);
            }
        }
    }

    DEVICE_MEMBER void finish(float (&sums)[COUNT][8]) const {
        Eight<T> bias{}, image_biases[COUNT]{}, residuals[COUNT]{};
        if (p.bias != nullptr) bias = load(p.bias + column);
        if (p.image_bias != nullptr) {
            unsigned size = p.height * p.width;
            load(image_biases, p.image_bias, [&](int64_t pixel) { return int64_t(unsigned(pixel) / size) * p.image_bias_stride; });
        }
        if (p.residual != nullptr) load(residuals, p.residual, [&](int64_t pixel) { return pixel * p.residual_stride; });
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float added[8] = {};
            add_8(added, bias), add_8(added, image_biases[i]), add_8(added, residuals[i]);
#pragma unroll
            for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(sums[i][j], p.scale, added[j]);
            if (i < existing) store(p.c + static_cast<int64_t>(pixels[i]) * p.c_stride + column, sums[i]);
        }
    }

    // The same of sums that are the gradient of a GEGLU's result: they become the gradient of its halves, [a, b]. gates has a and b
    // where c will have their gradients.
    DEVICE_MEMBER void finish_gated(float (&sums)[COUNT][8]) const {
        Eight<T> of_a[COUNT], of_b[COUNT];
        load(of_a, p.gates, [&](int64_t pixel) { return pixel * p.c_stride; });
        load(of_b, p.gates + p.n, [&](int64_t pixel) { return pixel * p.c_stride; });
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float a[8] = {}, b[8] = {};
            add_8(a, of_a[i]), add_8(b, of_b[i]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float d = sums[i][j] * p.scale, gate = b[j];
                b[j] = d * a[j] * gelu_derivative(gate), a[j] = d * gelu(gate);
            }
            if (i >= existing) continue;
            T* to = p.c + static_cast<int64_t>(pixels[i]) * p.c_stride + column;
            store(to, a), store(to + p.n, b);
        }
    }
};

// Where a split leaves its sums of a pixel.
template <typename T> DEVICE float* partial_of(const Product<T>& p, int split, int pixel, int column) {
    return p.partial + (static_cast<int64_t>(split) * p.pixels() + pixel) * partial_stride(p.n) + column;
}

// A block's sums become results. each(f), the same for all splits of a tile, calls f(pixels, existing, column, own), as Results has
// them: own(sums) adds the block's sums of these pixels to zeros. The block that comes last to a tile adds what
// all its splits have, first to last.
template <Direction D, typename T, typename Each> DEVICE void deliver(const Product<T>& p, Each each) {
    unsigned split = blockIdx.z % p.splits, tile = blockIdx.z / p.splits * gridDim.x + blockIdx.x;
    if (p.splits > 1) {
        each([&](auto& pixels, int existing, int column, auto own) {
            constexpr int COUNT = std::extent_v<std::remove_reference_t<decltype(pixels)>>;
            float sums[COUNT][8] = {};
            own(sums);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (i < existing) store_8(partial_of(p, split, pixels[i], column), sums[i]);
            }
        });
        if (!arrives_last(p.arrivals + tile, p.splits)) return;
    }
    each([&](auto& pixels, int existing, int column, auto own) {
        constexpr int COUNT = std::extent_v<std::remove_reference_t<decltype(pixels)>>;
        float sums[COUNT][8] = {};
        if (p.splits == 1) {
            own(sums);
        } else {
            int64_t size = partial_of(p, 1, 0, 0) - p.partial;
            const float* from[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) from[i] = partial_of(p, 0, pixels[i], column);
#pragma unroll COUNT > 4 ? 1 : 2
            for (int split = 0; split < p.splits; ++split) {
#pragma unroll
                for (int i = 0; i < COUNT; ++i) add_8(sums[i], load_8(from[i])), from[i] += size;
            }
        }
        auto finish = [&](auto results) {
            if (D == Direction::Gradient && p.gates != nullptr) results.finish_gated(sums);
            else results.finish(sums);
        };
        if (in_eights(p)) finish(Results<true, T, COUNT>{p, pixels, existing, column});
        else finish(Results<false, T, COUNT>{p, pixels, existing, column});
    });
}

// ---- entry points: each calls take_turn() once it knows what it reads ----

#define PRODUCT(name, bounds, T, body)                                                                                 \
    KERNEL(name, bounds, T* c, float* partial, const T* a, const T* w, const T* bias, const T* image_bias,             \
           const T* residual, const T* gates, T* gated, int images, int height, int width, int n, int source_height,   \
           int source_width, int channels, int kernel_height, int kernel_width, int stride, int top, int left,         \
           int c_stride, int a_stride, int w_stride, int residual_stride, int image_bias_stride, float scale,          \
           int splits, unsigned* arrivals) {                                                                           \
        Product<T> p{c, partial, a, w, bias, image_bias, residual, gates, gated, images, height, width, n, \
                     source_height, source_width, channels, kernel_height, kernel_width, stride, top, left, c_stride,  \
                     a_stride, w_stride, residual_stride, image_bias_stride, scale, splits, arrivals};                           \
        body;                                                                                                          \
    }
