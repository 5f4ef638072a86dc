//! Forward and backward of a transformer on a card, layer by layer, as in `cpu.rs`. Sums ride on the product before them, those
//! of gradients on the normalisation's; the few keys of the context get their gradients from blocks that share the queries.

use std::sync::Arc;

use candle_core::Result;

use super::keys_and_values::{KeysAndValues, OfBlock};
use super::{Transformer, TransformerAttention, TransformerBlock};
use crate::attention::cuda::{self as attention, Saved as SavedScores};
use crate::attention::{AttentionMask, AttentionShape};
use crate::gpu::product::{Gated, Onward, Rows};
use crate::gpu::{Array, Gpu, View};
use crate::linear::cuda::Joined;
use crate::{Linear, group_norm, layer_norm, linear};

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
    /// What the blocks make of them, if that is known.
    pub keys_and_values: Option<&'a Arc<KeysAndValues>>,
}

/// What the backward pass needs.
pub(super) struct Saved<G: Gpu> {
    /// Of the group normalisation.
    statistics: Array<G>,
    blocks: Vec<SavedBlock<G>>,
}

/// What a block's backward pass needs.
struct SavedBlock<G: Gpu> {
    attended: Attended<G>,
    /// The two halves of the GEGLU.
    gates: Array<G>,
}

/// A block up to its feed-forward layers.
struct Attended<G: Gpu> {
    /// The block's input.
    x: Array<G>,
    attn1: SavedAttention<G>,
    /// After self-attention.
    x1: Array<G>,
    attn2: SavedAttention<G>,
    /// After cross-attention.
    x2: Array<G>,
}

/// What an attention's backward pass needs.
struct SavedAttention<G: Gpu> {
    qkv: Projected<G>,
    y: Array<G>,
    log_sum_exp: Option<Array<G>>,
}

impl<G: Gpu> SavedAttention<G> {
    fn scores(&self, width: usize) -> Result<SavedScores<'_, G>> {
        let log_sum_exp = self.log_sum_exp.as_ref().map(Array::view);
        Ok(SavedScores { qkv: self.qkv.rows(width)?, y: self.y.view(), log_sum_exp })
    }
}

/// Queries, keys and values: side by side where the layers' weights are one behind the other.
enum Projected<G: Gpu> {
    Apart([Array<G>; 3]),
    /// Queries, then keys beside values.
    KeysWithValues([Array<G>; 2]),
    Together(Array<G>),
    /// Queries; keys and values are the context's.
    OfContext(Array<G>, OfBlock),
}

impl<G: Gpu> Projected<G> {
    /// Each `width` wide.
    fn rows(&self, width: usize) -> Result<[Rows<'_, G>; 3]> {
        Ok(match self {
            Self::Apart(qkv) => qkv.each_ref().map(|array| columns(array, 0, width, 1)),
            Self::KeysWithValues([q, kv]) => {
                [columns(q, 0, width, 1), columns(kv, 0, width, 2), columns(kv, 1, width, 2)]
            }
            Self::Together(qkv) => [0, 1, 2].map(|part| columns(qkv, part, width, 3)),
            Self::OfContext(q, context) => {
                let [k, v] = context.rows()?;
                [columns(q, 0, width, 1), k, v]
            }
        })
    }
}

/// Part `index` of so many that lie side by side.
fn columns<G: Gpu>(array: &Array<G>, index: usize, width: usize, parts: usize) -> Rows<'_, G> {
    Rows::new(array.view().from(index * width), parts * width)
}

/// What the backward pass is for.
pub(super) struct Wanted<'a, G: Gpu> {
    /// Whether the input needs a gradient.
    pub dx: bool,
    /// What is known of it, to be added.
    pub known_dx: Option<View<'a, G>>,
    /// How many of the context's last tokens do.
    pub tail: usize,
    /// What is known of theirs, to be added.
    pub known: Option<View<'a, G>>,
}

/// Gradients to `x` and to the last tokens of the context, where they are wanted.
pub(super) type Gradients<G> = (Option<Array<G>>, Option<Array<G>>);

