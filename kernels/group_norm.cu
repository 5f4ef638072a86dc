// Group norm, with or without SiLU after it, and its gradient.
//
// group_norm_partial_{f32,f16,bf16}           means and squared deviations of shares of the pixels
// group_norm_{f32,f16,bf16}                   merges them: y = act(z), z = x̂ · weight + bias
// group_norm_gradient_partial_{f32,f16,bf16}  sums of g and g · x̂ over shares of the pixels
// group_norm_gradient_{f32,f16,bf16}          merges them: d_x = (g − mean(g) − x̂ · mean(g · x̂)) / √(σ² + eps) + residual + known
// group_norm_whole_{f32,f16,bf16}, group_norm_whole_gradient_{f32,f16,bf16}
//                                             one launch for the first two, and for the last: a block has a whole group
//
// x̂ = (x − μ) / √(σ² + eps) with a group's mean μ and variance σ²; g = d_y · act'(z) · weight.
//
// Shapes  y, x, d_x, d_y, residual [B, pixels, channels]; weight, bias [channels] f32; statistics [B, groups, 2] f32: μ and
//         1 / √(σ² + eps), which the forward kernels write for the gradient, may be null there; partial [B, groups, splits, 2] f32,
//         between the two kernels of a pair. residual and known are gradients that reach the input around the normalisation;
//         each may be null. A gradient's first `own` channels are d_x [B, pixels, own], the others rest, which may be null if own is
//         channels: then d_x may be d_y, x, residual or known. silu ≠ 0 asks for SiLU. y may be x. groups divides channels.
//         Pointers are 16-byte aligned if channels (for a whole group, its own) and own are multiples of 8; other widths go
//         number by number.
// Types   f32 within. Means and squared deviations are updated, then merged, in a fixed order: no square of a mean is ever
//         subtracted, and a result depends neither on the order of blocks nor on the batch.
// Launch  grid: (splits, groups / 8 rounded up, B); 256 threads. The same splits, any number, for both kernels of a pair:
//         pixels · channels / groups / 1024, from 1 to 128, gives a thread four pixels, and a card its fill.
//         Shared memory: 64 · max(256, channels / groups) bytes for the partial kernels, 128 bytes for the others. For whole
//         groups the grid is (1, groups, B), shared memory 192 bytes.
//         For whole groups on Hopper too; the others it has in one launch, group_norm_sm90a.cu, if the picture is not large.
// Needs   compute capability 8.0. Registers: 64, of the gradients' kernels 128, as many as their bounds leave; none spilled.
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
#include "group_norm.cuh"

constexpr int AT_ONCE = 2;  // pixels that a thread reads: more would not fit into its registers
template <typename T> constexpr int WRITTEN_OF_GRADIENT = sizeof(T) == 4 ? 1 : AT_ONCE;

// Two sums of a group, of the block or of any.
DEVICE int64_t place_of_partial(const Tile& tile, int group, int split) { return ((tile.group + group) * gridDim.x + split) * 2; }
DEVICE void store_partial(float* partial, const Tile& tile, int group, float2 sums) {
    if (threadIdx.x % 32 == 0) store_vector(partial + place_of_partial(tile, group, blockIdx.x), sums);
}
DEVICE float2 load_partial(const float* partial, const Tile& tile, int group, int split) {
    return load_vector<float2>(partial + place_of_partial(tile, group, split));
}

template <int N, typename T> DEVICE void group_norm_partial(float* partial, const T* x, int pixels, int channels, int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    leave_moments<N, AT_ONCE>(tile, x, channels);
    int group = threadIdx.x / 32;
    if (group >= tile.groups) return;
    Moments moments = moments_of(tile, group);
    store_partial(partial, tile, group, {moments.mean, moments.squares});
}

