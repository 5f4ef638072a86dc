//! Runtime dispatch: loops compiled once for each instruction set, chosen when the program runs.

use pulp::{Simd, WithSimd};

/// Runs `f` compiled for the widest instruction set that this processor has (AVX-512, AVX2 + FMA, NEON,
/// or the target's baseline). Loops inside `f` vectorise accordingly.
#[inline(always)]
pub(crate) fn vectorise<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// A loop over rows of 32 values, `N` vectors of a row at a time: as many as there are, or as many as registers are enough for.
pub(crate) trait RowsOf32 {
    fn run<S: Simd, const N: usize>(self, simd: S);
}

/// Runs a loop as [`vectorise`] does.
pub(crate) fn run_rows(rows: impl RowsOf32) {
    struct Rows<R>(R);

    impl<R: RowsOf32> WithSimd for Rows<R> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            match S::F32_LANES {
                16 => self.0.run::<S, 2>(simd),
                _ => self.0.run::<S, 4>(simd),
            }
        }
    }

    pulp::Arch::new().dispatch(Rows(rows));
}

/// Lanes of the accumulators in [`sum`]: two AVX-512 registers, so that additions overlap.
const LANES: usize = 32;

/// `Σ f(i)` for `i` in `0..n`, in [`LANES`] interleaved partial sums (a fixed order: the result does not depend on
/// the instruction set's width).
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let blocks = n / LANES;
    for block in 0..blocks {
        for (lane, acc) in lanes.iter_mut().enumerate() {
            *acc += f(block * LANES + lane);
        }
    }
    let mut total = 0.0;
    for acc in lanes {
        total += acc;
    }
    for i in blocks * LANES..n {
        total += f(i);
    }
    total
}
