// Attention, backward: from the gradient dₒ of the output to those of queries, keys and values.
//
// With p = exp(scale · q kᵀ − lse) computed again, δ = Σ dₒ ∘ o for each query and s = p ∘ (dₒ vᵀ − δ):
//     dq = scale · s k,   dk = scale · sᵀ q,   dv = pᵀ dₒ.
//
// attention_backward_queries_{f16,bf16}_d{32,40,64,80,160}   dq and δ; comes first
// attention_backward_keys_{f16,bf16}_d{32,40,64,80,160}      dk and dv of all keys: self-attention
// attention_backward_tail_{f16,bf16}_d{32,40,64,80,160}      dk and dv of the last n keys in f32: HiPer's tail
// sum_splits_{f16,bf16}                                   adds up what the tail's blocks found, in a fixed order
//
// Each gradient has a block of its own to collect it, so no sum depends on the order in which blocks run: results are
// the same bits every time. The price is 7 products where 5 with atomic additions would do.
//
// Shapes  as in attention.cu; d_o, o, d_q like q; d_k, d_v like k; lse, delta [B, heads, queries] f32. The tail's d_k, d_v are
//         [splits, B, n, heads · D] f32, of keys keys − n … keys − 1; split i is the sum over its share of the queries, and
//         sum_splits makes [B, n, heads · D] of them. With strides of 2 · heads · D and d_v = d_k + heads · D, the two
//         lie side by side and are summed at once. No causal mask.
// Types   f16 or bf16 in and out, the tail's gradients f32 until they are summed; products, sums and statistics f32; p and s are rounded to the
//         storage type before the second product. The loss is scaled by the caller, so that s does not underflow.
// Needs   compute capability 8.0.
//
//         D     kernel   threads  rows of a block  columns of a tile  shared memory, bytes  registers (8.0 / 9.0)
//         32    queries  128      128              32                 20480                 163 / 168
//               keys     128      128              32                 20480                 216 / 212
//               tail     32       16               32                 10752                 128 / 128
//         40    queries  128      128              32                 20480                 199 / 195
//               keys     128      128              32                 20480                 237 / 240
//               tail     32       16               32                 10752                 136 / 137
//         64    queries  128      64               64                 36864                 167 / 170
//               keys     128      64               64                 37888                 234 / 232
//               tail     32       16               64                 37888                 238 / 234
//         80    queries  128      64               32                 22528                 159 / 164
//               keys     128      64               32                 23040                 218 / 218
//               tail     32       16               32                 23040                 218 / 218
//         160   queries  128      64               32                 43008                 243 / 249
//               keys     128      64               16                 64768                 247 / 246
//               tail     32       16               16                 32512                 248 / 245
//
//         Nothing is spilled. Grid: rows (queries; keys; n) over those of a block, rounded up, in x; heads in y; B in z, for
//         the tail B · splits. sum_splits: a thread a number, 256 threads. One split for each 128 queries fills a card.
// Source  FlashAttention-2 (arXiv 2307.08691), algorithm 2, in two kernels where it adds dq atomically.
//
// Time    Predicted as in attention.cu, not yet measured; queries has 3 products, keys 4, each its exponentials.
//
//         4096 × 4096, D 40    32 and 43 GFLOP: 52 and 69 µs; twice 36 µs of exponentials   95 and 125 µs
//         1024 × 1024, D 80    4 and 5.4 GFLOP: 6.5 and 8.7 µs, one warp a scheduler        15 and 20 µs
//         256 × 256, D 160     0.5 and 0.7 GFLOP; 8 and 16 tiles one after another          8 and 12 µs
//         4096 × 77, D 40      queries: 0.6 GFLOP, 10.5 MB at 3 TB/s: 3.5 µs                6 µs
//         its tail of 5        16 of 5 rows' work: 0.17 GFLOP, 5.2 MB; 256 warps, 4 tiles   6 µs
//         sum_splits           32 splits of 5 · 640: 0.4 MB                                 2.5 µs
//
//         A step's backward pass has 4, 5 and 5 self-attentions of the three sizes, one of 64 × 64, and 16 over 77 keys, the
//         first of them without d_q: 1.4 ms. Hopper's own products (wgmma) are not used. Of a whole tile's instructions at D 40,
//         68 of 240 are products in queries, 88 of 290 in keys (9.0).
#include "attention_tile.cuh"

