//! What the CPU paths share: vector dispatch, scalar functions that vectorise, matrix products, work splitting.

pub(crate) mod gemm;
pub(crate) mod isa;
pub(crate) mod math;
pub(crate) mod microkernel;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod weight;

/// How many rows each thread takes so that `rows` are spread evenly, at least `min` a thread.
pub(crate) fn rows_per_thread(rows: usize, min: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads()).max(min).max(1)
}
