// Softmax of rows, in place: for attention whose heads are too wide for attention.cu (the VAE's only head is 512 wide),
// between two products of cublasLt.
//
// softmax_{f32,f16,bf16}
//
// Shapes  scores [rows, columns], each row contiguous: softmax(scale · scores) takes its place.
// Types   exponentials and sums f32.
// Launch  grid: rows; 256 threads, 128 bytes of shared memory.
// Needs   compute capability 8.0. 20 registers.
// Source  the definition, with the maximum subtracted.
// Time    the VAE at 512², 4096 × 4096 f16: the first pass reads 34 MB, the other two find a row (8 KB) in the first-level
//         cache, 34 MB are written: 67 MB at 3 TB/s: 22 µs.
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

template <typename T> DEVICE void softmax(T* scores, int columns, float scale) {
    float* scratch = reinterpret_cast<float*>(shared_memory());
    scores += static_cast<int64_t>(blockIdx.x) * columns;
    float maximum = -CUDART_INF_F, sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) maximum = fmaxf(maximum, scale * to_f32(scores[i]));
    maximum = block_max(maximum, scratch);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += __expf(scale * to_f32(scores[i]) - maximum);
    sum = block_sum(sum, scratch);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        scores[i] = from_f32<T>(__expf(scale * to_f32(scores[i]) - maximum) / sum);
    }
}

#define OF_TYPE(T, type) \
    KERNEL(softmax_##type, (256), T* scores, int columns, float scale) { softmax(scores, columns, scale); }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
