//! What the CPU paths share: vector dispatch, scalar functions that vectorise, matrix products, work splitting.

pub(crate) mod fill;
pub(crate) mod gemm;
pub(crate) mod isa;
pub(crate) mod math;
pub(crate) mod matrix;
pub(crate) mod microkernel;
pub(crate) mod scratch;
pub(crate) mod simd;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Tasks a thread, where another task costs next to nothing: a thread that was held up is helped out.
pub(crate) const TASKS: usize = 4;

/// How many of `rows` a task takes, where it has sums of its own: at least `min`.
pub(crate) fn share(rows: usize, min: usize) -> usize {
    rows.div_ceil(TASKS * rayon::current_num_threads()).max(min).max(1)
}

/// Values of a stretch of rows that one call fills: few enough to stay in the first caches between its passes.
pub(crate) fn stretch(width: usize) -> usize {
    (4096 / width).max(1) * width
}
