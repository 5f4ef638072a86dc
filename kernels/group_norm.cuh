// What the group norm's kernels are made of: a block's share of the pixels, its sums, and what is written by all shares' sums.
#pragma once

#include "activation.cuh"
#include "numbers.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, GROUPS = WARPS;  // of a block, if each warp merges a group: the most

// A block's share of the pixels, and the channels of its groups. A thread keeps N channels and goes down the pixels.
struct Tile {
    int depth, first_group, groups, first_channel, width;  // channels of a group; of the tile
    int first_pixel, pixels;
    int columns, rows, row, column;  // columns of N channels, and pixels that the block has at a time; the thread's own
    int64_t group, image_pixel, start;  // of the first group, pixel and number in all images
    float2* cells;                   // in shared memory

    DEVICE_MEMBER Tile(int n, int most_groups, int all_pixels, int all_channels, int all_groups, int bytes_before_cells = 0) {
        depth = all_channels / all_groups;
        first_group = blockIdx.y * most_groups, groups = min(most_groups, all_groups - first_group);
        first_channel = first_group * depth, width = groups * depth;
        first_pixel = blockIdx.x * share(all_pixels), pixels = pixels_of(blockIdx.x, all_pixels);
        columns = width / n;
        int abreast = min(columns, THREADS);
        rows = THREADS / abreast, row = threadIdx.x / abreast, column = threadIdx.x % abreast;
        group = static_cast<int64_t>(blockIdx.z) * all_groups + first_group;
        image_pixel = static_cast<int64_t>(blockIdx.z) * all_pixels + first_pixel;
        start = image_pixel * all_channels + first_channel;
        cells = reinterpret_cast<float2*>(shared_memory() + bytes_before_cells);
    }

    // Pixels of a split, rounded up; of this one.
    static DEVICE_MEMBER int share(int all_pixels) { return (all_pixels + gridDim.x - 1) / gridDim.x; }
    static DEVICE_MEMBER int pixels_of(int split, int all_pixels) {
        int first = split * share(all_pixels);
        return max(0, min(share(all_pixels), all_pixels - first));
    }

    // Calls f with the first channel, counted in the tile, of each column that is this thread's.
    template <typename F> DEVICE_MEMBER void each_column(int n, F f) const {
        if (row >= rows) return;
        for (int at = column; at < columns; at += THREADS) f(at * n);
    }
    // Calls f with the place of each number of a channel that is this thread's, and what load has of that place: of the next
    // AT_ONCE places before f is called with the first, since one after another would each wait for memory.
    template <int AT_ONCE, typename Load, typename F>
    DEVICE_MEMBER void each_pixel(int channel, int all_channels, Load load, F f) const {
        int64_t step = static_cast<int64_t>(rows) * all_channels, at = start + static_cast<int64_t>(row) * all_channels + channel;
        for (int pixel = row; pixel < pixels; pixel += AT_ONCE * rows, at += AT_ONCE * step) {
            decltype(load(at)) loaded[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (pixel + i * rows < pixels) loaded[i] = load(at + i * step);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (pixel + i * rows < pixels) f(at + i * step, loaded[i]);
            }
        }
    }

    // Where a thread leaves two sums of a channel for the warp that merges its group: [groups, rows, depth].
    DEVICE_MEMBER float2& cell(int channel) const {
        int group = channel / depth;
        return cells[swizzled((group * (rows - 1) + row) * depth + channel)];
    }
    DEVICE_MEMBER int cells_of_group() const { return rows * depth; }
    DEVICE_MEMBER float2 cell_of_group(int group, int i) const { return cells[swizzled(group * cells_of_group() + i)]; }
    // Cells change places in their eight: neighbours write one of every eight, which would lie in few banks.
    static DEVICE_MEMBER int swizzled(int cell) { return cell ^ (cell >> 4 & 7); }
};

// Neighbouring numbers as they are stored, which takes fewer registers than f32 while others are on their way.
template <int N, typename T> struct Stored {
    using Piece = std::conditional_t<N == 1, T, uint4>;
    static constexpr int PIECES = N * sizeof(T) / sizeof(Piece);
    Piece pieces[PIECES];

    DEVICE_MEMBER Numbers<N> numbers() const { return load_numbers<N>(reinterpret_cast<const T*>(pieces)); }
};
template <int N, typename T> DEVICE Stored<N, T> load_stored(const T* from) {
    using S = Stored<N, T>;
    S stored;
#pragma unroll
    for (int i = 0; i < S::PIECES; ++i) stored.pieces[i] = load_vector<typename S::Piece>(from + i * (N / S::PIECES));
    return stored;
}

