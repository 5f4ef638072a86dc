//! The optimisation loop.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};

use crate::{
    Adam, AdamConfig, Checkpoint, DEFAULT_N_HIPER, Error, GradientCheck, HiperEmbedding, HiperMetadata,
    NoisePredictor, NoiseSchedule, Optimised, Result, Step, TailLoss, TailOptimisation, TextEmbedding,
    TorchGenerator, check_gradient,
};

/// How a tail is learned; the defaults are the paper's.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PersonalisationConfig {
    /// Tokens in the tail, `N`.
    pub n_hiper: usize,
    /// Steps of the optimiser.
    pub train_steps: usize,
    /// Adam's constants, the learning rate among them.
    pub adam: AdamConfig,
}

impl Default for PersonalisationConfig {
    fn default() -> Self {
        Self { n_hiper: DEFAULT_N_HIPER, train_steps: 1000, adam: AdamConfig::default() }
    }
}

/// When [`Personalisation::run`] stops and stores; the default does neither before the end.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunControl<'a> {
    /// Steps between checkpoints, 0 for none.
    pub checkpoint_every: usize,
    /// Looked at before every step; when it is set, the run stops there.
    pub cancel: Option<&'a AtomicBool>,
}

/// What [`Personalisation::run`] tells while it runs.
#[derive(Debug, Clone)]
pub enum Event {
    /// A step is done.
    Step(Step),
    /// A checkpoint is due, or the run was cancelled: what must be stored to continue.
    Checkpoint(Box<Checkpoint>),
}

/// How [`Personalisation::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are taken.
    Finished,
    /// Stopped by [`RunControl::cancel`]; the last event was a checkpoint.
    Cancelled,
}

/// A run in progress: the tail, the optimiser and the random numbers.
///
/// Each step draws noise and then a timestep from the generator, in this order; with the VAE's sample drawn before from the
/// same generator, a seed gives the losses that PyTorch gives. A step that fails changes nothing.
#[derive(Debug, Clone)]
pub struct Personalisation {
    config: PersonalisationConfig,
    schedule: NoiseSchedule,
    latents: Tensor,
    head: Tensor,
    tail: HiperEmbedding,
    adam: Adam,
    generator: TorchGenerator,
    last_loss: Option<f64>,
}

impl Personalisation {
    /// Begins at the source embedding's own tail.
    ///
    /// `latents [1, 4, h, w]`, `f32`: the picture's, times the VAE's scaling factor. `generator`: as the draw of the VAE's
    /// sample left it.
    ///
    /// # Errors
    /// When a setting or a shape is outside its range, or a value is not finite.
    pub fn new(
        config: PersonalisationConfig,
        latents: &Tensor,
        source: &TextEmbedding,
        schedule: NoiseSchedule,
        generator: TorchGenerator,
    ) -> Result<Self> {
        config.adam.check()?;
        schedule.check()?;
        if config.train_steps == 0 {
            return Err(Error::argument("train_steps", "at least 1", 0));
        }
        if !matches!(latents.dims(), [1, _, _, _])
            || latents.dtype() != DType::F32
            || latents.elem_count() == 0
        {
            let got = format!("{:?} of {}", latents.dims(), latents.dtype().as_str());
            return Err(Error::argument("latents", "[1, 4, h, w] of f32", got));
        }
        for (argument, tensor) in [("latents", latents), ("source embedding", source.tensor())] {
            if !values(tensor)?.iter().all(|v| v.is_finite()) {
                return Err(Error::argument(argument, "finite values", "NaN or infinity"));
            }
        }
        let (head, tail) = source.split(config.n_hiper)?;
        let adam = Adam::new(config.adam, tail.tensor().elem_count());
        Ok(Self { config, schedule, latents: latents.detach(), head, tail, adam, generator, last_loss: None })
    }

    /// Continues a stored run; everything that follows is bit for bit what it would have been.
    ///
    /// `self` is the run begun afresh, with the same picture, text and settings; only `train_steps` may differ.
    ///
    /// # Errors
    /// When the checkpoint belongs to other settings or another model.
    pub fn resume(self, checkpoint: Checkpoint) -> Result<Self> {
        let Checkpoint { tail, adam, generator, last_loss, metadata: _ } = checkpoint;
        let shape = |tail: &HiperEmbedding| format!("a tail of [{}, {}]", tail.n_hiper(), tail.width());
        if tail.tensor().dims() != self.tail.tensor().dims() {
            return Err(Error::argument("checkpoint", shape(&self.tail), shape(&tail)));
        }
        if adam.config != self.config.adam {
            let constants = |config: &AdamConfig| format!("{config:?}");
            return Err(Error::argument("checkpoint", constants(&self.config.adam), constants(&adam.config)));
        }
        if adam.steps > self.config.train_steps {
            let expected = format!("at most train_steps, {} steps", self.config.train_steps);
            return Err(Error::argument("checkpoint", expected, format!("{} steps", adam.steps)));
        }
        let tail = HiperEmbedding::new(tail.tensor().to_device(self.head.device())?)?;
        Ok(Self { tail, adam, generator, last_loss, ..self })
    }

