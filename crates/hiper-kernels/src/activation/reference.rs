//! The definitions in `f64`.

use super::Activation;

pub(super) fn activation(x: &[f64], kind: Activation) -> Vec<f64> {
    x.iter()
        .map(|&x| match kind {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
            Activation::Gelu => x * normal_cdf(x),
        })
        .collect()
}

/// Φ(x) = ½ + φ(x) (x + x³/3 + x⁵/15 + …), which converges for every x (Abramowitz & Stegun 26.2.11).
pub(crate) fn normal_cdf(x: f64) -> f64 {
    let (mut term, mut sum, mut k) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() && term != 0.0 {
        k += 2.0;
        term *= x * x / k;
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
}
