// Products with a frozen weight by Hopper's own instructions: what product.cu computes, with its parameters, faster.
//
// product_sm90a_{forward,gradient}_{f16,bf16}_{128x320,128x160,64x160,64x64}
//
// Shapes, types  as product.cu's kernels with tensor cores, but for w, which is packed: in pieces of 8 outputs × 8 inputs, [O / 8,
//         kernel_height, kernel_width, I / 8, 8, 8], w_stride as ever I · kernel_width · kernel_height. So the pieces of a step lie as
//         the tensor cores want them, for a product along the inputs and for one along the outputs; splits too.
//         gated, if not null, in a forward product with one split and nothing but a bias: c [.., n], which may be null then, is the
//         halves of a GEGLU, and gated [.., n / 2] becomes its result
// Needs   compute capability 9.0 and no other: this file is compiled for sm_90a. O and I multiples of 8
//
//         tile      threads  results of a block  shared memory, bytes  blocks of a multiprocessor  registers
//         128x320   256      128 × 320           231488                1                           234
//         128x160   256      128 × 160           186448                1                           240
//         64x160    128      64 × 160            173664                1                           232
//         64x64     128      64 × 64             99936                 2                           161
//
//         Nothing is spilled. Grid as product.cu's, in clusters of 1, 2 or 4 blocks in x, a divisor of the tiles of rows: neighbours
//         in a cluster have the same columns, and each sends all of them a share of the weights.
//
// Choice  By product.cu's estimate, with 1400, 770, 480 and 290 clocks for a step of 128x320, 128x160, 64x160 and 64x64: shared
//         memory moves 128 bytes a clock, a step's copies (56, 36, 28 and 16 KB) and 7 KB for each product of 64 × 160 × 16, 4 KB
//         for one of 64 × 64 × 16, which is 1344, 736, 448 and 256 clocks; some more to meet at the barrier. The tensor cores need
//         1280, 640, 320 and 128. Alone, blocks would wait for the second-level cache: for 1800, 1150, 900 and 510 clocks, in clusters
//         of four for 830, 670, 420 and 320. The driver says how many of these a card runs at once.
// Source  wgmma, mbarrier and cp.async.bulk as the PTX ISA has them; clusters that share a side of a product as CUTLASS has them. What a
//         row gathers each thread copies itself, zeros beside the image too; the PTX ISA wants async_proxy_fence behind such copies,
//         CUTLASS has none: were steps to take much longer than predicted, that is the first thing to try without.
//
// Time    Predicted for an H100, not yet measured; where product.cu's table has other kernels for the same, with theirs:
//
//         M      N      depth        tile     splits  cluster  blocks   GFLOP   time     without  TFLOP/s
//         4096   320    9 · 320      64x160   1       4        128      7.5     14 µs    24 µs    530
//         4096   320    9 · 960      128x160  2       4        128      22.6    37 µs    66 µs    610
//         4096   320    320          64x160   1       4        128      0.8     3 µs     4 µs     260
//         4096   2560   320          128x320  1       2        256      6.7     18 µs    27 µs    370
//         4096   320    1280         64x160   1       4        128      3.4     7 µs     12 µs    460
//         1024   640    9 · 640      64x160   2       4        128      7.5     17 µs    23 µs    450
//         1024   640    9 · 1920     128x160  4       4        128      22.6    39 µs    55 µs    580
//         1024   640    640          64x160   1       1        64       0.8     4 µs     5 µs     200
//         1024   5120   640          128x320  1       2        128      6.7     13 µs    25 µs    510
//         256    1280   9 · 1280     64x160   4       4        128      7.5     18 µs    25 µs    430
//         256    1280   9 · 2560     64x160   4       4        128      15.1    30 µs    41 µs    500
//         256    1280   1280         64x64    1       2        80       0.8     4 µs     6 µs     190
//         256    10240  1280         128x160  1       2        128      6.7     12 µs    24 µs    550
//         256    1280   5120         64x160   4       4        128      3.4     11 µs    15 µs    310
//         64     1280   9 · 1280     64x64    4       1        80       1.9     11 µs    12 µs    170 (weights: 10 µs)
//         77     1280   768          64x64    1       1        40       0.2     3 µs     4 µs     keys and values of the text
//         16384  512    9 · 512      128x320  1       2        256      77      125 µs   178 µs   620 (VAE)
#include "cluster.cuh"
#include "product_block.cuh"
#include "warpgroup.cuh"

