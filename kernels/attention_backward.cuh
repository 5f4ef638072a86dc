// The gradient of attention: what attention_backward.cu's kernels do, and attention_sm90a.cu's.
#pragma once

#include "attention_tile.cuh"

// A Shape says how much a block has: WARPS · 16 · M rows, COLUMNS columns of a tile, left sides of products in a Left, and who
// multiplies, a By.

// Shared memory: the two left sides, then two stages of two tiles and (for keys) of lse and δ; the stages begin where the
// left sides do if those are in registers.
template <typename T, int D, typename Shape> struct Layout {
    static constexpr int ROWS = Shape::WARPS * 16 * Shape::M, SIDE = ROWS * ROW<D>, TILE = Shape::By::template TILE<D, Shape::COLUMNS>;
    static constexpr bool RESIDENT = std::is_same_v<typename Shape::template Left<T>, InShared<T, D>>;
    static constexpr int STAGES = RESIDENT ? 2 * SIDE : 0;
};

// A gradient of a row: Σ dₒ ∘ o over the head, in each of the row's four lanes.
template <typename T, int D> DEVICE float row_delta(const T* d_o, const T* o, bool exists) {
    float sum = 0.0f;
    if (exists) {
        for (int j = lane_of_warp() % 4 * 2; j < D; j += 8) {
            float2 x = unpack<T>(load_vector<uint32_t>(d_o + j)), y = unpack<T>(load_vector<uint32_t>(o + j));
            sum += x.x * y.x + x.y * y.y;
        }
    }
    return row_sum(sum);
}

template <typename T, int D, typename Shape>
DEVICE void attention_backward_queries(T* d_q, float* delta, const T* d_o, const T* o, const float* lse, const T* q,
                                       const T* k, const T* v, int queries, int keys, int d_q_stride, int d_o_stride,
                                       int o_stride, int q_stride, int k_stride, int v_stride, float scale) {
    using By = typename Shape::By;
    using Memory = Layout<T, D, Shape>;
    constexpr int THREADS = Shape::WARPS * 32, M = Shape::M, KEYS = Shape::COLUMNS, N = KEYS / 8;
    constexpr int QUERIES = Memory::ROWS, TILE = Memory::TILE;

    int first_query = blockIdx.x * QUERIES, head = blockIdx.y, image = blockIdx.z, heads = gridDim.y;
    int lane = lane_of_warp(), warp_row = threadIdx.x / 32 * 16 * M, existing = queries - first_query;
    int64_t query_row = static_cast<int64_t>(image) * queries + first_query;
    int64_t key_row = static_cast<int64_t>(image) * keys;
    int64_t statistic = (static_cast<int64_t>(image) * heads + head) * queries + first_query;
    d_q += query_row * d_q_stride + head * D;
    d_o += query_row * d_o_stride + head * D;
    o += query_row * o_stride + head * D;
    q += query_row * q_stride + head * D;
    k += key_row * k_stride + head * D;
    v += key_row * v_stride + head * D;

    T* memory = reinterpret_cast<T*>(shared_memory());
    load_rows<T, D, QUERIES, THREADS>(memory, q, q_stride, existing);
    load_rows<T, D, QUERIES, THREADS>(memory + Memory::SIDE, d_o, d_o_stride, existing);
    cp_async_commit();

    // Of a lane's upper and lower row: lse to base 2, and δ. A row that does not exist may have any.
    float log_sum[M][2], row_deltas[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = warp_row + m * 16 + half * 8 + lane / 4;
            bool exists = row < existing;
            log_sum[m][half] = exists ? lse[statistic + row] * LOG2_E : 0.0f;
            row_deltas[m][half] = row_delta<T, D>(d_o + static_cast<int64_t>(row) * d_o_stride,
                                                  o + static_cast<int64_t>(row) * o_stride, exists);
            if (exists && lane % 4 == 0) delta[statistic + row] = row_deltas[m][half];
        }
    }

    cp_async_wait<0>();
    __syncthreads();
    typename Shape::template Left<T> query_side[M], gradient_side[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        query_side[m].take(memory + (warp_row + m * 16) * ROW<D>);
        gradient_side[m].take(memory + Memory::SIDE + (warp_row + m * 16) * ROW<D>);
    }
    __syncthreads();

    auto stage_of = [&](int tile) { return memory + Memory::STAGES + tile % 2 * (2 * TILE); };
    // One after the other, so that k and v are the next one's.
    auto load_tile = [&](int tile) {
        int valid = keys - tile * KEYS;
        By::template load_tile<T, D, KEYS, THREADS>(stage_of(tile), k, k_stride, valid);
        By::template load_tile<T, D, KEYS, THREADS>(stage_of(tile) + TILE, v, v_stride, valid);
        cp_async_commit();
        k += static_cast<int64_t>(KEYS) * k_stride;
        v += static_cast<int64_t>(KEYS) * v_stride;
    };
    float sums[M][D / 8][4] = {};
    float exponent_scale = scale * LOG2_E;
    auto attend = [&](int tile, auto extent) {
        const T* key_tile = stage_of(tile);
        int count = keys - tile * KEYS;
        float weights[M][N][4] = {}, gradients[M][N][4] = {};
        By::template multiply_by_rows<T, D>(weights, query_side, key_tile, extent, count);
        By::template multiply_by_rows<T, D>(gradients, gradient_side, key_tile + TILE, extent, count);
        By::finish(weights, gradients);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < N * 4; ++i) {
                int column = i / 4 * 8 + lane % 4 * 2 + i % 2, half = i % 4 / 2;
                float exponent = fmaf(weights[m][i / 4][i % 4], exponent_scale, -log_sum[m][half]);
                // A key that does not exist is zeros; a weight that overflows would make them NaN.
                float weight = extent.value || column < count ? exp2_approx(exponent) : 0.0f;
                weights[m][i / 4][i % 4] = weight * (gradients[m][i / 4][i % 4] - row_deltas[m][half]);
            }
        }
        By::template multiply_by_columns<T, D>(sums, weights, key_tile, extent, count);
        By::finish(sums);
    };
    int tiles = (keys + KEYS - 1) / KEYS;
    load_tile(0);
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
        By::show_tile();
        __syncthreads();  // this tile has arrived; nobody reads the other stage any more
        if (tile + 1 < tiles) load_tile(tile + 1);
        if (keys - tile * KEYS < KEYS) attend(tile, Short());
        else attend(tile, Whole());
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        int row = warp_row + m * 16;
        store_rows<D>(d_q + static_cast<int64_t>(row) * d_q_stride, d_q_stride, sums[m], scale, scale, existing - row);
    }
}

