//! One product each way with the same weight.

use candle_core::Result;

use super::LinearFunction;
use crate::geglu;
use crate::gpu::product::{self, Added, Gated, Geometry, Layer, Onward, Rows};
use crate::gpu::{Array, Gpu, View, kept};

/// Layers of one input whose weights lie one behind the other ([`Linear::side_by_side`](crate::Linear::side_by_side)), as one:
/// their results are side by side.
pub(crate) struct Joined<'a, G: Gpu> {
    layer: &'a Layer<G>,
    inputs: usize,
    outputs: usize,
}

impl<'a, G: Gpu> Joined<'a, G> {
    /// None if their weights lie elsewhere.
    pub(crate) fn of(layers: &[&'a LinearFunction]) -> Result<Option<Self>> {
        let Some(first) = layers.first() else { return Ok(None) };
        let (layer, mut outputs) = (kept::<Layer<G>>(&first.card)?, first.out_features);
        for next in &layers[1..] {
            if !layer.is_followed_by(kept(&next.card)?, outputs) || next.in_features != first.in_features {
                return Ok(None);
            }
            outputs += next.out_features;
        }
        Ok(Some(Self { layer, inputs: first.in_features, outputs }))
    }

    /// `[rows, all O]`.
    pub(crate) fn forward(&self, gpu: &G, x: View<'_, G>) -> Result<Array<G>> {
        let geometry = Geometry::linear(x.len / self.inputs, self.inputs, self.outputs);
        product::forward(gpu, &geometry, self.layer, x, &Added::NOTHING)
    }

    /// The sum of all layers' gradients `(+ residual)`, from `[rows, all O]`.
    pub(crate) fn input_gradient(
        &self,
        gpu: &G,
        grad_output: View<'_, G>,
        residual: Option<View<'_, G>>,
    ) -> Result<Array<G>> {
        let geometry = Geometry::linear(grad_output.len / self.outputs, self.inputs, self.outputs);
        product::input_gradient(
            gpu,
            &geometry,
            self.layer,
            Rows::new(grad_output, self.outputs),
            Onward::Plus(residual),
        )
    }
}

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

/// The same and a GEGLU behind it: by one kernel, where there is one. `keep`: whether the layer's result is wanted too.
pub(crate) fn forward_through_geglu<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    x: View<'_, G>,
    keep: bool,
) -> Result<Gated<G>> {
    let geometry = Geometry::linear(x.len / layer.in_features, layer.in_features, layer.out_features);
    if let Some(both) =
        product::forward_through_geglu(gpu, &geometry, kept::<Layer<G>>(&layer.card)?, x, keep)?
    {
        return Ok(both);
    }
    let halves = forward(gpu, layer, x, None)?;
    let gated = geglu::cuda::forward(gpu, halves.view(), layer.out_features / 2)?;
    Ok(Gated { halves: keep.then_some(halves), gated })
}

/// `dx = dy W (+ residual)`.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    grad_output: View<'_, G>,
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    input_gradient_of_columns(gpu, layer, grad_output, [0, layer.out_features], Onward::Plus(residual))
}

/// The same where `x` was a GEGLU's result: the gradient of its two halves, `gates`.
pub(crate) fn gradient_of_gates<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    gates: View<'_, G>,
    grad_output: View<'_, G>,
) -> Result<Array<G>> {
    input_gradient_of_columns(gpu, layer, grad_output, [0, layer.out_features], Onward::ThroughGeglu(gates))
}

/// Where `dy` is some columns of a wider matrix: from column `first` on, of rows `width` wide.
pub(crate) fn input_gradient_of_columns<G: Gpu>(
    gpu: &G,
    layer: &LinearFunction,
    matrix: View<'_, G>,
    [first, width]: [usize; 2],
    onward: Onward<'_, G>,
) -> Result<Array<G>> {
    let geometry = Geometry::linear(matrix.len / width, layer.in_features, layer.out_features);
    let rows = Rows::new(matrix.from(first), width);
    product::input_gradient(gpu, &geometry, kept::<Layer<G>>(&layer.card)?, rows, onward)
}
