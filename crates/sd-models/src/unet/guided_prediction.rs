//! The network's predictions along a sampling, with classifier-free guidance.

use candle_core::{DType, Tensor};
use hiper_kernels::{Context, Replay, is_card};

use super::UNet2DConditionModel;
use crate::Result;

/// Predictions for latents of one shape at one timestep after another, with one text: `ε_u + guidance_scale · (ε_c − ε_u)`
/// (Ho & Salimans, arXiv 2207.12598), or `ε_c` where the guidance is 1. On an NVIDIA card all launches of a prediction are recorded
/// once, and replayed.
pub(crate) struct GuidedPrediction<'a> {
    guided: Guided<'a>,
    recorded: Option<Recorded<'a>>,
}

/// Network, text and strength.
#[derive(Clone)]
struct Guided<'a> {
    unet: &'a UNet2DConditionModel,
    /// `[B, T, D]`, or `[2 B, T, D]`: the negative prompt's, then the prompt's.
    context: Context,
    /// None for no guidance.
    guidance_scale: Option<f64>,
}

/// What a recording reads and writes.
struct Recorded<'a> {
    latents: Tensor,
    sinusoids: Tensor,
    prediction: Tensor,
    replay: Replay<'a>,
}

impl<'a> GuidedPrediction<'a> {
    /// For latents of the shape of these; `[negative_prompt_embeds, prompt_embeds]`.
    ///
    /// # Errors
    /// When shapes disagree.
    pub(crate) fn new(
        unet: &'a UNet2DConditionModel,
        latents: &Tensor,
        [negative, positive]: [&Tensor; 2],
        guidance_scale: f64,
    ) -> Result<Self> {
        let guidance_scale = (guidance_scale != 1.0).then_some(guidance_scale);
        let encoder_hidden_states = match guidance_scale {
            Some(_) => Tensor::cat(&[negative, positive], 0)?,
            None => positive.clone(),
        };
        let context = Context::whole(&unet.precision.enter(&encoder_hidden_states)?);
        let mut guided = Guided { unet, context, guidance_scale };
        unet.check(&guided.input(latents)?, &[0.0], &encoder_hidden_states)?;
        guided.context = unet.layers()?.project(&guided.context)?;
        let recorded = is_card(latents.device()).then(|| guided.record(latents)).transpose()?;
        Ok(Self { guided, recorded })
    }

    /// The prediction for latents of that shape.
    ///
    /// # Errors
    /// What the device says.
    pub(crate) fn at(&self, latents: &Tensor, timestep: f64) -> Result<Tensor> {
        let sinusoids = self.guided.unet.sinusoids(&[timestep])?;
        let Some(recorded) = &self.recorded else { return self.guided.predict(latents, &sinusoids) };
        recorded.latents.slice_set(&latents.contiguous()?, 0, 0)?;
        recorded.sinusoids.slice_set(&sinusoids, 0, 0)?;
        recorded.replay.run()?;
        // The next run overwrites it; some schedulers look back.
        Ok(recorded.prediction.copy()?)
    }
}

impl<'a> Guided<'a> {
    /// The network's latents.
    fn input(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(match self.guidance_scale {
            Some(_) => Tensor::cat(&[latents, latents], 0)?,
            None => latents.clone(),
        })
    }

    fn predict(&self, latents: &Tensor, sinusoids: &Tensor) -> Result<Tensor> {
        let prediction = self.unet.forward_at(&self.input(latents)?, sinusoids, &self.context)?;
        let Some(guidance_scale) = self.guidance_scale else { return Ok(prediction) };
        let both = prediction.chunk(2, 0)?;
        Ok((&both[0] + ((&both[1] - &both[0])? * guidance_scale)?)?)
    }

    fn record(&self, latents: &Tensor) -> Result<Recorded<'a>> {
        let zeros = || Tensor::zeros(latents.shape(), DType::F32, latents.device());
        let (latents, prediction) = (zeros()?, zeros()?);
        let sinusoids = self.unet.sinusoids(&[0.0])?;
        let (guided, [x, t, y]) = (self.clone(), [&latents, &sinusoids, &prediction].map(Tensor::clone));
        let replay =
            Replay::new(latents.device(), move || y.slice_set(&guided.predict(&x, &t)?.contiguous()?, 0, 0))?;
        Ok(Recorded { latents, sinusoids, prediction, replay })
    }
}
