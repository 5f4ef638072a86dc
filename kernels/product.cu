// Products with a frozen weight: every linear layer and convolution of the UNet, the VAE and CLIP, and their input gradients.
//
// product_forward_{f16,bf16}_{128x128,64x160,64x64}    c = scale · gather(a) · wᵀ + bias + image_bias + residual
// product_gradient_{f16,bf16}_{128x128,64x160,64x64}   the same of gather(a) · w: from the output's gradient to the input's
// product_{forward,gradient}_{f32,f16,bf16}            both without tensor cores: f32, and channels that are no eights
//
// Shapes  Images are channels last. w is stored once: [O, kernel_height, kernel_width, I], w_stride numbers from one o to the
//         next. A linear layer is a kernel of 1 × 1 over images [1, 1, rows]. All kernels have the same parameters:
//
//                                         forward                              gradient
//         c  [images, height, width, n]   result, n = O                        gradient of the input, n = I
//         a  [images, source_height,      input, channels = I                  gradient of the output, channels = O
//             source_width, channels]
//
//         Output pixel (y, x) reads input pixels (y · stride + ky − top, x · stride + kx − left), zero outside; what is padded
//         below and to the right follows from the output's size. At most 64 taps, at most 16 on an axis.
//         c, a, residual: c_stride, a_stride, residual_stride numbers from pixel to pixel, so that each may be some channels of
//         a wider image. bias [n]; image_bias [images, n], image_bias_stride from one to the next: the embedding of the
//         timestep. bias, image_bias and residual may be null; residual may be c. gates, if not null, in a gradient alone, which
//         then adds nothing: the halves [a, b] of a GEGLU, y = a · gelu(b), whose result was the layer's input. c, like gates [.., 2 n],
//         becomes their gradient. gated is product_sm90a.cu's alone, and null here. Products of activations are linear layers too: q kᵀ is forward with w = k, p v is gradient
//         with w = v.
// Types   f16, bf16 or f32 in and out, biases too; sums f32, rounded once. No sum depends on the order in which blocks run.
// Needs   compute capability 8.0. With tensor cores: a, w 16-byte aligned; channels, a_stride, w_stride multiples of 8, in a
//         gradient n too. Results are written in eights if c and what comes to it allow it, else one by one.
//
//         tile      threads  results of a block  shared memory, bytes       blocks of a      registers (8.0 / 9.0)
//                                                (forward / gradient)       multiprocessor
//         128x128   128      128 × 128           100352 / 103424            2                254 / 254
//         64x160    128      64 × 160            87552 / 90624              2                254 / 255
//         64x64     128      64 × 64             50688 / 53760              4                120 / 124
//         none      128      64 × 64             10240                      4                128 / 127
//
//         Blocks of a multiprocessor with 228 KB of shared memory: of an A100's, with 164, 1, 1 and 3. Nothing is spilled.
//         Grid: x = tiles of rows · tiles of columns, columns fastest; y = 1; z = phases · splits. Phases:
//         1 forward, stride² in a gradient, where a phase has the pixels that meet the same taps; the rows are
//         images · ⌈height / √phases⌉ · ⌈width / √phases⌉. A split of the depth leaves its sums in partial, splits · images ·
//         height · width · ⌈n / 8⌉ · 8 floats, 16-byte aligned; the block that comes last to a tile adds them, first to last.
//         arrivals: a zero for each tile of each phase, zero again afterwards. Both null for 1 split.
//
// Choice  Of all tiles (on Hopper those of product_sm90a.cu instead), and 1 to 16 splits of 4 steps at least, the fewest
//         clocks, estimated as
//
//             ⌈blocks / multiprocessors⌉ · (⌈steps / splits⌉ · max(clocks, bytes / share) + 1400 + results · (8 / 128 + 4 / share))
//                 + (2000 + (1 + splits) · results of a tile · 4 / 48, if splits > 1)
//
//         where steps = taps · ⌈channels / 64⌉ and clocks = 830, 670, 400 for 128x128, 64x160, 64x64: what shared memory can
//         deliver to a tile, or the tensor cores at 620 TFLOP/s if that is less; bytes what a step copies, 128 · (rows + columns),
//         and share what the second-level cache has for a block in a clock: 32 bytes where every multiprocessor wants some (an A100's has
//         5120 a clock for all, by its white paper; 132 would have 39 each), up to 64 where fewer do; 1400 to begin and end a
//         block; its results pass through shared memory as f32, 128 bytes a clock, and two bytes of each are written, and two of
//         something added; then what it takes to find out which block is the last, and its traffic. Without tensor cores: ⌈taps · channels / 16⌉
//         steps of 800 clocks. The width 160 is for SD's 320, 640, 1280: 4096 × 320 results are 128 blocks, for 132 multiprocessors.
// Source  Implicit GEMM (Chetlur et al., cuDNN, arXiv 1410.0759); tiles, fragments and pipeline as CUTLASS has them for
//         compute capability 8.0 (efficient_gemm.md). GEGLU: Shazeer, arXiv 2002.05202.
//
// Time    Predicted for an H100 by that rule, without product_sm90a.cu, not yet measured: SD 1.5 at 512², one image; gradients as forward with N and
//         channels exchanged.
//
//         M      N      depth        tile     splits  blocks   GFLOP   time        TFLOP/s
//         4096   320    9 · 320      128x128  1       96       7.5     24 µs       320
//         4096   320    9 · 960      128x128  1       96       22.6    66 µs       340
//         4096   320    320          64x160   1       128      0.8     4 µs        190
//         4096   2560   320          128x128  1       640      6.7     27 µs       250
//         4096   320    1280         128x128  1       96       3.4     12 µs       290
//         1024   640    9 · 640      128x128  3       120      7.5     23 µs       330
//         1024   640    9 · 1920     128x128  3       120      22.6    55 µs       410
//         1024   640    640          64x160   1       64       0.8     5 µs        160
//         1024   5120   640          128x128  1       320      6.7     25 µs       270
//         256    1280   9 · 1280     128x128  6       120      7.5     25 µs       300
//         256    1280   9 · 2560     128x128  6       120      15.1    41 µs       370
//         256    1280   1280         64x64    1       80       0.8     6 µs        150
//         256    10240  1280         64x160   1       256      6.7     24 µs       280
//         256    1280   5120         64x160   3       96       3.4     15 µs       220
//         64     1280   9 · 1280     64x64    5       100      1.9     12 µs       160 (weights: 10 µs)
//         4096   4      9 · 320      64x64    2       128      0.1     9 µs        conv_out
//         77     1280   768          64x64    1       40       0.2     4 µs        keys and values of the text
//         16384  512    9 · 512      128x128  1       512      77      178 µs      430 (VAE)
//
//         conv_in (4 channels) and the gradient of conv_out have a depth of 36 and go without tensor cores: about 7 µs.
#include "product_block.cuh"

