//! One pass over memory each way.

use super::Activation;
use crate::cpu::fill::fill;
use crate::cpu::math::{erf, exp, sigmoid};
use crate::cpu::simd::vectorise;
use crate::cpu::stretch;

const QUICK: f32 = 1.702;

pub(super) fn forward(activation: Activation, x: &[f32]) -> Vec<f32> {
    fill([1, x.len()], stretch(1), |_, first, y| {
        y.copy_from_slice(&x[first..][..y.len()]);
        activation.apply_in_place(y);
    })
}

pub(super) fn input_gradient(activation: Activation, x: &[f32], grad_output: &[f32]) -> Vec<f32> {
    fill([1, x.len()], stretch(1), |_, first, dx| {
        dx.copy_from_slice(&grad_output[first..][..dx.len()]);
        activation.multiply_by_derivative(dx, &x[first..]);
    })
}

/// `Φ(x)`, the standard normal distribution function.
#[inline(always)]
pub(crate) fn normal_cdf(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2)
}

/// `d/dx (x Φ(x)) = Φ(x) + x φ(x)`.
#[inline(always)]
pub(crate) fn gelu_derivative(x: f32) -> f32 {
    const INV_SQRT_TAU: f32 = 0.398_942_3;
    normal_cdf(x) + x * INV_SQRT_TAU * exp(-0.5 * x * x)
}

/// `d/dx (x σ(kx)) = σ(kx) (1 + kx (1 − σ(kx)))`.
#[inline(always)]
fn swish_derivative(x: f32, k: f32) -> f32 {
    let s = sigmoid(k * x);
    s * (1.0 + k * x * (1.0 - s))
}

impl Activation {
    /// `x ← act(x)` on the calling thread.
    pub(crate) fn apply_in_place(self, x: &mut [f32]) {
        vectorise(
            #[inline(always)]
            || match self {
                Activation::Silu => x.iter_mut().for_each(|x| *x *= sigmoid(*x)),
                Activation::QuickGelu => x.iter_mut().for_each(|x| *x *= sigmoid(QUICK * *x)),
                Activation::Gelu => x.iter_mut().for_each(|x| *x *= normal_cdf(*x)),
            },
        );
    }

    /// `g ← g · act'(x)` on the calling thread.
    pub(crate) fn multiply_by_derivative(self, g: &mut [f32], x: &[f32]) {
        vectorise(
            #[inline(always)]
            || match self {
                Activation::Silu => g.iter_mut().zip(x).for_each(|(g, &x)| *g *= swish_derivative(x, 1.0)),
                Activation::QuickGelu => {
                    g.iter_mut().zip(x).for_each(|(g, &x)| *g *= swish_derivative(x, QUICK))
                }
                Activation::Gelu => g.iter_mut().zip(x).for_each(|(g, &x)| *g *= gelu_derivative(x)),
            },
        );
    }
}
