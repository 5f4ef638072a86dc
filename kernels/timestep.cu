// The sinusoidal embedding of timesteps.
//
// timestep_embedding_f32
//
// Shapes  embedding [B, channels], timesteps [B] f32. With half = channels / 2 and f_i = 10000^(−i / (half − freq_shift)):
//         embedding = [sin(t f), cos(t f)], halves exchanged if flip_sin_to_cos ≠ 0; an odd channel more is 0.
// Types   frequencies and phases are rounded to f32, as diffusers has them; exponentials, sines and cosines are computed in
//         f64, so that phases up to 1000 keep their digits.
// Launch  grid: (channels / 256 rounded up, B); 256 threads.
// Needs   compute capability 8.0. 28 registers, and 40 bytes of stack for f64 sines.
// Source  diffusers' get_timestep_embedding (embeddings.py) with downscale_freq_shift = freq_shift, scale 1, max_period 10000.
// Time    320 channels: 2 µs, bound by its launch.
#include "device.cuh"

KERNEL(timestep_embedding_f32, (256), float* embedding, const float* timesteps, int channels, int flip_sin_to_cos,
       float freq_shift) {
    take_turn();
    int channel = blockIdx.x * blockDim.x + threadIdx.x, half = channels / 2;
    if (channel >= channels) return;
    float value = 0.0f;
    if (channel < 2 * half) {
        int i = channel % half;
        float exponent = -9.210340371976184f * static_cast<float>(i) / (static_cast<float>(half) - freq_shift);
        double phase = timesteps[blockIdx.y] * static_cast<float>(exp(static_cast<double>(exponent)));
        bool cosine = (channel >= half) != (flip_sin_to_cos != 0);
        value = static_cast<float>(cosine ? cos(phase) : sin(phase));
    }
    embedding[static_cast<int64_t>(blockIdx.y) * channels + channel] = value;
}
