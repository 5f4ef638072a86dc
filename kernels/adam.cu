// Adam for the tails of several subjects.
//
// adam_{f32,f16,bf16}   by the gradient's type
//
// Shapes  parameters, first_moment, second_moment, gradient [subjects, count]; losses [subjects] f32; counts [subjects, 2] f32: steps
//         taken, and 1 once the subject has stopped; and the same after the step, elsewhere. gradient is scale times that of the
//         loss. A subject stops, for good, before the first step whose loss, gradient or moved parameter is not finite. counts
//         lives in device memory, so that a captured graph goes on counting.
// Types   gradient f16, bf16 or f32, all else f32; constants f64 as torch has them.
// Launch  grid: subjects; 1024 threads: one block sees a whole tail, so that all of it moves or none. 16 bytes of
//         shared memory; at most 32 registers.
// Needs   compute capability 8.0.
// Source  Adam (Kingma & Ba, arXiv 1412.6980) in torch.optim.Adam's order of operations, as in hiper-core's adam.rs.
// Time    5 tokens of 768: 3840 numbers, 7 arrays, 108 KB through one multiprocessor: about 3 µs, launch included.
#include "device.cuh"

// What a step makes of one parameter.
struct Moved { float parameter, m, v; };

// Where the state is read, or left.
template <typename F> struct State { F *parameters, *first_moment, *second_moment, *counts; };

template <typename T>
DEVICE void adam(State<float> to, State<const float> from, const T* gradient, const float* losses, int count,
                 double learning_rate, double beta1, double beta2, double eps, float scale) {
    int subject = blockIdx.x;
    int64_t first = static_cast<int64_t>(subject) * count;
    auto of_subject = [=](auto& state) {
        state.parameters += first, state.first_moment += first, state.second_moment += first, state.counts += 2 * subject;
    };
    of_subject(to), of_subject(from), gradient += first;

    // The powers in f64, once, each by another warp.
    float* corrections = reinterpret_cast<float*>(shared_memory());
    float steps = from.counts[0] + 1.0f;
    if (threadIdx.x == 0) {
        corrections[0] = static_cast<float>(learning_rate / (1.0 - pow(beta1, static_cast<double>(steps))));
    } else if (threadIdx.x == 32) {
        corrections[1] = static_cast<float>(sqrt(1.0 - pow(beta2, static_cast<double>(steps))));
    }
    int stopped = from.counts[1] != 0.0f || !isfinite(losses[subject]);
    __syncthreads();
    float step_size = corrections[0], correction2 = corrections[1];
    float rest1 = static_cast<float>(1.0 - beta1), kept2 = static_cast<float>(beta2);
    float rest2 = static_cast<float>(1.0 - beta2), unscale = 1.0f / scale, added = static_cast<float>(eps);
    auto state = [&](int i) { return Moved{from.parameters[i], from.first_moment[i], from.second_moment[i]}; };
    auto moved = [&](int i) {
        Moved now = state(i);
        float g = to_f32(gradient[i]) * unscale;
        float m = fmaf(g - now.m, rest1, now.m);
        float v = fmaf(rest2 * g, g, now.v * kept2);
        return Moved{now.parameter - step_size * m / (sqrtf(v) / correction2 + added), m, v};
    };
    for (int i = threadIdx.x; i < count; i += blockDim.x) stopped |= !isfinite(moved(i).parameter);
    stopped = __syncthreads_or(stopped);
    if (threadIdx.x == 0) {
        to.counts[0] = stopped ? from.counts[0] : steps;
        to.counts[1] = stopped ? 1.0f : 0.0f;
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        Moved now = stopped ? state(i) : moved(i);
        to.parameters[i] = now.parameter, to.first_moment[i] = now.m, to.second_moment[i] = now.v;
    }
}

#define OF_TYPE(T, type)                                                                                              \
    KERNEL(adam_##type, (1024), float* parameters_after, float* first_moment_after, float* second_moment_after,       \
           float* counts_after, const float* parameters, const float* first_moment, const float* second_moment,       \
           const float* counts, const T* gradient, const float* losses, int count, double learning_rate,              \
           double beta1, double beta2, double eps, float scale) {                                                     \
        take_turn();                                                                                                  \
        State<float> to{parameters_after, first_moment_after, second_moment_after, counts_after};                     \
        State<const float> from{parameters, first_moment, second_moment, counts};                                     \
        adam(to, from, gradient, losses, count, learning_rate, beta1, beta2, eps, scale);                             \
    }
OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)