impl<G: Gpu> Pass<'_, G> {
    /// `keep`: whether to return what the backward pass needs.
    pub(super) fn forward(&self, x: View<'_, G>, keep: bool) -> Result<(Array<G>, Option<Saved<G>>)> {
        let (mut tokens, statistics) = self.proj_in(x)?;
        let mut blocks = Vec::new();
        for block in &self.transformer.blocks {
            let (output, saved) = self.block(block, tokens, keep)?;
            tokens = output;
            blocks.extend(saved);
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
            let (output, saved) = self.block(block, tokens, true)?;
            tokens = output;
            blocks.extend(saved);
        }
        let attended = self.attended(last, tokens, true)?;
        let normed = layer_norm::cuda::forward(self.gpu, &last.norm3.0, attended.x2.view())?;
        let gates = linear::cuda::forward(self.gpu, &last.ff_in.0, normed.view(), None)?;
        blocks.push(SavedBlock { attended, gates });
        Ok(Saved { statistics, blocks })
    }

    /// What goes into the first block, and the group normalisation's statistics.
    fn proj_in(&self, x: View<'_, G>) -> Result<(Array<G>, Array<G>)> {
        let Transformer { norm, proj_in, .. } = self.transformer;
        let (normed, statistics) = group_norm::cuda::forward(self.gpu, &norm.0, x, self.batch)?;
        Ok((linear::cuda::forward(self.gpu, &proj_in.0, normed.view(), None)?, statistics))
    }

    /// A block's output, and what its backward pass needs, to `keep`.
    fn block(
        &self,
        block: &TransformerBlock,
        x: Array<G>,
        keep: bool,
    ) -> Result<(Array<G>, Option<SavedBlock<G>>)> {
        let attended = self.attended(block, x, keep)?;
        let normed = layer_norm::cuda::forward(self.gpu, &block.norm3.0, attended.x2.view())?;
        let Gated { halves, gated } =
            linear::cuda::forward_through_geglu(self.gpu, &block.ff_in.0, normed.view(), keep)?;
        let around = Some(attended.x2.view());
        let output = linear::cuda::forward(self.gpu, &block.ff_out.0, gated.view(), around)?;
        Ok((output, halves.map(|gates| SavedBlock { attended, gates })))
    }

    fn attended(&self, block: &TransformerBlock, x: Array<G>, keep: bool) -> Result<Attended<G>> {
        let gpu = self.gpu;
        let normed = layer_norm::cuda::forward(gpu, &block.norm1.0, x.view())?;
        let qkv = self.project_itself(&block.attn1, normed.view())?;
        let attn1 = self.attend(&block.attn1, qkv, self.queries, keep)?;
        let x1 = linear::cuda::forward(gpu, &block.attn1.to_out.0, attn1.y.view(), Some(x.view()))?;
        let normed = layer_norm::cuda::forward(gpu, &block.norm2.0, x1.view())?;
        let qkv = self.project_context(block, normed.view())?;
        let attn2 = self.attend(&block.attn2, qkv, self.keys, keep)?;
        let x2 = linear::cuda::forward(gpu, &block.attn2.to_out.0, attn2.y.view(), Some(x1.view()))?;
        Ok(Attended { x, attn1, x1, attn2, x2 })
    }

    /// For self-attention.
    fn project_itself(&self, weights: &TransformerAttention, x: View<'_, G>) -> Result<Projected<G>> {
        let TransformerAttention { to_q, to_k, to_v, .. } = weights;
        if let Some(layers) = Joined::of(&[&to_q.0, &to_k.0, &to_v.0])? {
            return Ok(Projected::Together(layers.forward(self.gpu, x)?));
        }
        let project = |layer: &Linear| linear::cuda::forward(self.gpu, &layer.0, x, None);
        Ok(Projected::Apart([project(to_q)?, project(to_k)?, project(to_v)?]))
    }

    /// For cross-attention.
    fn project_context(&self, block: &TransformerBlock, x: View<'_, G>) -> Result<Projected<G>> {
        let TransformerAttention { to_q, to_k, to_v, .. } = &block.attn2;
        let project = |layer: &Linear, x| linear::cuda::forward(self.gpu, &layer.0, x, None);
        let q = project(to_q, x)?;
        if let Some(known) = self.keys_and_values {
            return Ok(Projected::OfContext(q, known.of_block(block)?));
        }
        if let Some(layers) = Joined::of(&[&to_k.0, &to_v.0])? {
            return Ok(Projected::KeysWithValues([q, layers.forward(self.gpu, self.context)?]));
        }
        Ok(Projected::Apart([q, project(to_k, self.context)?, project(to_v, self.context)?]))
    }

    fn attend(
        &self,
        weights: &TransformerAttention,
        qkv: Projected<G>,
        keys: usize,
        keep: bool,
    ) -> Result<SavedAttention<G>> {
        let shape = self.shape(weights, keys);
        let (y, log_sum_exp) = attention::forward(self.gpu, &shape, qkv.rows(shape.width())?, keep)?;
        Ok(SavedAttention { qkv, y, log_sum_exp })
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

    /// `saved`: computed again if it was not kept.
    pub(super) fn backward(
        &self,
        x: View<'_, G>,
        saved: Option<&Saved<G>>,
        dy: View<'_, G>,
        wanted: Wanted<'_, G>,
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
        let Wanted { dx: wants_dx, known_dx, tail, known } = wanted;
        let mut dtail: Option<Array<G>> = None;
        let mut d = linear::cuda::input_gradient(self.gpu, &proj_out.0, dy, None)?;
        for (i, (block, saved)) in blocks.iter().zip(&saved.blocks).enumerate().rev() {
            let known = dtail.as_ref().map(Array::view).or(known);
            let wanted = Wanted { dx: wants_dx || i > 0, known_dx: None, tail, known };
            let (dx, dt) = self.block_backward(block, saved, d.view(), wanted)?;
            dtail = dt;
            match dx {
                Some(dx) => d = dx,
                None => return Ok((None, dtail)),
            }
        }
        let d = linear::cuda::input_gradient(self.gpu, &proj_in.0, d.view(), None)?;
        let inputs = [x, saved.statistics.view()];
        let around = [Some(dy), known_dx];
        let dx = group_norm::cuda::input_gradient(self.gpu, &norm.0, inputs, self.batch, d.view(), around)?;
        Ok((Some(dx), dtail))
    }

    /// The gradient to the block's input, if it is wanted, and that to the last tokens of the context.
    fn block_backward(
        &self,
        block: &TransformerBlock,
        saved: &SavedBlock<G>,
        dy: View<'_, G>,
        wanted: Wanted<'_, G>,
    ) -> Result<Gradients<G>> {
        let gpu = self.gpu;
        let SavedBlock { attended: saved, gates } = saved;
        let d = linear::cuda::gradient_of_gates(gpu, &block.ff_out.0, gates.view(), dy)?;
        let d = linear::cuda::input_gradient(gpu, &block.ff_in.0, d.view(), None)?;
        let dx2 = layer_norm::cuda::input_gradient(gpu, &block.norm3.0, saved.x2.view(), d.view(), Some(dy))?;

        let d = linear::cuda::input_gradient(gpu, &block.attn2.to_out.0, dx2.view(), None)?;
        let (dq, dtail) = self.cross_backward(&block.attn2, &saved.attn2, d, &wanted)?;
        if !wanted.dx {
            return Ok((None, dtail));
        }
        let d = linear::cuda::input_gradient(gpu, &block.attn2.to_q.0, dq.view(), None)?;
        let (x1, around) = (saved.x1.view(), Some(dx2.view()));
        let dx1 = layer_norm::cuda::input_gradient(gpu, &block.norm2.0, x1, d.view(), around)?;
        drop((dx2, dq));

        let d = linear::cuda::input_gradient(gpu, &block.attn1.to_out.0, dx1.view(), None)?;
        let d = self.itself_backward(&block.attn1, &saved.attn1, d)?;
        let (x, around) = (saved.x.view(), Some(dx1.view()));
        let dx = layer_norm::cuda::input_gradient(gpu, &block.norm1.0, x, d.view(), around)?;
        Ok((Some(dx), dtail))
    }

    /// From the gradient of cross-attention's result to those of its queries and, unless it is left with the context's keys and
    /// values, of the tail.
    fn cross_backward(
        &self,
        weights: &TransformerAttention,
        saved: &SavedAttention<G>,
        dy: Array<G>,
        wanted: &Wanted<'_, G>,
    ) -> Result<(Array<G>, Option<Array<G>>)> {
        let (gpu, shape, tail) = (self.gpu, self.shape(weights, self.keys), wanted.tail);
        let scores = saved.scores(shape.width())?;
        if let (Projected::OfContext(_, context), 1..) = (&saved.qkv, tail) {
            let dq = context.with_parts(gpu, tail, |to| {
                attention::cross_gradients_in_parts(gpu, &shape, &scores, dy.view(), (tail, to))
            });
            return Ok((dq?, None));
        }
        let (dq, both) = attention::cross_gradients(gpu, &shape, &scores, dy.view(), tail)?;
        let dtail = both.map(|both| self.tail_gradient(weights, both, wanted.known)).transpose()?;
        Ok((dq, dtail))
    }

    /// From the gradient of self-attention's result to that of what it attends to.
    fn itself_backward(
        &self,
        weights: &TransformerAttention,
        saved: &SavedAttention<G>,
        dy: Array<G>,
    ) -> Result<Array<G>> {
        let (gpu, shape) = (self.gpu, self.shape(weights, self.queries));
        let TransformerAttention { to_q, to_k, to_v, .. } = weights;
        let (scores, len) = (saved.scores(shape.width())?, dy.len);
        let alloc = |parts: usize| gpu.alloc(dy.dtype, parts * len);
        if let Some(layers) = Joined::of(&[&to_q.0, &to_k.0, &to_v.0])? {
            let d = alloc(3)?;
            let rows = [0, 1, 2].map(|part| columns(&d, part, shape.width(), 3));
            attention::input_gradients(gpu, &shape, &scores, dy.view(), rows)?;
            return layers.input_gradient(gpu, d.view(), None);
        }
        let gradients = [alloc(1)?, alloc(1)?, alloc(1)?];
        let [dq, dk, dv] = gradients.each_ref().map(Array::view);
        let rows = [dq, dk, dv].map(|view| Rows::new(view, shape.width()));
        attention::input_gradients(gpu, &shape, &scores, dy.view(), rows)?;
        let d = linear::cuda::input_gradient(gpu, &to_q.0, dq, None)?;
        let d = linear::cuda::input_gradient(gpu, &to_k.0, dk, Some(d.view()))?;
        linear::cuda::input_gradient(gpu, &to_v.0, dv, Some(d.view()))
    }

    /// From the gradients of the tail's keys and values, `[B, N, 2·H·D]`, and what is known of the tail's own.
    fn tail_gradient(
        &self,
        weights: &TransformerAttention,
        both: Array<G>,
        known: Option<View<'_, G>>,
    ) -> Result<Array<G>> {
        if let Some(layers) = Joined::of(&[&weights.to_k.0, &weights.to_v.0])? {
            return layers.input_gradient(self.gpu, both.view(), known);
        }
        let width = weights.to_k.0.out_features;
        let of_k = linear::cuda::input_gradient_of_columns(
            self.gpu,
            &weights.to_k.0,
            both.view(),
            [0, 2 * width],
            Onward::Plus(known),
        )?;
        let columns = [width, 2 * width];
        linear::cuda::input_gradient_of_columns(
            self.gpu,
            &weights.to_v.0,
            both.view(),
            columns,
            Onward::Plus(Some(of_k.view())),
        )
    }
}
