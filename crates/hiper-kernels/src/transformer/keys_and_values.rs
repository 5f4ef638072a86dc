//! Keys and values of a text on a card: for all cross-attentions of a network by one product, and the gradient of the text's tail by
//! another. Layer by layer each product would have a few rows, and take as long as its weights need from memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor};

use super::{TransformerAttention, TransformerBlock};
use crate::attention::cuda::{TailParts, sum_parts, takes_parts};
use crate::frozen::FrozenFunction;
use crate::gpu::product::Rows;
use crate::gpu::{Array, Card, Gpu, Kept, on_card, with_views};
use crate::linear::LinearFunction;
use crate::linear::cuda::Joined;
use crate::tape::{Tape, Value};

/// In how many parts a cross-attention leaves the gradients of a tail: one number for all, so that they are summed at once. A block
/// has 16 tokens; a long tail has blocks enough in fewer parts.
fn splits(tail: usize) -> usize {
    (MOST_SPLITS / tail.div_ceil(16)).max(4)
}

const MOST_SPLITS: usize = 16;

/// Keys and values of `[B, T, D]` for some blocks: `[B, T, O]`, where `O` has the keys of the first block, its values, those of the
/// second, and so on.
pub(super) struct KeysAndValues {
    blocks: Vec<Arc<TransformerBlock>>,
    batch: usize,
    dtype: DType,
    values: Kept,
    /// While a backward pass goes through the blocks.
    gradients: Mutex<Option<Gradients>>,
}

/// Those of the last `N` tokens' keys and values.
struct Gradients {
    /// `[splits, B, N, O]`, in `f32`.
    parts: Kept,
    /// How many blocks have left theirs.
    blocks: usize,
}

impl KeysAndValues {
    /// None on a CPU, where no kernel of attention has the heads, or where the layers' weights lie elsewhere.
    pub(super) fn of(blocks: &[Arc<TransformerBlock>], context: &Tensor) -> Result<Option<Self>> {
        let (Some(first), Some(card)) = (blocks.first(), Card::of(context.device())?) else {
            return Ok(None);
        };
        let (dtype, batch) = (context.dtype(), context.dim(0)?);
        let takes = |attention: &TransformerAttention| {
            let head_dim = attention.to_k.0.out_features / attention.num_heads.max(1);
            takes_parts(head_dim, dtype, batch, MOST_SPLITS)
        };
        if !blocks.iter().all(|block| takes(&block.attn2)) {
            return Ok(None);
        }
        first.attn2.to_k.0.output_shape(context.dims())?;
        let values = on_card!(card, gpu => {
            let Some(layers) = Joined::of(&layers(blocks))? else { return Ok(None) };
            Kept::new(with_views(&gpu, [context], |[context]| layers.forward(&gpu, context))?)
        });
        Ok(Some(Self { blocks: blocks.to_vec(), batch, dtype, values, gradients: Mutex::default() }))
    }

    /// The tail `[B, N, D]`, for the blocks, on its tape.
    pub(super) fn on(self: &Arc<Self>, tape: &mut Tape, tail: &Value) -> Value {
        let (of_blocks, tensor) = (self.clone(), tail.tensor().clone());
        tape.step(&[tail], tensor.clone(), move |_| Ok(vec![Some(of_blocks.tail_gradient(&tensor)?)]))
    }

    /// What is a block's own.
    pub(super) fn of_block(self: &Arc<Self>, block: &TransformerBlock) -> Result<OfBlock> {
        let mut first = 0;
        for own in &self.blocks {
            let [keys, values] = [&own.attn2.to_k, &own.attn2.to_v].map(|layer| layer.0.out_features);
            if std::ptr::eq(own.as_ref(), block) {
                return Ok(OfBlock { all: self.clone(), first_columns: [first, first + keys] });
            }
            first += keys + values;
        }
        candle_core::bail!("transformer: its context was projected for other blocks")
    }

    /// From what the blocks left.
    fn tail_gradient(&self, tail: &Tensor) -> Result<Tensor> {
        let gradients = self.gradients().take().filter(|gradients| gradients.blocks == self.blocks.len());
        let Gradients { parts, .. } = gradients.ok_or_else(unfinished)?;
        on_card!(Card::needed(tail, "transformer")?, gpu => {
            let Some(layers) = Joined::of(&layers(&self.blocks))? else { return Err(unfinished()) };
            let sums = sum_parts(&gpu, parts.get::<Array<_>>()?.view(), splits(tail.dim(1)?), self.dtype)?;
            layers.input_gradient(&gpu, sums.view(), None)?.into_tensor(&gpu, tail.dims())
        })
    }

    fn gradients(&self) -> MutexGuard<'_, Option<Gradients>> {
        self.gradients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `O`.
    fn width(&self) -> usize {
        layers(&self.blocks).iter().map(|layer| layer.out_features).sum()
    }
}

/// The keys and values of one block.
pub(super) struct OfBlock {
    all: Arc<KeysAndValues>,
    /// Of the keys, and of the values.
    first_columns: [usize; 2],
}

impl OfBlock {
    pub(super) fn rows<G: Gpu>(&self) -> Result<[Rows<'_, G>; 2]> {
        let all = self.all.values.get::<Array<G>>()?;
        Ok(self.first_columns.map(|first| Rows::new(all.view().from(first), self.all.width())))
    }

    /// Calls `leave` with where the gradients of the last `tail` tokens go.
    pub(super) fn with_parts<G: Gpu, R>(
        &self,
        gpu: &G,
        tail: usize,
        leave: impl FnOnce(&TailParts<'_, G>) -> Result<R>,
    ) -> Result<R> {
        let Self { all, first_columns } = self;
        let (width, splits, mut gradients) = (all.width(), splits(tail), all.gradients());
        let Gradients { parts, blocks } = match &mut *gradients {
            Some(begun) => begun,
            none => none.insert(Gradients {
                parts: Kept::new(gpu.alloc(DType::F32, splits * all.batch * tail * width)?),
                blocks: 0,
            }),
        };
        *blocks += 1;
        let parts = parts.get::<Array<G>>()?.view();
        leave(&TailParts { parts, splits, width, first_columns: *first_columns })
    }
}

/// In the order in which their results lie.
fn layers(blocks: &[Arc<TransformerBlock>]) -> Vec<&LinearFunction> {
    blocks.iter().flat_map(|block| [block.attn2.to_k.0.as_ref(), block.attn2.to_v.0.as_ref()]).collect()
}

fn unfinished() -> candle_core::Error {
    candle_core::Error::Msg(
        "transformer: a gradient went past some of the blocks that the context was projected for".into(),
    )
}

#[cfg(test)]
mod tests;