// A block of WARPGROUPS times 64 × COLUMNS results, of which an instruction makes WIDTH columns.
template <int WARPGROUPS, int COLUMNS_, int STAGES_> struct Tile {
    static constexpr int ROWS = WARPGROUPS * 64, COLUMNS = COLUMNS_, THREADS = WARPGROUPS * 128, STAGES = STAGES_;
    static constexpr int WIDTH = COLUMNS > 160 ? 160 : COLUMNS, ROWS_AT_A_TIME = 6;
};

// The weights of a step, as they lie in memory: lines of pieces of 8 outputs × 8 inputs. Forward: a line has the step's channels for
// 8 results. Gradient: all results for 8 channels.
template <typename T, Direction D, typename Shape> struct Weights {
    static constexpr int COLUMNS = Shape::COLUMNS, PIECE = 64, SIZE = COLUMNS * DEPTH, PARTS = 1;
    static constexpr bool KEEPS_ROWS = true;
    static constexpr int DOWN = (D == Direction::Forward ? COLUMNS : DEPTH) / 8, ACROSS = SIZE / PIECE / DOWN, SHARES = DOWN;

    // The columns of a GEGLU's block are the same of both halves: those of the first, then those of the second.
    DEVICE_MEMBER static int halvings(const Product<T>& p) { return D == Direction::Forward && p.gated != nullptr ? 1 : 0; }
    DEVICE_MEMBER static int width_of_tile(const Product<T>& p) { return COLUMNS >> halvings(p); }

    // What a step has: lines of a half, pieces of a line; and where a line's first is, if it is there.
    template <typename B> DEVICE_MEMBER static int lines(const B& block, int channel) {
        int all = D == Direction::Forward ? (block.p.n >> halvings(block.p)) - block.first_column : block.p.channels - channel;
        return min(DOWN >> halvings(block.p), all / 8);
    }
    template <typename B> DEVICE_MEMBER static int pieces(const B& block, int channel) {
        return min(ACROSS, (D == Direction::Forward ? block.p.channels - channel : block.p.n - block.first_column) / 8);
    }
    template <typename B> DEVICE_MEMBER static const T* first_piece(const B& block, Tap tap, int channel, int line) {
        int of_half = DOWN >> halvings(block.p), half = line >= of_half, within = line - half * of_half;
        int output = (D == Direction::Forward ? half * (block.p.n / 2) + block.first_column : channel) + within * 8;
        int input = D == Direction::Forward ? channel : block.first_column;
        return block.p.w + static_cast<int64_t>(output) * block.p.w_stride + 8 * (tap.weight + input);
    }
    template <typename B> DEVICE_MEMBER static bool is_there(const B& block, int channel, int line) {
        int of_half = DOWN >> halvings(block.p), within = line < of_half ? line : line - of_half;
        return line < DOWN && within < lines(block, channel);
    }
    template <typename B> DEVICE_MEMBER static int bytes_of_line(const B& block, int channel) {
        return pieces(block, channel) * PIECE * static_cast<int>(sizeof(T));
    }
    template <typename B> DEVICE_MEMBER static void prefetch_share(const B& block, Tap tap, int channel, int line) {
        if (is_there(block, channel, line)) bulk_prefetch(first_piece(block, tap, channel, line), bytes_of_line(block, channel));
    }

    // Where a step's copies count, and behind it, where the blocks' warps do that have done with a step: behind the last row.
    template <typename B> DEVICE_MEMBER static Barrier* arrived(const B& block, int step) {
        return reinterpret_cast<Barrier*>(block.rows + Shape::ROWS) + step % Shape::STAGES;
    }
    template <typename B> DEVICE_MEMBER static Barrier* done(const B& block, int step) { return arrived(block, step) + Shape::STAGES; }
    DEVICE_MEMBER static unsigned is_odd(int step) { return step / Shape::STAGES % 2; }
    // Of this thread: every warp has some lines, and the lanes of one copy in turn.
    int together, line;
    DEVICE_MEMBER Weights()
        : together(cluster_size()),
          line((threadIdx.x % 32 * (Shape::THREADS / 32) + threadIdx.x / 32) * together + cluster_rank()) {}

    // Starts to copy a step, if there is one: for all blocks together, each a share of it.
    template <typename B> DEVICE_MEMBER void load(const B& block, int step, int /* part */, bool wanted) const {
        if (!wanted) return;
        int channel = block.next_channel, bytes = bytes_of_line(block, channel);
        if (threadIdx.x == 0) expect(arrived(block, step), (lines(block, channel) << halvings(block.p)) * bytes);
        if (together > 1) wait_for(done(block, step), is_odd(step) ^ 1);
        if (is_there(block, channel, line)) {
            const T* from = first_piece(block, block.tap, channel, line);
            T* to = block.right(step) + line * ACROSS * PIECE;
            if (together == 1) bulk_copy(to, from, bytes, arrived(block, step));
            else bulk_copy_to_all(to, from, bytes, arrived(block, step));
        }
        __syncwarp();  // products want the whole warp
    }
    // A step that has fewer channels leaves what was there before: a finite number, for rows have zeros there.
    template <typename B> DEVICE_MEMBER static void clear(const B& block) {
        for (int i = threadIdx.x * 8; i < Shape::STAGES * SIZE; i += Shape::THREADS * 8) {
            cp_async_16(block.right(i / SIZE) + i % SIZE, block.p.w, false);
        }
        cp_async_commit();
        cp_async_wait<0>();
        async_proxy_fence();
        cluster_arrive();
        cluster_wait();
    }
    // Those of the first 16 channels, for the results of the first instruction; and so many bytes further on those of 16 channels
    // from 16 k on, for the results from 8 · `eighth` on.
    static constexpr unsigned BYTES = PIECE * sizeof(T), LINE = ACROSS * BYTES;
    DEVICE_MEMBER static uint64_t matrix(const T* tile) {
        return D == Direction::Forward ? matrix_at(tile, Lines::Of16, LINE, BYTES) : matrix_at(tile, Lines::Of16, BYTES, LINE);
    }
    DEVICE_MEMBER static unsigned bytes_to(int k, int eighth) {
        return D == Direction::Forward ? eighth * LINE + k * 2 * BYTES : k * 2 * LINE + eighth * BYTES;
    }
};

