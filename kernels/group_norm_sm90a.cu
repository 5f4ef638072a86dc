// Group norm and its gradient in one launch, where group_norm.cu takes two: the blocks that share groups are a cluster of Hopper's,
// and read each other's sums.
//
// group_norm_sm90a_{f16,bf16}           y = act(z), z = x̂ · weight + bias
// group_norm_sm90a_gradient_{f16,bf16}  d_x = (g − mean(g) − x̂ · mean(g · x̂)) / √(σ² + eps) + residual + known
//
// Shapes  as group_norm.cu's, without partial. groups_of_block is 1, 2, 4 or 8. Pointers are 16-byte aligned if channels, those of
//         groups_of_block groups and own are multiples of 8; other widths go number by number.
// Types   f32 within, as there. What a result is made of has an order: a thread's pixels, its warp's part of a share, the
//         cluster's ranks. It depends neither on the order of blocks nor on the batch.
// Launch  grid: (blocks of a cluster, groups / groups_of_block rounded up, B); 256 threads; a cluster is all blocks in x, 1 to 8, any
//         number for any pixels. Shared memory: 1216 + 8 · max(2048, width) bytes, where width = groups_of_block · channels / groups;
//         if kept is 1, and behind it room for what a block reads, which it keeps: for each of the up to ⌈width / 8 / 256⌉ ·
//         ⌈pixels of a block / rows⌉ eights of a thread 4096 bytes, of the gradient 8192; rows = ⌊256 / (width / 8)⌋, at least 1.
// Needs   compute capability 9.0 and no other: this file is compiled for sm_90a. Registers: 122, of the gradient 128; none spilled.
// Source  as group_norm.cu; clusters and their memory as the PTX ISA has them, "barrier.cluster" and "mapa".
//
// Time    A block reads its share from the second-level cache (x; of the gradient d_y too), again from shared memory, if it has kept
//         it, else from there (its own cache is empty behind the cluster's barrier), and writes: at 32 bytes a clock, or all blocks
//         together at 2300; what is kept at 64, to write and to read. 4096 × 960 is not kept. Beside that 3000 clocks:
//         for the first numbers to come 700, for a warp's part of the sums 600, to meet and to read from the others 900, for their
//         sums, weights and biases 800. Without: the two launches of group_norm.cu, and 1 µs from one to the other. With a residual.
//
//                        groups of a block  blocks  forward  without  gradient  without
//         4096 × 320     4                  64      3.5 µs   5 µs     5.5 µs    7 µs
//         4096 × 640     2                  128     4.5 µs   7 µs     7.5 µs    11 µs
//         4096 × 960     4                  64      8 µs     9 µs     15 µs     15 µs
//         1024 × 640     2                  128     2.5 µs   4 µs     3 µs      5 µs
//         1024 × 1920    2                  128     4 µs     6 µs     6 µs      9 µs
//         256 × 1920     2                  128     2.5 µs   4 µs     3 µs      4.5 µs
//
//         Predicted for an H100, not yet measured.
#include "cluster.cuh"
#include "group_norm.cuh"

constexpr int MOST_BLOCKS = 8;  // of a cluster

// Pixels that a thread reads at once, for sums and to write: as many as 128 registers hold.
constexpr int SUMMED = 8, WRITTEN = 4, SUMMED_OF_GRADIENT = 3, WRITTEN_OF_GRADIENT = 2;

// Shared memory, but for the cells behind it. V is what a warp has of its part of a group.
template <typename V> struct Shared {
    V own[WARPS], all[MOST_BLOCKS * WARPS];  // of the block's warps, and then of all blocks'
    float2 of_group[GROUPS];                 // what all threads need of each
};
constexpr int BYTES_BEFORE_CELLS = sizeof(Shared<Moments>);

template <typename V> DEVICE Shared<V>& shared() { return *reinterpret_cast<Shared<V>*>(shared_memory()); }

// A block's groups, and the blocks of its cluster, each with a share of the pixels. Of each group every block has as many parts as
// warps for it.
struct Work {
    Tile tile;
    int parts, group, part;  // of a group; the warp's own, which may be no group
    int room;                // for what is read, behind the cells, in pieces of 16 bytes; 0 if there is none

    DEVICE_MEMBER Work(int n, int groups_of_block, int pixels, int channels, int groups, int kept)
        : tile(n, groups_of_block, pixels, channels, groups, BYTES_BEFORE_CELLS), parts(WARPS / groups_of_block),
          group(threadIdx.x / 32 / parts), part(threadIdx.x / 32 % parts), room(0) {
        int cells = max(THREADS * 8, channels / groups * groups_of_block);
        if (n != 1 && kept != 0) room = (BYTES_BEFORE_CELLS + cells * static_cast<int>(sizeof(float2))) / 16;
    }

