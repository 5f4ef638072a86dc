//! Nearest-neighbour enlargement.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::error::check_shape;
use crate::frozen::{self, FrozenFunction};
use crate::gpu::{Array, Gpu, View};
use crate::tape::{Tape, Value};

/// Nearest-neighbour resizing, as torch's `interpolate(mode="nearest")`:
/// `y[b, r, c] = x[b, ⌊r H / H'⌋, ⌊c W / W'⌋]`.
///
/// # Shapes
/// `x [B, H, W, C]`, `y [B, height, width, C]`.
///
/// # Errors
/// When `x` has another rank, a size is 0, or `x` is not `f32`.
pub fn upsample_nearest2d(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    frozen::apply(&Arc::new(UpsampleNearest { height, width }), x)
}

/// [`upsample_nearest2d`] on a tape.
///
/// # Errors
/// As there.
pub fn upsample_nearest2d_on(tape: &mut Tape, x: &Value, height: usize, width: usize) -> Result<Value> {
    frozen::apply_on(&Arc::new(UpsampleNearest { height, width }), tape, x)
}

struct UpsampleNearest {
    height: usize,
    width: usize,
}

impl FrozenFunction for UpsampleNearest {
    const NAME: &'static str = "upsample_nearest2d";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let ok = input.len() == 4 && !input.contains(&0) && self.height > 0 && self.width > 0;
        check_shape(ok, Self::NAME, "x", || "[B, H, W, C], no size 0".into(), input)?;
        Ok(vec![input[0], self.height, self.width, input[3]])
    }

    fn forward(&self, x: &[f32], shape: &[usize]) -> Vec<f32> {
        cpu::forward(x, shape, [self.height, self.width])
    }

    fn input_gradient(&self, _x: &[f32], shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(shape, [self.height, self.width], grad_output)
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, x, shape, [self.height, self.width])
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        _x: View<'_, G>,
        shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, shape, [self.height, self.width], grad_output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CARD_DTYPES, check, check_on_card};

    #[test]
    fn matches_the_definition() {
        for (shape, size) in
            [([1, 2, 2, 3], [4, 4]), ([2, 3, 5, 2], [6, 10]), ([1, 3, 2, 1], [5, 3]), ([1, 1, 1, 4], [2, 2])]
        {
            check(
                &[&shape],
                |x| upsample_nearest2d(&x[0], size[0], size[1]),
                |x| reference::upsample(&x[0], shape, size),
            );
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        for (shape, size) in [([2, 2, 3, 8], [4, 6]), ([1, 3, 2, 5], [5, 3]), ([1, 17, 16, 16], [34, 33])] {
            for dtype in CARD_DTYPES {
                check_on_card(
                    dtype,
                    &[&shape],
                    |x| upsample_nearest2d(&x[0], size[0], size[1]),
                    |x| reference::upsample(&x[0], shape, size),
                );
            }
        }
    }
}