// The sums of both halves of a GEGLU become its result, by the halves as they are rounded, which its gradient needs: they are
// written too if there is a place for them.
template <typename T, Direction D, typename Shape, typename Right> DEVICE void deliver_gated(const Block<T, D, Shape, Right>& block) {
    constexpr int HALF = Shape::COLUMNS / 2, EIGHTHS = HALF / 8, DOWN = Shape::THREADS / EIGHTHS;
    const Product<T>& p = block.p;
    int width = p.n / 2, within = threadIdx.x % EIGHTHS * 8, column = block.first_column + within;
    if (column >= width || threadIdx.x >= DOWN * EIGHTHS) return;
    float bias_of_a[8] = {}, bias_of_b[8] = {};
    if (p.bias != nullptr) add_8(bias_of_a, load_8(p.bias + column)), add_8(bias_of_b, load_8(p.bias + width + column));
    int rows = min(int(Shape::ROWS), block.gather.rows - block.first_row);
#pragma unroll 2
    for (int row = threadIdx.x / EIGHTHS; row < rows; row += DOWN) {
        float a[8] = {}, b[8] = {};
        block.add_staged(a, row, within), block.add_staged(b, row, HALF + within);
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] += bias_of_a[i], b[i] += bias_of_b[i];
        int64_t pixel = block.gather.pixel(block.first_row + row);
        if (p.c != nullptr) store_8(p.c + pixel * p.c_stride + column, a), store_8(p.c + pixel * p.c_stride + width + column, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = to_f32(from_f32<T>(a[i])) * gelu(to_f32(from_f32<T>(b[i])));
        store_8(p.gated + pixel * width + column, a);
    }
}

