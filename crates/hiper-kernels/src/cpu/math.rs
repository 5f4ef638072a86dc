//! Scalar functions written without branches, so that loops over them vectorise; with fused multiply–adds, which every
//! processor since 2013 has (on older ones they are calls, and slow).

/// Adding and subtracting 1.5·2²³ rounds to an integer; the low bits of the sum hold that integer.
const ROUND: f32 = 12_582_912.0;

/// `eˣ`, within 2 units in the last place; saturates below −87.3 and above 88.7. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (mantissa, shifted) = exp_parts(x.clamp(-87.3, 88.7));
    // 2ⁿ in two factors: n = 128 has no f32 of its own.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    mantissa * scale(half) * scale(n - half)
}

/// `eˣ` for x ≤ 0, as of a score less the largest one: in fewer operations. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    // Not `max`, which would lose a NaN.
    let clamped = if x < -87.3 { -87.3 } else { x };
    let (mantissa, shifted) = exp_parts(clamped);
    // The low bits of `shifted` hold n, and those of ROUND above them are shifted out.
    let n = shifted.to_bits().wrapping_add(127);
    mantissa * f32::from_bits(n << 23)
}

/// `eˣ = mantissa · 2ⁿ`, and `n + ROUND`.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Minimax polynomial of (eʳ − 1 − r) / r² on [−ln2/2, ln2/2] (Cephes, expf).
    let p =
        polynomial(r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
    ((p * r).mul_add(r, r) + 1.0, shifted)
}

/// `c₀ xⁿ + c₁ xⁿ⁻¹ + … + cₙ`.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for c in &coefficients[1..] {
        sum = sum.mul_add(x, *c);
    }
    sum
}

/// The logistic function `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function, within 5e-7 (rational approximation of Eigen and XLA, exact beyond |x| = 4 in f32).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let p = polynomial(
        x2,
        [
            -2.726_142_3e-10,
            2.770_681_4e-8,
            -2.101_024e-6,
            -5.692_506_4e-5,
            -7.349_906_3e-4,
            -2.954_6e-3,
            -1.609_603_3e-2,
        ],
    );
    let q = polynomial(x2, [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2]);
    (x * p / q).clamp(-1.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f32::EPSILON as f64, "{worst}");
        let negative = (-87_000..=0).map(|i| i as f32 * 1e-3);
        let error = |x: f32| (f64::from(exp_of_negative(x)) / f64::from(x).exp() - 1.0).abs();
        let worst = negative.map(error).fold(0f64, f64::max);
        assert!(worst < 2.0 * f32::EPSILON as f64, "{worst}");
        assert!(exp_of_negative(f32::NAN).is_nan() && exp_of_negative(f32::NEG_INFINITY) < 1.3e-38);
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e9) < 1.3e-38 && exp(1e9) > 1e38);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn erf_matches_known_values() {
        // Abramowitz & Stegun, table 7.1.
        for (x, y) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916),
            (0.5, 0.520_499_878),
            (1.0, 0.842_700_793),
            (2.0, 0.995_322_265),
        ] {
            assert!((erf(x) - y as f32).abs() < 5e-7, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert!((erf(9.0) - 1.0).abs() < 5e-7);
    }
}
