// Group norm, with or without SiLU after it, and its gradient.
//
// group_norm_partial_{f32,f16,bf16}           means and squared deviations of shares of the pixels
// group_norm_{f32,f16,bf16}                   merges them: y = act(z), z = x̂ · weight + bias
// group_norm_gradient_partial_{f32,f16,bf16}  sums of g and g · x̂ over shares of the pixels
// group_norm_gradient_{f32,f16,bf16}          merges them: d_x = (g − mean(g) − x̂ · mean(g · x̂)) / √(σ² + eps) + residual
// group_norm_whole_{f32,f16,bf16}, group_norm_whole_gradient_{f32,f16,bf16}
//                                             one launch for the first two, and for the last: a block has a whole group
//
// x̂ = (x − μ) / √(σ² + eps) with a group's mean μ and variance σ²; g = d_y · act'(z) · weight.
//
// Shapes  y, x, d_x, d_y, residual [B, pixels, channels]; weight, bias [channels] f32; statistics [B, groups, 2] f32: μ and
//         1 / √(σ² + eps), which the forward kernels write for the gradient, may be null there; partial [B, groups, splits, 2] f32,
//         between the two kernels of a pair. residual is the gradient that reaches the input around the normalisation; may
//         be null. silu ≠ 0 asks for SiLU. y may be x, d_x may be d_y, x or residual. groups divides channels.
//         Pointers are 16-byte aligned if channels (for a whole group, its own) is a multiple of 8; other widths go number by
//         number.
// Types   f32 within. Means and squared deviations are updated, then merged, in a fixed order: no square of a mean is ever
//         subtracted, and a result depends neither on the order of blocks nor on the batch.
// Launch  grid: (splits, groups / 8 rounded up, B); 256 threads. The same splits, any number, for both kernels of a pair:
//         pixels · channels / groups / 1024, from 1 to 128, gives a thread four pixels, and a card its fill.
//         Shared memory: 64 · max(256, channels / groups) bytes for the partial kernels, 128 bytes for the others. For whole
//         groups the grid is (1, groups, B), shared memory 192 bytes.
// Needs   compute capability 8.0. Registers: 61 and 64, of the gradient 111 and 115, of whole groups 63 and 116; none spilled.
// Source  Wu, He (arXiv 1803.08494); updates of mean and squared deviations by Welford (1962); the merge is the definition, of
//         the parts' means about the common one (Chan, Golub, LeVeque 1979).
// Time    A block has the channels of eight groups; a warp merges a group. x comes from memory once, then from the second-
//         level cache (50 MB).
//
//         256 × 1280 f16, 32 whole groups of 20 KB, from the first-level cache but once: 3.5 µs, gradient 4 µs
//         4096 × 320 f16    2.6 MB read, again, and written                 2 and 2.5 µs    gradient 2.5 and 3.5 µs
//         1024 × 640        half of that; latency                           2 and 2 µs               2 and 2.5 µs
//         262144 × 128      67 MB read, again, and written, at 3 TB/s       25 and 45 µs             45 and 90 µs
//
//         Predicted for an H100, not yet measured.
#include "activation.cuh"
#include "numbers.cuh"

constexpr int THREADS = 256, GROUPS = THREADS / 32;  // of a block, if a warp merges a group

// A block's share of the pixels, and the channels of its groups. A thread keeps N channels and goes down the pixels.
struct Tile {
    int depth, first_group, groups, first_channel, width;  // channels of a group; of the tile
    int first_pixel, pixels;
    int columns, rows, row, column;  // columns of N channels, and pixels that the block has at a time; the thread's own
    int64_t group, start;            // of the first group in all images, of the first number

    DEVICE_MEMBER Tile(int n, int most_groups, int all_pixels, int all_channels, int all_groups) {
        depth = all_channels / all_groups;
        first_group = blockIdx.y * most_groups, groups = min(most_groups, all_groups - first_group);
        first_channel = first_group * depth, width = groups * depth;
        first_pixel = blockIdx.x * share(all_pixels), pixels = pixels_of(blockIdx.x, all_pixels);
        columns = width / n;
        int abreast = min(columns, THREADS);
        rows = THREADS / abreast, row = threadIdx.x / abreast, column = threadIdx.x % abreast;
        group = static_cast<int64_t>(blockIdx.z) * all_groups + first_group;
        start = (static_cast<int64_t>(blockIdx.z) * all_pixels + first_pixel) * all_channels + first_channel;
    }

