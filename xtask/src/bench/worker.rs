//! What is measured by library calls, in a process of its own: `cargo xtask bench --worker PART`.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use hiper_benches::filled;
use sd_models::{AutoencoderKl, ModelFiles, UNet2DConditionModel};
use serde_json::{Value, json};

use super::{Args, operators};

const TIMESTEP: f64 = 500.0;
/// Tokens of a text.
const TOKENS: usize = 77;

/// A measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// One forward pass of the UNet, batch 1.
    Unet,
    /// The VAE's encoder.
    Encode,
    /// The VAE's decoder.
    Decode,
    /// Every operator, and the ceilings.
    Operators,
}

/// Measures, saying an event a step.
///
/// # Errors
/// When the checkpoint cannot be loaded.
pub fn run(part: Part, args: &Args) -> Result<()> {
    sd_models::keep_freed_memory();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads()).build_global()?;
    let files = || -> Result<ModelFiles> {
        Ok(ModelFiles::from_dir(args.model.as_ref().context("--worker needs --model")?)?)
    };
    let device = &Device::Cpu;
    // As `hiper` does: from outside its threads every operator would wake one and wait for it.
    rayon::scope(|_| match part {
        Part::Operators => operators::measure(args.steps),
        Part::Unet => {
            let unet = UNet2DConditionModel::load(&files()?, device)?;
            let size = args.size / AutoencoderKl::load(&files()?, device)?.config().vae_scale_factor();
            let latents = filled(&[1, unet.config().in_channels, size, size])?;
            let text = filled(&[1, TOKENS, unet.cross_attention_dim()])?;
            steps(args.steps, || Ok(unet.forward(&latents, &[TIMESTEP], &text)?))
        }
        Part::Encode => {
            let vae = AutoencoderKl::load(&files()?, device)?;
            let picture = filled(&[1, 3, args.size, args.size])?;
            steps(args.steps, || Ok(vae.encode(&picture)?.mean))
        }
        Part::Decode => {
            let vae = AutoencoderKl::load(&files()?, device)?;
            let size = args.size / vae.config().vae_scale_factor();
            let latents = filled(&[1, vae.config().latent_channels, size, size])?;
            steps(args.steps, || Ok(vae.decode(&latents)?))
        }
    })
}

fn steps(count: usize, step: impl Fn() -> Result<Tensor>) -> Result<()> {
    for _ in 0..count {
        let started = Instant::now();
        step()?;
        say(&json!({"event": "step", "seconds": started.elapsed().as_secs_f64()}))?;
    }
    Ok(())
}

/// Writes one event.
///
/// # Errors
/// When nobody listens.
pub fn say(event: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{event}")?;
    Ok(out.flush()?)
}
