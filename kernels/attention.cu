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
//         32    128      128                 64              20480                 194 / 185
//         40    128      128                 64              20480                 197 / 210
//         64    128      128                 64              36864                 237 / 255
//         80    128      64                  64              45056                 159 / 166
//         160   128      64                  32              43008                 214 / 226
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
#include "attention_forward.cuh"

// WARPS · 16 · M queries to a block, KEYS keys to a tile.
template <int D> struct ForwardShape {
    using By = Warps;
    static constexpr int WARPS = 4, M = D <= 64 ? 2 : 1, KEYS = D <= 80 ? 64 : 32;
};

#define FORWARD(T, D) FORWARD_OF(attention_forward_##T##_d##D, (ForwardShape<D>::WARPS * 32, 2), T, D, ForwardShape<D>)
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