    // Pixels of a split, rounded up; of this one.
    static DEVICE_MEMBER int share(int all_pixels) { return (all_pixels + gridDim.x - 1) / gridDim.x; }
    static DEVICE_MEMBER int pixels_of(int split, int all_pixels) {
        int first = split * share(all_pixels);
        return max(0, min(share(all_pixels), all_pixels - first));
    }
    DEVICE_MEMBER int pixels_of_row(int row) const { return pixels > row ? (pixels - row + rows - 1) / rows : 0; }

    // Calls f with the first channel, counted in the tile, of each column that is this thread's.
    template <typename F> DEVICE_MEMBER void each_column(int n, F f) const {
        if (row >= rows) return;
        for (int at = column; at < columns; at += THREADS) f(at * n);
    }
    // Calls f with the place of each number of a channel that is this thread's.
    template <typename F> DEVICE_MEMBER void each_pixel(int channel, int all_channels, F f) const {
        int64_t step = static_cast<int64_t>(rows) * all_channels, at = start + static_cast<int64_t>(row) * all_channels + channel;
        for (int pixel = row; pixel < pixels; pixel += rows, at += step) f(at);
    }

    // Where a thread leaves two sums of a channel for the warp that merges its group: [rows, width] in shared memory.
    DEVICE_MEMBER float2* cell(int row, int channel) const {
        return reinterpret_cast<float2*>(shared_memory()) + row * width + channel;
    }
    // Cell i of a group.
    DEVICE_MEMBER float2 cell_of_group(int group, int i) const { return *cell(i / depth, group * depth + i % depth); }
    // The block's two sums of a group.
    DEVICE_MEMBER void store_partial(float* partial, int group, float2 sums) const {
        if (threadIdx.x % 32 == 0) store_vector(partial + ((this->group + group) * gridDim.x + blockIdx.x) * 2, sums);
    }
    DEVICE_MEMBER float2 load_partial(const float* partial, int group, int split) const {
        return load_vector<float2>(partial + ((this->group + group) * gridDim.x + split) * 2);
    }
};

// How many numbers, their mean, and the sum of their squared differences from it.
struct Moments { float count, mean, squares; };

// Those of the union of `sets`; of(i) are set i's, zeros if it is empty. The first is not, unless all are.
template <typename F> DEVICE Moments unite(int sets, F of) {
    int lane = threadIdx.x % 32;
    float origin = of(0).mean, count = 0.0f, sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < sets; i += 32) {
        Moments set = of(i);
        count += set.count;
        sum += set.count * (set.mean - origin);
    }
    count = warp_sum(count);
    float mean = origin + warp_sum(sum) / fmaxf(count, 1.0f);
    for (int i = lane; i < sets; i += 32) {
        Moments set = of(i);
        squares += set.squares + set.count * (set.mean - mean) * (set.mean - mean);
    }
    return {count, mean, warp_sum(squares)};
}

// Both sums of `parts`.
template <typename F> DEVICE float2 sum_pairs(int parts, F of) {
    float2 sum = {0.0f, 0.0f};
    for (int i = threadIdx.x % 32; i < parts; i += 32) {
        float2 part = of(i);
        sum.x += part.x, sum.y += part.y;
    }
    return {warp_sum(sum.x), warp_sum(sum.y)};
}

