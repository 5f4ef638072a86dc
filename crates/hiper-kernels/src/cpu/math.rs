//! Functions written without branches, so that loops over them vectorise; with fused multiply–adds, which every
//! processor since 2013 has (on older ones they are calls, and slow).

use pulp::Simd;

/// Adding and subtracting 1.5·2²³ rounds to an integer; the low bits of the sum hold that integer.
const ROUND: f32 = 12_582_912.0;

/// The natural logarithm of 2 in two parts, the first so short that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Minimax polynomial of (eʳ − 1 − r) / r² on [−ln2/2, ln2/2] (Cephes, expf), the coefficients in pairs from the highest: three
/// short sums (Estrin's scheme) wait less for one another than a long one.
const EXP: [[f32; 2]; 3] =
    [[1.987_569_1e-4, 1.398_199_9e-3], [8.333_452e-3, 4.166_579_6e-2], [1.666_666_5e-1, 0.5]];

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

/// `eˣ` for x ≤ 0, as of a score less the largest one, of `N` vectors: in fewer operations, and side by side, since one's
/// operations wait for one another. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_of_negative<S: Simd, const N: usize>(simd: S, x: [S::f32s; N]) -> [S::f32s; N] {
    let [low, round] = [-87.3, ROUND].map(|c| simd.splat_f32s(c));
    let mut x = x;
    for x in &mut x {
        // Not `max`, which would lose a NaN.
        *x = simd.select_f32s(simd.less_than_f32s(*x, low), low, *x);
    }
    let mut shifted = x;
    for shifted in &mut shifted {
        *shifted = simd.mul_add_f32s(*shifted, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    }
    let mut r = x;
    for part in [LN2_HIGH, LN2_LOW] {
        for (r, shifted) in r.iter_mut().zip(&shifted) {
            *r = simd.mul_add_f32s(simd.sub_f32s(*shifted, round), simd.splat_f32s(-part), *r);
        }
    }
    let mut p = r;
    for p in &mut p {
        let (r, square) = (*p, simd.mul_f32s(*p, *p));
        let [a, b, c] =
            EXP.map(|[high, low]| simd.mul_add_f32s(simd.splat_f32s(high), r, simd.splat_f32s(low)));
        let sum = simd.mul_add_f32s(simd.mul_add_f32s(a, square, b), square, c);
        *p = simd.add_f32s(simd.mul_add_f32s(sum, square, r), simd.splat_f32s(1.0));
    }
    for (p, shifted) in p.iter_mut().zip(&shifted) {
        // The low bits of `shifted` hold n, and those of ROUND above them are shifted out.
        let n = simd.add_u32s(simd.transmute_u32s_f32s(*shifted), simd.splat_u32s(127));
        let scale = simd.wrapping_dyn_shl_u32s(n, simd.splat_u32s(23));
        *p = simd.mul_f32s(*p, simd.transmute_f32s_u32s(scale));
    }
    p
}

/// `eˣ = mantissa · 2ⁿ`, and `n + ROUND`.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let square = r * r;
    let [a, b, c] = EXP.map(|[high, low]| r.mul_add(high, low));
    let sum = a.mul_add(square, b).mul_add(square, c);
    (sum.mul_add(square, r) + 1.0, shifted)
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

    /// [`exp_of_negative`] of one number, by the widest vectors that this processor has.
    fn of_negative(x: f32) -> f32 {
        struct One(f32);
        impl pulp::WithSimd for One {
            type Output = f32;
            fn with_simd<S: Simd>(self, simd: S) -> f32 {
                let [y] = exp_of_negative(simd, [simd.splat_f32s(self.0)]);
                simd.reduce_max_f32s(y)
            }
        }
        pulp::Arch::new().dispatch(One(x))
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f32::EPSILON as f64, "{worst}");
        for i in -87_000..=0 {
            let x = i as f32 * 1e-3;
            let error = (f64::from(of_negative(x)) / f64::from(x).exp() - 1.0).abs();
            assert!(error < 2.0 * f32::EPSILON as f64, "e^{x}: {error}");
        }
        assert!(of_negative(f32::NAN).is_nan() && of_negative(f32::NEG_INFINITY) < 1.3e-38);
        assert_eq!(of_negative(0.0), 1.0);
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
