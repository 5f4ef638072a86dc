//! HiPer (Han et al., "Highly Personalized Text Embedding for Image Manipulation by Stable Diffusion",
//! [arXiv 2303.08767](https://arxiv.org/abs/2303.08767)): learn the subject of one picture in the last few tokens of a text
//! embedding, then edit the picture with a sentence. The network stays as it is.
//!
//! The embedding of a source text is cut in two, `e_src = [e_src′; e_hper]`: a *semantic head* and, in the last `N` tokens, a
//! *HiPer tail*. The diffusion loss of the one picture moves the tail alone,
//!
//! ```text
//! e_hper* = argmin ‖ε − ε_θ(x_t, t, [e_src′; e_hper])‖²   over noise ε and timestep t,   x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε
//! ```
//!
//! and the learned tail, times 0.8, behind another sentence's head, `[e_tgt′; 0.8 e_hper*]`, is the conditioning of the edit.
//!
//! | here | in the paper |
//! | --- | --- |
//! | [`TextEmbedding::split`] | the head `e_src′` and the tail `e_hper` |
//! | [`NoiseSchedule`] | `x_t` |
//! | [`NoisePredictor`] | `ε_θ`, and the loss with its gradient to the tail |
//! | [`Personalisation`] | the argmin, with [`Adam`], [`Checkpoint`]s and exact resumption; of several subjects in a batch |
//! | [`compose`] | the conditioning of the edit |
//! | [`HiperFile`] | `e_hper*` on disk |
//!
//! # Your network
//!
//! The network is anything that implements [`NoisePredictor`]; a closure is enough. Random numbers come from
//! [`TorchGenerator`], so that a seed means here what it means in PyTorch.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use hiper_core::{
//!     DEFAULT_TAIL_SCALE, HiperFile, NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType,
//!     TextEmbedding, TorchGenerator, compose,
//! };
//!
//! # fn main() -> hiper_core::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("hiper.safetensors");
//! // A "network" that answers with the text's mean: enough to see the loop run. Yours takes latents [1, 4, h, w], a timestep
//! // and a text embedding [1, T, D], and predicts noise [1, 4, h, w].
//! let network =
//!     |latents: &Tensor, _timestep: f64, text: &Tensor| latents.zeros_like()?.broadcast_add(&text.mean_all()?);
//!
//! // What your VAE says of the picture, and your text encoder of "a standing dog" and "a sitting dog".
//! let device = Device::Cpu;
//! let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &device)?;
//! let source = TextEmbedding::new(Tensor::ones((1, 77, 16), DType::F32, &device)?)?;
//! let target = TextEmbedding::new(Tensor::zeros((1, 77, 16), DType::F32, &device)?)?;
//!
//! let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
//! let config = PersonalisationConfig { train_steps: 10, ..Default::default() };
//! let mut run = Personalisation::new(config, &latents, &source, schedule, TorchGenerator::new(0))?;
//! run.check_gradient(&network)?.ensure(1e-2)?; // candle can lose gradients without a word
//! while let Some(step) = run.step(&network)? {
//!     println!("step {} loss {:.4}", step.step, step.loss);
//! }
//! HiperFile { tail: run.tail().clone(), metadata: Default::default() }.save(&path)?;
//!
//! let edit = compose(&target, run.tail(), DEFAULT_TAIL_SCALE)?; // the conditioning of your sampler
//! assert_eq!(edit.dims(), [1, 77, 16]);
//! # Ok(())
//! # }
//! ```
//!
//! `examples/candle_transformers_unet` drives the Stable Diffusion UNet of candle-transformers, whose own gradient is wrong.
//!
//! # Invariants
//!
//! No network access, no printing, no environment variables; the filesystem only in [`HiperFile`], [`Checkpoint`],
//! [`write_conditioning`] and [`write_atomically`]. Random draws are always an argument. A step that fails changes nothing.

mod adam;
mod embedding;
mod error;
mod file;
mod gradient_check;
mod noise_schedule;
mod optimisation;
mod personalisation;
mod predictor;
mod rng;

pub use adam::{Adam, AdamConfig};
pub use embedding::{DEFAULT_N_HIPER, DEFAULT_TAIL_SCALE, HiperEmbedding, TextEmbedding, compose};
pub use error::{Error, Result};
pub use file::{Checkpoint, HiperFile, HiperMetadata, write_atomically, write_conditioning};
pub use gradient_check::{GradientCheck, GradientCheckConfig, check_gradient};
pub use noise_schedule::{NoiseSchedule, PredictionType};
pub use optimisation::{Draw, Optimised, Step, TailOptimisation, optimise_step_by_step};
pub use personalisation::{Event, Outcome, Personalisation, PersonalisationConfig, RunControl};
pub use predictor::{LossAndGradient, NoisePredictor, TailLoss};
pub use rng::{GeneratorState, TorchGenerator};
