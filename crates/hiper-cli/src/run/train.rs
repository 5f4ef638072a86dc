//! The loop: steps of all subjects together, logs, checkpoints, previews, and Ctrl-C.

use std::time::Instant;

use candle_core::Device;
use hiper_core::{HiperEmbedding, HiperMetadata, Personalisation, Step};
use sd_models::UNet2DConditionModel;

use super::checkpoints::{self, Checkpoints};
use super::network::Network;
use super::step_log::StepLog;
use crate::console::{Console, Event, Loss, Losses, SubjectLoss};
use crate::output::Output;
use crate::{Error, Result, interrupt};

/// Weight of the past in the running mean of the loss; it forgets in about 20 steps.
const SMOOTHING: f64 = 0.95;

/// Draws a preview of a tail so far; called with the run's place among the runs and its step.
pub type Preview<'a> = dyn FnMut(usize, usize, &HiperEmbedding) -> Result<()> + 'a;

/// One subject's run and the folder it writes to.
pub struct Run<'a> {
    /// What the subject is called, when it is one of several.
    pub name: Option<&'a str>,
    /// The tail, the optimiser and the random numbers.
    pub personalisation: Personalisation,
    /// Where it writes.
    pub output: &'a Output<'a>,
    /// Where the tail comes from: photo, text, model, seed.
    pub origin: HiperMetadata,
    /// Why it cannot go on.
    pub failure: Option<hiper_core::Error>,
}

impl Run<'_> {
    /// Takes up the newest whole checkpoint, if there is one.
    ///
    /// # Errors
    /// When the checkpoint belongs to another run.
    pub fn resume(&mut self, checkpoints: &Checkpoints, console: &Console) -> Result<()> {
        match checkpoints.newest(self.personalisation.config().train_steps, console) {
            Some((step, path, checkpoint)) => {
                console.event(&Event::Resumed { file: &path.display().to_string(), step });
                self.personalisation = self.personalisation.clone().resume(checkpoint)?;
            }
            None => console.warn(format!(
                "{}: no checkpoint to resume from, starting afresh",
                self.output.folder().display()
            )),
        }
        Ok(())
    }

    /// What the tail's file says of it.
    pub fn metadata(&self) -> HiperMetadata {
        HiperMetadata {
            train_steps: Some(self.personalisation.steps_taken()),
            learning_rate: Some(self.personalisation.config().adam.learning_rate),
            final_loss: self.personalisation.last_loss(),
            ..self.origin.clone()
        }
    }

    fn is_learning(&self) -> bool {
        self.failure.is_none() && !self.personalisation.is_finished()
    }

    fn save_checkpoint(&self) -> Result<()> {
        checkpoints::save(&self.personalisation, self.metadata(), self.output).map(|_| ())
    }
}

/// Runs in a batch: every step is one pass of the network.
pub struct Training<'a> {
    /// The network.
    pub unet: &'a UNet2DConditionModel,
    /// Where it computes.
    pub device: &'a Device,
    /// What it tells.
    pub console: &'a Console,
    /// Steps of the optimiser.
    pub train_steps: usize,
    /// Steps between checkpoints, 0 for none.
    pub checkpoint_every: usize,
    /// Steps between previews, 0 for none.
    pub preview_every: usize,
}

