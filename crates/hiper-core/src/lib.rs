//! HiPer (Han et al., "Highly Personalized Text Embedding for Image Manipulation by Stable Diffusion",
//! [arXiv 2303.08767](https://arxiv.org/abs/2303.08767)): learn the subject of one picture in the last few tokens of a text
//! embedding, then edit the picture with a sentence. The network stays as it is.
//!
//! * [`TextEmbedding`] splits into a *semantic head* and a *HiPer tail* ([`HiperEmbedding`]).
//! * [`Personalisation`] optimises the tail alone with the diffusion loss (equation 4 of the paper).
//! * [`compose`] puts a learned tail behind another sentence's head (section 3.2).
//!
//! The network is anything that implements [`NoisePredictor`]; a closure is enough.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use hiper_core::{NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType, TextEmbedding, TorchGenerator};
//!
//! # fn main() -> hiper_core::Result<()> {
//! // A "network" that answers with the text's mean: enough to see the loop run.
//! let network = |latents: &Tensor, _timestep: f64, text: &Tensor| latents.zeros_like()?.broadcast_add(&text.mean_all()?);
//!
//! let device = Device::Cpu;
//! let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &device)?;
//! let source = TextEmbedding::new(Tensor::ones((1, 77, 16), DType::F32, &device)?)?;
//! let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
//! let config = PersonalisationConfig { train_steps: 10, ..Default::default() };
//! let mut run = Personalisation::new(config, &latents, &source, schedule, TorchGenerator::new(0))?;
//! while let Some(step) = run.step(&network)? {
//!     println!("step {} loss {:.4}", step.step, step.loss);
//! }
//! let edit = hiper_core::compose(&source, run.tail(), hiper_core::DEFAULT_TAIL_SCALE)?;
//! assert_eq!(edit.dims(), [1, 77, 16]);
//! # Ok(())
//! # }
//! ```

mod adam;
mod embedding;
mod error;
mod file;
mod noise_schedule;
mod personalisation;
mod predictor;
mod rng;

pub use adam::{Adam, AdamConfig};
pub use embedding::{DEFAULT_N_HIPER, DEFAULT_TAIL_SCALE, HiperEmbedding, TextEmbedding, compose};
pub use error::{Error, Result};
pub use file::{Checkpoint, HiperFile, HiperMetadata, write_atomically, write_conditioning};
pub use noise_schedule::{NoiseSchedule, PredictionType};
pub use personalisation::{Personalisation, PersonalisationConfig, Step};
pub use predictor::{LossAndGradient, NoisePredictor, TailLoss, check_gradient};
pub use rng::{GeneratorState, TorchGenerator};
