// Random draws of a personalisation step, and what is mixed of them.
//
// draw_f32       standard normal numbers, then a timestep, for each subject: torch's, as its CPU generator draws them
// add_noise_f32  x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε
// velocity_f32   v = √ᾱ_t ε − √(1 − ᾱ_t) x₀, the target of a network that predicts velocity
//
// Shapes  latents, noise, noisy_latents, target [subjects, count], count ≥ 16; timesteps [subjects] f32, whole numbers from 0 and
//         below num_train_timesteps < 2^28; alphas_cumprod [num_train_timesteps] f32; generators [subjects, 625] u32: the 624
//         words of mt19937, and how many of them are used; after the draws elsewhere. They live in device memory, so that a captured
//         graph goes on drawing. A subject gets the same numbers alone and in a batch.
// Types   f32; bit for bit the numbers of hiper-core's TorchGenerator: a seed means the same on a card and on a CPU.
// Launch  draw: grid: subjects; 1024 threads, 4992 bytes of shared memory. add_noise, velocity: grid: (count / 256 rounded up,
//         subjects); 256 threads.
// Needs   compute capability 8.0. At most 23 registers.
// Source  mt19937 (Matsumoto & Nishimura 1998); torch 2.15's randn (cpu/DistributionTemplates.h), with Cephes' polynomials, and
//         randint, as in hiper-core's rng.rs and rng/box_muller.rs; DDPM (Ho et al., arXiv 2006.11239) equation 4.
// Time    One subject at 512², 16384 numbers: draw runs on one multiprocessor, 27 times three barriers for the words, 650 clocks
//         each, and 8 pairs a thread: about 12 µs; the others about 2 µs, bound by their launch.
#include "device.cuh"

constexpr int WORDS = 624, MIDDLE = 397, STRIDE = WORDS - MIDDLE;

// mt19937, by all threads of a block: at least STRIDE.
struct Generator {
    // In shared memory: the words in use, and room for those after them.
    uint32_t *words, *next_words;
    int used;

    DEVICE_MEMBER void load(const uint32_t* state) {
        words = reinterpret_cast<uint32_t*>(shared_memory());
        next_words = words + WORDS;
        for (int i = threadIdx.x; i < WORDS; i += blockDim.x) words[i] = state[i];
        used = min(static_cast<int>(state[WORDS]), WORDS);
        __syncthreads();
    }

    DEVICE_MEMBER void store(uint32_t* state) const {
        for (int i = threadIdx.x; i < WORDS; i += blockDim.x) state[i] = words[i];
        if (threadIdx.x == 0) state[WORDS] = static_cast<uint32_t>(used);
    }

    // f(i, bits) for each of the next n draws, by any thread.
    template <typename F> DEVICE_MEMBER void draw(int n, F f) {
        for (int done = 0; done < n;) {
            if (used == WORDS) refill();
            int count = min(n - done, WORDS - used);
            for (int i = threadIdx.x; i < count; i += blockDim.x) f(done + i, tempered(words[used + i]));
            used += count, done += count;
        }
    }

    // A new word needs old ones, and the new one STRIDE before it: STRIDE of them can be made at once.
    DEVICE_MEMBER void refill() {
        for (int first = 0; first < WORDS; first += STRIDE) {
            int i = first + threadIdx.x;
            if (threadIdx.x < STRIDE && i < WORDS) {
                uint32_t after = i + 1 < WORDS ? words[i + 1] : next_words[0];
                uint32_t middle = i < STRIDE ? words[i + MIDDLE] : next_words[i - STRIDE];
                uint32_t y = (words[i] & 0x80000000u) | (after & 0x7fffffffu);
                next_words[i] = middle ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0u);
            }
            __syncthreads();
        }
        uint32_t* old = words;
        words = next_words, next_words = old, used = 0;
    }

    static DEVICE_MEMBER uint32_t tempered(uint32_t y) {
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }
};

// Of a normal positive number. No product here or below meets an addition that a compiler could fuse it with: bits are the same
// with and without.
DEVICE float natural_logarithm(float x) {
    uint32_t bits = __float_as_uint(x);
    float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 126);
    float mantissa = __uint_as_float((bits & 0x807fffffu) | 0x3f000000u);
    float r = mantissa - 1.0f;
    if (mantissa < 0.70710678118654752440f) exponent -= 1.0f, r += mantissa;
    constexpr float COEFFICIENTS[9] = {7.0376836e-2f,  -1.151461e-1f, 1.16769984e-1f, -1.2420141e-1f, 1.4249323e-1f,
                                       -1.6668058e-1f, 2.0000714e-1f, -2.4999994e-1f, 0.3333333f};
    float sum = COEFFICIENTS[0], square = r * r;
