//! Operators of *frozen* networks: a forward pass and the gradient to the input, nothing else.
//!
//! Personalisation never changes a network, so no operator here computes, or keeps anything for, the
//! gradient of a weight: weights are captured inside the operator and never become arguments of candle's
//! graph. Each operator is a folder: `mod.rs` (what it computes), `cpu.rs` (forward and vector–Jacobian product on a CPU),
//! `cuda.rs` (the kernels that a card runs for both) and `reference.rs` (the slow, obvious definition in `f64` that tests compare
//! with).
//!
//! # Layout
//! Pictures are channels-last, `[B, H, W, C]`; token sequences are `[B, S, C]`. Tensors are `f32`.
//! Non-contiguous arguments are accepted and copied.
//!
//! # Cards
//! With the feature `cuda`, tensors and layers on a card ([`cuda_device`]) pass through the same functions. There tensors may be
//! `f16` or `bf16` too, as the weights of the layers that they meet; sums are `f32`. Attention there is fast
//! for heads of 32, 40, 64, 80 and 160 in `f16` and `bf16`, and its gradient without a mask; else it stores the scores of one head
//! at a time.
//!
//! # Gradients
//! Every operator can be differentiated with [`candle_core::Tensor::backward`]. This is not a matter of
//! course: candle-nn's `softmax_last_dim` and fused `layer_norm` are applied without a backward pass and
//! silently cut the graph.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use hiper_kernels::Linear;
//!
//! # fn main() -> candle_core::Result<()> {
//! let weight = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
//! let linear = Linear::new(&weight, None)?;
//! let x = Var::from_vec(vec![1f32, 2.0], (1, 2), &Device::Cpu)?;
//! let grads = linear.forward(&x)?.sum_all()?.backward()?;
//! assert_eq!(grads.get(&x).unwrap().to_vec2::<f32>()?, [[3.0, 3.0]]);
//! # Ok(())
//! # }
//! ```

mod activation;
mod adam;
mod allocator;
mod attention;
mod conv2d;
mod cpu;
mod elementwise;
mod error;
mod frozen;
mod geglu;
mod gpu;
mod group_norm;
mod layer_norm;
mod linear;
mod loss;
mod memory;
mod random;
mod resnet_block;
mod tape;
#[cfg(test)]
mod testing;
mod timestep;
mod transformer;
mod upsample;
mod weight;

pub use activation::{Activation, activation};
pub use adam::{AdamConstants, AdamState};
pub use allocator::{AlignedAllocator, keep_freed_memory};
pub use attention::{AttentionConfig, AttentionMask, attention};
pub use candle_core::Result;
pub use conv2d::{Conv2d, Conv2dConfig, Padding};
pub use error::Error;
pub use geglu::geglu;
pub use gpu::{
    KernelTime, Replay, cuda_device, forgo_sm90a, free_memory, is_card, kernel_times, time_kernels,
};
#[cfg(feature = "host-kernels")]
pub use gpu::{host::on_host, test_card::on_test_device};
pub use group_norm::GroupNorm;
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use loss::{MseLoss, mse_loss};
pub use memory::Memory;
pub use random::{Drawn, GENERATOR_STATE, add_noise, draw_noise, velocity};
pub use resnet_block::ResnetBlock;
pub use tape::{Tape, Value};
pub use timestep::timestep_embedding;
pub use transformer::{Context, Transformer, TransformerAttention, TransformerBlock};
pub use upsample::{upsample_nearest2d, upsample_nearest2d_on};
pub use weight::Weight;
