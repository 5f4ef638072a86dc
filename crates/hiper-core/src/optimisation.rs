//! Some steps of the optimisation, as the loop asks a network for them.

use candle_core::{Device, Tensor};

use crate::{Adam, Error, LossAndGradient, NoisePredictor, NoiseSchedule, Result, TailLoss};

/// The random numbers of one step.
#[derive(Debug, Clone)]
pub struct Draw {
    /// `ε`, `[1, 4, h, w]`.
    pub noise: Tensor,
    /// `t`.
    pub timestep: usize,
}

/// Some steps of one subject.
#[derive(Debug, Clone)]
pub struct TailOptimisation<'a> {
    /// `x_0`, `[1, 4, h, w]`.
    pub latents: &'a Tensor,
    /// The semantic head, `[1, T − N, D]`: it stays.
    pub head: &'a Tensor,
    /// The tail before the first step, `[N, D]`.
    pub tail: &'a Tensor,
    /// The optimiser before the first step.
    pub adam: &'a Adam,
    /// How noise is mixed in, and what the network should answer.
    pub schedule: &'a NoiseSchedule,
    /// The steps' random numbers, in order.
    pub draws: Vec<Draw>,
}

impl TailOptimisation<'_> {
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
    /// The losses of the steps taken, each before the tail moved.
    pub losses: Vec<f64>,
    /// The tail after them, `[N, D]` row-major.
    pub tail: Vec<f32>,
    /// The optimiser after them.
    pub adam: Adam,
    /// Why no more were taken: [`Error::NotFinite`].
    pub failure: Option<Error>,
}

impl Optimised {
    /// Before the first step.
    fn start(subject: &TailOptimisation<'_>) -> Result<Self> {
        let tail = subject.tail.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
        Ok(Self { losses: vec![], tail, adam: subject.adam.clone(), failure: None })
    }

    /// One step more, or the reason why not; what came before stays as it is.
    fn step(&mut self, answer: LossAndGradient) -> Result<()> {
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
        (self.adam, self.tail) = (adam, tail);
        self.losses.push(loss);
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
) -> Result<Vec<Optimised>> {
    let mut optimised = subjects.iter().map(Optimised::start).collect::<Result<Vec<_>>>()?;
    for step in 0..subjects.iter().map(|subject| subject.draws.len()).max().unwrap_or(0) {
        let going = subjects.iter().zip(&mut optimised).filter(|(_, so_far)| so_far.failure.is_none());
        let mut going: Vec<_> =
            going.filter_map(|(s, so_far)| Some((s, s.draws.get(step)?, so_far))).collect();
        let mixed = going.iter().map(|(subject, draw, so_far)| {
            let TailOptimisation { latents, schedule, tail, .. } = subject;
            let noisy_latents = schedule.add_noise(latents, &draw.noise, draw.timestep)?;
            let target = schedule.target(latents, &draw.noise, draw.timestep)?;
            Ok([noisy_latents, target, Tensor::from_slice(&so_far.tail, tail.shape(), tail.device())?])
        });
        let mixed = mixed.collect::<Result<Vec<_>>>()?;
        let asked = going.iter().zip(&mixed).map(|((subject, draw, _), [noisy_latents, target, tail])| {
            TailLoss { noisy_latents, timestep: draw.timestep as f64, head: subject.head, tail, target }
        });
        let asked: Vec<TailLoss<'_>> = asked.collect();
        if asked.is_empty() {
            break;
        }
        let answers = network.losses_and_gradients(&asked)?;
        if answers.len() != asked.len() {
            let expected = format!("{}, one for each subject", asked.len());
            return Err(Error::argument("the network's losses and gradients", expected, answers.len()));
        }
        for ((_, _, so_far), answer) in going.iter_mut().zip(answers) {
            so_far.failure = so_far.step(answer).err();
        }
    }
    Ok(optimised)
}