// A block makes ROWS × COLUMNS results, a warp WARP_ROWS × WARP_COLUMNS of them.
template <int ROWS_, int COLUMNS_, int WARP_ROWS_, int WARP_COLUMNS_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_, STAGES = 3;
    static constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS, THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * 32;
    static constexpr int ROWS_AT_A_TIME = COLUMNS > 64 ? 4 : 1;  // of a thread's results: what registers hold
};

// The weights of a step, COLUMNS wide. Gradient: a row a gathered channel, with an odd number of 16-byte pieces from row to row,
// for the banks.
template <typename T, Direction D, typename Shape> struct Weights {
    static constexpr int COLUMNS = Shape::COLUMNS, PAIRS = Shape::WARP_COLUMNS / 16;
    static constexpr int PITCH = D == Direction::Forward ? DEPTH : COLUMNS + 8;
    static constexpr int SIZE = (D == Direction::Forward ? COLUMNS : DEPTH) * PITCH;

    // Beside the products of 16 channels each but the last: what copies compute their addresses with is scheduled between products,
    // and has no branch in it.
    static constexpr int PARTS = DEPTH / 16 - 1;
    static constexpr bool KEEPS_ROWS = false;
    // Of a step's lines, one for each result or for each channel, 64 numbers.
    static constexpr int SHARE = 64, ACROSS = ((D == Direction::Forward ? DEPTH : COLUMNS) + SHARE - 1) / SHARE;
    static constexpr int SHARES = (D == Direction::Forward ? COLUMNS : DEPTH) * ACROSS;

    DEVICE_MEMBER static int width_of_tile(const Product<T>&) { return COLUMNS; }
    template <typename B> DEVICE_MEMBER static void prefetch_share(const B& block, Tap tap, int channel, int share) {
        constexpr bool FORWARD = D == Direction::Forward;
        int down = share / ACROSS, across = share % ACROSS * SHARE, column = block.first_column + (FORWARD ? down : across);
        channel += FORWARD ? across : down;
        if (channel >= block.p.channels || column >= block.p.n) return;
        int64_t row = FORWARD ? column : channel;
        prefetch(block.p.w + tap.weight + row * block.p.w_stride + (FORWARD ? channel : column));
    }
    // Starts to copy a part of a step, if there is this step.
    template <typename B> DEVICE_MEMBER void load(const B& block, int step, int part, bool wanted) const {
        const Product<T>& p = block.p;
        const T* w = p.w + block.tap.weight;
        T* tile = block.right(step);
        if constexpr (D == Direction::Forward) {
            constexpr int AT_ONCE = Shape::THREADS / 8, COPIES = COLUMNS / AT_ONCE;
            static_assert(COLUMNS % AT_ONCE == 0 && AT_ONCE % 8 == 0);
            int first = threadIdx.x / 8, piece = threadIdx.x % 8, row = block.first_column + first;
            int channel = block.next_channel + piece * 8;
            tile += swizzled(first, piece);
            w += static_cast<int64_t>(row) * p.w_stride + channel;
#pragma unroll
            for (int copy = begin_of_part<Weights>(COPIES, part); copy < begin_of_part<Weights>(COPIES, part + 1); ++copy) {
                int i = copy * AT_ONCE;
                cp_async_16(tile + i * DEPTH, w + static_cast<int64_t>(i) * p.w_stride, channel < p.channels && row + i < p.n, wanted);
            }
        } else {
            constexpr int PIECES = COLUMNS / 8, AT_ONCE = Shape::THREADS / PIECES, COPIES = (DEPTH + AT_ONCE - 1) / AT_ONCE;
            int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
            int row = block.next_channel + first, column = block.first_column + piece * 8;
            tile += first * PITCH + piece * 8;
            w += static_cast<int64_t>(row) * p.w_stride + column;
#pragma unroll
            for (int copy = begin_of_part<Weights>(COPIES, part); copy < begin_of_part<Weights>(COPIES, part + 1); ++copy) {
                int i = copy * AT_ONCE;
                bool mine = (Shape::THREADS % PIECES == 0 || first < AT_ONCE) && (i + AT_ONCE <= DEPTH || i + first < DEPTH);
                cp_async_16(tile + i * PITCH, w + static_cast<int64_t>(i) * p.w_stride, column < p.n && row + i < p.channels,
                            wanted && mine);
            }
        }
    }
    // Fragments of 16 channels, from 16 k on, for a warp's columns from `first_column` on.
    DEVICE_MEMBER static void take(uint32_t (&b)[PAIRS][4], const T* tile, int first_column, int k) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            if constexpr (D == Direction::Forward) {
                int row = first_column + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(b[j], tile + swizzled(row, k * 2 + lane / 8 % 2) + j * 16 * PITCH);
            } else {
                ldmatrix_x4_transposed(b[j], tile + (k * 16 + lane % 16) * PITCH + first_column + j * 16 + lane / 16 * 8);
            }
        }
    }
};