    // Leaves what the warp has where the others of the cluster find it, and fetches theirs. The cluster has still to meet
    // before the block ends: others may be reading here until then.
    template <typename V> DEVICE_MEMBER void exchange(V own) const {
        int thread = threadIdx.x, cells = WARPS * static_cast<int>(cluster_size());
        if (thread % 32 == 0) shared<V>().own[thread / 32] = own;
        __syncwarp();  // the cluster's barrier wants whole warps
        cluster_arrive();
        cluster_wait();
        if (thread < cells) shared<V>().all[thread] = load_from_rank(shared<V>().own + thread % WARPS, thread / WARPS);
        __syncwarp();
        cluster_arrive_relaxed();  // what was read is here, and nobody has to see anything
        __syncthreads();
    }
    // Of all blocks, part by part, in the order of their ranks.
    template <typename V> DEVICE_MEMBER V fetched(int group, int i) const {
        return shared<V>().all[i / parts * WARPS + group * parts + i % parts];
    }
    DEVICE_MEMBER int fetched_of_group() const { return parts * static_cast<int>(cluster_size()); }
};

template <int N, bool SILU, typename T>
DEVICE void group_norm(T* y, float* statistics, const T* x, const float* weight, const float* bias, int pixels, int channels,
                       int groups, int groups_of_block, int kept, float eps) {
    Work work(N, groups_of_block, pixels, channels, groups, kept);
    const Tile& tile = work.tile;
    leave_moments<N, SUMMED>(tile, x, channels, work.room);
    work.exchange(work.group < tile.groups ? moments_of(tile, work.group, work.part, work.parts) : Moments());
    int group = threadIdx.x / 32;
    float2* of_group = shared<Moments>().of_group;
    if (group < tile.groups) {
        Moments moments = unite(work.fetched_of_group(), [&](int i) { return work.fetched<Moments>(group, i); });
        leave_normaliser(tile, group, moments, eps, of_group, statistics);
    }
    __syncthreads();
    normalise<N, WRITTEN, SILU>(tile, y, x, of_group, weight, bias, channels, work.room);
    __syncwarp();
    cluster_wait();
}

template <int N, bool SILU, typename T>
DEVICE void group_norm_gradient(const Onward<T>& onward, const T* d_y, const T* x, const float* statistics,
                                const float* weight, const float* bias, int pixels, int channels, int groups,
                                int groups_of_block, int kept) {
    Work work(N, groups_of_block, pixels, channels, groups, kept);
    const Tile& tile = work.tile;
    leave_sums<N, SUMMED_OF_GRADIENT, SILU>(tile, d_y, x, statistics, weight, bias, channels, work.room);
    work.exchange(work.group < tile.groups ? sums_of(tile, work.group, work.part, work.parts) : float2());
    int group = threadIdx.x / 32;
    float2* means = shared<float2>().of_group;
    if (group < tile.groups) {
        float2 sums = sum_pairs(work.fetched_of_group(), [&](int i) { return work.fetched<float2>(group, i); });
        float count = static_cast<float>(tile.depth) * pixels;
        if (threadIdx.x % 32 == 0) means[group] = {sums.x / count, sums.y / count};
    }
    __syncthreads();
    write_gradient<N, WRITTEN_OF_GRADIENT, SILU>(tile, onward, d_y, x, statistics, means, weight, bias, channels, work.room);
    __syncwarp();
    cluster_wait();
}

// What every tile's channels are a multiple of, if it is 8.
DEVICE int width_of_tiles(int channels, int groups, int groups_of_block) {
    return channels % 8 == 0 ? channels / groups * groups_of_block : 1;
}

#define OF_TYPE(T)                                                                                                     \
    KERNEL(group_norm_sm90a_##T, (THREADS, 2), T* y, float* statistics, const T* x, const float* weight,               \
           const float* bias, int pixels, int channels, int groups, int groups_of_block, int kept, float eps,          \
           int silu) {                                                                                                 \
        take_turn();                                                                                                   \
        specialise(silu, width_of_tiles(channels, groups, groups_of_block), [=](auto activated, auto n) {              \
            group_norm<n.value, activated.value>(y, statistics, x, weight, bias, pixels, channels, groups,             \
                                                 groups_of_block, kept, eps);                                          \
        });                                                                                                            \
    }                                                                                                                  \
    KERNEL(group_norm_sm90a_gradient_##T, (THREADS, 2), T* d_x, T* rest, int own, const T* d_y, const T* x,            \
           const T* residual, const T* known, const float* statistics, const float* weight, const float* bias,         \
           int pixels, int channels, int groups, int groups_of_block, int kept, int silu) {                            \
        take_turn();                                                                                                   \
        int width = width_of_results(width_of_tiles(channels, groups, groups_of_block), own);                          \
        specialise(silu, width, [=](auto activated, auto n) {                                                          \
            Onward<T> onward{d_x, rest, own, residual, known};                                                         \
            group_norm_gradient<n.value, activated.value>(onward, d_y, x, statistics, weight, bias, pixels, channels,  \
                                                          groups, groups_of_block, kept);                              \
        });                                                                                                            \
    }
OF_TYPE(f16)
OF_TYPE(bf16)