template <int N, bool SILU, typename T>
DEVICE void group_norm(T* y, float* statistics, const T* x, const float* partial, const float* weight, const float* bias,
                       int pixels, int channels, int groups, float eps) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    float2* of_group = reinterpret_cast<float2*>(shared_memory());
    int group = threadIdx.x / 32;
    if (group < tile.groups) {
        Moments moments = unite(gridDim.x, [&](int split) -> Moments {
            float2 part = load_partial(partial, tile, group, split);
            return {static_cast<float>(tile.depth) * tile.pixels_of(split, pixels), part.x, part.y};
        });
        leave_normaliser(tile, group, moments, eps, of_group, statistics);
    }
    __syncthreads();
    normalise<N, AT_ONCE, SILU>(tile, y, x, of_group, weight, bias, channels);
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
            auto load = [&](int64_t at) { return load_stored<N>(x + at); };
            tile.each_pixel<AT_ONCE>(channel, channels, load, [&](int64_t, const Stored<N, T>& stored) {
                Numbers<N> numbers = stored.numbers();
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
    normalise<N, AT_ONCE, SILU>(tile, y, x, of_whole_group(), weight, bias, channels);
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_gradient_partial(float* partial, const T* d_y, const T* x, const float* statistics,
                                        const float* weight, const float* bias, int pixels, int channels, int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    leave_sums<N, AT_ONCE, SILU>(tile, d_y, x, statistics, weight, bias, channels);
    int group = threadIdx.x / 32;
    if (group < tile.groups) store_partial(partial, tile, group, sums_of(tile, group));
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_gradient(const Onward<T>& onward, const T* d_y, const T* x, const float* statistics,
                                const float* partial, const float* weight, const float* bias, int pixels, int channels,
                                int groups) {
    Tile tile(N, GROUPS, pixels, channels, groups);
    float2* means = reinterpret_cast<float2*>(shared_memory());
    int group = threadIdx.x / 32;
    if (group < tile.groups) {
        float2 sums = sum_pairs(gridDim.x, [&](int split) { return load_partial(partial, tile, group, split); });
        float count = static_cast<float>(tile.depth) * pixels;
        if (threadIdx.x % 32 == 0) means[group] = {sums.x / count, sums.y / count};
    }
    __syncthreads();
    write_gradient<N, WRITTEN_OF_GRADIENT<T>, SILU>(tile, onward, d_y, x, statistics, means, weight, bias, channels);
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_whole_gradient(const Onward<T>& onward, const T* d_y, const T* x, const float* statistics,
                                      const float* weight, const float* bias, int pixels, int channels, int groups) {
    Tile tile(N, 1, pixels, channels, groups);
    float sum = 0.0f, product = 0.0f, count = static_cast<float>(tile.depth) * pixels;
    Kept<Given<N, T>> nothing(0);
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        each_gradient<N, AT_ONCE>(tile, channel, own, d_y, x, channels, nothing, [&](int, float normalised, float g) {
            sum += g;
            product = fmaf(g, normalised, product);
        });
    });
    float2 means = {sum_of_block(sum) / count, sum_of_block(product) / count};
    if (threadIdx.x == 0) *of_whole_group() = means;
    __syncthreads();
    write_gradient<N, WRITTEN_OF_GRADIENT<T>, SILU>(tile, onward, d_y, x, statistics, of_whole_group(), weight, bias, channels);
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
    KERNEL(group_norm_gradient_##type, (THREADS, 2), T* d_x, T* rest, int own, const T* d_y, const T* x,              \
           const T* residual, const T* known, const float* statistics, const float* partial, const float* weight,     \
           const float* bias, int pixels, int channels, int groups, int silu) {                                       \
        take_turn();                                                                                                  \
        specialise(silu, width_of_results(channels, own), [=](auto activated, auto n) {                               \
            Onward<T> onward{d_x, rest, own, residual, known};                                                        \
            group_norm_gradient<n.value, activated.value>(onward, d_y, x, statistics, partial, weight, bias, pixels,  \
                                                          channels, groups);                                          \
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_whole_##type, (THREADS, 4), T* y, float* statistics, const T* x, const float* weight,           \
           const float* bias, int pixels, int channels, int groups, float eps, int silu) {                            \
        take_turn();                                                                                                  \
        specialise(silu, channels / groups, [=](auto activated, auto n) {                                             \
            group_norm_whole<n.value, activated.value>(y, statistics, x, weight, bias, pixels, channels, groups, eps);\
        });                                                                                                           \
    }                                                                                                                 \
    KERNEL(group_norm_whole_gradient_##type, (THREADS, 2), T* d_x, T* rest, int own, const T* d_y, const T* x,        \
           const T* residual, const T* known, const float* statistics, const float* weight, const float* bias,        \
           int pixels, int channels, int groups, int silu) {                                                          \
        take_turn();                                                                                                  \
        specialise(silu, width_of_results(channels / groups, own), [=](auto activated, auto n) {                      \
            Onward<T> onward{d_x, rest, own, residual, known};                                                        \
            group_norm_whole_gradient<n.value, activated.value>(onward, d_y, x, statistics, weight, bias, pixels,     \
                                                                channels, groups);                                    \
        });                                                                                                           \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
