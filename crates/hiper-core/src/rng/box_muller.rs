//! Box–Muller in single precision, with the roundings of torch's vectorised kernel.
//!
//! torch evaluates logarithm, sine and cosine by Cephes' single-precision polynomials (S. L. Moshier, `logf.c`, `sinf.c`) in
//! fused multiply-adds. The same sums in the same order give the same bits, on every machine and without its `libm`.

/// Turns sixteen uniforms of [0, 1) into sixteen normals in place: the first eight make the radii, the last eight the angles;
/// cosines go to the first half, sines to the second.
pub(super) fn box_muller(block: &mut [f32; 16]) {
    let (first, last) = block.split_at_mut(8);
    for (a, b) in first.iter_mut().zip(last) {
        let radius = (-2.0 * ln(1.0 - *a)).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * *b);
        (*a, *b) = (radius * cos, radius * sin);
    }
}

/// The natural logarithm of a normal positive number.
fn ln(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        0.333_333_3,
    ];
    /// ln 2 in two parts, the first exact in few bits.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // x = mantissa · 2^exponent with the mantissa in [√½, √2).
    let mut exponent = ((x.to_bits() >> 23) as i32 - 126) as f32;
    let mantissa = f32::from_bits((x.to_bits() & 0x807f_ffff) | 0.5f32.to_bits());
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let square = x * x;
    let sum = COEFFICIENTS[1..].iter().fold(COEFFICIENTS[0], |sum, &c| sum.mul_add(x, c)) * x;
    let sum = square.mul_add(-0.5, sum.mul_add(square, exponent * LN_2[1]));
    exponent.mul_add(LN_2[0], x + sum)
}

/// Sine and cosine of an angle from 0 to some thousands.
fn sin_cos(angle: f32) -> (f32, f32) {
    /// π/4 in three parts, the first two exact in few bits.
    const MINUS_PI_4: [f32; 3] = [-0.785_156_25, -2.418_756_5e-4, -3.774_895e-8];
    const FOUR_OVER_PI: f32 = 1.273_239_5;
    let octant = ((angle * FOUR_OVER_PI) as i32 + 1) & !1;
    let x = MINUS_PI_4.iter().fold(angle, |x, &part| (octant as f32).mul_add(part, x));
    let square = x * x;
    let cos = 2.443_315_7e-5f32.mul_add(square, -1.388_731_6e-3).mul_add(square, 4.166_664_6e-2);
    let cos = (cos * square).mul_add(square, -0.5 * square) + 1.0;
    let sin = (-1.951_529_6e-4f32).mul_add(square, 8.332_161e-3).mul_add(square, -1.666_665_5e-1);
    let sin = (sin * square).mul_add(x, x);
    match octant & 7 {
        0 => (sin, cos),
        2 => (cos, -sin),
        4 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cephes states a peak relative error of 1e-7 and absolute errors of 1e-7 for sine and cosine.
    const TOLERANCE: f64 = 1.5e-7;

    #[test]
    fn the_polynomials_are_the_functions() {
        for i in 1..=100_000u32 {
            let x = i as f32 / 100_000.0;
            let want = f64::from(x).ln();
            assert!((f64::from(ln(x)) - want).abs() <= TOLERANCE * want.abs().max(1.0), "ln {x}");
            let angle = x * std::f32::consts::TAU;
            let (sin, cos) = sin_cos(angle);
            let (want_sin, want_cos) = f64::from(angle).sin_cos();
            assert!((f64::from(sin) - want_sin).abs() < TOLERANCE, "sin {angle}");
            assert!((f64::from(cos) - want_cos).abs() < TOLERANCE, "cos {angle}");
        }
    }

    #[test]
    fn the_ends_of_the_range_are_finite() {
        let mut block = [0.0; 16];
        block[1] = 1.0 - f32::EPSILON / 2.0;
        block[9] = 1.0 - f32::EPSILON / 2.0;
        box_muller(&mut block);
        assert!(block.iter().all(|v| v.is_finite()), "{block:?}");
    }
}