template <int N, typename T> DEVICE void group_norm_partial(float* partial, const T* x, int pixels, int channels, int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    tile.each_column(N, [&](int channel) {
        float mean[N] = {}, squares[N] = {}, count = 0.0f;
        tile.each_pixel(channel, channels, [&](int64_t at) {
            Numbers<N> numbers = load_numbers<N>(x + at);
            count += 1.0f;
            float share = 1.0f / count;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float difference = numbers.at[i] - mean[i];
                mean[i] = fmaf(difference, share, mean[i]);
                squares[i] = fmaf(difference, numbers.at[i] - mean[i], squares[i]);
            }
        });
#pragma unroll
        for (int i = 0; i < N; ++i) *tile.cell(tile.row, channel + i) = {mean[i], squares[i]};
    });
    __syncthreads();

    int group = threadIdx.x / 32;
    if (group >= tile.groups) return;
    Moments moments = unite(tile.rows * tile.depth, [&](int i) -> Moments {
        float2 cell = tile.cell_of_group(group, i);
        return {static_cast<float>(tile.pixels_of_row(i / tile.depth)), cell.x, cell.y};
    });
    tile.store_partial(partial, group, {moments.mean, moments.squares});
}

// y, from a group's mean and inverse deviation, which of_group has for each of the block's.
template <int N, bool SILU, typename T>
DEVICE void normalise(const Tile& tile, T* y, const T* x, const float2* of_group, const float* weight, const float* bias,
                      int channels) {
    tile.each_column(N, [&](int channel) {
        float mean[N], scale[N], shift[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float2 both = of_group[(channel + i) / tile.depth];
            mean[i] = both.x, scale[i] = both.y * weight[tile.first_channel + channel + i];
            shift[i] = bias[tile.first_channel + channel + i];
        }
        tile.each_pixel(channel, channels, [&](int64_t at) {
            Numbers<N> numbers = load_numbers<N>(x + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float z = fmaf(numbers.at[i] - mean[i], scale[i], shift[i]);
                numbers.at[i] = SILU ? silu(z) : z;
            }
            store_numbers(y + at, numbers);
        });
    });
}

template <int N, bool SILU, typename T>
DEVICE void group_norm(T* y, float* statistics, const T* x, const float* partial, const float* weight, const float* bias,
                       int pixels, int channels, int groups, float eps) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    float2* of_group = reinterpret_cast<float2*>(shared_memory());
    int group = threadIdx.x / 32;
    if (group < tile.groups) {
        Moments moments = unite(gridDim.x, [&](int split) -> Moments {
            float2 part = tile.load_partial(partial, group, split);
            return {static_cast<float>(tile.depth) * tile.pixels_of(split, pixels), part.x, part.y};
        });
        float2 both = {moments.mean, 1.0f / sqrtf(moments.squares / moments.count + eps)};
        if (threadIdx.x % 32 == 0) {
            of_group[group] = both;
            if (statistics != nullptr && blockIdx.x == 0) store_vector(statistics + (tile.group + group) * 2, both);
        }
    }
    __syncthreads();
    normalise<N, SILU>(tile, y, x, of_group, weight, bias, channels);
}

// Where a block that has a whole group leaves what all threads need of it: behind what block_sum uses.
DEVICE float2* of_whole_group() { return reinterpret_cast<float2*>(shared_memory() + 128); }
DEVICE float sum_of_block(float x) { return block_sum(x, reinterpret_cast<float*>(shared_memory())); }

template <int N, bool SILU, typename T>
DEVICE void group_norm_whole(T* y, float* statistics, const T* x, const float* weight, const float* bias, int pixels,
                             int channels, int groups, float eps) {
    Tile tile(N, 1, pixels, channels, groups);
    float count = static_cast<float>(tile.depth) * pixels;
    auto mean_of = [&](auto f) {
        float sum = 0.0f;
        tile.each_column(N, [&](int channel) {
            tile.each_pixel(channel, channels, [&](int64_t at) {
                Numbers<N> numbers = load_numbers<N>(x + at);
#pragma unroll
                for (int i = 0; i < N; ++i) sum += f(numbers.at[i]);
            });
        });
        return sum_of_block(sum) / count;
    };
    float mean = mean_of([](float x) { return x; });
    float variance = mean_of([=](float x) { return (x - mean) * (x - mean); });
    float2 both = {mean, 1.0f / sqrtf(variance + eps)};
    if (threadIdx.x == 0) {
        *of_whole_group() = both;
        if (statistics != nullptr) store_vector(statistics + tile.group * 2, both);
    }
    __syncthreads();
    normalise<N, SILU>(tile, y, x, of_whole_group(), weight, bias, channels);
}

