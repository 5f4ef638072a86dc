//! The text that transformers attend to, and where its gradient goes.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::TransformerBlock;
use super::keys_and_values::KeysAndValues;
use crate::elementwise::concatenate;
use crate::tape::{Tape, Value};

/// The context of [`Transformer`](super::Transformer)s: `[B, T, D]`, of which the last `N` tokens may have a gradient.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use hiper_kernels::Context;
///
/// # fn main() -> candle_core::Result<()> {
/// let head = Tensor::zeros((1, 72, 768), DType::F32, &Device::Cpu)?;
/// let tail = Var::zeros((1, 5, 768), DType::F32, &Device::Cpu)?;
/// let context = Context::of_head_and_tail(&head, &tail)?;
/// assert_eq!(context.dims(), [1, 77, 768]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Context {
    /// All tokens, cut from the graph.
    pub(super) tokens: Tensor,
    /// The last of them, in the graph: gradients go there.
    pub(super) tail: Tensor,
    /// What transformers make of the tokens, if that was computed before them.
    pub(super) keys_and_values: Option<Arc<KeysAndValues>>,
}

impl Context {
    /// All tokens `[B, T, D]` alike.
    pub fn whole(tokens: &Tensor) -> Self {
        Self { tokens: tokens.detach(), tail: tokens.clone(), keys_and_values: None }
    }

    /// A frozen `head [B, T − N, D]` and a `tail [B, N, D]`: the head's gradient is not computed.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn of_head_and_tail(head: &Tensor, tail: &Tensor) -> Result<Self> {
        let tokens = concatenate([&head.detach(), &tail.detach()], 1)?;
        Ok(Self { tokens, tail: tail.clone(), keys_and_values: None })
    }

    /// The same context, with the keys and values that the blocks make of it, all of them by one product, and the gradient of its
    /// tail by another: on a card, in 16 bits, if their `to_k` and `to_v` lie
    /// [side by side](crate::Linear::all_side_by_side), in this order. Elsewhere nothing is computed before its time.
    ///
    /// # Errors
    /// When the tokens are not as wide as the layers want.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use hiper_kernels::Context;
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let context = Context::whole(&Tensor::zeros((1, 77, 768), DType::F32, &Device::Cpu)?);
    /// assert_eq!(context.project(&[])?.dims(), [1, 77, 768]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn project(&self, blocks: &[Arc<TransformerBlock>]) -> Result<Self> {
        let keys_and_values = match &self.keys_and_values {
            Some(known) => Some(known.clone()),
            None => KeysAndValues::of(blocks, &self.tokens)?.map(Arc::new),
        };
        Ok(Self { keys_and_values, ..self.clone() })
    }

    /// As an input of a tape: what [`Transformer::on`](super::Transformer::on) takes beside it. Where keys and values were
    /// [computed before](Self::project), every one of their blocks must have a part in what is differentiated.
    ///
    /// # Errors
    /// What the device says.
    pub fn on(&self, tape: &mut Tape) -> Result<Value> {
        let tail = tape.input(&self.tail);
        Ok(match &self.keys_and_values {
            Some(keys_and_values) => keys_and_values.on(tape, &tail),
            None => tail,
        })
    }

    /// `[B, T, D]`.
    pub fn dims(&self) -> &[usize] {
        self.tokens.dims()
    }
}
