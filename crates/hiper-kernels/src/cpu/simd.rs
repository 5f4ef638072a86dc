//! Runtime dispatch: loops compiled once for each instruction set, chosen when the program runs.

/// Runs `f` compiled for the widest instruction set that this processor has (AVX-512, AVX2 + FMA, NEON,
/// or the target's baseline). Loops inside `f` vectorise accordingly.
#[inline(always)]
pub(crate) fn vectorise<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
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