// What a gradient is made of, for the channels of a thread.
template <int N, bool SILU> struct Channels {
    float mean[N], inverse[N], weight[N], bias[N];

    DEVICE_MEMBER Channels(const Tile& tile, int channel, const float* statistics, const float* weights, const float* biases) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float2 both = load_vector<float2>(statistics + (tile.group + (channel + i) / tile.depth) * 2);
            mean[i] = both.x, inverse[i] = both.y;
            weight[i] = weights[tile.first_channel + channel + i], bias[i] = biases[tile.first_channel + channel + i];
        }
    }
    DEVICE_MEMBER float normalised(int i, float x) const { return (x - mean[i]) * inverse[i]; }
    // g, of x̂ and d_y.
    DEVICE_MEMBER float gradient(int i, float normalised, float dy) const {
        float g = dy * weight[i];
        return SILU ? g * silu_derivative(fmaf(normalised, weight[i], bias[i])) : g;
    }
};

// Calls f(x̂, g) for each number of a column.
template <int N, bool SILU, typename T, typename F>
DEVICE void each_gradient(const Tile& tile, int channel, const Channels<N, SILU>& own, const T* d_y, const T* x, int channels, F f) {
    tile.each_pixel(channel, channels, [&](int64_t at) {
        Numbers<N> numbers = load_numbers<N>(x + at), dy = load_numbers<N>(d_y + at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float normalised = own.normalised(i, numbers.at[i]);
            f(i, normalised, own.gradient(i, normalised, dy.at[i]));
        }
    });
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_gradient_partial(float* partial, const T* d_y, const T* x, const float* statistics,
                                        const float* weight, const float* bias, int pixels, int channels, int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        float sum[N] = {}, product[N] = {};
        each_gradient(tile, channel, own, d_y, x, channels, [&](int i, float normalised, float g) {
            sum[i] += g;
            product[i] = fmaf(g, normalised, product[i]);
        });
#pragma unroll
        for (int i = 0; i < N; ++i) *tile.cell(tile.row, channel + i) = {sum[i], product[i]};
    });
    __syncthreads();

    int group = threadIdx.x / 32;
    if (group >= tile.groups) return;
    float2 sums = sum_pairs(tile.rows * tile.depth, [&](int i) { return tile.cell_of_group(group, i); });
    tile.store_partial(partial, group, sums);
}

// d_x, from a group's mean g and mean g · x̂, which `means` has for each of the block's.
template <int N, bool SILU, typename T>
DEVICE void write_gradient(const Tile& tile, T* d_x, const T* d_y, const T* x, const T* residual, const float* statistics,
                           const float2* means, const float* weight, const float* bias, int channels) {
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        float mean_g[N], mean_product[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float2 both = means[(channel + i) / tile.depth];
            mean_g[i] = both.x, mean_product[i] = both.y;
        }
        tile.each_pixel(channel, channels, [&](int64_t at) {
            Numbers<N> numbers = load_numbers<N>(x + at), dy = load_numbers<N>(d_y + at), sum = {};
            if (residual != nullptr) sum = load_numbers<N>(residual + at);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float normalised = own.normalised(i, numbers.at[i]), g = own.gradient(i, normalised, dy.at[i]);
                sum.at[i] += (g - mean_g[i] - normalised * mean_product[i]) * own.inverse[i];
            }
            store_numbers(d_x + at, sum);
        });
    });
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_gradient(T* d_x, const T* d_y, const T* x, const T* residual, const float* statistics,
                                const float* partial, const float* weight, const float* bias, int pixels, int channels,
                                int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    float2* means = reinterpret_cast<float2*>(shared_memory());
    int group = threadIdx.x / 32;
    if (group < tile.groups) {
        float2 sums = sum_pairs(gridDim.x, [&](int split) { return tile.load_partial(partial, group, split); });
        float count = static_cast<float>(tile.depth) * pixels;
        if (threadIdx.x % 32 == 0) means[group] = {sums.x / count, sums.y / count};
    }
    __syncthreads();
    write_gradient<N, SILU>(tile, d_x, d_y, x, residual, statistics, means, weight, bias, channels);
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_whole_gradient(T* d_x, const T* d_y, const T* x, const T* residual, const float* statistics,
                                      const float* weight, const float* bias, int pixels, int channels, int groups) {
    Tile tile(N, 1, pixels, channels, groups);
    float sum = 0.0f, product = 0.0f, count = static_cast<float>(tile.depth) * pixels;
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        each_gradient(tile, channel, own, d_y, x, channels, [&](int, float normalised, float g) {
            sum += g;
            product = fmaf(g, normalised, product);
        });
    });
    float2 means = {sum_of_block(sum) / count, sum_of_block(product) / count};
    if (threadIdx.x == 0) *of_whole_group() = means;
    __syncthreads();
    write_gradient<N, SILU>(tile, d_x, d_y, x, residual, statistics, of_whole_group(), weight, bias, channels);
}