template <typename T, Direction D, typename Shape> DEVICE void product(const Product<T>& p) {
    using Right = Weights<T, D, Shape>;
    constexpr int M = Shape::WARP_ROWS / 16, N = Shape::WARP_COLUMNS / 8, STAGES = Shape::STAGES;
    Block<T, D, Shape, Right> block(p);
    block.prepare(STAGES - 1);
    take_turn();
    if (block.is_empty()) return;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / Shape::WARPS_ACROSS * Shape::WARP_ROWS;
    int warp_column = warp % Shape::WARPS_ACROSS * Shape::WARP_COLUMNS;
    uint32_t a[2][M][4], b[2][Right::PAIRS][4];
    auto take = [&](int into, int step, int k) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ldmatrix_x4(a[into][m], block.left(step) + swizzled(warp_row + lane % 16, k * 2 + lane / 16) + m * 16 * DEPTH);
        }
        Right::take(b[into], block.right(step), warp_column, k);
    };

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
#pragma unroll
        for (int part = 0; part < Right::PARTS; ++part) block.load(Right(), step, part);
    }
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    take(0, 0, 0);

    // Fragments are taken 16 channels ahead of the products that need them, across steps too. Behind the last step that
    // is one more time than needed, from memory that nobody writes.
    float sums[M][N][4] = {};
    for (int step = 0; step < block.count; ++step) {
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
            bool last = k == DEPTH / 16 - 1;
            if (last) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();  // the next step has arrived; nobody reads this one any more
            }
            take((k + 1) % 2, last ? step + 1 : step, last ? 0 : k + 1);
            if (!last) block.load(Right(), step + STAGES - 1, k);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    uint32_t right[2] = {b[k % 2][n / 2][n % 2 * 2], b[k % 2][n / 2][n % 2 * 2 + 1]};
                    mma_m16n8k16<T>(sums[m][n], a[k % 2][m], right);
                }
            }
        }
    }

    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) block.put(warp_row + m * 16, warp_column + n * 8, sums[m][n]);
    }
    __syncthreads();
    block.deliver();
}

