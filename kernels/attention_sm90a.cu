// Attention and its gradient by Hopper's own instructions: what attention.cu and attention_backward.cu compute, with their
// parameters, faster.
//
// attention_sm90a_{forward,backward_queries,backward_keys}_{f16,bf16}_d{40,64,80}
//
// Shapes, types  as theirs
// Needs   compute capability 9.0 and no other: this file is compiled for sm_90a
//
// Source  FlashAttention-2 (arXiv 2307.08691), as there; wgmma as the PTX ISA has it.
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_warpgroup.cuh"

template <int D> struct Shape {
    using By = Warpgroup;
    static constexpr int WARPS = 4, M = 1, KEYS = 64, COLUMNS = 64;
    template <typename T> using Left = InRegisters<T, D>;
};

// Blocks of a multiprocessor: forward, of the gradients of queries, of those of keys.
#define OF_HEAD(T, D, forward, queries, keys)                                                                          \
    FORWARD_OF(attention_sm90a_forward_##T##_d##D, (128, forward), T, D, Shape<D>)                                     \
    BACKWARD_QUERIES(attention_sm90a_backward_queries_##T##_d##D, (128, queries), T, D, Shape<D>)                      \
    BACKWARD_KEYS(attention_sm90a_backward_keys_##T##_d##D, (128, keys), T, D, Shape<D>)
OF_HEAD(f16, 40, 4, 3, 3)
OF_HEAD(f16, 64, 3, 3, 2)
OF_HEAD(f16, 80, 3, 2, 2)
OF_HEAD(bf16, 40, 4, 3, 3)
OF_HEAD(bf16, 64, 3, 3, 2)
OF_HEAD(bf16, 80, 3, 2, 2)
