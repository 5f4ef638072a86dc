// What is computed number by number, and what moves numbers: one pass over memory each. T is f32, f16 or bf16.
//
// {silu,gelu,quick_gelu}_T            y = act(x); gelu is the exact one
// {silu,gelu,quick_gelu}_gradient_T   d_x = d_y · act'(x)
// add_T                               y = a + b
// concatenate_T                       y = [a, b], row by row
// geglu_T                             y = a · gelu(b) where x = [a, b]
// geglu_gradient_T                    d_x = [d_y · gelu(b), d_y · a · gelu'(b)]
// upsample_nearest_T                  y[r, c] = x[⌊r · height / out_height⌋, ⌊c · width / out_width⌋]
// upsample_nearest_gradient_T         d_x = the sum of d_y over the pixels that read x, by rows
// transpose_T                         y = xᵀ
//
// Shapes  The first three take `count` numbers of any shape. Rows: geglu x [rows, 2 · width], y [rows, width]; a [rows, a_width],
//         b [rows, b_width], and both of them side by side [rows, a_width + b_width]. Pictures: x [B, height, width, channels],
//         y [B, out_height, out_width, channels]. A matrix: x [rows, columns].
//         Pointers are 16-byte aligned, except where a row's width is not a multiple of 8: then N below is 1, else 8, and numbers
//         go one by one. A result may lie where an operand of the same type and shape lies, in the first three and geglu_gradient
//         (d_x in x).
// Types   f32 within, rounded once; what only moves stays the same number.
// Launch  256 threads, no shared memory. Grid, rounded up:
//         count / 2048 for the first three; rows · width / N / 256 for geglu and its gradient, with both parts' width for
//         concatenate; (out_width · channels / N / 256, out_height, B) for upsample_nearest, with the sizes of x for
//         its gradient; rows · columns / 256 for the last.
// Needs   compute capability 8.0. At most 55 registers.
// Source  GEGLU: Shazeer, arXiv 2002.05202; nearest: torch's interpolate.
// Time    Bytes over 3 TB/s and a launch of 2 µs. geglu of 4096 × 2560 f16: 31 MB: 11 µs, its gradient 52 MB: 18 µs;
//         concatenate of 4096 × 960: 15.7 MB, half of it from the second-level cache: 4 µs, of most others 2 µs; the
//         VAE's 256² to 512² with 256 channels, 168 MB: 56 µs.
#include "activation.cuh"
#include "numbers.cuh"

// to[i] = f(from[i]…) for i below count: eight numbers a thread.
template <typename To, typename F, typename... From> DEVICE void map(To* to, int64_t count, F f, const From*... from) {
    int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (first + 8 <= count) map_numbers<8>(to + first, f, (from + first)...);
    else for (; first < count; ++first) map_numbers<1>(to + first, f, (from + first)...);
}

DEVICE float same(float x) { return x; }

