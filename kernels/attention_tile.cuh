// What the attention kernels are made of: rows of queries, keys or values in shared memory, and their products.
//
// A warp holds 16 M rows of the left side of every product; head size D is the depth of the first product and the width
// of the second. D is a multiple of 8: depths of 16 go through m16n8k16, a rest of 8 (D = 40) through m16n8k8. Nothing
// is padded to a power of two.
#pragma once

#include "device.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// Numbers from row to row in shared memory: an odd number of 16-byte pieces, so that the eight rows of a matrix that
// ldmatrix reads lie in different banks.
template <int D> constexpr int ROW = D % 16 == 0 ? D + 8 : D;

DEVICE int lane_of_warp() { return threadIdx.x % 32; }

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Starts to copy ROWS rows, of which the first `valid` exist; the others become zeros. A thread keeps its column and goes
// down the rows, so that its addresses differ by constants.
template <typename T, int D, int ROWS, int THREADS>
DEVICE void load_rows(T* tile, const T* from, int stride, int valid) {
    constexpr int PIECES = D / 8, AT_ONCE = THREADS / PIECES;
    int first = threadIdx.x / PIECES, column = threadIdx.x % PIECES * 8;
    tile += first * ROW<D> + column;
    from += static_cast<int64_t>(first) * stride + column;
    if (first >= AT_ONCE) return;
#pragma unroll
    for (int row = 0; row < ROWS; row += AT_ONCE) {
        if (row + AT_ONCE <= ROWS || row + first < ROWS) {
            cp_async_16(tile + row * ROW<D>, from + static_cast<int64_t>(row) * stride, row + first < valid);
        }
    }
}

// 16 rows as the left side of products, kept in registers.
template <typename T, int D> struct InRegisters {
    uint32_t fragments[(D + 8) / 16][4];

    DEVICE_MEMBER void take(const T* tile) {
        const T* row = tile + lane_of_warp() % 16 * ROW<D>;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) ldmatrix_x4(fragments[k], row + k * 16 + lane_of_warp() / 16 * 8);
        if constexpr (D % 16 != 0) {
            uint32_t rest[2];
            ldmatrix_x2(rest, row + D - 8);
            fragments[D / 16][0] = rest[0], fragments[D / 16][1] = rest[1];
            fragments[D / 16][2] = fragments[D / 16][3] = 0;
        }
    }
    DEVICE_MEMBER void fragment(uint32_t (&a)[4], int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
    }
};

// The same, read from shared memory whenever they are needed: for heads too large for registers (D a multiple of 16).
template <typename T, int D> struct InShared {
    const T* row;

    DEVICE_MEMBER void take(const T* tile) {
        row = tile + lane_of_warp() % 16 * ROW<D> + lane_of_warp() / 16 * 8;
    }
    DEVICE_MEMBER void fragment(uint32_t (&a)[4], int k) const { ldmatrix_x4(a, row + k * 16); }
};

// Whether all columns of a tile exist: a type, so that the work on a whole tile has no branch in it. A step of a kernel is
// a function of it: a block's last tile may be short, the others are whole.
using Whole = std::true_type;
using Short = std::false_type;

// How tiles lie in shared memory, and how they are multiplied: by warps, which every card can. The other way is in
// attention_warpgroup.cuh.
struct Warps {
    // Numbers of a tile.
    template <int D, int ROWS> static constexpr int TILE = ROWS * ROW<D>;

    // Starts to copy a tile, as load_rows.
    template <typename T, int D, int ROWS, int THREADS>
    DEVICE_MEMBER static void load_tile(T* tile, const T* from, int stride, int valid) {
        load_rows<T, D, ROWS, THREADS>(tile, from, stride, valid);
    }
    // Of a tile whose copies have arrived, before the barrier: what multiplies sees it.
    DEVICE_MEMBER static void show_tile() {}

    // sums[m][n] += left[m] · (rows 8n…8n+7 of the tile)ᵀ; of a short tile for the first `count` rows, rounded up to 16.
    template <typename T, int D, int M, int N, typename Left, typename Extent>
    DEVICE_MEMBER static void multiply_by_rows(float (&sums)[M][N][4], const Left (&left)[M], const T* tile, Extent, int count) {
        int lane = lane_of_warp();
        const T* row16 = tile + (lane % 8 + lane / 16 * 8) * ROW<D> + lane / 8 % 2 * 8;
        const T* row8 = tile + lane % 16 * ROW<D> + D - 8;
#pragma unroll
        for (int k = 0; k < (D + 8) / 16; ++k) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) left[m].fragment(a[m], k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                if (!Extent::value && n * 8 >= count) continue;
                if (k < D / 16) {
                    uint32_t b[4];
                    ldmatrix_x4(b, row16 + n * 8 * ROW<D> + k * 16);
                    uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma_m16n8k16<T>(sums[m][n], a[m], first);
                        mma_m16n8k16<T>(sums[m][n + 1], a[m], second);
                    }
                } else {
                    uint32_t b[2];
                    ldmatrix_x2(b, row8 + n * 8 * ROW<D>);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma_m16n8k8<T>(sums[m][n], a[m][0], a[m][1], b[0]);
                        mma_m16n8k8<T>(sums[m][n + 1], a[m][0], a[m][1], b[1]);
                    }
                }
            }
        }
    }

    // sums[m] += weights[m] · tile, with the weights where multiply_by_rows leaves them, rounded to T; of a short tile the first
    // `count` rows, rounded up to 16.
    template <typename T, int D, int M, int N, typename Extent>
    DEVICE_MEMBER static void multiply_by_columns(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], const T* tile,
                                                  Extent, int count) {
        int lane = lane_of_warp();
        const T* column = tile + lane % 16 * ROW<D> + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            if (!Extent::value && n * 8 >= count) continue;
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = weights[m][n + i / 2] + i % 2 * 2;
                    a[m][i] = pack<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                if (j + 1 < D / 8) {
                    uint32_t b[4];
                    ldmatrix_x4_transposed(b, column + n * 8 * ROW<D> + j * 8);
                    uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma_m16n8k16<T>(sums[m][j], a[m], first);
                        mma_m16n8k16<T>(sums[m][j + 1], a[m], second);
                    }
                } else {
                    uint32_t b[2];
                    ldmatrix_x2_transposed(b, tile + (n * 8 + lane % 16) * ROW<D> + j * 8);
#pragma unroll
                    for (int m = 0; m < M; ++m) mma_m16n8k16<T>(sums[m][j], a[m], b);
                }
            }
        }
    }

    // Before sums are read, or what they were made of changes.
    template <typename... Sums> DEVICE_MEMBER static void finish(Sums&...) {}
};

// A sum or maximum over a row of 16 × 8 results: four lanes hold it.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Writes a warp's 16 rows, times `factor` of the upper and the lower row of a lane; the first `valid` rows exist.
template <int D, typename T>
DEVICE void store_rows(T* to, int stride, const float (&sums)[D / 8][4], float upper, float lower, int valid) {
    int row = lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
        if (row >= valid) continue;
        float factor = half == 0 ? upper : lower;
        T* at = to + static_cast<int64_t>(row) * stride + column;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            float x = sums[j][2 * half] * factor, y = sums[j][2 * half + 1] * factor;
            if constexpr (sizeof(T) == 4) store_vector(at + j * 8, float2{x, y});
            else store_vector(at + j * 8, pack<T>(x, y));
        }
    }
}
