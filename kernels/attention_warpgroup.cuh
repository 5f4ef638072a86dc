// Attention's products by Hopper's tensor cores, which read tiles from shared memory while threads go on: a warpgroup has 64 rows,
// their left sides in registers as in attention_tile.cuh. For sources that are compiled for compute capability 9.0a alone.
#pragma once

#include "attention_tile.cuh"
#include "warpgroup.cuh"

// A tile lies in pieces, a piece the same 8 numbers of all its rows: so it can be read along its rows, as keys are for scores, and
// across them, as they are for sums of keys. Eight rows of a piece are one matrix, 128 bytes behind each other.
struct Warpgroup {
    static constexpr int EIGHT_ROWS = 8 * 8;  // numbers
    // Depths are multiples of 16: the last piece may be zeros.
    template <int D> static constexpr int PIECES = (D + 8) / 16 * 2;
    template <int ROWS> static constexpr int PIECE = ROWS * 8;
    template <int D, int ROWS> static constexpr int TILE = PIECES<D> * PIECE<ROWS>;

    // As load_rows: eight neighbours copy a matrix, into different banks.
    template <typename T, int D, int ROWS, int THREADS>
    DEVICE_MEMBER static void load_tile(T* tile, const T* from, int stride, int valid) {
        constexpr int AT_ONCE = THREADS / 8 / PIECES<D> * 8;
        int matrix = threadIdx.x / 8, piece = matrix % PIECES<D>, first = matrix / PIECES<D> * 8 + threadIdx.x % 8;
        tile += piece * PIECE<ROWS> + first * 8;
        from += static_cast<int64_t>(first) * stride + piece * 8;
        if (first >= AT_ONCE) return;
#pragma unroll
        for (int row = 0; row < ROWS; row += AT_ONCE) {
            if (row + AT_ONCE <= ROWS || row + first < ROWS) {
                bool exists = row + first < valid && piece * 8 < D;
                cp_async_16(tile + row * 8, from + static_cast<int64_t>(row) * stride, exists);
            }
        }
    }

    DEVICE_MEMBER static void show_tile() { async_proxy_fence(); }

    // sums[n] = left · (rows 8n…8n+7 of the tile)ᵀ, with zeros for the rows that a short tile lacks.
    template <typename T, int D, int N, typename Extent>
    DEVICE_MEMBER static void multiply_by_rows(float (&sums)[1][N][4], const InRegisters<T, D> (&left)[1], const T* tile, Extent,
                                               int) {
        constexpr int BYTES = PIECE<8 * N> * sizeof(T);
        uint64_t rows = matrix_at(tile, Lines::Of16, EIGHT_ROWS * sizeof(T), BYTES);
        warpgroup_begin();
        wgmma_k16<T, false, false>(sums[0], left[0].fragments[0], rows);
#pragma unroll
        for (int k = 1; k < PIECES<D> / 2; ++k) {
            wgmma_k16<T, false, true>(sums[0], left[0].fragments[k], further(rows, 2 * k * BYTES));
        }
    }

    // sums += weights · tile, with the weights where multiply_by_rows leaves them, rounded to T.
    template <typename T, int D, int N, typename Extent>
    DEVICE_MEMBER static void multiply_by_columns(float (&sums)[1][D / 8][4], const float (&weights)[1][N][4], const T* tile,
                                                  Extent, int) {
        constexpr int BYTES = PIECE<8 * N> * sizeof(T);
        uint64_t columns = matrix_at(tile, Lines::Of16, BYTES, EIGHT_ROWS * sizeof(T));
        uint32_t a[N / 2][4];
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
            const float* pair = weights[0][i / 2] + i % 2 * 2;
            a[i / 4][i % 4] = pack<T>(pair[0], pair[1]);
        }
        warpgroup_begin();
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            wgmma_k16<T, true, true>(sums[0], a[n], further(columns, 2 * n * EIGHT_ROWS * sizeof(T)));
        }
    }

    template <typename... Sums> DEVICE_MEMBER static void finish(Sums&... sums) {
        warpgroup_commit();
        warpgroup_wait<0>();
        (pin(sums[0]), ...);
    }
};
