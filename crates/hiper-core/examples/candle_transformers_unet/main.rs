//! HiPer on the Stable Diffusion UNet of candle-transformers.
//!
//! ```text
//! cargo run --release -p hiper-core --example candle_transformers_unet
//! ```
//!
//! A closure makes any network a [`NoisePredictor`], but candle-transformers' UNet gives a wrong gradient without a word.
//! `check_gradient` finds that out; `differentiable.rs` is the same network with a whole gradient; and a network that predicts
//! one way and differentiates another implements `losses_and_gradients`. Small random widths stand for a checkpoint.

#![allow(clippy::print_stdout, reason = "an example talks")]

mod differentiable;
mod random_weights;

use candle_core::{Device, Tensor};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use hiper_core::{
    DEFAULT_TAIL_SCALE, LossAndGradient, NoisePredictor, NoiseSchedule, Personalisation,
    PersonalisationConfig, PredictionType, TailLoss, TextEmbedding, TorchGenerator, compose,
};

use differentiable::DifferentiableUNet;
use random_weights::random_weights;

/// A gradient in `f32` against differences in `f32`.
const TOLERANCE: f64 = 1e-2;

/// Predictions from candle-transformers' model, gradients from its differentiable twin.
struct Network {
    unet: UNet2DConditionModel,
    differentiable: DifferentiableUNet,
}

impl NoisePredictor for Network {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let network =
            |latents: &Tensor, timestep: f64, text: &Tensor| self.unet.forward(latents, timestep, text);
        network.predict_noise(latents, timesteps, encoder_hidden_states)
    }

    fn losses_and_gradients(&self, steps: &[TailLoss<'_>]) -> hiper_core::Result<Vec<LossAndGradient>> {
        let network = |latents: &Tensor, timestep: f64, text: &Tensor| {
            self.differentiable.forward(latents, timestep, text)
        };
        network.losses_and_gradients(steps)
    }
}

/// Stable Diffusion's structure at a fraction of its width.
fn small_config() -> UNet2DConditionModelConfig {
    let block =
        |out_channels, use_cross_attn| BlockConfig { out_channels, use_cross_attn, attention_head_dim: 4 };
    UNet2DConditionModelConfig {
        blocks: vec![block(32, Some(1)), block(64, Some(1)), block(64, None)],
        cross_attention_dim: 24,
        ..Default::default()
    }
}

fn main() -> hiper_core::Result<()> {
    let (device, config) = (Device::Cpu, small_config());
    let weights = random_weights(&device);
    let network = Network {
        unet: UNet2DConditionModel::new(weights.clone(), 4, 4, false, config.clone())?,
        differentiable: DifferentiableUNet::new(weights, 4, 4, &config)?,
    };

    // What a VAE and a text encoder would say.
    let mut generator = TorchGenerator::new(0);
    let latents = generator.randn_tensor(&[1, 4, 16, 16], &device)?;
    let source = TextEmbedding::new(generator.randn_tensor(&[1, 77, config.cross_attention_dim], &device)?)?;
    let target = TextEmbedding::new(generator.randn_tensor(&[1, 77, config.cross_attention_dim], &device)?)?;

    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
    let settings = PersonalisationConfig { train_steps: 20, ..Default::default() };
    let mut run = Personalisation::new(settings, &latents, &source, schedule, generator)?;

    let own = |latents: &Tensor, timestep: f64, text: &Tensor| network.unet.forward(latents, timestep, text);
    let check = run.check_gradient(&own)?;
    println!("candle-transformers' own gradient: off by {:.0} %", 100.0 * check.relative_error());
    if let Err(error) = check.ensure(TOLERANCE) {
        println!("  {error}");
    }
    let check = run.check_gradient(&network)?;
    println!("the differentiable twin's gradient: off by {:.2} %", 100.0 * check.relative_error());
    check.ensure(TOLERANCE)?;

    while let Some(step) = run.step(&network)? {
        println!("step {:2}  timestep {:3}  loss {:.4}", step.step, step.timestep, step.loss);
    }
    let edit = compose(&target, run.tail(), DEFAULT_TAIL_SCALE)?;
    let noise = network.predict_noise(&latents, &[500.0], &edit)?;
    println!("the edit's conditioning {:?}, its first prediction {:?}", edit.dims(), noise.dims());
    Ok(())
}
