// The loss of a prediction, and its gradient.
//
// mse_loss_{f32,f16,bf16}   losses = mean((target − prediction)²); d_prediction = scale · 2 / count · (prediction − target)
//
// Shapes  prediction, d_prediction [B, pixels, channels]; target [B, channels, pixels] f32; losses [B] f32, each of its own count =
//         pixels · channels numbers. scale keeps gradients in f16's range; whoever uses them divides by it.
// Types   f32 within; d_prediction is rounded once. A loss is a sum in a fixed order.
// Launch  grid: B; 1024 threads; 128 bytes of shared memory.
// Needs   compute capability 8.0. At most 25 registers.
// Time    4 × 64 × 64: 130 KB through one multiprocessor: about 4 µs. Predicted, not yet measured.
#include "device.cuh"

template <typename T>
DEVICE void mse_loss(float* losses, T* d_prediction, const T* prediction, const float* target, int pixels, int channels,
                     float scale) {
    int count = pixels * channels;
    int64_t first = static_cast<int64_t>(blockIdx.x) * count;
    d_prediction += first, prediction += first, target += first;
    float share = 1.0f / static_cast<float>(count), steepness = 2.0f * scale * share, sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float difference = to_f32(prediction[i]) - target[i % channels * pixels + i / channels];
        d_prediction[i] = from_f32<T>(steepness * difference);
        sum = fmaf(difference, difference, sum);
    }
    sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) losses[blockIdx.x] = sum * share;
}

#define OF_TYPE(T, type)                                                                                              \
    KERNEL(mse_loss_##type, (1024), float* losses, T* d_prediction, const T* prediction, const float* target,         \
           int pixels, int channels, float scale) {                                                                   \
        take_turn();                                                                                                  \
        mse_loss(losses, d_prediction, prediction, target, pixels, channels, scale);                                  \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
