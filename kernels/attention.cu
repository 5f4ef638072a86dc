// Attention, forward: o = softmax(scale · q kᵀ) v for each head, never storing the scores.
//
// attention_forward_{f16,bf16}_d{32,40,64,80,160}
//
// Shapes  q, o [B, queries, heads · D]; k, v [B, keys, heads · D]; lse [B, heads, queries]. The strides from row to row
//         are arguments (numbers, multiples of 8; pointers 16-byte aligned), so that q, k, v may lie in one buffer; an
//         image begins where the one before it ends. queries and keys are any numbers from 1. causal ≠ 0 hides keys
//         behind the query of the same number.
// Types   f16 or bf16 in and out; scores, sums and statistics f32. lse is the logarithm of the sum of exp(scale · score),
//         for the backward pass; may be null.
// Needs   compute capability 8.0.
//
//         D     threads  queries of a block  keys of a tile  shared memory, bytes  registers (8.0 / 9.0; none spilled)
//         32    128      128                 64              20480                 190 / 183
//         40    128      128                 64              20480                 200 / 196
//         64    128      128                 64              36864                 237 / 240
//         80    128      64                  64              45056                 165 / 165
//         160   128      64                  32              43008                 218 / 223
//
//         Grid: queries over those of a block, rounded up, in x; heads in y; B in z.
// Source  FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 1: queries in registers, keys and values through two
//         stages of shared memory, a running maximum and sum; exponentials to base 2.
//
// Time    Predicted for an H100, SD 1.5 at 512², one image, 8 heads; not yet measured. Two products of 2 · queries · keys · D
//         · heads operations at 620 TFLOP/s (what mma.sync reaches of the card's 989); queries · keys · heads exponentials
//         at 132 · 16 a cycle, 3.7e12 a second; products and exponentials overlap between warps in part.
//
//         4096 × 4096, D 40    21.5 GFLOP: 35 µs; 134 M exponentials: 36 µs        60–90 µs
//         1024 × 1024, D 80    2.7 GFLOP: 4.3 µs, but one warp a scheduler         10–15 µs
//         256 × 256, D 160     0.34 GFLOP; 8 tiles one after another, 0.7 µs each  6 µs
//         4096 × 77, D 40      0.42 GFLOP; q and o, 5.2 MB at 3 TB/s: 1.8 µs       4 µs
//
//         A pass of the UNet has 5 self-attentions of each of the three sizes, one of 64 × 64, and 16 over 77 keys: 0.5 ms.
#include "attention_tile.cuh"

// WARPS · 16 · M queries to a block, KEYS keys to a tile.
template <int D> struct ForwardShape { static constexpr int WARPS = 4, M = D <= 64 ? 2 : 1, KEYS = D <= 80 ? 64 : 32; };

template <typename T, int D>
DEVICE void attention_forward(T* o, float* lse, const T* q, const T* k, const T* v, int queries, int keys, int o_stride,
                              int q_stride, int k_stride, int v_stride, float scale, int causal) {
    using Shape = ForwardShape<D>;
    constexpr int WARPS = Shape::WARPS, THREADS = WARPS * 32, M = Shape::M, KEYS = Shape::KEYS, N = KEYS / 8;
    constexpr int QUERIES = WARPS * 16 * M, TILE = KEYS * ROW<D>;
    static_assert(QUERIES * ROW<D> <= 2 * TILE, "queries pass through the second stage");

    int first_query = blockIdx.x * QUERIES, head = blockIdx.y, image = blockIdx.z, heads = gridDim.y;
    int lane = lane_of_warp(), warp_row = threadIdx.x / 32 * 16 * M;
    int64_t query_row = static_cast<int64_t>(image) * queries + first_query;
    int64_t key_row = static_cast<int64_t>(image) * keys;
    q += query_row * q_stride + head * D;
    o += query_row * o_stride + head * D;
    k += key_row * k_stride + head * D;
    v += key_row * v_stride + head * D;

    // A stage holds a tile of keys and one of values.
    T* stages = reinterpret_cast<T*>(shared_memory());
    auto load_tile = [&](int tile) {
        T* stage = stages + tile % 2 * (2 * TILE);
        int64_t first = static_cast<int64_t>(tile) * KEYS;
        int valid = keys - tile * KEYS;
        load_rows<T, D, KEYS, THREADS>(stage, k + first * k_stride, k_stride, valid);
        load_rows<T, D, KEYS, THREADS>(stage + TILE, v + first * v_stride, v_stride, valid);
        cp_async_commit();
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
        multiply_by_rows<T, D>(scores, left, key_tile, extent, count);
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
        multiply_by_columns<T, D>(sums, scores, key_tile + TILE, extent, count);
    };
    int seen = causal ? min(keys, first_query + QUERIES) : keys;
    int tiles = (seen + KEYS - 1) / KEYS;
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
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

#define FORWARD(T, D)                                                                                                 \
    KERNEL(attention_forward_##T##_d##D, (ForwardShape<D>::WARPS * 32, 2), T* o, float* lse, const T* q, const T* k,     \
           const T* v, int queries, int keys, int o_stride, int q_stride, int k_stride, int v_stride, float scale,    \
           int causal) {                                                                                              \
        take_turn();                                                                                                  \
        attention_forward<T, D>(o, lse, q, k, v, queries, keys, o_stride, q_stride, k_stride, v_stride, scale, causal); \
    }
FORWARD(f16, 32)
FORWARD(f16, 40)
FORWARD(f16, 64)
FORWARD(f16, 80)
FORWARD(f16, 160)
FORWARD(bf16, 32)
FORWARD(bf16, 40)
FORWARD(bf16, 64)
FORWARD(bf16, 80)
FORWARD(bf16, 160)
