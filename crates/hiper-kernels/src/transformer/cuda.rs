//! Forward and backward of a transformer on a card, layer by layer, as in `cpu.rs`. Sums ride on the product before them, those
//! of gradients on the normalisation's; the few keys of the context get their gradients from blocks that share the queries.

use candle_core::Result;

use super::{Transformer, TransformerAttention, TransformerBlock};
use crate::attention::cuda::{self as attention, Saved as SavedScores};
use crate::attention::{AttentionMask, AttentionShape};
use crate::gpu::{Array, Gpu, View, cast};
use crate::{geglu, group_norm, layer_norm, linear};

/// One application of a transformer: its sizes and its context.
pub(super) struct Pass<'a, G: Gpu> {
    pub gpu: &'a G,
    pub transformer: &'a Transformer,
    pub batch: usize,
    /// Pixels of a picture.
    pub queries: usize,
    pub context: View<'a, G>,
    /// Tokens of a context.
    pub keys: usize,
}

/// What the backward pass needs.
pub(super) struct Saved<G: Gpu> {
    /// Of the group normalisation.
    statistics: Array<G>,
    blocks: Vec<SavedBlock<G>>,
}

/// What a block's backward pass needs.
struct SavedBlock<G: Gpu> {
    /// The block's input.
    x: Array<G>,
    attn1: SavedAttention<G>,
    /// After self-attention.
    x1: Array<G>,
    attn2: SavedAttention<G>,
    /// After cross-attention.
    x2: Array<G>,
    /// The two halves of the GEGLU.
    gates: Array<G>,
}

/// What an attention's backward pass needs.
struct SavedAttention<G: Gpu> {
    q: Array<G>,
    k: Array<G>,
    v: Array<G>,
    y: Array<G>,
    log_sum_exp: Option<Array<G>>,
}

impl<G: Gpu> SavedAttention<G> {
    fn views(&self) -> SavedScores<'_, G> {
        let [q, k, v, y] = [&self.q, &self.k, &self.v, &self.y].map(Array::view);
        SavedScores { q, k, v, y, log_sum_exp: self.log_sum_exp.as_ref().map(Array::view) }
    }
}

/// Gradients to `x` and to the last tokens of the context, where they are wanted.
pub(super) type Gradients<G> = (Option<Array<G>>, Option<Array<G>>);