// The gradients of keys first_key … keys − 1 from the queries of one split; attention_backward.cu says where they go.
template <typename T, int D, typename Shape, typename Out>
DEVICE void attention_backward_keys(Out* d_k, Out* d_v, const T* d_o, const float* lse, const float* delta, const T* q,
                                    const T* k, const T* v, int queries, int keys, int first_key, int splits, int d_k_stride,
                                    int d_v_stride, int d_o_stride, int q_stride, int k_stride, int v_stride, float scale) {
    using By = typename Shape::By;
    using Memory = Layout<T, D, Shape>;
    constexpr int THREADS = Shape::WARPS * 32, M = Shape::M, QUERIES = Shape::COLUMNS, N = QUERIES / 8;
    constexpr int KEYS = Memory::ROWS, TILE = Memory::TILE;

    int images = gridDim.z / splits, image = blockIdx.z % images, split = blockIdx.z / images;
    int head = blockIdx.y, heads = gridDim.y, lane = lane_of_warp(), warp_row = threadIdx.x / 32 * 16 * M;
    int rows = keys - first_key, first_row = blockIdx.x * KEYS, existing = rows - first_row;
    int64_t query_row = static_cast<int64_t>(image) * queries;
    int64_t key_row = static_cast<int64_t>(image) * keys + first_key + first_row;
    int64_t gradient_row = static_cast<int64_t>(blockIdx.z) * rows + first_row;
    d_k += gradient_row * d_k_stride + head * D;
    d_v += gradient_row * d_v_stride + head * D;
    d_o += query_row * d_o_stride + head * D;
    q += query_row * q_stride + head * D;
    k += key_row * k_stride + head * D;
    v += key_row * v_stride + head * D;
    lse += (static_cast<int64_t>(image) * heads + head) * queries;
    delta += (static_cast<int64_t>(image) * heads + head) * queries;

    T* memory = reinterpret_cast<T*>(shared_memory());
    load_rows<T, D, KEYS, THREADS>(memory, k, k_stride, existing);
    load_rows<T, D, KEYS, THREADS>(memory + Memory::SIDE, v, v_stride, existing);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    typename Shape::template Left<T> key_side[M], value_side[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        key_side[m].take(memory + (warp_row + m * 16) * ROW<D>);
        value_side[m].take(memory + Memory::SIDE + (warp_row + m * 16) * ROW<D>);
    }
    __syncthreads();

    // A stage holds a tile of queries and one of output gradients; behind both stages lie lse (to base 2) and δ.
    auto stage_of = [&](int tile) { return memory + Memory::STAGES + tile % 2 * (2 * TILE); };
    auto statistics_of = [&](int tile) {
        return reinterpret_cast<float*>(memory + Memory::STAGES + 4 * TILE) + tile % 2 * (2 * QUERIES);
    };
    int tiles = (queries + QUERIES - 1) / QUERIES, share = (tiles + splits - 1) / splits;
    int begin = split * share, end = min(tiles, begin + share);
    q += static_cast<int64_t>(begin * QUERIES) * q_stride;
    d_o += static_cast<int64_t>(begin * QUERIES) * d_o_stride;
    // One after the other, so that q and d_o are the next one's.
    auto load_tile = [&](int tile) {
        int valid = queries - tile * QUERIES;
        By::template load_tile<T, D, QUERIES, THREADS>(stage_of(tile), q, q_stride, valid);
        By::template load_tile<T, D, QUERIES, THREADS>(stage_of(tile) + TILE, d_o, d_o_stride, valid);
        cp_async_commit();
        q += static_cast<int64_t>(QUERIES) * q_stride;
        d_o += static_cast<int64_t>(QUERIES) * d_o_stride;
    };
    // The statistics of a tile wait in registers while the tile before it is worked on.
    constexpr int CARRIED = (QUERIES + THREADS - 1) / THREADS;
    float carried[CARRIED][2];
    auto fetch_statistics = [&](int tile) {
#pragma unroll
        for (int i = 0; i < CARRIED; ++i) {
            int column = i * THREADS + threadIdx.x, query = tile * QUERIES + column;
            bool exists = column < QUERIES && query < queries;
            carried[i][0] = exists ? lse[query] * LOG2_E : 0.0f;  // a query that does not exist adds zeros
            carried[i][1] = exists ? delta[query] : 0.0f;
        }
    };
    auto place_statistics = [&](int tile) {
#pragma unroll
        for (int i = 0; i < CARRIED; ++i) {
            int column = i * THREADS + threadIdx.x;
            if (column >= QUERIES) continue;
            statistics_of(tile)[column] = carried[i][0];
            statistics_of(tile)[QUERIES + column] = carried[i][1];
        }
    };

    float key_sums[M][D / 8][4] = {}, value_sums[M][D / 8][4] = {};
    float exponent_scale = scale * LOG2_E;
    auto attend = [&](int tile, auto extent) {
        const T* query_tile = stage_of(tile);
        const float* statistics = statistics_of(tile);
        int count = queries - tile * QUERIES;
        float weights[M][N][4] = {}, gradients[M][N][4] = {};
        By::template multiply_by_rows<T, D>(weights, key_side, query_tile, extent, count);
        By::template multiply_by_rows<T, D>(gradients, value_side, query_tile + TILE, extent, count);
        By::finish(weights, gradients);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            int column = n * 8 + lane % 4 * 2;
            float2 log_sum = load_vector<float2>(statistics + column);
            float2 deltas = load_vector<float2>(statistics + QUERIES + column);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float weight = exp2_approx(fmaf(weights[m][n][i], exponent_scale, -(i % 2 ? log_sum.y : log_sum.x)));
                    weights[m][n][i] = weight;
                    gradients[m][n][i] = weight * (gradients[m][n][i] - (i % 2 ? deltas.y : deltas.x));
                }
            }
        }
        By::template multiply_by_columns<T, D>(value_sums, weights, query_tile + TILE, extent, count);
        By::template multiply_by_columns<T, D>(key_sums, gradients, query_tile, extent, count);
        By::finish(value_sums, key_sums);
    };
    if (begin < end) {
        load_tile(begin);
        fetch_statistics(begin);
        place_statistics(begin);
    }
    for (int tile = begin; tile < end; ++tile) {
        cp_async_wait<0>();
        By::show_tile();
        __syncthreads();  // this tile has arrived; nobody reads the other stage any more
        if (tile + 1 < end) {
            load_tile(tile + 1);
            fetch_statistics(tile + 1);
        }
        if (queries - tile * QUERIES < QUERIES) attend(tile, Short());
        else attend(tile, Whole());
        if (tile + 1 < end) place_statistics(tile + 1);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        int row = warp_row + m * 16;
        store_rows<D>(d_k + static_cast<int64_t>(row) * d_k_stride, d_k_stride, key_sums[m], scale, scale, existing - row);
        store_rows<D>(d_v + static_cast<int64_t>(row) * d_v_stride, d_v_stride, value_sums[m], 1.0f, 1.0f, existing - row);
    }
}

