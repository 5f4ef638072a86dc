//! Noise schedulers, one file each, equal to the diffusers classes of the same name.
//!
//! A scheduler decides which timesteps the network sees and how a prediction moves the sample. All of them are built
//! from the checkpoint's own `scheduler_config.json`; as with diffusers' `from_config`, a field that the file lacks takes
//! the default *of the scheduler asked for*.

mod alphas;
mod config;
mod ddim;
mod ddpm;
mod dpm_solver_multistep;
mod euler;
mod pndm;
mod sigmas;
mod uni_pc_multistep;

use candle_core::Tensor;

pub use config::{BetaSchedule, PredictionType, SchedulerConfig, SchedulerKind, TimestepSpacing};

use crate::Result;

/// One sampling run's schedule and state.
pub trait Scheduler {
    /// The timesteps to predict at, in order; fractional for Euler's default spacing.
    fn timesteps(&self) -> &[f64];

    /// What standard normal latents are multiplied by to become the first sample.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// The network's input at step `step_index`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn scale_model_input(&self, sample: &Tensor, _step_index: usize) -> Result<Tensor> {
        Ok(sample.clone())
    }

    /// The sample after step `step_index`. Steps are taken in order. `noise(shape)` gives standard normal noise, and is
    /// called only by schedulers that add some.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        noise: &mut Noise<'_>,
    ) -> Result<Tensor>;
}

/// Where a scheduler's noise comes from: standard normal values of a shape.
pub type Noise<'a> = dyn FnMut(&[usize]) -> candle_core::Result<Tensor> + 'a;

impl SchedulerKind {
    /// Builds the scheduler for `num_inference_steps` steps.
    ///
    /// # Errors
    /// When the configuration asks for what this scheduler does not do here, or the number of steps is 0 or above the
    /// number of training timesteps.
    ///
    /// ```
    /// use sd_models::schedulers::{SchedulerConfig, SchedulerKind};
    ///
    /// # fn main() -> sd_models::Result<()> {
    /// let config = SchedulerConfig::stable_diffusion();
    /// let ddim = SchedulerKind::Ddim.build(&config, 50)?;
    /// assert_eq!(ddim.timesteps()[..2], [981.0, 961.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn build(self, config: &SchedulerConfig, num_inference_steps: usize) -> Result<Box<dyn Scheduler>> {
        config.validate(self, num_inference_steps)?;
        Ok(match self {
            Self::Ddim => Box::new(ddim::Ddim::new(config, num_inference_steps)),
            Self::Ddpm => Box::new(ddpm::Ddpm::new(config, num_inference_steps)),
            Self::Pndm => Box::new(pndm::Pndm::new(config, num_inference_steps)),
            Self::Euler => Box::new(euler::Euler::new(config, num_inference_steps, euler::Kind::Plain)),
            Self::EulerAncestral => {
                Box::new(euler::Euler::new(config, num_inference_steps, euler::Kind::Ancestral))
            }
            Self::DpmSolverMultistep => {
                Box::new(dpm_solver_multistep::DpmSolver::new(config, num_inference_steps))
            }
            Self::UniPc => Box::new(uni_pc_multistep::UniPc::new(config, num_inference_steps)),
        })
    }
}

/// `a·x + b·y`, the shape of nearly every update.
fn combine(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(((x * a)? + (y * b)?)?)
}