// What a thread has read, V after V, to be read again in the same order: in shared memory, from piece `room` of 16 bytes on, or nowhere
// if that is 0. Neighbours' pieces lie beside each other.
template <typename V> struct Kept {
    static constexpr int PIECES = sizeof(V) / sizeof(uint4);  // none of single numbers, for which there is no room
    int next;

    DEVICE_MEMBER explicit Kept(int room) : next(room == 0 ? 0 : room + threadIdx.x) {}
    static DEVICE_MEMBER uint4* place(int piece) { return reinterpret_cast<uint4*>(shared_memory()) + piece; }
    DEVICE_MEMBER void keep(const V& read) {
        if (next == 0) return;
#pragma unroll
        for (int i = 0; i < PIECES; ++i, next += THREADS) store_vector(place(next), reinterpret_cast<const uint4*>(&read)[i]);
    }
    // The next one, or what `read` reads.
    template <typename F> DEVICE_MEMBER V load(F read) {
        if (next == 0) return read();
        V kept;
#pragma unroll
        for (int i = 0; i < PIECES; ++i, next += THREADS) reinterpret_cast<uint4*>(&kept)[i] = load_vector<uint4>(place(next));
        return kept;
    }
};

// How many numbers, their mean, and the sum of their squared differences from it.
struct alignas(16) Moments { float count, mean, squares; };

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

// Some of a group's cells: a part of so many.
struct Part {
    int first, count;
    DEVICE_MEMBER Part(const Tile& tile, int part, int parts) {
        first = tile.cells_of_group() * part / parts;
        count = tile.cells_of_group() * (part + 1) / parts - first;
    }
};

// Each thread leaves the moments of its channels; of a group's cells, or of a part of them, a warp then makes those of the share.
template <int N, int AT_ONCE, typename T>
DEVICE void leave_moments(const Tile& tile, const T* x, int channels, int room = 0) {
    Kept<Stored<N, T>> kept(room);
    tile.each_column(N, [&](int channel) {
        float mean[N] = {}, squares[N] = {}, count = 0.0f;
        auto load = [&](int64_t at) { return load_stored<N>(x + at); };
        tile.each_pixel<AT_ONCE>(channel, channels, load, [&](int64_t, const Stored<N, T>& stored) {
            kept.keep(stored);
            Numbers<N> numbers = stored.numbers();
            count += 1.0f;
            float share = reciprocal_approx(count);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float difference = numbers.at[i] - mean[i];
                mean[i] = fmaf(difference, share, mean[i]);
                squares[i] = fmaf(difference, numbers.at[i] - mean[i], squares[i]);
            }
        });
#pragma unroll
        for (int i = 0; i < N; ++i) tile.cell(channel + i) = {mean[i], squares[i]};
    });
    __syncthreads();
}
DEVICE Moments moments_of(const Tile& tile, int group, int part = 0, int parts = 1) {
    // Of each channel the first rows have a pixel more than the others.
    int each = tile.pixels / tile.rows, longer = tile.pixels % tile.rows * tile.depth;
    Part own(tile, part, parts);
    return unite(own.count, [&](int i) -> Moments {
        float2 cell = tile.cell_of_group(group, own.first + i);
        return {static_cast<float>(each + (own.first + i < longer)), cell.x, cell.y};
    });
}

// A warp leaves what normalises a group, mean and inverse deviation, for the block, and for the gradient if that wants it.
DEVICE void leave_normaliser(const Tile& tile, int group, const Moments& moments, float eps, float2* of_group, float* statistics) {
    if (threadIdx.x % 32 != 0) return;
    float2 both = {moments.mean, 1.0f / sqrtf(moments.squares / moments.count + eps)};
    of_group[group] = both;
    if (statistics != nullptr && blockIdx.x == 0) store_vector(statistics + (tile.group + group) * 2, both);
}

// y, from a group's mean and inverse deviation, which of_group has for each of the block's.
template <int N, int AT_ONCE, bool SILU, typename T>
DEVICE void normalise(const Tile& tile, T* y, const T* x, const float2* of_group, const float* weight, const float* bias,
                      int channels, int room = 0) {
    Kept<Stored<N, T>> kept(room);
    tile.each_column(N, [&](int channel) {
        float mean[N], scale[N], shift[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float2 both = of_group[(channel + i) / tile.depth];
            mean[i] = both.x, scale[i] = both.y * weight[tile.first_channel + channel + i];
            shift[i] = bias[tile.first_channel + channel + i];
        }
        auto load = [&](int64_t at) { return kept.load([=] { return load_stored<N>(x + at); }); };
        tile.each_pixel<AT_ONCE>(channel, channels, load, [&](int64_t at, const Stored<N, T>& stored) {
            Numbers<N> numbers = stored.numbers();
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float z = fmaf(numbers.at[i] - mean[i], scale[i], shift[i]);
                numbers.at[i] = SILU ? silu(z) : z;
            }
            store_numbers(y + at, numbers);
        });
    });
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

// What is read of a place for it.
template <int N, typename T> struct Given { Stored<N, T> x, d_y; };
template <int N, typename T> DEVICE Given<N, T> load_given(const T* x, const T* d_y) {
    return {load_stored<N>(x), load_stored<N>(d_y)};
}