#define ACTIVATION(T, type, name)                                                                                     \
    KERNEL(name##_##type, (256), T* y, const T* x, int64_t count) {                                                   \
        take_turn();                                                                                                  \
        map(y, count, [](float x) { return name(x); }, x);                                                            \
    }                                                                                                                 \
    KERNEL(name##_gradient_##type, (256), T* d_x, const T* d_y, const T* x, int64_t count) {                          \
        take_turn();                                                                                                  \
        map(d_x, count, [](float dy, float x) { return dy * name##_derivative(x); }, d_y, x);                         \
    }

// This thread's N numbers of a matrix, if there are any: thread after thread, row after row.
struct Place {
    int row, column;
    DEVICE_MEMBER Place(int width, int n) {
        unsigned at = blockIdx.x * blockDim.x + threadIdx.x, pieces = width / n;
        row = static_cast<int>(at / pieces), column = static_cast<int>(at % pieces) * n;
    }
};

template <int N, typename T> DEVICE void concatenate(T* y, const T* a, const T* b, int rows, int a_width, int b_width) {
    Place place(a_width + b_width, N);
    if (place.row >= rows) return;
    int64_t row = place.row;
    const T* part = place.column < a_width ? a + row * a_width + place.column : b + row * b_width + (place.column - a_width);
    map_numbers<N>(y + row * (a_width + b_width) + place.column, same, part);
}

template <int N, typename T> DEVICE void geglu(T* y, const T* x, int rows, int width) {
    Place place(width, N);
    if (place.row >= rows) return;
    y += static_cast<int64_t>(place.row) * width + place.column;
    x += static_cast<int64_t>(place.row) * 2 * width + place.column;
    map_numbers<N>(y, [](float a, float b) { return a * gelu(b); }, x, x + width);
}

template <int N, typename T> DEVICE void geglu_gradient(T* d_x, const T* d_y, const T* x, int rows, int width) {
    Place place(width, N);
    if (place.row >= rows) return;
    d_y += static_cast<int64_t>(place.row) * width + place.column;
    int64_t start = static_cast<int64_t>(place.row) * 2 * width + place.column;
    Numbers<N> dy = load_numbers<N>(d_y), a = load_numbers<N>(x + start), b = load_numbers<N>(x + start + width);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float gate = b.at[i];
        b.at[i] = dy.at[i] * a.at[i] * gelu_derivative(gate);
        a.at[i] = dy.at[i] * gelu(gate);
    }
    store_numbers(d_x + start, a);
    store_numbers(d_x + start + width, b);
}

// Row `row`, column `column` of a block's picture.
DEVICE int64_t pixel(int row, int column, int height, int width, int channels) {
    return ((static_cast<int64_t>(blockIdx.z) * height + row) * width + column) * channels;
}

template <int N, typename T>
DEVICE void upsample_nearest(T* y, const T* x, int height, int width, int out_height, int out_width, int channels) {
    Place place(channels, N);  // in a row of the picture, pixel after pixel
    int row = blockIdx.y, column = place.row;
    if (column >= out_width) return;
    y += pixel(row, column, out_height, out_width, channels) + place.column;
    x += pixel(row * height / out_height, column * width / out_width, height, width, channels) + place.column;
    map_numbers<N>(y, same, x);
}

template <int N, typename T>
DEVICE void upsample_nearest_gradient(T* d_x, const T* d_y, int height, int width, int out_height, int out_width,
                                      int channels) {
    Place place(channels, N);
    int row = blockIdx.y, column = place.row;
    if (column >= width) return;
    // ⌊r · height / out_height⌋ = row from the first such r to before row + 1's.
    auto first = [](int i, int size, int out_size) { return (i * out_size + size - 1) / size; };
    Numbers<N> sum = {};
    for (int r = first(row, height, out_height); r < first(row + 1, height, out_height); ++r) {
        for (int c = first(column, width, out_width); c < first(column + 1, width, out_width); ++c) {
            Numbers<N> dy = load_numbers<N>(d_y + pixel(r, c, out_height, out_width, channels) + place.column);
#pragma unroll
            for (int i = 0; i < N; ++i) sum.at[i] += dy.at[i];
        }
    }
    store_numbers(d_x + pixel(row, column, height, width, channels) + place.column, sum);
}

template <typename T> DEVICE void transpose(T* y, const T* x, int rows, int columns) {
    Place place(columns, 1);
    if (place.row >= rows) return;
    int64_t from = static_cast<int64_t>(place.row) * columns + place.column;
    y[static_cast<int64_t>(place.column) * rows + place.row] = x[from];
}

#define OF_TYPE(T, type)                                                                                              \
    ACTIVATION(T, type, silu)                                                                                         \
    ACTIVATION(T, type, gelu)                                                                                         \
    ACTIVATION(T, type, quick_gelu)                                                                                   \
    KERNEL(add_##type, (256), T* y, const T* a, const T* b, int64_t count) {                                          \
        take_turn();                                                                                                  \
        map(y, count, [](float a, float b) { return a + b; }, a, b);                                                  \
    }                                                                                                                 \
    KERNEL(concatenate_##type, (256), T* y, const T* a, const T* b, int rows, int a_width, int b_width) {             \
        take_turn();                                                                                                  \
        by_width(a_width | b_width, [=](auto n) { concatenate<n.value>(y, a, b, rows, a_width, b_width); });          \
    }                                                                                                                 \
    KERNEL(geglu_##type, (256), T* y, const T* x, int rows, int width) {                                              \
        take_turn();                                                                                                  \
        by_width(width, [=](auto n) { geglu<n.value>(y, x, rows, width); });                                          \
    }                                                                                                                 \
    KERNEL(geglu_gradient_##type, (256), T* d_x, const T* d_y, const T* x, int rows, int width) {                     \
        take_turn();                                                                                                  \
        by_width(width, [=](auto n) { geglu_gradient<n.value>(d_x, d_y, x, rows, width); });                          \
    }                                                                                                                 \
    KERNEL(upsample_nearest_##type, (256), T* y, const T* x, int height, int width, int out_height, int out_width,    \
           int channels) {                                                                                            \
        take_turn();                                                                                                  \
        by_width(channels, [=](auto n) {                                                                              \
            upsample_nearest<n.value>(y, x, height, width, out_height, out_width, channels);                          \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(upsample_nearest_gradient_##type, (256), T* d_x, const T* d_y, int height, int width, int out_height,      \
           int out_width, int channels) {                                                                             \
        take_turn();                                                                                                  \
        by_width(channels, [=](auto n) {                                                                              \
            upsample_nearest_gradient<n.value>(d_x, d_y, height, width, out_height, out_width, channels);             \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(transpose_##type, (256), T* y, const T* x, int rows, int columns) {                                        \
        take_turn();                                                                                                  \
        transpose(y, x, rows, columns);                                                                               \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
