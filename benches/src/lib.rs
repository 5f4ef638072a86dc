//! The operators at Stable Diffusion 1.5's shapes, for criterion (`cargo bench -p hiper-benches`) and `cargo xtask bench`.

mod shapes;

use candle_core::{Device, Result, Tensor};

pub use shapes::for_each_operator;

/// What an operator must do at least, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Floating-point operations of the direct algorithm; Winograd's does with fewer.
    Flops(u64),
    /// Bytes to read and write when every tensor passes through memory once.
    Bytes(u64),
}

type Apply = dyn Fn(&Tensor) -> Result<Tensor>;

/// An operator with its input.
pub struct Operator {
    /// What and how large.
    pub name: String,
    /// Of the forward pass.
    pub forward_work: Work,
    /// Of the gradient to the input.
    pub gradient_work: Work,
    /// What [`Operator::apply`] takes.
    pub input: Tensor,
    apply: Box<Apply>,
}

impl Operator {
    /// The forward pass.
    ///
    /// # Errors
    /// What the operator gives.
    pub fn apply(&self, input: &Tensor) -> Result<Tensor> {
        (self.apply)(input)
    }
}

/// A tensor of small pseudo-random values, cheap to make and neither zero nor denormal.
///
/// # Errors
/// When it cannot be allocated.
pub fn filled(shape: &[usize]) -> Result<Tensor> {
    let values = (0..shape.iter().product::<usize>())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7 & 1023) as f32 / 1024.0 - 0.5);
    Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)
}
