//! The text that a transformer attends to, and where its gradient goes.

use candle_core::{Result, Tensor};

use crate::elementwise::concatenate;

/// The context of a [`Transformer`](super::Transformer): `[B, T, D]`, of which the last `N` tokens may have a gradient.
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
#[derive(Debug, Clone)]
pub struct Context {
    /// All tokens, cut from the graph.
    pub(super) tokens: Tensor,
    /// The last of them, in the graph: gradients go there.
    pub(super) tail: Tensor,
}

impl Context {
    /// All tokens `[B, T, D]` alike.
    pub fn whole(tokens: &Tensor) -> Self {
        Self { tokens: tokens.detach(), tail: tokens.clone() }
    }

    /// A frozen `head [B, T − N, D]` and a `tail [B, N, D]`: the head's gradient is not computed.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn of_head_and_tail(head: &Tensor, tail: &Tensor) -> Result<Self> {
        Ok(Self { tokens: concatenate([&head.detach(), &tail.detach()], 1)?, tail: tail.clone() })
    }

    /// The last tokens, in the graph.
    pub fn tail(&self) -> &Tensor {
        &self.tail
    }

    /// `[B, T, D]`.
    pub fn dims(&self) -> &[usize] {
        self.tokens.dims()
    }
}