impl Training<'_> {
    /// Takes all steps that are left. A run that cannot go on says why in its `failure`; the others finish.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after Ctrl-C, when checkpoints are written; what the network, the disk or a preview gives.
    pub fn finish(&self, runs: &mut [Run<'_>], preview: &mut Preview<'_>) -> Result<()> {
        let open = |run: &Run<'_>| StepLog::after(run.personalisation.steps_taken(), run.output);
        let mut logs = runs.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut losses = vec![RunningMean::default(); runs.len()];
        let mut pace = Pace::default();
        let network = Network::new(self.unet, self.device);
        self.start(runs);
        while runs.iter().any(Run::is_learning) {
            if interrupt::requested() {
                return Err(self.interrupted(runs));
            }
            let started = Instant::now();
            let rounds = self.steps_together(runs, &network)?;
            let seconds = started.elapsed().as_secs_f64() / rounds.len().max(1) as f64;
            for (to_come, steps) in (0..rounds.len()).rev().zip(&rounds) {
                for &(i, step) in steps {
                    logs[i].append(step, seconds)?;
                    losses[i].add(step.loss);
                }
                let position = self.position(runs).saturating_sub(to_come);
                let seconds_left = pace.mean_seconds(seconds) * (self.train_steps - position) as f64;
                self.tell(runs, steps, &losses, Time { position, seconds, seconds_left });
            }
            // Where one is due, no round comes after.
            let last = rounds.last().map(Vec::as_slice).unwrap_or_default();
            for &(i, _) in last.iter().filter(|(_, step)| due(step.step, self.checkpoint_every)) {
                runs[i].save_checkpoint()?;
            }
            for &(i, step) in last.iter().filter(|(_, step)| due(step.step, self.preview_every)) {
                self.console.finish();
                preview(i, step.step, runs[i].personalisation.tail())?;
                self.start(runs);
            }
        }
        self.console.finish();
        Ok(())
    }

    /// Steps of every run that has some left, up to the next checkpoint or preview at most: in every round, the runs' places
    /// and what they did.
    fn steps_together(&self, runs: &mut [Run<'_>], network: &Network<'_>) -> Result<Vec<Vec<(usize, Step)>>> {
        let learning = runs.iter_mut().enumerate().filter(|(_, run)| run.is_learning());
        let mut learning: Vec<(usize, &mut Run<'_>)> = learning.collect();
        let to_next = |every: usize, run: &Run<'_>| match every {
            0 => usize::MAX,
            every => every - run.personalisation.steps_taken() % every,
        };
        let halts = [self.checkpoint_every, self.preview_every];
        let next = learning.iter().flat_map(|(_, run)| halts.map(|every| to_next(every, run)));
        let most = next.min().unwrap_or(1);
        let mut personalisations: Vec<&mut Personalisation> =
            learning.iter_mut().map(|(_, run)| &mut run.personalisation).collect();
        let results = Personalisation::steps_together(&mut personalisations, network, most)?;
        let mut rounds: Vec<Vec<(usize, Step)>> = vec![];
        for ((i, run), result) in learning.into_iter().zip(results) {
            match result {
                Ok(steps) => {
                    rounds.resize_with(rounds.len().max(steps.len()), Vec::new);
                    rounds.iter_mut().zip(steps).for_each(|(round, step)| round.push((i, step)));
                }
                Err(error) => {
                    if let Some(name) = run.name {
                        self.console.warn(format!("{name}: {error}"));
                    }
                    run.failure = Some(error);
                }
            }
        }
        Ok(rounds)
    }

    fn start(&self, runs: &[Run<'_>]) {
        self.console.start(self.train_steps, self.position(runs), "learning");
    }

    /// The step of the subject that is least far.
    fn position(&self, runs: &[Run<'_>]) -> usize {
        let going = runs.iter().filter(|run| run.failure.is_none());
        going.map(|run| run.personalisation.steps_taken()).min().unwrap_or(self.train_steps)
    }

    fn tell(&self, runs: &[Run<'_>], steps: &[(usize, Step)], losses: &[RunningMean], time: Time) {
        let loss = |i: usize, step: Step| Loss {
            timestep: step.timestep,
            loss: step.loss,
            smoothed_loss: losses[i].mean(),
        };
        let named = steps.iter().filter_map(|&(i, step)| {
            Some(SubjectLoss { name: runs[i].name?, step: step.step, loss: loss(i, step) })
        });
        let subjects: Vec<SubjectLoss<'_>> = named.collect();
        let losses = match *steps {
            [] => return,
            [(i, step)] if subjects.is_empty() => Losses::One(loss(i, step)),
            _ => Losses::Batch { subjects: &subjects },
        };
        let Time { position: step, seconds, seconds_left } = time;
        self.console.event(&Event::Step {
            step,
            train_steps: self.train_steps,
            losses,
            seconds,
            seconds_left,
        });
    }

    fn interrupted(&self, runs: &[Run<'_>]) -> Error {
        self.console.finish();
        let stored = runs.iter().filter(|run| run.failure.is_none() && run.personalisation.steps_taken() > 0);
        match stored.map(|run| run.save_checkpoint().map(|()| run.personalisation.steps_taken())).collect() {
            Ok(steps) => Error::Interrupted(Vec::into_iter(steps).min()),
            Err(error) => error,
        }
    }
}

/// How far all are, how long the step took, and how long the rest will.
struct Time {
    position: usize,
    seconds: f64,
    seconds_left: f64,
}

fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The exponential mean of the losses so far, without the pull to zero at the start.
#[derive(Clone, Copy, Default)]
struct RunningMean {
    steps: i32,
    loss: f64,
}

impl RunningMean {
    fn add(&mut self, loss: f64) {
        self.steps += 1;
        self.loss = SMOOTHING * self.loss + (1.0 - SMOOTHING) * loss;
    }

    fn mean(&self) -> f64 {
        self.loss / (1.0 - SMOOTHING.powi(self.steps))
    }
}

/// How long steps take.
#[derive(Default)]
struct Pace {
    steps: u32,
    seconds: f64,
}

impl Pace {
    /// The mean duration of all steps so far.
    fn mean_seconds(&mut self, seconds: f64) -> f64 {
        self.steps += 1;
        self.seconds += seconds;
        self.seconds / f64::from(self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_equal_values_is_that_value() {
        let (mut loss, mut pace) = (RunningMean::default(), Pace::default());
        for _ in 0..50 {
            loss.add(0.7);
            assert!((loss.mean() - 0.7).abs() < 1e-12);
            assert!((pace.mean_seconds(2.0) - 2.0).abs() < 1e-12);
        }
    }

    #[test]
    fn zero_means_never() {
        assert!(!due(5, 0) && due(10, 5) && !due(11, 5));
    }
}