    /// What must be stored to continue from here. The metadata says what the run itself knows: steps, learning rate, loss.
    pub fn checkpoint(&self) -> Checkpoint {
        let metadata = HiperMetadata {
            train_steps: Some(self.adam.steps),
            learning_rate: Some(self.config.adam.learning_rate),
            final_loss: self.last_loss,
            ..Default::default()
        };
        Checkpoint {
            tail: self.tail.clone(),
            adam: self.adam.clone(),
            generator: self.generator.clone(),
            last_loss: self.last_loss,
            metadata,
        }
    }

    /// The settings.
    pub fn config(&self) -> &PersonalisationConfig {
        &self.config
    }

    /// The tail so far.
    pub fn tail(&self) -> &HiperEmbedding {
        &self.tail
    }

    /// The semantic head of the source embedding, `[1, T − N, D]`; it never moves.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Steps taken so far.
    pub fn steps_taken(&self) -> usize {
        self.adam.steps
    }

    /// Whether all steps are taken.
    pub fn is_finished(&self) -> bool {
        self.adam.steps >= self.config.train_steps
    }

    /// The loss of the last step taken.
    pub fn last_loss(&self) -> Option<f64> {
        self.last_loss
    }

    /// Takes one step, or none when all are taken: noise ε and a timestep t are drawn, and the tail moves against the gradient
    /// of the paper's loss `‖ε − ε_θ(x_t, t, [e_src′; e_hper])‖²` (or of the same with v).
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the loss, its gradient or the moved tail is NaN or infinite; whatever the network gives. The
    /// run is then as it was before.
    pub fn step(&mut self, network: &impl NoisePredictor) -> Result<Option<Step>> {
        let steps = Self::steps_together(&mut [self], network, 1)?.pop().transpose()?;
        Ok(steps.unwrap_or_default().pop())
    }

    /// Takes steps of each run, all in one pass of the network: subjects in a batch. As many as the network likes to take at
    /// once, at most `most` and what the run nearest its end has left. Runs whose steps are all taken are left out, and say
    /// none. Every run moves as it would alone, but for the rounding of a network that computes a batch in another order.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use hiper_core::*;
    /// # let network = |x: &Tensor, _t: f64, text: &Tensor| x.zeros_like()?.broadcast_add(&text.mean_all()?);
    /// # let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu)?;
    /// # let source = TextEmbedding::new(Tensor::ones((1, 77, 16), DType::F32, &Device::Cpu)?)?;
    /// # let begin = |seed| {
    /// #     let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
    /// #     let config = PersonalisationConfig { train_steps: 10, ..Default::default() };
    /// #     Personalisation::new(config, &latents, &source, schedule, TorchGenerator::new(seed))
    /// # };
    /// let (mut dog, mut cat) = (begin(0)?, begin(1)?); // each with its picture, text and generator
    /// let moved = Personalisation::steps_together(&mut [&mut dog, &mut cat], &network, 10)?;
    /// for (name, steps) in ["dog", "cat"].iter().zip(moved) {
    ///     match steps {
    ///         Ok(steps) if steps.is_empty() => println!("{name} is done"),
    ///         Ok(steps) => steps.iter().for_each(|step| println!("{name}: step {} loss {:.4}", step.step, step.loss)),
    ///         Err(error) => println!("{name}: {error}"),
    ///     }
    /// }
    /// # Ok::<(), hiper_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Whatever the network gives, and [`Error::Argument`] when the runs' shapes differ: no run has moved. A run whose next
    /// loss, gradient or tail is not finite has an error of its own in the list, and is as it was before; the others have moved.
    pub fn steps_together(
        runs: &mut [&mut Self],
        network: &impl NoisePredictor,
        most: usize,
    ) -> Result<Vec<Result<Vec<Step>>>> {
        let left = |run: &&mut Self| run.config.train_steps.saturating_sub(run.adam.steps);
        let least = runs.iter().map(left).filter(|&left| left > 0).min().unwrap_or(0);
        let count = network.steps_at_once().clamp(1, most.max(1)).min(least);
        let asked: Vec<TailOptimisation<'_>> =
            runs.iter().filter(|run| !run.is_finished()).map(|run| run.optimisation()).collect();
        TailOptimisation::check_batch(&asked)?;
        let answers = if asked.is_empty() { Vec::new() } else { network.optimise(&asked, count)? };
        if answers.len() != asked.len() {
            let expected = format!("{}, one for each subject", asked.len());
            return Err(Error::argument("what the network optimised", expected, answers.len()));
        }
        let mut answers = answers.into_iter();
        let moved = runs.iter_mut().map(|run| match run.is_finished() {
            true => Ok(Vec::new()),
            false => answers.next().map_or(Ok(Vec::new()), |answer| run.take(answer)),
        });
        Ok(moved.collect())
    }

