//! Some steps of the optimisation, as the loop asks a network for them.

use candle_core::{Device, Tensor};

use crate::{Adam, Error, LossAndGradient, NoisePredictor, NoiseSchedule, Result, TailLoss, TorchGenerator};

/// The random numbers of one step.
#[derive(Debug, Clone)]
pub struct Draw {
    /// `ε`, `[1, 4, h, w]`.
    pub noise: Tensor,
    /// `t`.
    pub timestep: usize,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Step {
    /// Counted from 1.
    pub step: usize,
    /// The timestep drawn.
    pub timestep: usize,
    /// The loss before the tail moved.
    pub loss: f64,
}

/// A subject, before some steps.
#[derive(Debug, Clone, Copy)]
pub struct TailOptimisation<'a> {
    /// `x_0`, `[1, 4, h, w]`.
    pub latents: &'a Tensor,
    /// The semantic head, `[1, T − N, D]`: it stays.
    pub head: &'a Tensor,
    /// The tail before the first step, `[N, D]`.
    pub tail: &'a Tensor,
    /// The optimiser before the first step.
    pub adam: &'a Adam,
    /// The random numbers before the first step.
    pub generator: &'a TorchGenerator,
    /// How noise is mixed in, and what the network should answer.
    pub schedule: &'a NoiseSchedule,
}

impl TailOptimisation<'_> {
    /// The next step's draws: noise, then a timestep.
    ///
    /// # Errors
    /// When the noise cannot be brought to the latents' device.
    pub fn draw(&self, generator: &mut TorchGenerator) -> Result<Draw> {
        let noise = generator.randn_tensor(self.latents.dims(), self.latents.device())?;
        Ok(Draw { noise, timestep: self.draw_timestep(generator) })
    }

    /// The timestep of the next step's draws, for networks that draw the noise themselves.
    pub fn draw_without_noise(&self, generator: &mut TorchGenerator) -> usize {
        generator.skip_randn(self.latents.elem_count());
        self.draw_timestep(generator)
    }

    fn draw_timestep(&self, generator: &mut TorchGenerator) -> usize {
        generator.randint(self.schedule.num_train_timesteps() as u32) as usize
    }

    /// Refuses subjects that do not fit into one batch.
    pub(crate) fn check_batch(subjects: &[Self]) -> Result<()> {
        let shapes = |subject: &Self| {
            let Self { latents, head, tail, .. } = subject;
            let (latents, tokens) = (latents.dims(), head.dims()[1] + tail.dims()[0]);
            format!("latents {latents:?} and a text of {tokens} tokens, width {}", tail.dims()[1])
        };
        let all: Vec<String> = subjects.iter().map(shapes).collect();
        match all.iter().position(|other| *other != all[0]) {
            Some(i) => {
                let expected = format!("{}, as the first", all[0]);
                let got = format!("{} in number {}", all[i], i + 1);
                Err(Error::argument("subjects in a batch", expected, got))
            }
            None => Ok(()),
        }
    }
}

/// What became of a subject.
#[derive(Debug)]
pub struct Optimised {
    /// The steps taken.
    pub steps: Vec<Step>,
    /// The tail after them, `[N, D]` row-major.
    pub tail: Vec<f32>,
    /// The optimiser after them.
    pub adam: Adam,
    /// The random numbers after them.
    pub generator: TorchGenerator,
    /// Why no more were taken: [`Error::NotFinite`].
    pub failure: Option<Error>,
}

impl Optimised {
    /// Before the first step.
    fn start(subject: &TailOptimisation<'_>) -> Result<Self> {
        let tail = subject.tail.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
        let (adam, generator) = (subject.adam.clone(), subject.generator.clone());
        Ok(Self { steps: vec![], tail, adam, generator, failure: None })
    }

    /// One step more, or the reason why not; what came before stays as it is. The generator is the one after the step's draws.
    fn step(&mut self, timestep: usize, generator: TorchGenerator, answer: LossAndGradient) -> Result<()> {
        let step = self.adam.steps + 1;
        let LossAndGradient { loss, tail_gradient } = answer;
        let finite = |quantity, values: &[f32]| match values.iter().all(|v| v.is_finite()) {
            true => Ok(()),
            false => Err(Error::NotFinite { step, quantity, loss }),
        };
        if !loss.is_finite() {
            return Err(Error::NotFinite { step, quantity: "the loss", loss });
        }
        finite("the gradient", &tail_gradient)?;
        let (mut adam, mut tail) = (self.adam.clone(), self.tail.clone());
        adam.step(&mut tail, &tail_gradient)?;
        finite("the tail after it", &tail)?;
        (self.adam, self.tail, self.generator) = (adam, tail, generator);
        self.steps.push(Step { step, timestep, loss });
        Ok(())
    }
}

/// What [`NoisePredictor::optimise`] does by default: each step by itself, by
/// [`losses_and_gradients`](NoisePredictor::losses_and_gradients). Those who failed are left out of the next. For networks that
/// have a better way for some devices or subjects alone.
///
/// # Errors
/// Whatever the network's errors are: no subject has moved then.
pub fn optimise_step_by_step(
    network: &(impl NoisePredictor + ?Sized),
    subjects: &[TailOptimisation<'_>],
    steps: usize,
) -> Result<Vec<Optimised>> {
    let mut optimised = subjects.iter().map(Optimised::start).collect::<Result<Vec<_>>>()?;
    for _ in 0..steps {
        let going = subjects.iter().zip(&mut optimised).filter(|(_, so_far)| so_far.failure.is_none());
        let mut going: Vec<_> = going.collect();
        if going.is_empty() {
            break;
        }
        let mixed = going.iter().map(|(subject, so_far)| Mixed::new(subject, so_far));
        let mixed = mixed.collect::<Result<Vec<_>>>()?;
        let asked: Vec<TailLoss<'_>> =
            going.iter().zip(&mixed).map(|((subject, _), mixed)| mixed.asked(subject)).collect();
        let answers = network.losses_and_gradients(&asked)?;
        if answers.len() != asked.len() {
            let expected = format!("{}, one for each subject", asked.len());
            return Err(Error::argument("the network's losses and gradients", expected, answers.len()));
        }
        for (((_, so_far), mixed), answer) in going.iter_mut().zip(mixed).zip(answers) {
            so_far.failure = so_far.step(mixed.timestep, mixed.generator, answer).err();
        }
    }
    Ok(optimised)
}

/// A step's draws, mixed with the latents.
struct Mixed {
    noisy_latents: Tensor,
    target: Tensor,
    tail: Tensor,
    timestep: usize,
    /// After the draws.
    generator: TorchGenerator,
}

impl Mixed {
    fn new(subject: &TailOptimisation<'_>, so_far: &Optimised) -> Result<Self> {
        let TailOptimisation { latents, schedule, tail, .. } = subject;
        let mut generator = so_far.generator.clone();
        let Draw { noise, timestep } = subject.draw(&mut generator)?;
        Ok(Self {
            noisy_latents: schedule.add_noise(latents, &noise, timestep)?,
            target: schedule.target(latents, &noise, timestep)?,
            tail: Tensor::from_slice(&so_far.tail, tail.shape(), tail.device())?,
            timestep,
            generator,
        })
    }

    fn asked<'a>(&'a self, subject: &TailOptimisation<'a>) -> TailLoss<'a> {
        let Self { noisy_latents, target, tail, timestep, .. } = self;
        TailLoss { noisy_latents, timestep: *timestep as f64, head: subject.head, tail, target }
    }
}