// f(whether there is an activation, how many channels a thread has at a time), both as constants.
template <typename F> DEVICE void specialise(int silu, int channels, F f) {
    by_width(channels, [=](auto n) {
        if (silu != 0) f(std::true_type(), n);
        else f(std::false_type(), n);
    });
}

#define OF_TYPE(T, type)                                                                                              \
    KERNEL(group_norm_partial_##type, (THREADS, 4), float* partial, const T* x, int pixels, int channels, int groups) { \
        take_turn();                                                                                                  \
        by_width(channels, [=](auto n) { group_norm_partial<n.value>(partial, x, pixels, channels, groups); });       \
    }                                                                                                                 \
    KERNEL(group_norm_##type, (THREADS, 4), T* y, float* statistics, const T* x, const float* partial,                \
           const float* weight, const float* bias, int pixels, int channels, int groups, float eps, int silu) {       \
        take_turn();                                                                                                  \
        specialise(silu, channels, [=](auto activated, auto n) {                                                      \
            group_norm<n.value, activated.value>(y, statistics, x, partial, weight, bias, pixels, channels, groups, eps); \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_gradient_partial_##type, (THREADS, 2), float* partial, const T* d_y, const T* x,                \
           const float* statistics, const float* weight, const float* bias, int pixels, int channels, int groups,     \
           int silu) {                                                                                                \
        take_turn();                                                                                                  \
        specialise(silu, channels, [=](auto activated, auto n) {                                                      \
            group_norm_gradient_partial<n.value, activated.value>(partial, d_y, x, statistics, weight, bias, pixels,  \
                                                                  channels, groups);                                  \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_gradient_##type, (THREADS, 2), T* d_x, const T* d_y, const T* x, const T* residual,             \
           const float* statistics, const float* partial, const float* weight, const float* bias, int pixels,         \
           int channels, int groups, int silu) {                                                                      \
        take_turn();                                                                                                  \
        specialise(silu, channels, [=](auto activated, auto n) {                                                      \
            group_norm_gradient<n.value, activated.value>(d_x, d_y, x, residual, statistics, partial, weight, bias,   \
                                                          pixels, channels, groups);                                  \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_whole_##type, (THREADS, 4), T* y, float* statistics, const T* x, const float* weight,           \
           const float* bias, int pixels, int channels, int groups, float eps, int silu) {                            \
        take_turn();                                                                                                  \
        specialise(silu, channels / groups, [=](auto activated, auto n) {                                             \
            group_norm_whole<n.value, activated.value>(y, statistics, x, weight, bias, pixels, channels, groups, eps);\
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_whole_gradient_##type, (THREADS, 2), T* d_x, const T* d_y, const T* x, const T* residual,       \
           const float* statistics, const float* weight, const float* bias, int pixels, int channels, int groups,     \
           int silu) {                                                                                                \
        take_turn();                                                                                                  \
        specialise(silu, channels / groups, [=](auto activated, auto n) {                                             \
            group_norm_whole_gradient<n.value, activated.value>(d_x, d_y, x, residual, statistics, weight, bias, pixels,\
                                                                channels, groups);                                    \
        });                                                                                                           \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