impl<G: Gpu> Pass<'_, G> {
    /// `keep`: whether to return what the backward pass needs.
    pub(super) fn forward(&self, x: View<'_, G>, keep: bool) -> Result<(Array<G>, Option<Saved<G>>)> {
        let (mut tokens, statistics) = self.proj_in(x)?;
        let mut blocks = Vec::new();
        for block in &self.transformer.blocks {
            let saved = self.block(block, tokens, keep)?;
            tokens = self.output(block, &saved)?;
            if keep {
                blocks.push(saved);
            }
        }
        let y = linear::cuda::forward(self.gpu, &self.transformer.proj_out.0, tokens.view(), Some(x))?;
        Ok((y, keep.then_some(Saved { statistics, blocks })))
    }

    /// What the backward pass needs, computed again: all but the last block's output.
    fn recompute(&self, x: View<'_, G>) -> Result<Saved<G>> {
        let (mut tokens, statistics) = self.proj_in(x)?;
        let mut blocks = Vec::new();
        let Some((last, others)) = self.transformer.blocks.split_last() else {
            return Ok(Saved { statistics, blocks });
        };
        for block in others {
            let saved = self.block(block, tokens, true)?;
            tokens = self.output(block, &saved)?;
            blocks.push(saved);
        }
        blocks.push(self.block(last, tokens, true)?);
        Ok(Saved { statistics, blocks })
    }

    /// What goes into the first block, and the group normalisation's statistics.
    fn proj_in(&self, x: View<'_, G>) -> Result<(Array<G>, Array<G>)> {
        let Transformer { norm, proj_in, .. } = self.transformer;
        let (normed, statistics) = group_norm::cuda::forward(self.gpu, &norm.0, x, self.batch)?;
        Ok((linear::cuda::forward(self.gpu, &proj_in.0, normed.view(), None)?, statistics))
    }

    /// All of a block but its output.
    fn block(&self, block: &TransformerBlock, x: Array<G>, keep: bool) -> Result<SavedBlock<G>> {
        let gpu = self.gpu;
        let normed = layer_norm::cuda::forward(gpu, &block.norm1.0, x.view())?;
        let attn1 = self.attend(&block.attn1, normed.view(), normed.view(), self.queries, keep)?;
        let x1 = linear::cuda::forward(gpu, &block.attn1.to_out.0, attn1.y.view(), Some(x.view()))?;
        let normed = layer_norm::cuda::forward(gpu, &block.norm2.0, x1.view())?;
        let attn2 = self.attend(&block.attn2, normed.view(), self.context, self.keys, keep)?;
        let x2 = linear::cuda::forward(gpu, &block.attn2.to_out.0, attn2.y.view(), Some(x1.view()))?;
        let normed = layer_norm::cuda::forward(gpu, &block.norm3.0, x2.view())?;
        let gates = linear::cuda::forward(gpu, &block.ff_in.0, normed.view(), None)?;
        Ok(SavedBlock { x, attn1, x1, attn2, x2, gates })
    }

    fn output(&self, block: &TransformerBlock, saved: &SavedBlock<G>) -> Result<Array<G>> {
        let gated = geglu::cuda::forward(self.gpu, saved.gates.view(), block.ff_out.0.in_features)?;
        linear::cuda::forward(self.gpu, &block.ff_out.0, gated.view(), Some(saved.x2.view()))
    }

    fn attend(
        &self,
        weights: &TransformerAttention,
        x: View<'_, G>,
        to: View<'_, G>,
        keys: usize,
        keep: bool,
    ) -> Result<SavedAttention<G>> {
        let q = linear::cuda::forward(self.gpu, &weights.to_q.0, x, None)?;
        let k = linear::cuda::forward(self.gpu, &weights.to_k.0, to, None)?;
        let v = linear::cuda::forward(self.gpu, &weights.to_v.0, to, None)?;
        let inputs = [q.view(), k.view(), v.view()];
        let (y, log_sum_exp) = attention::forward(self.gpu, &self.shape(weights, keys), inputs, keep)?;
        Ok(SavedAttention { q, k, v, y, log_sum_exp })
    }

    fn shape(&self, weights: &TransformerAttention, keys: usize) -> AttentionShape {
        let head_dim = weights.to_q.0.out_features / weights.num_heads;
        AttentionShape {
            batch: self.batch,
            queries: self.queries,
            keys,
            num_heads: weights.num_heads,
            head_dim,
            softmax_scale: (head_dim as f32).powf(-0.5),
            mask: AttentionMask::None,
        }
    }

    /// `saved`: computed again if it was not kept; `wanted`: whether the input needs a gradient, and how many of the context's last
    /// tokens do.
    pub(super) fn backward(
        &self,
        x: View<'_, G>,
        saved: Option<&Saved<G>>,
        dy: View<'_, G>,
        (wants_dx, tail): (bool, usize),
    ) -> Result<Gradients<G>> {
        let recomputed;
        let saved = match saved {
            Some(saved) => saved,
            None => {
                recomputed = self.recompute(x)?;
                &recomputed
            }
        };
        let Transformer { norm, proj_in, blocks, proj_out } = self.transformer;
        let mut dtail = None;
        let mut d = linear::cuda::input_gradient(self.gpu, &proj_out.0, dy, None)?;
        for (i, (block, saved)) in blocks.iter().zip(&saved.blocks).enumerate().rev() {
            let (dx, dt) = self.block_backward(block, saved, d.view(), (dtail, tail), wants_dx || i > 0)?;
            dtail = dt;
            match dx {
                Some(dx) => d = dx,
                None => return Ok((None, dtail)),
            }
        }
        let d = linear::cuda::input_gradient(self.gpu, &proj_in.0, d.view(), None)?;
        let inputs = [x, saved.statistics.view()];
        let dx = group_norm::cuda::input_gradient(self.gpu, &norm.0, inputs, self.batch, d.view(), Some(dy))?;
        Ok((Some(dx), dtail))
    }

    /// The gradient to the block's input, if it is wanted, and that to the last `tail` tokens of the context, added to `dtail`.
    fn block_backward(
        &self,
        block: &TransformerBlock,
        saved: &SavedBlock<G>,
        dy: View<'_, G>,
        (dtail, tail): (Option<Array<G>>, usize),
        wants_dx: bool,
    ) -> Result<Gradients<G>> {
        let gpu = self.gpu;
        let d = linear::cuda::input_gradient(gpu, &block.ff_out.0, dy, None)?;
        let d = geglu::cuda::input_gradient(gpu, saved.gates.view(), block.ff_out.0.in_features, d.view())?;
        let d = linear::cuda::input_gradient(gpu, &block.ff_in.0, d.view(), None)?;
        let dx2 = layer_norm::cuda::input_gradient(gpu, &block.norm3.0, saved.x2.view(), d.view(), Some(dy))?;

        let (shape, scores) = (self.shape(&block.attn2, self.keys), saved.attn2.views());
        let d = linear::cuda::input_gradient(gpu, &block.attn2.to_out.0, dx2.view(), None)?;
        let (dq, both) = attention::cross_gradients(gpu, &shape, &scores, d.view(), tail)?;
        drop(d);
        let before = dtail.as_ref().map(Array::view);
        let dtail = both.map(|both| self.tail_gradient(&block.attn2, both, before)).transpose()?;
        if !wants_dx {
            return Ok((None, dtail));
        }
        let d = linear::cuda::input_gradient(gpu, &block.attn2.to_q.0, dq.view(), None)?;
        let (x1, around) = (saved.x1.view(), Some(dx2.view()));
        let dx1 = layer_norm::cuda::input_gradient(gpu, &block.norm2.0, x1, d.view(), around)?;
        drop((dx2, dq));

        let (shape, scores) = (self.shape(&block.attn1, self.queries), saved.attn1.views());
        let d = linear::cuda::input_gradient(gpu, &block.attn1.to_out.0, dx1.view(), None)?;
        let [dq, dk, dv] = attention::input_gradients(gpu, &shape, &scores, d.view())?;
        let d = linear::cuda::input_gradient(gpu, &block.attn1.to_q.0, dq.view(), None)?;
        let d = linear::cuda::input_gradient(gpu, &block.attn1.to_k.0, dk.view(), Some(d.view()))?;
        let d = linear::cuda::input_gradient(gpu, &block.attn1.to_v.0, dv.view(), Some(d.view()))?;
        let (x, around) = (saved.x.view(), Some(dx1.view()));
        let dx = layer_norm::cuda::input_gradient(gpu, &block.norm1.0, x, d.view(), around)?;
        Ok((Some(dx), dtail))
    }

    /// From the gradients of the tail's keys and values, `[B, N, 2·H·D]`, and of the blocks behind.
    fn tail_gradient(
        &self,
        weights: &TransformerAttention,
        both: Array<G>,
        before: Option<View<'_, G>>,
    ) -> Result<Array<G>> {
        let both = cast(self.gpu, both, self.context.dtype)?;
        let width = weights.to_k.0.out_features;
        let of_k = linear::cuda::input_gradient_of_columns(
            self.gpu,
            &weights.to_k.0,
            both.view(),
            [0, 2 * width],
            before,
        )?;
        let columns = [width, 2 * width];
        linear::cuda::input_gradient_of_columns(
            self.gpu,
            &weights.to_v.0,
            both.view(),
            columns,
            Some(of_k.view()),
        )
    }
}