    /// Moves the tail. A failure after some steps is met again, first of all, by the next call.
    fn take(&mut self, optimised: Optimised) -> Result<Vec<Step>> {
        let Optimised { steps, tail, adam, generator, failure } = optimised;
        let Some(last) = steps.last() else { return failure.map_or(Ok(Vec::new()), Err) };
        let tail = Tensor::from_vec(tail, self.tail.tensor().shape(), self.head.device())?;
        self.tail = HiperEmbedding::new(tail)?;
        (self.adam, self.generator, self.last_loss) = (adam, generator, Some(last.loss));
        Ok(steps)
    }

    /// Takes all steps that are left, and tells about each of them and about the checkpoints that are due. The events' receiver
    /// may fail with an error of its own; the run stops there.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use hiper_core::*;
    /// # let network = |x: &Tensor, _t: f64, text: &Tensor| x.zeros_like()?.broadcast_add(&text.mean_all()?);
    /// # let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu)?;
    /// # let source = TextEmbedding::new(Tensor::ones((1, 77, 16), DType::F32, &Device::Cpu)?)?;
    /// # let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
    /// # let config = PersonalisationConfig { train_steps: 10, ..Default::default() };
    /// # let mut run = Personalisation::new(config, &latents, &source, schedule, TorchGenerator::new(0))?;
    /// use std::sync::atomic::AtomicBool;
    ///
    /// let cancel = AtomicBool::new(false); // set by a signal handler or another thread
    /// let control = RunControl { checkpoint_every: 4, cancel: Some(&cancel) };
    /// let mut stored = Vec::new();
    /// let outcome = run.run(&network, control, |event| -> hiper_core::Result<()> {
    ///     match event {
    ///         Event::Step(Step { step, loss, .. }) => println!("step {step} loss {loss:.4}"),
    ///         Event::Checkpoint(checkpoint) => stored.push(checkpoint.adam.steps), // or checkpoint.save(path)?
    ///     }
    ///     Ok(())
    /// })?;
    /// assert_eq!((outcome, stored), (Outcome::Finished, vec![4, 8]));
    /// # Ok::<(), hiper_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`step`](Self::step), and the receiver's own.
    pub fn run<E: From<Error>>(
        &mut self,
        network: &impl NoisePredictor,
        control: RunControl<'_>,
        mut on_event: impl FnMut(Event) -> Result<(), E>,
    ) -> Result<Outcome, E> {
        let mut stored = false;
        while !self.is_finished() {
            if control.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                if !stored {
                    on_event(Event::Checkpoint(Box::new(self.checkpoint())))?;
                }
                return Ok(Outcome::Cancelled);
            }
            let to_checkpoint = match control.checkpoint_every {
                0 => usize::MAX,
                every => every - self.adam.steps % every,
            };
            for steps in Self::steps_together(&mut [self], network, to_checkpoint)? {
                steps?.into_iter().try_for_each(|step| on_event(Event::Step(step)))?;
            }
            stored = control.checkpoint_every > 0 && self.adam.steps.is_multiple_of(control.checkpoint_every);
            if stored {
                on_event(Event::Checkpoint(Box::new(self.checkpoint())))?;
            }
        }
        Ok(Outcome::Finished)
    }

    /// Compares the network's gradient with central differences of its loss, for the next step. The run stays as it is.
    ///
    /// # Errors
    /// When the network fails.
    pub fn check_gradient(&self, network: &impl NoisePredictor) -> Result<GradientCheck> {
        let mut generator = self.generator.clone();
        let draw = self.optimisation().draw(&mut generator)?;
        let step = TailLoss {
            noisy_latents: &self.schedule.add_noise(&self.latents, &draw.noise, draw.timestep)?,
            timestep: draw.timestep as f64,
            head: &self.head,
            tail: self.tail.tensor(),
            target: &self.schedule.target(&self.latents, &draw.noise, draw.timestep)?,
        };
        check_gradient(network, &step, &mut generator, Default::default())
    }

    fn optimisation(&self) -> TailOptimisation<'_> {
        TailOptimisation {
            latents: &self.latents,
            head: &self.head,
            tail: self.tail.tensor(),
            adam: &self.adam,
            generator: &self.generator,
            schedule: &self.schedule,
        }
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
}
