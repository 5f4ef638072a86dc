// Products with a frozen weight by Hopper's own instructions: what product.cu computes, with its parameters, faster.
//
// product_sm90a_{forward,gradient}_{f16,bf16}_{128x160,64x160,64x64}
//
// Shapes, types  as product.cu's kernels with tensor cores; splits too
// Needs   compute capability 9.0 and no other: this file is compiled for sm_90a
//
//         tile      threads  results of a block  shared memory, bytes  blocks of a multiprocessor  registers
//         128x160   256      128 × 160           186368                1                           147
//         64x160    128      64 × 160            173568                1                           146
//         64x64     128      64 × 64             99840                 2                           143
//
//         Nothing is spilled. Grid as product.cu's.
//
// Choice  By product.cu's estimate, among its tiles and these, with 770, 480 and 290 clocks for a step of 128x160, 64x160 and 64x64:
//         shared memory moves 128 bytes a clock, a step's copies (36, 28 and 16 KB) and 7 KB for each product of 64 × 160 × 16, 4 KB
//         for one of 64 × 64 × 16, which is 736, 448 and 256 clocks; some more to meet at the barrier. The tensor cores need 640,
//         320 and 128.
// Source  wgmma as the PTX ISA has it. The weights of a gradient lie across the depth, in lines of 64 bytes, as 160 is a multiple
//         of 32 and not of 64. Copies are each thread's own, not the tensor memory accelerator's: a row gathers what it
//         reads, zeros beside the image too.
//
// Time    Predicted for an H100, not yet measured; where product.cu's table has other kernels for the same, with theirs:
//
//         M      N      depth        tile     splits  blocks   GFLOP   time     without  TFLOP/s
//         4096   320    9 · 320      64x160   1       128      7.5     13 µs    18 µs    560
//         4096   320    9 · 960      128x160  2       128      22.6    35 µs    53 µs    650
//         4096   2560   320          128x160  1       512      6.7     13 µs    18 µs    500
//         4096   320    1280         64x160   1       128      3.4     7 µs     9 µs     510
//         1024   640    9 · 640      64x160   2       128      7.5     16 µs    20 µs    470
//         1024   640    9 · 1920     128x160  4       128      22.6    37 µs    48 µs    610
//         1024   5120   640          128x160  1       256      6.7     11 µs    18 µs    610
//         256    1280   9 · 1280     64x160   4       128      7.5     17 µs    22 µs    440
//         256    1280   9 · 2560     64x160   4       128      15.1    29 µs    36 µs    520
//         256    10240  1280         128x160  1       128      6.7     10 µs    18 µs    680
//         256    1280   5120         64x160   4       128      3.4     10 µs    12 µs    330
//         256    1280   1280         64x64    1       80       0.8     4 µs     6 µs     190
//         64     1280   9 · 1280     64x64    6       120      1.9     9 µs     11 µs    220 (weights: 10 µs)
//         77     1280   768          64x64    1       40       0.2     3 µs     4 µs     keys and values of the text
//         16384  512    9 · 512      128x160  1       512      77      131 µs   141 µs   590 (VAE)
#include "product_block.cuh"
#include "warpgroup.cuh"

// A block of WARPGROUPS times 64 × COLUMNS results.
template <int WARPGROUPS, int COLUMNS_, int STAGES_> struct Tile {
    static constexpr int ROWS = WARPGROUPS * 64, COLUMNS = COLUMNS_, THREADS = WARPGROUPS * 128, STAGES = STAGES_;
};

