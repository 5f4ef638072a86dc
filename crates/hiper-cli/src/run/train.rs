//! The loop: steps, log, checkpoints, previews, and Ctrl-C.

use std::time::Instant;

use candle_core::Tensor;
use hiper_core::{HiperEmbedding, HiperMetadata, Personalisation};

use super::checkpoints::{self, Checkpoints};
use super::step_log::StepLog;
use crate::console::{Console, Event};
use crate::model::Model;
use crate::output::Output;
use crate::{Error, Result, interrupt};

/// Weight of the past in the running mean of the loss; it forgets in about 20 steps.
const SMOOTHING: f64 = 0.95;

/// Draws a preview of the tail so far; called with the step.
pub type Preview<'a> = dyn FnMut(usize, &HiperEmbedding) -> Result<()> + 'a;

/// A run about to begin or to continue.
pub struct Training<'a> {
    /// The network.
    pub model: &'a Model,
    /// Where it writes.
    pub output: &'a Output<'a>,
    /// What it tells.
    pub console: &'a Console,
    /// Where the tail comes from: photo, text, model, seed.
    pub origin: HiperMetadata,
    /// Steps between checkpoints, 0 for none.
    pub checkpoint_every: usize,
    /// Steps between previews, 0 for none.
    pub preview_every: usize,
}

impl Training<'_> {
    /// Takes up the newest whole checkpoint, if there is one.
    ///
    /// # Errors
    /// When the folder cannot be read, or the checkpoint belongs to another run.
    pub fn resume(&self, run: Personalisation, checkpoints: &Checkpoints) -> Result<Personalisation> {
        match checkpoints.newest(run.config().train_steps, self.console) {
            Some((step, path, checkpoint)) => {
                self.console.event(&Event::Resumed { file: &path.display().to_string(), step });
                Ok(run.resume(checkpoint)?)
            }
            None => {
                self.console.warn(format!(
                    "{}: no checkpoint to resume from, starting afresh",
                    self.output.folder().display()
                ));
                Ok(run)
            }
        }
    }

    /// Takes all steps that are left.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after Ctrl-C, when a checkpoint is written; what the run, the disk or a preview gives.
    pub fn finish(&self, run: &mut Personalisation, preview: &mut Preview<'_>) -> Result<()> {
        let total = run.config().train_steps;
        let mut log = StepLog::after(run.steps_taken(), self.output)?;
        let unet = &self.model.sd.unet;
        let network =
            |latents: &Tensor, timestep: f64, text: &Tensor| Ok(unet.forward(latents, &[timestep], text)?);
        let mut pace = Pace::default();
        self.console.start(total, run.steps_taken(), "learning");
        loop {
            if interrupt::requested() {
                return Err(self.interrupted(run));
            }
            let started = Instant::now();
            let Some(step) = run.step(&network)? else { break };
            let seconds = started.elapsed().as_secs_f64();
            log.append(step, seconds)?;
            self.console.event(&Event::Step {
                step: step.step,
                train_steps: total,
                timestep: step.timestep,
                loss: step.loss,
                smoothed_loss: pace.smoothed_loss(step.loss),
                seconds,
                seconds_left: pace.mean_seconds(seconds) * (total - step.step) as f64,
            });
            if due(step.step, self.checkpoint_every) {
                checkpoints::save(run, self.metadata(run), self.output)?;
            }
            if due(step.step, self.preview_every) {
                self.console.finish();
                preview(step.step, run.tail())?;
                self.console.start(total, step.step, "learning");
            }
        }
        self.console.finish();
        Ok(())
    }

    /// What the tail's file says of it.
    pub fn metadata(&self, run: &Personalisation) -> HiperMetadata {
        HiperMetadata {
            train_steps: Some(run.steps_taken()),
            learning_rate: Some(run.config().adam.learning_rate),
            final_loss: run.last_loss(),
            ..self.origin.clone()
        }
    }

    fn interrupted(&self, run: &Personalisation) -> Error {
        self.console.finish();
        match run.steps_taken() {
            0 => Error::Interrupted(None),
            step => match checkpoints::save(run, self.metadata(run), self.output) {
                Ok(_) => Error::Interrupted(Some(step)),
                Err(error) => error,
            },
        }
    }
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Running means for the progress bar.
#[derive(Default)]
struct Pace {
    steps: i32,
    loss: f64,
    seconds: f64,
}

impl Pace {
    /// The exponential mean of the losses so far, without the pull to zero at the start.
    fn smoothed_loss(&mut self, loss: f64) -> f64 {
        self.steps += 1;
        self.loss = SMOOTHING * self.loss + (1.0 - SMOOTHING) * loss;
        self.loss / (1.0 - SMOOTHING.powi(self.steps))
    }

    /// The mean duration of all steps so far.
    fn mean_seconds(&mut self, seconds: f64) -> f64 {
        self.seconds += seconds;
        self.seconds / f64::from(self.steps.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_equal_losses_is_that_loss() {
        let mut pace = Pace::default();
        for _ in 0..50 {
            assert!((pace.smoothed_loss(0.7) - 0.7).abs() < 1e-12);
            assert!((pace.mean_seconds(2.0) - 2.0).abs() < 1e-12);
        }
    }

    #[test]
    fn zero_means_never() {
        assert!(!due(5, 0) && due(10, 5) && !due(11, 5));
    }
}