#pragma unroll
    for (int i = 1; i < 9; ++i) sum = fmaf(sum, r, COEFFICIENTS[i]);
    sum *= r;
    sum = fmaf(square, -0.5f, fmaf(sum, square, exponent * -2.1219444e-4f));
    return fmaf(exponent, 0.6933594f, r + sum);
}

// Of an angle from 0 to some thousands.
DEVICE float2 sine_and_cosine(float angle) {
    int octant = (static_cast<int>(angle * 1.2732395f) + 1) & ~1;
    float turned = static_cast<float>(octant);
    float x = fmaf(turned, -3.774895e-8f, fmaf(turned, -2.4187565e-4f, fmaf(turned, -0.78515625f, angle)));
    float square = x * x;
    float cosine = fmaf(fmaf(2.4433157e-5f, square, -1.3887316e-3f), square, 4.1666646e-2f);
    cosine = fmaf(cosine * square, square, -0.5f * square) + 1.0f;
    float sine = fmaf(fmaf(-1.9515296e-4f, square, 8.332161e-3f), square, -1.6666655e-1f);
    sine = fmaf(sine * square, x, x);
    switch (octant & 7) {
        case 0: return {sine, cosine};
        case 2: return {cosine, -sine};
        case 4: return {-sine, -cosine};
        default: return {-cosine, sine};
    }
}

// Pair `i` of a block of sixteen uniform numbers: a radius and an angle become two normal numbers.
DEVICE void box_muller(float* sixteen, int i) {
    float radius = sqrtf(-2.0f * natural_logarithm(1.0f - sixteen[i]));
    float2 direction = sine_and_cosine(6.28318530717958647692f * sixteen[i + 8]);
    sixteen[i] = radius * direction.y;
    sixteen[i + 8] = radius * direction.x;
}

KERNEL(draw_f32, (1024), float* noise, float* timesteps, uint32_t* generators_after, const uint32_t* generators, int count,
       int num_train_timesteps) {
    take_turn();
    int subject = blockIdx.x, whole = count & ~15;
    float* numbers = noise + static_cast<int64_t>(subject) * count;
    int64_t state = static_cast<int64_t>(subject) * (WORDS + 1);
    auto uniform = [](uint32_t bits) { return static_cast<float>(bits & 0xffffffu) * 0x1p-24f; };

    Generator generator;
    generator.load(generators + state);
    generator.draw(count, [&](int i, uint32_t bits) { numbers[i] = uniform(bits); });
    __syncthreads();
    for (int i = threadIdx.x; i < whole / 2; i += blockDim.x) box_muller(numbers + i / 8 * 16, i % 8);
    if (whole < count) {
        // The last sixteen are drawn again, overlapping what is there.
        float* last = numbers + count - 16;
        __syncthreads();
        generator.draw(16, [&](int i, uint32_t bits) { last[i] = uniform(bits); });
        __syncthreads();
        if (threadIdx.x < 8) box_muller(last, threadIdx.x);
    }
    generator.draw(1, [&](int, uint32_t bits) {
        timesteps[subject] = static_cast<float>(bits % static_cast<uint32_t>(num_train_timesteps));
    });
    generator.store(generators_after + state);
}

struct Coefficients { float signal, sigma; };

DEVICE Coefficients coefficients(const float* timesteps, const float* alphas_cumprod, int subject) {
    float alpha = alphas_cumprod[static_cast<int>(timesteps[subject])];
    return {sqrtf(alpha), sqrtf(1.0f - alpha)};
}

KERNEL(add_noise_f32, (256), float* noisy_latents, const float* latents, const float* noise, const float* timesteps,
       const float* alphas_cumprod, int count) {
    take_turn();
    int subject = blockIdx.y, place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    int64_t i = static_cast<int64_t>(subject) * count + place;
    Coefficients at = coefficients(timesteps, alphas_cumprod, subject);
    noisy_latents[i] = at.signal * latents[i] + at.sigma * noise[i];
}

KERNEL(velocity_f32, (256), float* target, const float* latents, const float* noise, const float* timesteps,
       const float* alphas_cumprod, int count) {
    take_turn();
    int subject = blockIdx.y, place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    int64_t i = static_cast<int64_t>(subject) * count + place;
    Coefficients at = coefficients(timesteps, alphas_cumprod, subject);
    target[i] = at.signal * noise[i] - at.sigma * latents[i];
}
