//! Stable Diffusion as a library: text encoder, UNet, autoencoder, tokenizer, noise schedulers and loaders.
//!
//! Everything is read from the checkpoint's own configuration files (the diffusers layout), so that Stable Diffusion 1.4,
//! 1.5, 2.0, 2.1 and smaller siblings load without a change. Networks are frozen: gradients reach their inputs, never a
//! weight. No random number is drawn here: draws are arguments.
//!
//! ```no_run
//! use candle_core::Device;
//! use sd_models::{ModelFiles, StableDiffusion};
//!
//! # fn main() -> sd_models::Result<()> {
//! let files = ModelFiles::from_dir("stable-diffusion-v1-5")?;
//! let model = StableDiffusion::load(&files, &Device::Cpu)?;
//! let (tokens, encoder_hidden_states) = model.encode_prompt("a dog sitting on the beach")?;
//! println!("{} tokens, {:?}", tokens.num_tokens, encoder_hidden_states.dims());
//! # Ok(())
//! # }
//! ```

#[cfg(target_endian = "big")]
compile_error!("weights are read where the file has them, and it has them little-endian");

mod blocks;
mod clip_text_model;
mod error;
mod loader;
pub mod schedulers;
mod stable_diffusion;
mod tokenizer;
mod unet;
mod vae;

pub use clip_text_model::{ClipTextConfig, ClipTextModel};
pub use error::{Error, Result};
pub use hiper_kernels::{
    AdamConstants, AdamState, AlignedAllocator, KernelTime, Memory, cuda_device, forgo_sm90a, free_memory,
    is_card, keep_freed_memory, kernel_times, time_kernels,
};
pub use loader::{ModelFiles, Weights};
pub use stable_diffusion::{SampleConfig, StableDiffusion};
pub use tokenizer::{ClipTokenizer, Tokens};
pub use unet::{
    OneOrMany, OptimisationConfig, RecordedOptimisation, Target, UNet2DConditionConfig, UNet2DConditionModel,
};
pub use vae::{AutoencoderKl, AutoencoderKlConfig, DiagonalGaussian};
