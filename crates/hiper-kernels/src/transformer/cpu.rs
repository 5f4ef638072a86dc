//! Forward and backward of a transformer, layer by layer. Sums ride on the last pass of the product before them.

use std::borrow::Cow;

use super::{Transformer, TransformerAttention, TransformerBlock};
use crate::Memory;
use crate::attention::{AttentionMask, AttentionShape};
use crate::{attention, geglu, group_norm, layer_norm, linear};

/// One application of a transformer: its sizes and its context.
pub(super) struct Pass<'a> {
    transformer: &'a Transformer,
    batch: usize,
    queries: usize,
    context: &'a [f32],
    keys: usize,
}

/// What a forward pass leaves for the backward pass, of each block.
pub(super) enum Kept {
    /// All that it needs: [`Memory::Fast`].
    All(Vec<Saved<'static>>),
    /// What is small, and dear to compute again; the rest is computed again: [`Memory::Lean`].
    Attended(Vec<[Attended; 2]>),
}

/// What a block's backward pass needs.
pub(super) struct Saved<'a> {
    /// The block's input.
    x: Vec<f32>,
    attn1: SavedAttention<'a>,
    /// After self-attention.
    x1: Vec<f32>,
    attn2: SavedAttention<'a>,
    /// After cross-attention.
    x2: Vec<f32>,
    /// The two halves of the GEGLU.
    gates: Vec<f32>,
}

/// What an attention's backward pass needs.
struct SavedAttention<'a> {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Cow<'a, Attended>,
}