// The weights of a step. Forward: lines of 64 channels, one a result. Gradient: lines of 32 results, one a channel; the 64 channels
// of 32 results are together.
template <typename T, Direction D, typename Shape> struct Weights {
    static constexpr int COLUMNS = Shape::COLUMNS, LINE = 32, LINES_OF_COLUMNS = DEPTH * LINE;
    static constexpr int SIZE = COLUMNS * DEPTH;

    // As load_weights. Eight neighbours copy 64 bytes each of two channels.
    DEVICE_MEMBER static void load(T* tile, const T* w, const Product<T>& p, int first_column, int channel, int part,
                                   bool wanted) {
        if constexpr (D == Direction::Forward) return load_weights<T, Shape>(tile, w, p, first_column, channel, part, wanted);
        constexpr int ROWS_AT_ONCE = Shape::THREADS / 4, DOWN = DEPTH / ROWS_AT_ONCE, COPIES = COLUMNS / LINE * DOWN;
        static_assert(DEPTH % ROWS_AT_ONCE == 0);
        int first = threadIdx.x / 4, piece = threadIdx.x % 4, row = channel + first, column = first_column + piece * 8;
        tile += first * LINE + (piece ^ first / 2 % 4) * 8;
        w += static_cast<int64_t>(row) * p.w_stride + column;
#pragma unroll
        for (int copy = begin_of_part(COPIES, part); copy < begin_of_part(COPIES, part + 1); ++copy) {
            int down = copy % DOWN * ROWS_AT_ONCE, across = copy / DOWN * LINE;
            cp_async_16(tile + down * LINE + across * DEPTH, w + static_cast<int64_t>(down) * p.w_stride + across,
                        column + across < p.n && row + down < p.channels, wanted);
        }
    }
    // Those of 16 channels from 16 k on.
    DEVICE_MEMBER static uint64_t matrix(const T* tile, int k) {
        if constexpr (D == Direction::Forward) return matrix_at(tile + k * 16, Lines::Of128, 8 * DEPTH * sizeof(T), 0);
        else return matrix_at(tile + k * 16 * LINE, Lines::Of64, 8 * LINE * sizeof(T), LINES_OF_COLUMNS * sizeof(T));
    }
};

template <typename T, Direction D, typename Shape> DEVICE void product(const Product<T>& p) {
    using Right = Weights<T, D, Shape>;
    // One step's products are under way while the next one's begin: a stage is free two steps later.
    constexpr int AHEAD = Shape::STAGES - 2;
    Block<T, D, Shape, Right> block(p);
    block.prepare(AHEAD);
    take_turn();
    if (block.is_empty()) return;
    auto load = [&](int step) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) block.load(step, part);
    };

#pragma unroll
    for (int step = 0; step < AHEAD; ++step) load(step);

    Sums<Shape::COLUMNS> sums = {};
    int warpgroup_row = threadIdx.x / 128 * 64;
    for (int step = 0; step < block.count; ++step) {
        cp_async_wait<AHEAD - 1>();
        async_proxy_fence();
        __syncthreads();  // the step has arrived, and the products of the last but one are done
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
            const T* left = block.left(step) + warpgroup_row * DEPTH + k * 16;
            wgmma_k16<T, D == Direction::Gradient>(sums, matrix_at(left, Lines::Of128, 8 * DEPTH * sizeof(T), 0),
                                                   Right::matrix(block.right(step), k));
        }
        warpgroup_commit();
        load(step + AHEAD);
        warpgroup_wait<1>();
    }
    warpgroup_wait<0>();
    pin(sums);

    cp_async_wait<0>();
    __syncthreads();
    int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int j = 0; j < Shape::COLUMNS / 8; ++j) block.put(warp_row, j * 8, sums[j]);
    __syncthreads();
    block.deliver();
}

using Tile64x64 = Tile<1, 64, 6>;
using Tile64x160 = Tile<1, 160, 6>;
using Tile128x160 = Tile<2, 160, 5>;
#define OF_TILE(T, tile, threads, blocks)                                                                              \
    PRODUCT(product_sm90a_forward_##T##_##tile, (threads, blocks), T, (product<T, Direction::Forward, Tile##tile>(p)))  \
    PRODUCT(product_sm90a_gradient_##T##_##tile, (threads, blocks), T, (product<T, Direction::Gradient, Tile##tile>(p)))
OF_TILE(f16, 64x64, 128, 2)
OF_TILE(f16, 64x160, 128, 1)
OF_TILE(f16, 128x160, 256, 1)
OF_TILE(bf16, 64x64, 128, 2)
OF_TILE(bf16, 64x160, 128, 1)
OF_TILE(bf16, 128x160, 256, 1)
