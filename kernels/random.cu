// Random draws of a personalisation step, the noisy latents, and the loss.
//
// normal_{f32,f16,bf16}         standard normal numbers
// draw_timesteps                a uniform timestep for each subject; ends the step's draws
// add_noise_{f32,f16,bf16}      x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε
// velocity_f32                  v = √ᾱ_t ε − √(1 − ᾱ_t) x₀, the target of a network that predicts velocity
// squared_error_{f32,f16,bf16}  the mean of (prediction − target)², and its gradient
//
// Shapes  numbers, latents, noise, noisy_latents, target, prediction, gradient [subjects, count]; timesteps [subjects] f32,
//         whole numbers from 0; alphas_cumprod [num_train_timesteps] f32; seeds u64 and draws u32 [subjects].
//         A draw depends on its subject's seed, the number of draws before, and its place, on nothing else: subjects get the
//         same numbers alone and in a batch. draws lives in device memory, so that a captured graph goes on drawing;
//         draw_timesteps adds 1 to it, after normal has read it.
//         squared_error writes losses[subject · capacity + (draws − 1) mod capacity]: a history of `capacity` steps, to be
//         read now and then. With a capacity of 1, draws may be null. gradient = 2 (prediction − target) · loss_scale / count.
// Types   arithmetic f32, sums of squares f32 (of 16 or so numbers a thread, then pairwise).
// Launch  normal: a thread makes four numbers; grid: (count / 4 / 256 rounded up, subjects); 256 threads.
//         add_noise, velocity: grid: (count / 256 rounded up, subjects); 256 threads.
//         draw_timesteps: grid: subjects; 1 thread. squared_error: grid: subjects; 1024 threads, 128 bytes of shared memory.
// Needs   compute capability 8.0. At most 25 registers.
// Source  Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers, SC 2011); Box & Muller 1958; DDPM (Ho et al.,
//         arXiv 2006.11239) equation 14.
// Time    One subject at 512²: 16384 numbers, 64 to 160 KB a kernel: each about 2 µs, bound by its launch; squared_error
//         reads 98 KB through one multiprocessor: about 3 µs.
#include "device.cuh"

// Ten rounds: 128 random bits for a 128-bit counter and a 64-bit key.
DEVICE uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        constexpr unsigned A = 0xD2511F53u, B = 0xCD9E8D57u;
        counter = {__umulhi(B, counter.z) ^ counter.y ^ key.x, B * counter.z,
                   __umulhi(A, counter.x) ^ counter.w ^ key.y, A * counter.x};
        key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
    }
    return counter;
}

// What a draw is for: the third word of its counter.
constexpr unsigned NORMAL = 0, TIMESTEP = 1;

DEVICE uint4 draw(uint64_t seed, unsigned draws, unsigned purpose, unsigned place) {
    return philox4x32({place, draws, purpose, 0}, {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)});
}

// Two independent normal numbers of two words: a radius from (0, 1], an angle from [0, 2π).
DEVICE float2 box_muller(unsigned radius_bits, unsigned angle_bits) {
    constexpr float UNIT = 1.0f / 4294967296.0f;
    float radius = sqrtf(-2.0f * logf(fmaf(static_cast<float>(radius_bits), UNIT, UNIT)));
    float sine, cosine;
    sincospif(2.0f * UNIT * static_cast<float>(angle_bits), &sine, &cosine);
    return {radius * cosine, radius * sine};
}

template <typename T> DEVICE void normal(T* numbers, const uint64_t* seeds, const uint32_t* draws, int count) {
    int subject = blockIdx.y, place = blockIdx.x * blockDim.x + threadIdx.x;
    uint4 bits = draw(seeds[subject], draws[subject], NORMAL, place);
    float2 first = box_muller(bits.x, bits.y), second = box_muller(bits.z, bits.w);
    float four[4] = {first.x, first.y, second.x, second.y};
    numbers += static_cast<int64_t>(subject) * count;
    for (int i = 0; i < 4; ++i) {
        if (place * 4 + i < count) numbers[place * 4 + i] = from_f32<T>(four[i]);
    }
}

KERNEL(draw_timesteps, (1), float* timesteps, const uint64_t* seeds, uint32_t* draws, int num_train_timesteps) {
    int subject = blockIdx.x;
    uint4 bits = draw(seeds[subject], draws[subject], TIMESTEP, 0);
    timesteps[subject] = static_cast<float>(__umulhi(bits.x, num_train_timesteps));  // even to 1000 / 2^32
    ++draws[subject];
}

struct Coefficients { float signal, sigma; };

DEVICE Coefficients coefficients(const float* timesteps, const float* alphas_cumprod, int subject) {
    float alpha = alphas_cumprod[static_cast<int>(timesteps[subject])];
    return {sqrtf(alpha), sqrtf(1.0f - alpha)};
}

template <typename T>
DEVICE void add_noise(T* noisy_latents, const float* latents, const float* noise, const float* timesteps,
                      const float* alphas_cumprod, int count) {
    int subject = blockIdx.y, place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    int64_t i = static_cast<int64_t>(subject) * count + place;
    Coefficients at = coefficients(timesteps, alphas_cumprod, subject);
    noisy_latents[i] = from_f32<T>(at.signal * latents[i] + at.sigma * noise[i]);
}

KERNEL(velocity_f32, (256), float* target, const float* latents, const float* noise, const float* timesteps,
       const float* alphas_cumprod, int count) {
    int subject = blockIdx.y, place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    int64_t i = static_cast<int64_t>(subject) * count + place;
    Coefficients at = coefficients(timesteps, alphas_cumprod, subject);
    target[i] = at.signal * noise[i] - at.sigma * latents[i];
}

template <typename T>
DEVICE void squared_error(float* losses, T* gradient, const T* prediction, const float* target, const uint32_t* draws,
                          int count, int capacity, float loss_scale) {
    int subject = blockIdx.x;
    int64_t first = static_cast<int64_t>(subject) * count;
    gradient += first, prediction += first, target += first;
    float sum = 0.0f, factor = 2.0f * loss_scale / static_cast<float>(count);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float difference = to_f32(prediction[i]) - target[i];
        sum += difference * difference;
        gradient[i] = from_f32<T>(difference * factor);
    }
    sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) {
        unsigned at = capacity > 1 ? (draws[subject] - 1) % capacity : 0;
        losses[static_cast<int64_t>(subject) * capacity + at] = sum / static_cast<float>(count);
    }
}

#define OF_TYPE(T, type)                                                                                              \
    KERNEL(normal_##type, (256), T* numbers, const uint64_t* seeds, const uint32_t* draws, int count) {               \
        normal(numbers, seeds, draws, count);                                                                         \
    }                                                                                                                 \
    KERNEL(add_noise_##type, (256), T* noisy_latents, const float* latents, const float* noise,                       \
           const float* timesteps, const float* alphas_cumprod, int count) {                                          \
        add_noise(noisy_latents, latents, noise, timesteps, alphas_cumprod, count);                                   \
    }                                                                                                                 \
    KERNEL(squared_error_##type, (1024), float* losses, T* gradient, const T* prediction, const float* target,        \
           const uint32_t* draws, int count, int capacity, float loss_scale) {                                        \
        squared_error(losses, gradient, prediction, target, draws, count, capacity, loss_scale);                      \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
