// A block of a product with tensor cores: which rows, columns and steps are its own, how a step comes to shared memory, how
// sums leave it. What multiplies in between, and how weights come and lie, is in product.cu and product_sm90a.cu.
//
// A block makes Shape::ROWS × Shape::COLUMNS results. A step is DEPTH channels of a tap; Shape::STAGES of them have a place in
// shared memory, each the gathered rows and behind them Right::SIZE weights, which Right copies, and has fetched before in
// Right::SHARES shares.
#pragma once

#include "product_tile.cuh"

constexpr int DEPTH = 64;

// A step's copies may begin in Right::PARTS parts.
template <typename Right> DEVICE constexpr int begin_of_part(int copies, int part) { return copies * part / Right::PARTS; }

// Rows of DEPTH numbers in shared memory: piece i of 16 bytes lies at i ^ (row % 8), so that the eight rows of a matrix that
// tensor cores read lie in different banks.
DEVICE int swizzled(int row, int piece) { return row * DEPTH + (piece ^ row % 8) * 8; }

template <typename T, Direction D, typename Shape, typename Right> struct Block {
    static constexpr int ROWS = Shape::ROWS, COLUMNS = Shape::COLUMNS, THREADS = Shape::THREADS, AT_ONCE = THREADS / 8;
    static constexpr int COPIES = ROWS / AT_ONCE, STAGE = ROWS * DEPTH + Right::SIZE;
    static constexpr int PITCH = COLUMNS + 8;  // of sums, when they pass through shared memory
    static_assert(ROWS * PITCH * sizeof(float) <= Shape::STAGES * STAGE * sizeof(T), "sums lie where the stages were");

    // A row that a thread copies from: where the pixel of the first tap has its piece, and which taps exist.
    struct Source { const T* first; unsigned existing; };

    const Product<T>& p;
    int tiles_across, first_row, first_column;
    Gather<T, D> gather;
    T* stages;
    Tap* taps;
    Row* rows;
    int copied_row, piece;  // a thread copies one piece of every row that is AT_ONCE rows below its first
    int chunks;             // steps of a tap
    int first_step, count;  // of all taps'
    int next_tap, next_channel;
    Tap tap{};
    Source kept[Right::KEEPS_ROWS ? COPIES : 1];

    // Of `together` neighbours, each has other rows and the same columns.
    DEVICE_MEMBER explicit Block(const Product<T>& p, int together = 1)
        : p(p), tiles_across((p.n + COLUMNS - 1) / COLUMNS),
          first_row((blockIdx.x / (tiles_across * together) * together + blockIdx.x % together) * ROWS),
          first_column(blockIdx.x / together % tiles_across * Right::width_of_tile(p)),
          gather(p, blockIdx.z / p.splits), stages(reinterpret_cast<T*>(shared_memory())),
          taps(reinterpret_cast<Tap*>(stages + Shape::STAGES * STAGE)), rows(reinterpret_cast<Row*>(taps + MAX_TAPS)),
          copied_row(threadIdx.x / 8), piece(threadIdx.x % 8) {
        chunks = (p.channels + DEPTH - 1) / DEPTH;
        int steps = gather.taps * chunks, share = (steps + p.splits - 1) / p.splits;
        first_step = min(int(blockIdx.z % p.splits) * share, steps);
        count = min(share, steps - first_step);
        next_tap = first_step / chunks, next_channel = first_step % chunks * DEPTH;
    }
    DEVICE_MEMBER bool is_empty() const { return first_row >= gather.rows; }
    // What all steps look up, and the weights of the first steps on their way from memory: before a launch's turn, as weights
    // and sizes are known by then. Blocks that have the same weights share them. (Where the weights are
    // activations, which a launch before writes, it is of no use, and does no harm.)
    DEVICE_MEMBER void prepare(int steps) const {
        gather.list(taps, rows, first_row, ROWS);
        __syncthreads();
        int sharing = gridDim.x / tiles_across, shares = min(steps, count) * Right::SHARES;
        for (int i = first_row / ROWS * THREADS + threadIdx.x; i < shares; i += sharing * THREADS) {
            int step = first_step + i / Right::SHARES;
            Tap tap = load_vector<Tap>(taps + step / chunks);
            Right::prefetch_share(*this, tap, step % chunks * DEPTH, i % Right::SHARES);
        }
    }

    // Rows are the same in all steps: threads that have registers enough look them up once, behind prepare.
    DEVICE_MEMBER void keep_rows() {
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) kept[copy] = look_up(copy);
    }
    DEVICE_MEMBER Source look_up(int copy) const {
        Row row = load_vector<Row>(rows + copied_row + copy * AT_ONCE);
        return {p.a + static_cast<int64_t>(row.pixel) * p.a_stride + piece * 8, static_cast<unsigned>(row.existing)};
    }

    DEVICE_MEMBER T* left(int step) const { return stages + step % Shape::STAGES * STAGE; }
    DEVICE_MEMBER T* right(int step) const { return left(step) + ROWS * DEPTH; }

    // Starts to copy a part of a step: all steps in order, all parts in order. Each step closes a group of copies, which is empty
    // behind the last step. A part's rows are read together, and its weights asked for first, which come from further away.
    DEVICE_MEMBER void load(const Right& weights, int step, int part) {
        bool wanted = step < count;
        if (part == 0 && wanted) tap = load_vector<Tap>(taps + next_tap);
        T* to = left(step) + swizzled(copied_row, piece);
        int64_t further = static_cast<int64_t>(tap.pixels) * p.a_stride + next_channel;
        int first = begin_of_part<Right>(COPIES, part), end = begin_of_part<Right>(COPIES, part + 1);
        Source sources[COPIES];
#pragma unroll
        for (int copy = first; copy < end; ++copy) sources[copy] = Right::KEEPS_ROWS ? kept[copy] : look_up(copy);
        weights.load(*this, step, part, wanted);
#pragma unroll
        for (int copy = first; copy < end; ++copy) {
            bool exists = next_channel + piece * 8 < p.channels && (sources[copy].existing & tap.bits) == tap.bits;
            cp_async_16(to + copy * AT_ONCE * DEPTH, sources[copy].first + further, exists, wanted);
        }
        if (part < Right::PARTS - 1) return;
        cp_async_commit();
        next_channel += DEPTH;
        if (next_channel >= p.channels) next_channel = 0, ++next_tap;
    }

    // Sums go through shared memory, so that a warp writes whole rows: where nobody reads stages any more, four of a fragment
    // of 16 × 8 (see device.cuh), whose first result is at (row, column) of the block's; then, behind a barrier, out.
    DEVICE_MEMBER void put(int row, int column, const float (&sums)[4]) const {
        int lane = threadIdx.x % 32;
        row += lane / 4, column += lane % 4 * 2;
        store_vector(staged(row, column), float2{sums[0], sums[1]});
        store_vector(staged(row + 8, column), float2{sums[2], sums[3]});
    }
    // Adds the eight of a row from `column` on, a multiple of 8.
    DEVICE_MEMBER void add_staged(float (&to)[8], int row, int column) const {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 four = load_vector<float4>(staged(row, column + i));
            to[i] += four.x, to[i + 1] += four.y, to[i + 2] += four.z, to[i + 3] += four.w;
        }
    }
    // Of every other 32 columns fours change places in their eight: so threads that have an eight each find fours in different
    // banks.
    DEVICE_MEMBER float* staged(int row, int column) const {
        return reinterpret_cast<float*>(stages) + row * PITCH + (column ^ (column / 32 % 2) << 2);
    }
    DEVICE_MEMBER void deliver() const {
        ::deliver<D>(p, [&](auto f) { each_result(f); });
    }
    // Calls f for results that are this thread's, as the other deliver has it.
    template <typename F> DEVICE_MEMBER void each_result(F f) const {
        constexpr int EIGHTS = COLUMNS / 8, DOWN = THREADS / EIGHTS, EACH = (ROWS + DOWN - 1) / DOWN;
        constexpr int TIMES = (EACH + Shape::ROWS_AT_A_TIME - 1) / Shape::ROWS_AT_A_TIME, AT_A_TIME = (EACH + TIMES - 1) / TIMES;
        int first = threadIdx.x / EIGHTS, column = threadIdx.x % EIGHTS * 8;
        if (first >= DOWN || first_column + column >= p.n) return;
        int rows = min(int(ROWS), gather.rows - first_row);
        auto some = [&](auto... i) {
            auto row = [&](int i) { return first + i * DOWN < rows ? first + i * DOWN : first; };
            int pixels[] = {gather.pixel(first_row + row(i))...};
            f(pixels, (rows - first + DOWN - 1) / DOWN, first_column + column, [&](auto& sums) {
                (add_staged(sums[i], row(i), column), ...);
            });
        };
#pragma unroll 1
        for (; first < rows; first += DOWN * AT_A_TIME) call_with_numbers<AT_A_TIME>(some);
    }
};