/// What an attention gives.
#[derive(Clone)]
pub(super) struct Attended {
    y: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        transformer: &'a Transformer,
        shape: &[usize],
        context: &'a [f32],
        context_shape: &[usize],
    ) -> Self {
        Self { transformer, batch: shape[0], queries: shape[1] * shape[2], context, keys: context_shape[1] }
    }

    /// The result, and what was to be kept.
    pub(super) fn forward(&self, x: &[f32], keep: Option<Memory>) -> (Vec<f32>, Option<Kept>) {
        let (mut all, mut attended) = (Vec::new(), Vec::new());
        let mut tokens = self.proj_in(x);
        for block in &self.transformer.blocks {
            let saved = self.block(block, tokens, None);
            tokens = self.output(block, &saved);
            match keep {
                Some(Memory::Fast) => all.push(saved),
                Some(Memory::Lean) => {
                    attended.push([saved.attn1, saved.attn2].map(|a| a.attended.into_owned()));
                }
                None => {}
            }
        }
        let kept = keep.map(|memory| match memory {
            Memory::Fast => Kept::All(all),
            Memory::Lean => Kept::Attended(attended),
        });
        (linear::cpu::forward(&self.transformer.proj_out.0, &tokens, Some(x)), kept)
    }

    /// What every block's backward pass needs, computed again but for what is `known`, and but for the last block's output.
    fn recompute<'k>(&self, x: &[f32], known: &'k [[Attended; 2]]) -> Vec<Saved<'k>> {
        let blocks = &self.transformer.blocks;
        let mut all: Vec<Saved<'k>> = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            let tokens = match all.last() {
                Some(saved) => self.output(&blocks[i - 1], saved),
                None => self.proj_in(x),
            };
            all.push(self.block(block, tokens, known.get(i)));
        }
        all
    }

    fn proj_in(&self, x: &[f32]) -> Vec<f32> {
        let normed = group_norm::cpu::forward(&self.transformer.norm.0, x, self.batch);
        linear::cpu::forward(&self.transformer.proj_in.0, &normed, None)
    }

    /// All of a block but its output.
    fn block<'k>(
        &self,
        block: &TransformerBlock,
        x: Vec<f32>,
        known: Option<&'k [Attended; 2]>,
    ) -> Saved<'k> {
        let normed = layer_norm::cpu::forward(&block.norm1.0, &x);
        let known = known.map_or([None; 2], |known| known.each_ref().map(Some));
        let attn1 = self.attend(&block.attn1, [&normed, &normed], self.queries, known[0]);
        let x1 = linear::cpu::forward(&block.attn1.to_out.0, &attn1.attended.y, Some(&x));
        let normed = layer_norm::cpu::forward(&block.norm2.0, &x1);
        let attn2 = self.attend(&block.attn2, [&normed, self.context], self.keys, known[1]);
        let x2 = linear::cpu::forward(&block.attn2.to_out.0, &attn2.attended.y, Some(&x1));
        let normed = layer_norm::cpu::forward(&block.norm3.0, &x2);
        let gates = linear::cpu::forward(&block.ff_in.0, &normed, None);
        Saved { x, attn1, x1, attn2, x2, gates }
    }

    fn output(&self, block: &TransformerBlock, saved: &Saved<'_>) -> Vec<f32> {
        let gated = geglu::cpu::forward(&saved.gates, block.ff_out.0.in_features);
        linear::cpu::forward(&block.ff_out.0, &gated, Some(&saved.x2))
    }

    fn attend<'k>(
        &self,
        weights: &TransformerAttention,
        [x, to]: [&[f32]; 2],
        keys: usize,
        known: Option<&'k Attended>,
    ) -> SavedAttention<'k> {
        let q = linear::cpu::forward(&weights.to_q.0, x, None);
        let k = linear::cpu::forward(&weights.to_k.0, to, None);
        let v = linear::cpu::forward(&weights.to_v.0, to, None);
        let attended = known.map(Cow::Borrowed).unwrap_or_else(|| {
            let (y, log_sum_exp) = attention::cpu::forward(&self.shape(weights, keys), &q, &k, &v);
            Cow::Owned(Attended { y, log_sum_exp })
        });
        SavedAttention { q, k, v, attended }
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

    /// Gradients to `x`, if it is wanted, and to the last tokens of the context, as many as are wanted, from what the forward pass
    /// kept.
    pub(super) fn backward(
        &self,
        x: &[f32],
        kept: Option<&Kept>,
        dy: &[f32],
        wanted: (bool, usize),
    ) -> (Option<Vec<f32>>, Vec<f32>) {
        let known: &[_] = match kept {
            Some(Kept::All(saved)) => return self.backward_from(x, saved, dy, wanted),
            Some(Kept::Attended(known)) => known,
            None => &[],
        };
        self.backward_from(x, &self.recompute(x, known), dy, wanted)
    }

    fn backward_from(
        &self,
        x: &[f32],
        saved: &[Saved<'_>],
        dy: &[f32],
        (wants_dx, tail): (bool, usize),
    ) -> (Option<Vec<f32>>, Vec<f32>) {
        let mut dtail = vec![0f32; self.context.len() / self.keys * tail];
        let mut d = linear::cpu::input_gradient(&self.transformer.proj_out.0, dy, None);
        for (i, (block, saved)) in self.transformer.blocks.iter().zip(saved).enumerate().rev() {
            d = match self.block_backward(block, saved, &d, (&mut dtail, tail), wants_dx || i > 0) {
                Some(d) => d,
                None => return (None, dtail),
            };
        }
        let d = linear::cpu::input_gradient(&self.transformer.proj_in.0, &d, None);
        let dx = group_norm::cpu::input_gradient(&self.transformer.norm.0, x, self.batch, &d, Some(dy));
        (Some(dx), dtail)
    }

    /// The gradient to the block's input, if it is wanted; the gradient to the last `tail` tokens of the context is added to `dtail`.
    fn block_backward(
        &self,
        block: &TransformerBlock,
        saved: &Saved<'_>,
        dy: &[f32],
        (dtail, tail): (&mut Vec<f32>, usize),
        wants_dx: bool,
    ) -> Option<Vec<f32>> {
        let d = linear::cpu::input_gradient(&block.ff_out.0, dy, None);
        let d = geglu::cpu::input_gradient(&saved.gates, block.ff_out.0.in_features, &d);
        let d = linear::cpu::input_gradient(&block.ff_in.0, &d, None);
        let dx2 = layer_norm::cpu::input_gradient(&block.norm3.0, &saved.x2, &d, Some(dy));

        let [dq, dk, dv] = self.attend_backward(&block.attn2, &saved.attn2, &dx2, (self.keys, tail));
        *dtail = linear::cpu::input_gradient(&block.attn2.to_k.0, &dk, Some(dtail));
        *dtail = linear::cpu::input_gradient(&block.attn2.to_v.0, &dv, Some(dtail));
        if !wants_dx {
            return None;
        }
        let d = linear::cpu::input_gradient(&block.attn2.to_q.0, &dq, None);
        let dx1 = layer_norm::cpu::input_gradient(&block.norm2.0, &saved.x1, &d, Some(&dx2));
        drop((dx2, dq));

        let keys = (self.queries, self.queries);
        let [dq, dk, dv] = self.attend_backward(&block.attn1, &saved.attn1, &dx1, keys);
        let d = linear::cpu::input_gradient(&block.attn1.to_q.0, &dq, None);
        let d = linear::cpu::input_gradient(&block.attn1.to_k.0, &dk, Some(&d));
        let d = linear::cpu::input_gradient(&block.attn1.to_v.0, &dv, Some(&d));
        Some(layer_norm::cpu::input_gradient(&block.norm1.0, &saved.x, &d, Some(&dx1)))
    }

    /// `[dq, dk, dv]`, the latter two of the last keys, as many as are wanted.
    fn attend_backward(
        &self,
        weights: &TransformerAttention,
        saved: &SavedAttention<'_>,
        dy: &[f32],
        (keys, wanted): (usize, usize),
    ) -> [Vec<f32>; 3] {
        let d = linear::cpu::input_gradient(&weights.to_out.0, dy, None);
        let SavedAttention { q, k, v, attended } = saved;
        let Attended { y, log_sum_exp } = &**attended;
        let saved = attention::backward::Saved { q, k, v, y, log_sum_exp };
        attention::backward::input_gradients(&self.shape(weights, keys), &saved, &d, keys - wanted..keys)
    }
}
