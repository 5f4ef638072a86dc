//! The UNet as hiper-core sees it.

use std::cell::RefCell;

use candle_core::Tensor;
use hiper_core::{LossAndGradient, NoisePredictor, TailLoss};
use sd_models::{RecordedLoss, UNet2DConditionModel, is_card};

/// The UNet; on a card, a step is recorded and replayed.
pub struct Network<'a> {
    unet: &'a UNet2DConditionModel,
    /// The step of as many subjects, with pictures of one size.
    recorded: RefCell<Option<RecordedLoss<'a>>>,
}

impl<'a> Network<'a> {
    /// Of a checkpoint.
    pub fn new(unet: &'a UNet2DConditionModel) -> Self {
        Self { unet, recorded: RefCell::default() }
    }

    /// Losses and gradients to the whole text.
    fn replay(&self, steps: &[TailLoss<'_>]) -> candle_core::Result<(Vec<f32>, Tensor)> {
        let stack = |of: fn(&TailLoss<'_>) -> candle_core::Result<Tensor>| {
            Tensor::cat(&steps.iter().map(of).collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let latents = stack(|step| Ok(step.noisy_latents.clone()))?;
        let target = stack(|step| Ok(step.target.clone()))?;
        let text = stack(|step| step.encoder_hidden_states(step.tail))?;
        let timesteps: Vec<f64> = steps.iter().map(|step| step.timestep).collect();
        let mut recorded = self.recorded.borrow_mut();
        let recorded = match recorded.take().filter(|recorded| recorded.fits(&latents, &text)) {
            Some(fitting) => recorded.insert(fitting),
            None => recorded.insert(RecordedLoss::new(self.unet, &latents, &text)?),
        };
        Ok(recorded.run(&latents, &timesteps, &text, &target)?)
    }
}

impl NoisePredictor for Network<'_> {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        text: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.unet.forward(latents, timesteps, text)?)
    }

    fn losses_and_gradients(&self, steps: &[TailLoss<'_>]) -> hiper_core::Result<Vec<LossAndGradient>> {
        if !steps.first().is_some_and(|step| is_card(step.head.device())) {
            return Differentiated(self.unet).losses_and_gradients(steps);
        }
        let (losses, gradients) = self.replay(steps)?;
        let each = steps.iter().zip(losses).enumerate().map(|(i, (step, loss))| {
            let n_hiper = step.tail.dim(0)?;
            let gradient = gradients.get(i)?.narrow(0, gradients.dim(1)? - n_hiper, n_hiper)?;
            let tail_gradient = gradient.flatten_all()?.to_vec1()?;
            Ok(LossAndGradient { loss: f64::from(loss), tail_gradient })
        });
        each.collect()
    }
}

/// The same, differentiated anew each step: what hiper-core does with any network.
struct Differentiated<'a>(&'a UNet2DConditionModel);

impl NoisePredictor for Differentiated<'_> {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        text: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.forward(latents, timesteps, text)?)
    }
}