// Without tensor cores, for f32 and for channels that are no eights. 64 × 64 results of a block, 4 × 8 of a thread; a step
// is 16 of all taps' channels in a row.
namespace plain {

constexpr int TILE = 64, DEPTH = 16, PITCH = TILE + 4, THREADS = 128, EACH = TILE * DEPTH / THREADS;

template <typename T, Direction D> DEVICE void product(const Product<T>& p) {
    int tiles_across = (p.n + TILE - 1) / TILE, phase = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    int first_row = blockIdx.x / tiles_across * TILE, first_column = blockIdx.x % tiles_across * TILE;
    Gather<T, D> gather(p, phase);
    Tap* taps = reinterpret_cast<Tap*>(shared_memory());
    Row* rows = reinterpret_cast<Row*>(taps + MAX_TAPS);
    float* left = reinterpret_cast<float*>(rows + TILE);
    float* right = left + DEPTH * PITCH;
    gather.list(taps, rows, first_row, TILE);
    take_turn();
    if (first_row >= gather.rows) return;

    // A thread gathers one of a step's channels for every eighth row; its weights have the same channel in the forward
    // direction, the same column in the other: neighbours in memory for neighbouring threads.
    int channel = threadIdx.x % DEPTH, eighth = threadIdx.x / DEPTH, column = threadIdx.x % TILE, half = threadIdx.x / TILE;

    unsigned depth = gather.taps * p.channels, steps = (depth + DEPTH - 1) / DEPTH, share = (steps + p.splits - 1) / p.splits;
    unsigned first_step = min(split * share, steps), end = min(first_step + share, steps);
    float from_left[EACH], from_right[EACH];
    auto load = [&](unsigned step) {
        unsigned at = step * DEPTH + channel, tap_number = at / p.channels, offset = at % p.channels;
        Tap tap = at < depth ? taps[tap_number] : Tap{0, 0, ~0u, 0};
        const T* from = p.a + static_cast<int64_t>(tap.pixels) * p.a_stride + offset;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            Row row = rows[eighth + i * (TILE / EACH)];
            bool exists = (row.existing & tap.bits) == tap.bits && at < depth;
            from_left[i] = exists ? to_f32(from[static_cast<int64_t>(row.pixel) * p.a_stride]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int n = first_column + (D == Direction::Forward ? eighth + i * (TILE / EACH) : column);
            if constexpr (D == Direction::Gradient) {
                at = step * DEPTH + half + i * (DEPTH / EACH), tap_number = at / p.channels, offset = at % p.channels;
                tap.weight = at < depth ? taps[tap_number].weight : 0;
            }
            int64_t weight = D == Direction::Forward ? static_cast<int64_t>(n) * p.w_stride + tap.weight + offset
                                                     : static_cast<int64_t>(offset) * p.w_stride + tap.weight + n;
            from_right[i] = at < depth && n < p.n ? to_f32(p.w[weight]) : 0.0f;
        }
    };

    __syncthreads();  // taps and rows are listed
    load(first_step);
    float sums[4][8] = {};
    int row = threadIdx.x / 8 * 4, first = threadIdx.x % 8 * 8;  // of a thread's results
    for (unsigned step = first_step; step < end; ++step) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            left[channel * PITCH + eighth + i * (TILE / EACH)] = from_left[i];
            if constexpr (D == Direction::Forward) right[channel * PITCH + eighth + i * (TILE / EACH)] = from_right[i];
            else right[(half + i * (DEPTH / EACH)) * PITCH + column] = from_right[i];
        }
        __syncthreads();
        if (step + 1 < end) load(step + 1);
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float4 x = load_vector<float4>(left + k * PITCH + row), low = load_vector<float4>(right + k * PITCH + first);
            float4 high = load_vector<float4>(right + k * PITCH + first + 4);
            float four[4] = {x.x, x.y, x.z, x.w}, eight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 32; ++i) sums[i / 8][i % 8] = fmaf(four[i / 8], eight[i % 8], sums[i / 8][i % 8]);
        }
        __syncthreads();
    }
    deliver<D>(p, [&](auto f) {
        if (first_column + first >= p.n) return;
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2) {
            int number = first_row + row + pair, existing = gather.rows - number;
            if (existing <= 0) return;
            int pixels[2] = {gather.pixel(number), gather.pixel(existing > 1 ? number + 1 : number)};
            f(pixels, existing, first_column + first, [&](auto& own) {
#pragma unroll
                for (int i = 0; i < 16; ++i) own[i / 8][i % 8] = sums[pair + i / 8][i % 8];
            });
        }
    });
}

}  // namespace plain

using Tile128x128 = Tile<128, 128, 64, 64>;
using Tile64x160 = Tile<64, 160, 32, 80>;
using Tile64x64 = Tile<64, 64, 32, 32>;
#define OF_TILE(T, tile, blocks)                                                                                       \
    PRODUCT(product_forward_##T##_##tile, (128, blocks), T, (product<T, Direction::Forward, Tile##tile>(p)))            \
    PRODUCT(product_gradient_##T##_##tile, (128, blocks), T, (product<T, Direction::Gradient, Tile##tile>(p)))
#define OF_TYPE(T, type)                                                                                               \
    PRODUCT(product_forward_##type, (128, 4), T, (plain::product<T, Direction::Forward>(p)))                            \
    PRODUCT(product_gradient_##type, (128, 4), T, (plain::product<T, Direction::Gradient>(p)))
OF_TILE(f16, 128x128, 2)
OF_TILE(f16, 64x160, 2)
OF_TILE(f16, 64x64, 4)
OF_TILE(bf16, 128x128, 2)
OF_TILE(bf16, 64x160, 2)
OF_TILE(bf16, 64x64, 4)
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