// Rows of a block: WARPS · 16 · M; columns of a tile: COLUMNS. The left sides of products stay in registers, if they fit.
template <int D> struct QueriesShape {
    static constexpr int WARPS = 4, M = D <= 40 ? 2 : 1, COLUMNS = D == 64 ? 64 : 32;
    template <typename T> using Left = InRegisters<T, D>;
};
template <int D> struct KeysShape {
    static constexpr int WARPS = 4, M = D <= 40 ? 2 : 1, COLUMNS = D == 64 ? 64 : D == 160 ? 16 : 32;
    template <typename T> using Left = std::conditional_t<(D > 80), InShared<T, D>, InRegisters<T, D>>;
};
template <int D> struct TailShape : KeysShape<D> {
    static constexpr int WARPS = 1, M = 1;
};

// Shared memory: the two left sides, then two stages of two tiles and (for keys) of lse and δ; the stages begin where the
// left sides do if those are in registers.
template <typename T, int D, typename Shape> struct Layout {
    static constexpr int ROWS = Shape::WARPS * 16 * Shape::M, SIDE = ROWS * ROW<D>, TILE = Shape::COLUMNS * ROW<D>;
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

template <typename T, int D>
DEVICE void attention_backward_queries(T* d_q, float* delta, const T* d_o, const T* o, const float* lse, const T* q,
                                       const T* k, const T* v, int queries, int keys, int d_q_stride, int d_o_stride,
                                       int o_stride, int q_stride, int k_stride, int v_stride, float scale) {
    using Shape = QueriesShape<D>;
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
    auto load_tile = [&](int tile) {
        int64_t first = static_cast<int64_t>(tile) * KEYS;
        int valid = keys - tile * KEYS;
        load_rows<T, D, KEYS, THREADS>(stage_of(tile), k + first * k_stride, k_stride, valid);
        load_rows<T, D, KEYS, THREADS>(stage_of(tile) + TILE, v + first * v_stride, v_stride, valid);
        cp_async_commit();
    };
    float sums[M][D / 8][4] = {};
    float exponent_scale = scale * LOG2_E;
    auto attend = [&](int tile, auto extent) {
        const T* key_tile = stage_of(tile);
        int count = keys - tile * KEYS;
        float weights[M][N][4] = {}, gradients[M][N][4] = {};
        multiply_by_rows<T, D>(weights, query_side, key_tile, extent, count);
        multiply_by_rows<T, D>(gradients, gradient_side, key_tile + TILE, extent, count);
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
        multiply_by_columns<T, D>(sums, weights, key_tile, extent, count);
    };
    int tiles = (keys + KEYS - 1) / KEYS;
    load_tile(0);
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
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

// The gradients of keys first_key … keys − 1 from the queries of one split; see the shapes above for where they go.
template <typename T, int D, typename Shape, typename Out>
DEVICE void attention_backward_keys(Out* d_k, Out* d_v, const T* d_o, const float* lse, const float* delta, const T* q,
                                    const T* k, const T* v, int queries, int keys, int first_key, int splits, int d_k_stride,
                                    int d_v_stride, int d_o_stride, int q_stride, int k_stride, int v_stride, float scale) {
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
    auto load_tile = [&](int tile) {
        int64_t first = static_cast<int64_t>(tile) * QUERIES;
        int valid = queries - tile * QUERIES;
        load_rows<T, D, QUERIES, THREADS>(stage_of(tile), q + first * q_stride, q_stride, valid);
        load_rows<T, D, QUERIES, THREADS>(stage_of(tile) + TILE, d_o + first * d_o_stride, d_o_stride, valid);
        cp_async_commit();
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
        multiply_by_rows<T, D>(weights, key_side, query_tile, extent, count);
        multiply_by_rows<T, D>(gradients, value_side, query_tile + TILE, extent, count);
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
        multiply_by_columns<T, D>(value_sums, weights, query_tile + TILE, extent, count);
        multiply_by_columns<T, D>(key_sums, gradients, query_tile, extent, count);
    };
    int tiles = (queries + QUERIES - 1) / QUERIES, share = (tiles + splits - 1) / splits;
    int begin = split * share, end = min(tiles, begin + share);
    if (begin < end) {
        load_tile(begin);
        fetch_statistics(begin);
        place_statistics(begin);
    }
    for (int tile = begin; tile < end; ++tile) {
        cp_async_wait<0>();
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

#define BACKWARD(T, D)                                                                                                 \
    KERNEL(attention_backward_queries_##T##_d##D, (QueriesShape<D>::WARPS * 32), T* d_q, float* delta, const T* d_o,   \
           const T* o, const float* lse, const T* q, const T* k, const T* v, int queries, int keys, int d_q_stride,    \
           int d_o_stride, int o_stride, int q_stride, int k_stride, int v_stride, float scale) {                      \
        take_turn();                                                                                                   \
        attention_backward_queries<T, D>(d_q, delta, d_o, o, lse, q, k, v, queries, keys, d_q_stride, d_o_stride,      \
                                         o_stride, q_stride, k_stride, v_stride, scale);                               \
    }                                                                                                                  \
    KERNEL(attention_backward_keys_##T##_d##D, (KeysShape<D>::WARPS * 32), T* d_k, T* d_v, const T* d_o,               \
           const float* lse, const float* delta, const T* q, const T* k, const T* v, int queries, int keys,            \
           int d_k_stride, int d_v_stride, int d_o_stride, int q_stride, int k_stride, int v_stride, float scale) {    \
        take_turn();                                                                                                   \
        attention_backward_keys<T, D, KeysShape<D>>(d_k, d_v, d_o, lse, delta, q, k, v, queries, keys, 0, 1,           \
                                                    d_k_stride, d_v_stride, d_o_stride, q_stride, k_stride, v_stride,  \
                                                    scale);                                                            \
    }                                                                                                                  \
    KERNEL(attention_backward_tail_##T##_d##D, (TailShape<D>::WARPS * 32), float* d_k, float* d_v, const T* d_o,       \
           const float* lse, const float* delta, const T* q, const T* k, const T* v, int queries, int keys, int n,     \
           int splits, int d_k_stride, int d_v_stride, int d_o_stride, int q_stride, int k_stride, int v_stride,       \
           float scale) {                                                                                              \
        take_turn();                                                                                                   \
        attention_backward_keys<T, D, TailShape<D>>(d_k, d_v, d_o, lse, delta, q, k, v, queries, keys, keys - n,       \
                                                    splits, d_k_stride, d_v_stride, d_o_stride, q_stride, k_stride,    \
                                                    v_stride, scale);                                                  \
    }
BACKWARD(f16, 32)
BACKWARD(f16, 40)
BACKWARD(f16, 64)
BACKWARD(f16, 80)
BACKWARD(f16, 160)
BACKWARD(bf16, 32)
BACKWARD(bf16, 40)
BACKWARD(bf16, 64)
BACKWARD(bf16, 80)
BACKWARD(bf16, 160)

// sums[i] = parts[0][i] + parts[1][i] + … in this order; parts [splits, count]. A thread a number.
template <typename T> DEVICE void sum_splits(T* sums, const float* parts, int count, int splits) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += parts[static_cast<int64_t>(split) * count + i];
    sums[i] = from_f32<T>(sum);
}
KERNEL(sum_splits_f16, (256), f16* sums, const float* parts, int count, int splits) {
    take_turn();
    sum_splits(sums, parts, count, splits);
}
KERNEL(sum_splits_bf16, (256), bf16* sums, const float* parts, int count, int splits) {
    take_turn();
    sum_splits(sums, parts, count, splits);
}
