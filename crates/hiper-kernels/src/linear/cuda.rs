//! One product each way with the same weight.

use candle_core::Result;

use super::LinearFunction;
use crate::gpu::product::{self, Added, Geometry, Layer, Rows};
use crate::gpu::{Array, Gpu, View, kept};

/// `y = x Wᵀ + b (+ residual)`.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    x: View<'_, G>,
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    let geometry = Geometry::linear(x.len / layer.in_features, layer.in_features, layer.out_features);
    product::forward(gpu, &geometry, kept::<Layer<G>>(&layer.card)?, x, &Added { image_bias: None, residual })
}

/// `dx = dy W (+ residual)`.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    grad_output: View<'_, G>,
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    input_gradient_of_columns(gpu, layer, grad_output, [0, layer.out_features], residual)
}

/// The same where `dy` is some columns of a wider matrix: from column `first` on, of rows `width` wide.
pub(crate) fn input_gradient_of_columns<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    matrix: View<'_, G>,
    [first, width]: [usize; 2],
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    let geometry = Geometry::linear(matrix.len / width, layer.in_features, layer.out_features);
    let rows = Rows::new(matrix.from(first), width);
    product::input_gradient(gpu, &geometry, kept::<Layer<G>>(&layer.card)?, rows, residual)
}
