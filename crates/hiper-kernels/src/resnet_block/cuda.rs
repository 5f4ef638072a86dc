//! The block on a card. The time embedding and the sum ride on the convolutions, the shortcut's gradient on the normalisation's.

use candle_core::Result;

use super::{ResnetBlock, hidden_shape};
use crate::gpu::product::Added;
use crate::gpu::{Array, Gpu, View};
use crate::group_norm::cuda::Onward;
use crate::{conv2d, group_norm, linear};

/// What the backward pass needs.
pub(super) struct Saved<G: Gpu> {
    /// The first convolution's result.
    hidden: Array<G>,
    /// Of either normalisation.
    statistics: [Array<G>; 2],
}

/// One application of a block: its picture's shape, and the time embedding.
pub(super) struct Pass<'a, G: Gpu> {
    pub gpu: &'a G,
    pub block: &'a ResnetBlock,
    pub shape: &'a [usize],
    /// `[B, O]` or `[O]`.
    pub time: Option<View<'a, G>>,
}

impl<G: Gpu> Pass<'_, G> {
    pub(super) fn forward(&self, x: View<'_, G>) -> Result<(Array<G>, Saved<G>)> {
        let ResnetBlock { conv1, conv2, conv_shortcut, .. } = self.block;
        let (normed, saved) = self.hidden(x)?;
        let shortcut = conv_shortcut.as_ref().map(|layer| linear::cuda::forward(self.gpu, &layer.0, x, None));
        let shortcut = shortcut.transpose()?;
        let added = Added { image_bias: None, residual: Some(shortcut.as_ref().map_or(x, Array::view)) };
        let shape = hidden_shape(&conv1.0, self.shape);
        Ok((conv2d::cuda::forward(self.gpu, &conv2.0, normed.view(), &shape, &added)?, saved))
    }

    /// What goes into the second convolution, and what is on the way there.
    fn hidden(&self, x: View<'_, G>) -> Result<(Array<G>, Saved<G>)> {
        let (gpu, batch) = (self.gpu, self.shape[0]);
        let ResnetBlock { norm1, conv1, norm2, .. } = self.block;
        let (normed, of_input) = group_norm::cuda::forward(gpu, &norm1.0, x, batch)?;
        let added = Added { image_bias: self.time, residual: None };
        let hidden = conv2d::cuda::forward(gpu, &conv1.0, normed.view(), self.shape, &added)?;
        drop(normed);
        let (normed, of_hidden) = group_norm::cuda::forward(gpu, &norm2.0, hidden.view(), batch)?;
        Ok((normed, Saved { hidden, statistics: [of_input, of_hidden] }))
    }

    /// The gradient to the block's input, with what is `known` of it, or those to its first `own` channels and to the others.
    /// `saved`: computed again if it was not kept.
    pub(super) fn input_gradient(
        &self,
        x: View<'_, G>,
        saved: Option<&Saved<G>>,
        grad_output: View<'_, G>,
        (known, own): (Option<View<'_, G>>, Option<usize>),
    ) -> Result<(Array<G>, Option<Array<G>>)> {
        let (gpu, batch) = (self.gpu, self.shape[0]);
        let ResnetBlock { norm1, conv1, norm2, conv2, conv_shortcut, .. } = self.block;
        let recomputed;
        let saved = match saved {
            Some(saved) => saved,
            None => {
                recomputed = self.hidden(x)?.1;
                &recomputed
            }
        };
        let Saved { hidden, statistics: [of_input, of_hidden] } = saved;
        let shape = hidden_shape(&conv1.0, self.shape);
        let d = conv2d::cuda::input_gradient(gpu, &conv2.0, &shape, grad_output)?;
        let inputs = [hidden.view(), of_hidden.view()];
        let d = group_norm::cuda::input_gradient(gpu, &norm2.0, inputs, batch, d.view(), [None; 2])?;
        let d = conv2d::cuda::input_gradient(gpu, &conv1.0, self.shape, d.view())?;
        let shortcut = conv_shortcut
            .as_ref()
            .map(|layer| linear::cuda::input_gradient(gpu, &layer.0, grad_output, None))
            .transpose()?;
        let around = Some(shortcut.as_ref().map_or(grad_output, Array::view));
        let onward = Onward { residuals: [around, known], own };
        group_norm::cuda::input_gradients(gpu, &norm1.0, [x, of_input.view()], batch, d.view(), onward)
    }
}
