// Layer norm over rows, and its gradient.
//
// layer_norm_{f32,f16,bf16}           y = (x − μ) / √(σ² + eps) · weight + bias, with a row's mean μ and variance σ²
// layer_norm_gradient_{f32,f16,bf16}  with g = d_y · weight and x̂ the normalised row:
//                                     d_x = (g − mean(g) − x̂ · mean(g · x̂)) / √(σ² + eps) + residual
//
// Shapes  y, x, d_x, d_y, residual [rows, channels], rows contiguous; weight, bias [channels] f32. residual is the gradient
//         that reaches the input around the normalisation; may be null. y may be x, d_x may be d_y, x or residual.
//         Pointers are 16-byte aligned if channels is a multiple of 8; other widths go number by number.
// Types   f32 within. The variance is of differences from the mean: a mean far from zero costs no digits. The gradient
//         computes both again from x.
// Launch  a warp to a row. grid: rows / 8 rounded up; 256 threads; no shared memory.
// Needs   compute capability 8.0. At most 62 registers.
// Source  Ba, Kiros, Hinton (arXiv 1607.06450); the definition, in passes over a row that the first-level cache keeps.
// Time    4096 × 320 f16: 5.2 MB at 3 TB/s: 1.7 µs, and 1 µs of passes and sums one after another. The gradient with a
//         residual, 10.5 MB: 4.5 µs. 1024 × 640 and 256 × 1280: 2 and 3 µs, bound by latency.
#include "numbers.cuh"

// Calls f with the first of each N numbers that this lane has of a row.
template <int N, typename F> DEVICE void along_row(int channels, F f) {
    for (int first = static_cast<int>(threadIdx.x) % 32 * N; first < channels; first += 32 * N) f(first);
}

template <int N, typename T> DEVICE float mean_of_row(const T* x, int channels) {
    float sum = 0.0f;
    along_row<N>(channels, [&](int first) {
        Numbers<N> numbers = load_numbers<N>(x + first);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += numbers.at[i];
    });
    return warp_sum(sum) / static_cast<float>(channels);
}

template <int N, typename T>
DEVICE void layer_norm(T* y, const T* x, const float* weight, const float* bias, int rows, int channels, float eps) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    x += static_cast<int64_t>(row) * channels;
    y += static_cast<int64_t>(row) * channels;

    float mean = mean_of_row<N>(x, channels), squares = 0.0f;
    along_row<N>(channels, [&](int first) {
        Numbers<N> numbers = load_numbers<N>(x + first);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (numbers.at[i] - mean) * (numbers.at[i] - mean);
    });
    float inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(channels) + eps);
    along_row<N>(channels, [&](int first) {
        auto normalise = [=](float x, float weight, float bias) { return fmaf((x - mean) * inverse, weight, bias); };
        map_numbers<N>(y + first, normalise, x + first, weight + first, bias + first);
    });
}

template <int N, typename T>
DEVICE void layer_norm_gradient(T* d_x, const T* d_y, const T* x, const T* residual, const float* weight, int rows,
                                int channels, float eps) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    int64_t start = static_cast<int64_t>(row) * channels;
    d_x += start, d_y += start, x += start;

    float mean = mean_of_row<N>(x, channels), squares = 0.0f, sum = 0.0f, product = 0.0f;
    along_row<N>(channels, [&](int first) {
        Numbers<N> numbers = load_numbers<N>(x + first), dy = load_numbers<N>(d_y + first);
        Numbers<N> weights = load_numbers<N>(weight + first);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float difference = numbers.at[i] - mean, g = dy.at[i] * weights.at[i];
            squares += difference * difference;
            sum += g;
            product += g * difference;
        }
    });
    float share = 1.0f / static_cast<float>(channels);
    float inverse = 1.0f / sqrtf(warp_sum(squares) * share + eps);
    float mean_g = warp_sum(sum) * share, mean_product = warp_sum(product) * share * inverse;
    along_row<N>(channels, [&](int first) {
        auto gradient = [=](float x, float dy, float weight, float residual) {
            float normalised = (x - mean) * inverse;
            return fmaf(dy * weight - mean_g - normalised * mean_product, inverse, residual);
        };
        if (residual != nullptr) {
            map_numbers<N>(d_x + first, gradient, x + first, d_y + first, weight + first, residual + start + first);
        } else {
            auto alone = [=](float x, float dy, float weight) { return gradient(x, dy, weight, 0.0f); };
            map_numbers<N>(d_x + first, alone, x + first, d_y + first, weight + first);
        }
    });
}

#define OF_TYPE(T, type)                                                                                              \
    KERNEL(layer_norm_##type, (256), T* y, const T* x, const float* weight, const float* bias, int rows, int channels, \
           float eps) {                                                                                               \
        take_turn();                                                                                                  \
        by_width(channels, [=](auto n) { layer_norm<n.value>(y, x, weight, bias, rows, channels, eps); });            \
    }                                                                                                                 \
    KERNEL(layer_norm_gradient_##type, (256), T* d_x, const T* d_y, const T* x, const T* residual,                    \
           const float* weight, int rows, int channels, float eps) {                                                  \
        take_turn();                                                                                                  \
        by_width(channels, [=](auto n) {                                                                              \
            layer_norm_gradient<n.value>(d_x, d_y, x, residual, weight, rows, channels, eps);                         \
        });                                                                                                           \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
