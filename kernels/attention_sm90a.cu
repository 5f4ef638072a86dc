// Attention and its gradient by Hopper's own instructions: what attention.cu and attention_backward.cu compute, with their
// parameters, faster.
//
// attention_sm90a_{forward,backward_queries,backward_keys}_{f16,bf16}_d{40,64,80}
//
// Shapes, types  as theirs
// Needs   compute capability 9.0 and no other: this file is compiled for sm_90a
//
//         D     kernel            threads  rows of a block  columns of a tile  shared memory, bytes  registers  blocks of a
//                                                                                                               multiprocessor
//         40    forward           256      128              64                 24576                 112        2
//               backward_queries  256      128              32                 20480                 102        2
//               backward_keys     256      128              32                 20480                 128        2
//         64    forward           128      64               64                 32768                 123        3
//               backward_queries  128      64               64                 32768                 154        3
//               backward_keys     128      64               64                 33792                 215        2
//         80    forward           128      64               64                 40960                 148        3
//               backward_queries  128      64               64                 40960                 192        2
//               backward_keys     128      64               64                 41984                 245        2
//
//         Nothing is spilled. Grids as theirs. Two warpgroups of a block share each tile, where there are rows enough.
// Source  FlashAttention-2 (arXiv 2307.08691), as there; wgmma as the PTX ISA has it, tiles without swizzle, which are read along
//         their rows and across them. Heads of 40 are 48 deep for scores, the last 8 zeros.
//
// Time    Predicted for an H100 as in attention.cu, not yet measured. Clocks that 64 × 64 scores take of a multiprocessor at D 40:
//         tensor cores at 989 TFLOP/s; exponentials at 16 a clock; instructions of a warp (9.0a), one a clock for each of its four.
//
//                                tensor cores  exponentials  instructions
//         forward                176           256           279
//         backward_queries       272           256           328
//         backward_keys          352           256           450
//
//         4096 × 4096, D 40 are 32768 times that, in 256 blocks, which are one wave: 40, 47 and 64 µs at the largest of each, if
//         warpgroups overlap. Their tiles, 201 MB in lines of 32 bytes, come from the second-level cache in 27 µs meanwhile. 1024 × 1024, D 80 are 128 blocks, 16 tiles of 850, 900 and 1100 clocks one after another.
//
//                             forward  queries  keys    without: forward  queries  keys
//         4096 × 4096, D 40   50 µs    55 µs    70 µs            75 µs    95 µs    125 µs
//         1024 × 1024, D 80   9 µs     10 µs    12 µs            12 µs    15 µs    20 µs
//
//         The attentions of a UNet's pass: 0.4 ms, backward 0.9 ms.
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_warpgroup.cuh"

template <int D> struct Shape {
    using By = Warpgroup;
    static constexpr int WARPS = D == 40 ? 8 : 4, M = 1, KEYS = 64, COLUMNS = D == 40 ? 32 : 64;
    template <typename T> using Left = InRegisters<T, D>;
};

// Threads, and blocks of a multiprocessor: forward, of the gradients of queries, of those of keys.
#define OF_HEAD(T, D, threads, forward, queries, keys)                                                                 \
    FORWARD_OF(attention_sm90a_forward_##T##_d##D, (threads, forward), T, D, Shape<D>)                                 \
    BACKWARD_QUERIES(attention_sm90a_backward_queries_##T##_d##D, (threads, queries), T, D, Shape<D>)                  \
    BACKWARD_KEYS(attention_sm90a_backward_keys_##T##_d##D, (threads, keys), T, D, Shape<D>)
OF_HEAD(f16, 40, 256, 2, 2, 2)
OF_HEAD(f16, 64, 128, 3, 3, 2)
OF_HEAD(f16, 80, 128, 3, 2, 2)
OF_HEAD(bf16, 40, 256, 2, 2, 2)
OF_HEAD(bf16, 64, 128, 3, 3, 2)
OF_HEAD(bf16, 80, 128, 3, 2, 2)
