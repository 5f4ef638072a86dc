//! The definition in `f64`.

use crate::activation::reference::normal_cdf;

pub(crate) fn geglu(x: &[f64], c: usize) -> Vec<f64> {
    x.chunks(2 * c).flat_map(|row| (0..c).map(|i| row[i] * row[c + i] * normal_cdf(row[c + i]))).collect()
}
