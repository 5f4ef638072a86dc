//! The transforms of F(2×2, 3×3) and F(4×4, 3×3), the latter for the points 0, ±1, ±2 and ∞ (Lavin & Gray, arXiv 1509.09308).

use pulp::Simd;

/// The one-dimensional transforms of `F(M, 3)`, which has `P = M + 2` points.
pub(super) trait Transforms<const M: usize, const P: usize>: Sync {
    /// `Bᵀ d`.
    type Input: Step<P, P>;
    /// `G g`.
    type Weight: Step<3, P>;
    /// `Aᵀ m`.
    type Output: Step<P, M>;
}

/// A one-dimensional transform. (A type, not a closure: closures are not compiled for the instruction set of the function that
/// they are given to.)
pub(super) trait Step<const FROM: usize, const TO: usize> {
    fn apply<S: Simd>(simd: S, x: [S::f32s; FROM]) -> [S::f32s; TO];
}

/// F(2×2, 3×3).
pub(super) struct F2;
pub(super) struct F2Input;
pub(super) struct F2Weight;
pub(super) struct F2Output;

impl Transforms<2, 4> for F2 {
    type Input = F2Input;
    type Weight = F2Weight;
    type Output = F2Output;
}

impl Step<4, 4> for F2Input {
    #[inline(always)]
    fn apply<S: Simd>(s: S, d: [S::f32s; 4]) -> [S::f32s; 4] {
        [s.sub_f32s(d[0], d[2]), s.add_f32s(d[1], d[2]), s.sub_f32s(d[2], d[1]), s.sub_f32s(d[1], d[3])]
    }
}

impl Step<3, 4> for F2Weight {
    #[inline(always)]
    fn apply<S: Simd>(s: S, g: [S::f32s; 3]) -> [S::f32s; 4] {
        let half = s.splat_f32s(0.5);
        let (even, odd) = (s.mul_f32s(half, s.add_f32s(g[0], g[2])), s.mul_f32s(half, g[1]));
        [g[0], s.add_f32s(even, odd), s.sub_f32s(even, odd), g[2]]
    }
}

impl Step<4, 2> for F2Output {
    #[inline(always)]
    fn apply<S: Simd>(s: S, m: [S::f32s; 4]) -> [S::f32s; 2] {
        let (sum, difference) = (s.add_f32s(m[1], m[2]), s.sub_f32s(m[1], m[2]));
        [s.add_f32s(m[0], sum), s.sub_f32s(difference, m[3])]
    }
}

/// F(4×4, 3×3).
pub(super) struct F4;
pub(super) struct F4Input;
pub(super) struct F4Weight;
pub(super) struct F4Output;

impl Transforms<4, 6> for F4 {
    type Input = F4Input;
    type Weight = F4Weight;
    type Output = F4Output;
}

impl Step<6, 6> for F4Input {
    #[inline(always)]
    fn apply<S: Simd>(s: S, d: [S::f32s; 6]) -> [S::f32s; 6] {
        let [two, four, five] = [s.splat_f32s(2.0), s.splat_f32s(4.0), s.splat_f32s(-5.0)];
        let minus_four = s.splat_f32s(-4.0);
        let a = s.mul_add_f32s(minus_four, d[2], d[4]);
        let b = s.mul_add_f32s(minus_four, d[1], d[3]);
        let e = s.sub_f32s(d[4], d[2]);
        let f = s.mul_f32s(two, s.sub_f32s(d[3], d[1]));
        [
            s.mul_add_f32s(four, d[0], s.mul_add_f32s(five, d[2], d[4])),
            s.add_f32s(a, b),
            s.sub_f32s(a, b),
            s.add_f32s(e, f),
            s.sub_f32s(e, f),
            s.mul_add_f32s(four, d[1], s.mul_add_f32s(five, d[3], d[5])),
        ]
    }
}

impl Step<3, 6> for F4Weight {
    #[inline(always)]
    fn apply<S: Simd>(s: S, g: [S::f32s; 3]) -> [S::f32s; 6] {
        let sixth = s.splat_f32s(1.0 / 6.0);
        let minus_sixth = s.splat_f32s(-1.0 / 6.0);
        let even = s.mul_f32s(minus_sixth, s.add_f32s(g[0], g[2]));
        let odd = s.mul_f32s(minus_sixth, g[1]);
        let wide = s.mul_add_f32s(s.splat_f32s(1.0 / 24.0), g[0], s.mul_f32s(sixth, g[2]));
        let tilt = s.mul_f32s(s.splat_f32s(1.0 / 12.0), g[1]);
        [
            s.mul_f32s(s.splat_f32s(0.25), g[0]),
            s.add_f32s(even, odd),
            s.sub_f32s(even, odd),
            s.add_f32s(wide, tilt),
            s.sub_f32s(wide, tilt),
            g[2],
        ]
    }
}

impl Step<6, 4> for F4Output {
    #[inline(always)]
    fn apply<S: Simd>(s: S, m: [S::f32s; 6]) -> [S::f32s; 4] {
        let [two, four, eight] = [s.splat_f32s(2.0), s.splat_f32s(4.0), s.splat_f32s(8.0)];
        let (a, b) = (s.add_f32s(m[1], m[2]), s.sub_f32s(m[1], m[2]));
        let (e, f) = (s.add_f32s(m[3], m[4]), s.sub_f32s(m[3], m[4]));
        [
            s.add_f32s(m[0], s.add_f32s(a, e)),
            s.mul_add_f32s(two, f, b),
            s.mul_add_f32s(four, e, a),
            s.add_f32s(m[5], s.mul_add_f32s(eight, f, b)),
        ]
    }
}

/// Applies a one-dimensional transform to all rows, then to all columns that leaves.
#[inline(always)]
pub(super) fn both_ways<T: Step<FROM, TO>, S: Simd, const FROM: usize, const TO: usize>(
    simd: S,
    d: [[S::f32s; FROM]; FROM],
) -> [[S::f32s; TO]; TO] {
    let zero = simd.splat_f32s(0.0);
    let mut rows = [[zero; TO]; FROM];
    for (row, d) in rows.iter_mut().zip(d) {
        *row = T::apply(simd, d);
    }
    let mut both = [[zero; TO]; TO];
    for c in 0..TO {
        let mut column = [zero; FROM];
        for (value, row) in column.iter_mut().zip(&rows) {
            *value = row[c];
        }
        for (row, value) in both.iter_mut().zip(T::apply(simd, column)) {
            row[c] = value;
        }
    }
    both
}
