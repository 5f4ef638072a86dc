//! One product each way, which gathers its patches itself.

use candle_core::Result;

use super::{ConvFunction, Padding};
use crate::gpu::product::{self, Added, Geometry, Layer, Onward, Rows};
use crate::gpu::{Array, Gpu, View, kept};

/// `y = conv(x) + bias (+ image_bias) (+ residual)`.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    conv: &ConvFunction,
    x: View<'_, G>,
    shape: &[usize],
    added: &Added<'_, G>,
) -> Result<Array<G>> {
    product::forward(gpu, &conv.geometry(shape), kept::<Layer<G>>(&conv.card)?, x, added)
}

pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    conv: &ConvFunction,
    shape: &[usize],
    grad_output: View<'_, G>,
) -> Result<Array<G>> {
    let rows = Rows::new(grad_output, conv.channels_out);
    product::input_gradient(
        gpu,
        &conv.geometry(shape),
        kept::<Layer<G>>(&conv.card)?,
        rows,
        Onward::Plus(None),
    )
}

impl ConvFunction {
    fn geometry(&self, shape: &[usize]) -> Geometry {
        let Padding { top, left, .. } = self.config.padding;
        Geometry {
            images: shape[0],
            input: [shape[1], shape[2]],
            output: self.output_size(shape[1], shape[2]),
            inputs: self.channels_in,
            outputs: self.channels_out,
            kernel: self.kernel,
            stride: self.config.stride,
            padding: [top, left],
        }
    }
}
