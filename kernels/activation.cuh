// Activations and their derivatives, in f32.
#pragma once

#include "device.cuh"

constexpr float LOG2_E = 1.44269504f;

DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-LOG2_E * x)); }

// x σ(kx), and its derivative σ(kx) (1 + kx (1 − σ(kx))).
DEVICE float swish(float x, float k) { return x * sigmoid(k * x); }
DEVICE float swish_derivative(float x, float k) {
    float s = sigmoid(k * x);
    return s * fmaf(k * x, 1.0f - s, 1.0f);
}

DEVICE float silu(float x) { return swish(x, 1.0f); }
DEVICE float silu_derivative(float x) { return swish_derivative(x, 1.0f); }

// OpenAI CLIP's approximation of GELU.
DEVICE float quick_gelu(float x) { return swish(x, 1.702f); }
DEVICE float quick_gelu_derivative(float x) { return swish_derivative(x, 1.702f); }

// exp(−x²/2), and by it Φ(x), the standard normal distribution function: the tail beyond |x| is exp(−x²/2) times a polynomial in
// 1 / (1 + p |x|), the form of Abramowitz and Stegun's 7.1.26, with coefficients that were fitted for the least relative error up to
// |x| = 6.5. So small values are as exact as large ones, which 1 + erff(x) loses to cancellation, and take fewer instructions.
struct Normal { float exponential, cdf; };
DEVICE Normal normal(float x) {
    constexpr float P = 0.345f;
    constexpr float C[7] = {0.0473024547f, -0.202822536f, 0.253913343f, -0.0242396407f, 0.155915201f, 0.131899014f, 0.138032243f};
    float exponential = exp2_approx(-0.5f * LOG2_E * x * x), t = reciprocal_approx(fmaf(P, fabsf(x), 1.0f)), sum = C[0];
#pragma unroll
    for (int i = 1; i < 7; ++i) sum = fmaf(sum, t, C[i]);
    float tail = sum * t * exponential;
    return {exponential, x < 0.0f ? tail : 1.0f - tail};
}

// x Φ(x), not the approximation by tanh; and its derivative Φ(x) + x φ(x).
DEVICE float gelu(float x) { return x * normal(x).cdf; }
DEVICE float gelu_derivative(float x) {
    Normal at = normal(x);
    return fmaf(x * 0.39894228f, at.exponential, at.cdf);
}