// ---- entry points ----

#define BACKWARD_QUERIES(name, bounds, T, D, Shape)                                                                    \
    KERNEL(name, bounds, T* d_q, float* delta, const T* d_o, const T* o, const float* lse, const T* q, const T* k,     \
           const T* v, int queries, int keys, int d_q_stride, int d_o_stride, int o_stride, int q_stride, int k_stride,\
           int v_stride, float scale) {                                                                                \
        take_turn();                                                                                                   \
        attention_backward_queries<T, D, Shape>(d_q, delta, d_o, o, lse, q, k, v, queries, keys, d_q_stride, d_o_stride,\
                                                o_stride, q_stride, k_stride, v_stride, scale);                        \
    }
#define BACKWARD_KEYS(name, bounds, T, D, Shape)                                                                       \
    KERNEL(name, bounds, T* d_k, T* d_v, const T* d_o, const float* lse, const float* delta, const T* q, const T* k,   \
           const T* v, int queries, int keys, int d_k_stride, int d_v_stride, int d_o_stride, int q_stride,            \
           int k_stride, int v_stride, float scale) {                                                                  \
        take_turn();                                                                                                   \
        attention_backward_keys<T, D, Shape>(d_k, d_v, d_o, lse, delta, q, k, v, queries, keys, 0, 1, d_k_stride,      \
                                             d_v_stride, d_o_stride, q_stride, k_stride, v_stride, scale);             \
    }
