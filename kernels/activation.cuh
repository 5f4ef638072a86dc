// Activations and their derivatives, in f32.
#pragma once

#include "device.cuh"

DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

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

// Φ(x), the standard normal distribution function.
DEVICE float normal_cdf(float x) { return fmaf(0.5f, erff(x * 0.70710678f), 0.5f); }

// x Φ(x), not the approximation by tanh; and its derivative Φ(x) + x φ(x).
DEVICE float gelu(float x) { return x * normal_cdf(x); }
DEVICE float gelu_derivative(float x) { return fmaf(x * 0.39894228f, __expf(-0.5f * x * x), normal_cdf(x)); }
