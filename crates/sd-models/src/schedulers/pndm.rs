//! `PNDMScheduler` (arXiv 2202.09778): PLMS, linear multistep over up to four predictions (equations 9 and 12). Its first
//! steps have fewer than four. With `skip_prk_steps`, as Stable Diffusion's own configurations say, they are of lower order
//! and the second timestep is visited twice: `n + 1` predictions. Without, three Runge–Kutta steps (equation 13) of four
//! predictions each come first: `n + 9`.

use candle_core::Tensor;

use super::alphas::{Alphas, Reading, stride, whole_timesteps};
use super::{Noise, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct Pndm {
    steps: Vec<Step>,
    timesteps: Vec<f64>,
    reading: Reading,
    /// The last predictions, newest last.
    ets: Vec<Tensor>,
    /// What a step of several predictions starts from.
    cur_sample: Option<Tensor>,
    /// The Runge–Kutta step's weighted predictions so far.
    cur_model_output: Option<Tensor>,
}

/// What is done with one prediction.
struct Step {
    /// ᾱ where the sample is moved from, and to.
    alphas: [f64; 2],
    rule: Rule,
}

#[derive(Clone, Copy)]
enum Rule {
    /// One of the four predictions of a Runge–Kutta step.
    RungeKutta(usize),
    /// The second visit of the second timestep: the mean of both predictions, applied to the first sample again.
    Again,
    Multistep,
}

impl Pndm {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        // diffusers' class knows no rescaling and ignores the field.
        let config = SchedulerConfig { rescale_betas_zero_snr: false, ..config.clone() };
        let alphas = Alphas::new(&config, config.set_alpha_to_one.unwrap_or(false));
        let (descending, stride) = (whole_timesteps(&config, n), stride(&config, n));
        let step = |timestep: f64, from: f64, to: f64, rule| {
            (timestep, Step { alphas: [alphas.at(from), alphas.at(to)], rule })
        };
        let multistep = |&t: &f64| step(t, t, t - stride, Rule::Multistep);
        let plan: Vec<(f64, Step)> = if config.skip_prk_steps {
            let second = descending[1];
            let again = step(second, second + stride, second, Rule::Again);
            let mut plan: Vec<_> = descending.iter().map(multistep).collect();
            plan.insert(1, again);
            plan
        } else {
            let half = (stride / 2.0).floor();
            let runge_kutta = descending.windows(2).take(3).flat_map(|pair| {
                let (from, to) = (pair[0], pair[1]);
                [(from, from - half), (to + half, to + half), (to + half, to), (to, to)]
                    .into_iter()
                    .enumerate()
                    .map(move |(stage, (timestep, end))| (timestep, from, end, Rule::RungeKutta(stage)))
            });
            runge_kutta
                .map(|(timestep, from, to, rule)| step(timestep, from, to, rule))
                .chain(descending.iter().skip(3).map(multistep))
                .collect()
        };
        let (timesteps, steps) = plan.into_iter().unzip();
        let reading = Reading::new(&config);
        Self { steps, timesteps, reading, ets: Vec::new(), cur_sample: None, cur_model_output: None }
    }

    /// The weighted sum of a Runge–Kutta step's predictions: after the last, the step's own; before, the newest.
    fn runge_kutta(&mut self, stage: usize, sample: &Tensor, model_output: &Tensor) -> Result<Tensor> {
        const WEIGHTS: [f64; 4] = [1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0];
        if stage == 0 {
            self.ets.push(model_output.clone());
            self.cur_sample = Some(sample.clone());
        }
        let sum = match self.cur_model_output.take() {
            Some(sum) => combine(1.0, &sum, WEIGHTS[stage], model_output)?,
            None => (model_output * WEIGHTS[stage])?,
        };
        if stage + 1 == WEIGHTS.len() {
            return Ok(sum);
        }
        self.cur_model_output = Some(sum);
        Ok(model_output.clone())
    }

    /// Equation 12, with the coefficients of lower orders while predictions are fewer.
    fn multistep(&mut self, model_output: &Tensor) -> Result<Tensor> {
        if self.ets.len() == 4 {
            self.ets.remove(0);
        }
        self.ets.push(model_output.clone());
        let weights: &[f64] = match self.ets.len() {
            1 => &[1.0],
            2 => &[-1.0 / 2.0, 3.0 / 2.0],
            3 => &[5.0 / 12.0, -16.0 / 12.0, 23.0 / 12.0],
            _ => &[-9.0 / 24.0, 37.0 / 24.0, -59.0 / 24.0, 55.0 / 24.0],
        };
        let mut blend = (&self.ets[0] * weights[0])?;
        for (output, &weight) in self.ets.iter().zip(weights).skip(1) {
            blend = combine(1.0, &blend, weight, output)?;
        }
        Ok(blend)
    }
}

impl Scheduler for Pndm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        _noise: &mut Noise<'_>,
    ) -> Result<Tensor> {
        let Step { alphas: [alpha, alpha_prev], rule } = self.steps[step_index];
        let output = match rule {
            Rule::RungeKutta(stage) => self.runge_kutta(stage, sample, model_output)?,
            Rule::Again => match self.ets.last() {
                Some(first) => combine(0.5, model_output, 0.5, first)?,
                None => model_output.clone(),
            },
            Rule::Multistep => {
                self.cur_sample = Some(sample.clone());
                self.multistep(model_output)?
            }
        };
        let sample = self.cur_sample.as_ref().unwrap_or(sample);
        // Equation 9.
        let epsilon = self.reading.noise(alpha, sample, &output)?;
        let (beta, beta_prev) = (1.0 - alpha, 1.0 - alpha_prev);
        let denominator = alpha * beta_prev.sqrt() + (alpha * beta * alpha_prev).sqrt();
        combine((alpha_prev / alpha).sqrt(), sample, -(alpha_prev - alpha) / denominator, &epsilon)
    }
}
