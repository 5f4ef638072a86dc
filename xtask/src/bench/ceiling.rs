//! What the machine can do at best, measured: percentages are of these.

use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Floats in each array of the triad: 3 × 128 MiB, more than caches hold.
const TRIAD: usize = 32 << 20;
const REPETITIONS: usize = 5;

/// Floating-point operations a second of all threads, in fused multiply–adds whose operands stay in registers.
pub fn flops_a_second() -> f64 {
    const ROUNDS: usize = 20_000_000;
    best(|| {
        let sums: Vec<(f32, f64)> = rayon::broadcast(|_| Arch::new().dispatch(Registers { rounds: ROUNDS }));
        std::hint::black_box(&sums);
        sums.iter().map(|(_, flops)| flops).sum()
    })
}

/// Bytes a second of `a = b + s·c` over arrays in memory; two read and one written (the line fetched before it is
/// written is not counted).
pub fn bytes_a_second() -> f64 {
    const CHUNK: usize = 64 << 10;
    let (b, c) = (vec![1.5f32; TRIAD], vec![0.5f32; TRIAD]);
    let mut a = vec![0.0f32; TRIAD];
    best(|| {
        a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK).zip(c.par_chunks(CHUNK))).for_each(|(a, (b, c))| {
            a.iter_mut().zip(b.iter().zip(c)).for_each(|(a, (b, c))| *a = b + 3.0 * c);
        });
        std::hint::black_box(&a);
        (3 * 4 * TRIAD) as f64
    })
}

/// The best rate of a few repetitions; `work` returns how much it did.
fn best(mut work: impl FnMut() -> f64) -> f64 {
    let rate = |_| {
        let started = Instant::now();
        let done = work();
        done / started.elapsed().as_secs_f64()
    };
    (0..REPETITIONS).map(rate).fold(0.0, f64::max)
}

/// Enough independent sums to hide the latency of a multiply–add on two ports.
const SUMS: usize = 12;

struct Registers {
    rounds: usize,
}

impl WithSimd for Registers {
    /// A value that depends on all sums, and the operations.
    type Output = (f32, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let (factor, term) = (simd.splat_f32s(0.999), simd.splat_f32s(0.001));
        let mut sums = [simd.splat_f32s(0.5); SUMS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, term);
            }
        }
        let total = sums.iter().map(|&sum| simd.reduce_sum_f32s(sum)).sum();
        (total, (2 * self.rounds * SUMS * S::F32_LANES) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_sums_converge_and_operations_are_counted() {
        // x = 0.999 x + 0.001 has the fixed point 1; every lane of every sum is there after 20000 rounds.
        let (total, flops) = Arch::new().dispatch(Registers { rounds: 20_000 });
        let lanes = flops / (2.0 * 20_000.0);
        assert!((f64::from(total) / lanes - 1.0).abs() < 1e-3, "{total} of {lanes}");
    }
}
