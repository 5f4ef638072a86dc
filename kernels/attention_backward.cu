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
//         sum_splits makes [B, n, heads · D] of them. With larger strides they are columns of a wider matrix, as those of all
//         attentions to one text, and are summed at once. No causal mask.
// Types   f16 or bf16 in and out, the tail's gradients f32 until they are summed; products, sums and statistics f32; p and s are rounded to the
//         storage type before the second product. The loss is scaled by the caller, so that s does not underflow.
// Needs   compute capability 8.0.
//
//         D     kernel   threads  rows of a block  columns of a tile  shared memory, bytes  registers (8.0 / 9.0)
//         32    queries  128      128              32                 20480                 157 / 161
//               keys     128      128              32                 20480                 210 / 212
//               tail     32       16               32                 10752                 149 / 150
//         40    queries  128      128              32                 20480                 196 / 191
//               keys     128      128              32                 20480                 237 / 240
//               tail     32       16               32                 10752                 152 / 158
//         64    queries  128      64               64                 36864                 147 / 146
//               keys     128      64               64                 37888                 230 / 229
//               tail     32       16               64                 37888                 229 / 238
//         80    queries  128      64               32                 22528                 160 / 164
//               keys     128      64               32                 23040                 214 / 219
//               tail     32       16               32                 23040                 216 / 225
//         160   queries  128      64               32                 43008                 249 / 248
//               keys     128      64               16                 64768                 248 / 245
//               tail     32       16               16                 32512                 247 / 250
//
//         Nothing is spilled. Grid: rows (queries; keys; n) over those of a block, rounded up, in x; heads in y; B in z, for
//         the tail B · splits. sum_splits: a thread a number, 256 threads. One split for each 128 to 256 queries fills a card.
// Source  FlashAttention-2 (arXiv 2307.08691), algorithm 2, in two kernels where it adds dq atomically.
//
// Time    Predicted as in attention.cu, not yet measured; queries has 3 products, keys 4, each its exponentials.
//
//         4096 × 4096, D 40    32 and 43 GFLOP: 52 and 69 µs; twice 36 µs of exponentials   95 and 125 µs
//         1024 × 1024, D 80    4 and 5.4 GFLOP: 6.5 and 8.7 µs, one warp a scheduler        15 and 20 µs
//         256 × 256, D 160     0.5 and 0.7 GFLOP; 8 and 16 tiles one after another          8 and 12 µs
//         4096 × 77, D 40      queries: 0.6 GFLOP, 10.5 MB at 3 TB/s: 3.5 µs                6 µs
//         its tail of 5        16 of 5 rows' work: 0.17 GFLOP, 5.2 MB; 128 warps, 8 tiles   8 µs
//         sum_splits           16 splits of 5 · 24960, of all attentions to a text: 8 MB    4 µs
//
//         A step's backward pass has 4, 5 and 5 self-attentions of the three sizes, one of 64 × 64, and 16 over 77 keys, the
//         first of them without d_q: 1.4 ms, on Hopper less: attention_sm90a.cu. Of a whole tile's instructions at D 40, 68 of
//         240 are products in queries, 88 of 290 in keys (9.0).
#include "attention_backward.cuh"

// Rows of a block: WARPS · 16 · M; columns of a tile: COLUMNS. The left sides of products stay in registers, if they fit.
template <int D> struct QueriesShape {
    using By = Warps;
    static constexpr int WARPS = 4, M = D <= 40 ? 2 : 1, COLUMNS = D == 64 ? 64 : 32;
    template <typename T> using Left = InRegisters<T, D>;
};
template <int D> struct KeysShape {
    using By = Warps;
    static constexpr int WARPS = 4, M = D <= 40 ? 2 : 1, COLUMNS = D == 64 ? 64 : D == 160 ? 16 : 32;
    template <typename T> using Left = std::conditional_t<(D > 80), InShared<T, D>, InRegisters<T, D>>;
};
template <int D> struct TailShape : KeysShape<D> {
    static constexpr int WARPS = 1, M = 1;
};

#define BACKWARD(T, D)                                                                                                 \
    BACKWARD_QUERIES(attention_backward_queries_##T##_d##D, (QueriesShape<D>::WARPS * 32), T, D, QueriesShape<D>)      \
    BACKWARD_KEYS(attention_backward_keys_##T##_d##D, (KeysShape<D>::WARPS * 32), T, D, KeysShape<D>)                  \
    KERNEL(attention_backward_tail_##T##_d##D, (TailShape<D>::WARPS * 32, 8), float* d_k, float* d_v, const T* d_o,       \
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
