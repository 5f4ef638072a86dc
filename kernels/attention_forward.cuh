// Attention: what attention.cu's kernels do, and attention_sm90a.cu's.
#pragma once

#include "attention_tile.cuh"

// A Shape says how much a block has: WARPS · 16 · M queries, KEYS keys of a tile, and who multiplies, a By.
template <typename T, int D, typename Shape>
DEVICE void attention_forward(T* o, float* lse, const T* q, const T* k, const T* v, int queries, int keys, int o_stride,
                              int q_stride, int k_stride, int v_stride, float scale, int causal) {
    using By = typename Shape::By;
    constexpr int WARPS = Shape::WARPS, THREADS = WARPS * 32, M = Shape::M, KEYS = Shape::KEYS, N = KEYS / 8;
    constexpr int QUERIES = WARPS * 16 * M, TILE = By::template TILE<D, KEYS>;
    static_assert(QUERIES * ROW<D> <= 2 * TILE, "queries pass through the second stage");

    int first_query = blockIdx.x * QUERIES, head = blockIdx.y, image = blockIdx.z, heads = gridDim.y;
    int lane = lane_of_warp(), warp_row = threadIdx.x / 32 * 16 * M;
    int64_t query_row = static_cast<int64_t>(image) * queries + first_query;
    int64_t key_row = static_cast<int64_t>(image) * keys;
    q += query_row * q_stride + head * D;
    o += query_row * o_stride + head * D;
    k += key_row * k_stride + head * D;
    v += key_row * v_stride + head * D;

    // A stage holds a tile of keys and one of values. One tile after the other, so that k and v are the next one's.
    T* stages = reinterpret_cast<T*>(shared_memory());
    auto load_tile = [&](int tile) {
        T* stage = stages + tile % 2 * (2 * TILE);
        int valid = keys - tile * KEYS;
        By::template load_tile<T, D, KEYS, THREADS>(stage, k, k_stride, valid);
        By::template load_tile<T, D, KEYS, THREADS>(stage + TILE, v, v_stride, valid);
        cp_async_commit();
        k += static_cast<int64_t>(KEYS) * k_stride;
        v += static_cast<int64_t>(KEYS) * v_stride;
    };

    load_rows<T, D, QUERIES, THREADS>(stages + 2 * TILE, q, q_stride, queries - first_query);
    load_tile(0);
    cp_async_wait<0>();
    __syncthreads();
    InRegisters<T, D> left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m].take(stages + 2 * TILE + (warp_row + m * 16) * ROW<D>);

    float sums[M][D / 8][4] = {};
    float maximum[M][2], total[M][2];  // of a lane's upper and lower row; total of its own columns alone
#pragma unroll
    for (int m = 0; m < M; ++m) maximum[m][0] = maximum[m][1] = -CUDART_INF_F, total[m][0] = total[m][1] = 0.0f;
    float exponent_scale = scale * LOG2_E;

    auto attend = [&](int tile, auto extent) {
        const T* key_tile = stages + tile % 2 * (2 * TILE);
        int count = keys - tile * KEYS;
        float scores[M][N][4] = {};
        By::template multiply_by_rows<T, D>(scores, left, key_tile, extent, count);
        By::finish(scores);
        if constexpr (!extent.value) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < N * 4; ++i) {
                    int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                    int row = first_query + warp_row + m * 16 + lane / 4 + i % 4 / 2 * 8;
                    if (column >= count || (causal && tile * KEYS + column > row)) scores[m][i / 4][i % 4] = -CUDART_INF_F;
                }
            }
        }

#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = maximum[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                top = row_max(top);
                float kept = exp2_approx((maximum[m][half] - top) * exponent_scale), shift = top * exponent_scale;
                maximum[m][half] = top;
                float sum = total[m][half] * kept;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[m][n][i] = exp2_approx(fmaf(scores[m][n][i], exponent_scale, -shift));
                        sum += scores[m][n][i];
                    }
                }
                total[m][half] = sum;
#pragma unroll
                for (int j = 0; j < D / 8; ++j) sums[m][j][2 * half] *= kept, sums[m][j][2 * half + 1] *= kept;
            }
        }
        By::template multiply_by_columns<T, D>(sums, scores, key_tile + TILE, extent, count);
        By::finish(sums);
    };
    int seen = causal ? min(keys, first_query + QUERIES) : keys;
    int tiles = (seen + KEYS - 1) / KEYS;
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
        By::show_tile();
        __syncthreads();  // this tile has arrived; nobody reads the other stage any more
        if (tile + 1 < tiles) load_tile(tile + 1);
        if (causal || keys - tile * KEYS < KEYS) attend(tile, Short());
        else attend(tile, Whole());
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
        int first = first_query + warp_row + m * 16;
        float upper = row_sum(total[m][0]), lower = row_sum(total[m][1]);
        store_rows<D>(o + static_cast<int64_t>(warp_row + m * 16) * o_stride, o_stride, sums[m], 1.0f / upper,
                      1.0f / lower, queries - first);
        if (lse != nullptr && lane % 4 == 0) {
            float* at = lse + (static_cast<int64_t>(image) * heads + head) * queries;
            int row = first + lane / 4;
            if (row < queries) at[row] = maximum[m][0] * scale + logf(upper);
            if (row + 8 < queries) at[row + 8] = maximum[m][1] * scale + logf(lower);
        }
    }
}

// ---- entry point ----

#define FORWARD_OF(name, bounds, T, D, Shape)                                                                          \
    KERNEL(name, bounds, T* o, float* lse, const T* q, const T* k, const T* v, int queries, int keys, int o_stride,    \
           int q_stride, int k_stride, int v_stride, float scale, int causal) {                                        \
        take_turn();                                                                                                   \
        attention_forward<T, D, Shape>(o, lse, q, k, v, queries, keys, o_stride, q_stride, k_stride, v_stride, scale, causal);\
    }