// Calls f(x̂, g) for each number of a column.
template <int N, int AT_ONCE, bool SILU, typename T, typename F>
DEVICE void each_gradient(const Tile& tile, int channel, const Channels<N, SILU>& own, const T* d_y, const T* x, int channels,
                          Kept<Given<N, T>>& kept, F f) {
    auto load = [&](int64_t at) { return load_given<N>(x + at, d_y + at); };
    tile.each_pixel<AT_ONCE>(channel, channels, load, [&](int64_t, const Given<N, T>& read) {
        kept.keep(read);
        Numbers<N> numbers = read.x.numbers(), dy = read.d_y.numbers();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float normalised = own.normalised(i, numbers.at[i]);
            f(i, normalised, own.gradient(i, normalised, dy.at[i]));
        }
    });
}

// The same with sums of g and g · x̂.
template <int N, int AT_ONCE, bool SILU, typename T>
DEVICE void leave_sums(const Tile& tile, const T* d_y, const T* x, const float* statistics, const float* weight, const float* bias,
                       int channels, int room = 0) {
    Kept<Given<N, T>> kept(room);
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        float sum[N] = {}, product[N] = {};
        each_gradient<N, AT_ONCE>(tile, channel, own, d_y, x, channels, kept, [&](int i, float normalised, float g) {
            sum[i] += g;
            product[i] = fmaf(g, normalised, product[i]);
        });
#pragma unroll
        for (int i = 0; i < N; ++i) tile.cell(channel + i) = {sum[i], product[i]};
    });
    __syncthreads();
}
DEVICE float2 sums_of(const Tile& tile, int group, int part = 0, int parts = 1) {
    Part own(tile, part, parts);
    return sum_pairs(own.count, [&](int i) { return tile.cell_of_group(group, own.first + i); });
}

template <int N> DEVICE void add(Numbers<N>& to, const Numbers<N>& numbers) {
#pragma unroll
    for (int i = 0; i < N; ++i) to.at[i] += numbers.at[i];
}

// Where d_x goes, and what is added to it.
template <typename T> struct Onward {
    T *d_x, *rest;              // of a pixel the first `own` channels, and the others
    int own;
    const T *residual, *known;  // as x; may be null
};

// d_x, from a group's mean g and mean g · x̂, which `means` has for each of the block's.
template <int N, int AT_ONCE, bool SILU, typename T>
DEVICE void write_gradient(const Tile& tile, const Onward<T>& onward, const T* d_y, const T* x, const float* statistics,
                           const float2* means, const float* weight, const float* bias, int channels, int room = 0) {
    struct Read { Given<N, T> given; Stored<N, T> residual, known; };
    Kept<Given<N, T>> kept(room);
    tile.each_column(N, [&](int channel) {
        Channels<N, SILU> own(tile, channel, statistics, weight, bias);
        float mean_g[N], mean_product[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float2 both = means[(channel + i) / tile.depth];
            mean_g[i] = both.x, mean_product[i] = both.y;
        }
        int column = tile.first_channel + channel;
        bool first = column < onward.own;
        int width = first ? onward.own : channels - onward.own;
        T* to = (first ? onward.d_x + column : onward.rest + (column - onward.own)) + (tile.image_pixel + tile.row) * width;
        auto load = [&](int64_t at) {
            Read read = {kept.load([=] { return load_given<N>(x + at, d_y + at); }), {}, {}};
            if (onward.residual != nullptr) read.residual = load_stored<N>(onward.residual + at);
            if (onward.known != nullptr) read.known = load_stored<N>(onward.known + at);
            return read;
        };
        tile.each_pixel<AT_ONCE>(channel, channels, load, [&](int64_t, const Read& read) {
            Numbers<N> numbers = read.given.x.numbers(), dy = read.given.d_y.numbers(), sum = {};
            if (onward.residual != nullptr) sum = read.residual.numbers();
            if (onward.known != nullptr) add(sum, read.known.numbers());
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float normalised = own.normalised(i, numbers.at[i]), g = own.gradient(i, normalised, dy.at[i]);
                sum.at[i] += (g - mean_g[i] - normalised * mean_product[i]) * own.inverse[i];
            }
            store_numbers(to, sum);
            to += static_cast<int64_t>(tile.rows) * width;
        });
    });
}

// Channels of which a gradient's results lie together, if both they and the number of `own` are in eights.
DEVICE int width_of_results(int width, int own) { return own % 8 == 0 ? width : 1; }

// f(whether there is an activation, how many channels a thread has at a time), both as constants.
template <typename F> DEVICE void specialise(int silu, int channels, F f) {
    by_width(channels, [=](auto n) {
        if (silu != 0) f(std::true_type(), n);
        else f(std::false_type(), n);
    });
}