template <typename T, Direction D, typename Shape> DEVICE void product(const Product<T>& p) {
    using Right = Weights<T, D, Shape>;
    // One step's products are under way while the next one's begin: a stage is free two steps later.
    constexpr int AHEAD = Shape::STAGES - 2;
    Right weights;
    int together = weights.together;
    Block<T, D, Shape, Right> block(p, together);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shape::STAGES; ++stage) {
            begin_barrier(Right::arrived(block, stage), 1);
            begin_barrier(Right::done(block, stage), together * Shape::THREADS / 32);
        }
    }
    block.prepare(AHEAD);
    block.keep_rows();
    cluster_arrive_relaxed();
    cluster_wait();
    take_turn();
    if (p.channels % DEPTH != 0) Right::clear(block);
#pragma unroll
    for (int step = 0; step < AHEAD; ++step) block.load(weights, step, 0);

    constexpr int EIGHTHS = Shape::WIDTH / 8, INSTRUCTIONS = Shape::COLUMNS / Shape::WIDTH;
    Sums<Shape::WIDTH> sums[INSTRUCTIONS] = {};
    int warpgroup_row = Shape::THREADS == 128 ? 0 : threadIdx.x / 128 * 64;
    for (int step = 0; step < block.count; ++step) {
        cp_async_wait<AHEAD - 1>();
        async_proxy_fence();
        __syncthreads();  // the step's rows have arrived, and the products of the last but one are done
        wait_for(Right::arrived(block, step), Right::is_odd(step));
        uint64_t left = matrix_at(block.left(step) + warpgroup_row * DEPTH, Lines::Of128, 8 * DEPTH * sizeof(T), 0);
        uint64_t right = Right::matrix(block.right(step));
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
#pragma unroll
            for (int i = 0; i < INSTRUCTIONS; ++i) {
                wgmma_k16<T, D == Direction::Gradient>(sums[i], further(left, k * 16 * sizeof(T)),
                                                       further(right, Right::bytes_to(k, i * EIGHTHS)));
            }
        }
        warpgroup_commit();
        block.load(weights, step + AHEAD, 0);
        warpgroup_wait<1>();
        __syncwarp();
        // Each arrival is waited for where the stage is filled again: none comes to a block that has ended.
        int lane = threadIdx.x % 32;
        bool filled_again = step > 0 && step - 1 + Shape::STAGES < block.count;
        if (filled_again && together > 1 && lane < together) arrive_at(Right::done(block, step - 1), lane);
    }
    __syncwarp();  // the cluster's barrier wants whole warps
    cluster_arrive_relaxed();  // what others have copied here has come
    warpgroup_wait<0>();
#pragma unroll
    for (int i = 0; i < INSTRUCTIONS; ++i) pin(sums[i]);

    cp_async_wait<0>();
    __syncthreads();
    int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int j = 0; j < Shape::COLUMNS / 8; ++j) block.put(warp_row, j * 8, sums[j / EIGHTHS][j % EIGHTHS]);
    __syncthreads();
    if (D == Direction::Forward && p.gated != nullptr) deliver_gated(block);
    else block.deliver();
    __syncwarp();
    cluster_wait();  // what this block has copied to others has come to them
}

using Tile64x64 = Tile<1, 64, 6>;
using Tile64x160 = Tile<1, 160, 6>;
using Tile128x160 = Tile<2, 160, 5>;
using Tile128x320 = Tile<2, 320, 4>;
#define OF_TILE(T, tile, threads, blocks)                                                                              \
    PRODUCT(product_sm90a_forward_##T##_##tile, (threads, blocks), T, (product<T, Direction::Forward, Tile##tile>(p)))  \
    PRODUCT(product_sm90a_gradient_##T##_##tile, (threads, blocks), T, (product<T, Direction::Gradient, Tile##tile>(p)))
OF_TILE(f16, 64x64, 128, 2)
OF_TILE(f16, 64x160, 128, 1)
OF_TILE(f16, 128x160, 256, 1)
OF_TILE(f16, 128x320, 256, 1)
OF_TILE(bf16, 64x64, 128, 2)
OF_TILE(bf16, 64x160, 128, 1)
OF_TILE(bf16, 128x160, 256, 1)
OF_TILE(bf16, 128x320, 256, 1)
