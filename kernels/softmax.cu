// Softmax of rows and its gradient, in place: between products of product.cu, for attention with heads of a size (the VAE's
// only head is 512 wide) or type that attention.cu lacks, and for its gradient under a mask.
//
// softmax_{f32,f16,bf16}           scores become weights p = softmax(scale · scores)
// softmax_gradient_{f32,f16,bf16}  gradients dp of the weights become scale · p ∘ (dp − Σ p ∘ dp), those of the scores
//
// Shapes  scores, gradients, weights [rows, columns], each row contiguous. causal ≠ 0 hides columns behind that of the row's
//         number: their weights, and so the gradients of their scores, are 0.
// Types   exponentials and sums f32.
// Launch  grid: rows; 256 threads, 128 bytes of shared memory.
// Needs   compute capability 8.0. At most 20 registers.
// Source  the definition, with the maximum subtracted.
// Time    the VAE at 512², 4096 × 4096 f16: the first pass reads 34 MB, the other two find a row (8 KB) in the first-level
//         cache, 34 MB are written: 67 MB at 3 TB/s: 22 µs. The gradient, 101 MB: 34 µs.
#include "device.cuh"

// `scratch` as for block_sum.
DEVICE float block_max(float x, float* scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? scratch[lane] : -CUDART_INF_F);
    __syncthreads();
    return x;
}

template <typename T> DEVICE void softmax(T* scores, int columns, float scale, int causal) {
    float* scratch = reinterpret_cast<float*>(shared_memory());
    scores += static_cast<int64_t>(blockIdx.x) * columns;
    int seen = causal ? min(columns, static_cast<int>(blockIdx.x) + 1) : columns;
    float maximum = -CUDART_INF_F, sum = 0.0f;
    for (int i = threadIdx.x; i < seen; i += blockDim.x) maximum = fmaxf(maximum, scale * to_f32(scores[i]));
    maximum = block_max(maximum, scratch);
    for (int i = threadIdx.x; i < seen; i += blockDim.x) sum += __expf(scale * to_f32(scores[i]) - maximum);
    sum = block_sum(sum, scratch);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        scores[i] = from_f32<T>(i < seen ? __expf(scale * to_f32(scores[i]) - maximum) / sum : 0.0f);
    }
}

template <typename T> DEVICE void softmax_gradient(T* gradients, const T* weights, int columns, float scale) {
    gradients += static_cast<int64_t>(blockIdx.x) * columns;
    weights += static_cast<int64_t>(blockIdx.x) * columns;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += to_f32(weights[i]) * to_f32(gradients[i]);
    sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        gradients[i] = from_f32<T>(scale * to_f32(weights[i]) * (to_f32(gradients[i]) - sum));
    }
}

#define OF_TYPE(T, type)                                                                                           \
    KERNEL(softmax_##type, (256), T* scores, int columns, float scale, int causal) {                               \
        take_turn();                                                                                               \
        softmax(scores, columns, scale, causal);                                                                   \
    }                                                                                                              \
    KERNEL(softmax_gradient_##type, (256), T* gradients, const T* weights, int columns, float scale) {             \
        take_turn();                                                                                               \
        softmax_gradient(gradients, weights, columns, scale);                                                      \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
