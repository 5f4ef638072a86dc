//! The optimisation loop.

use candle_core::{Device, Tensor};

use crate::{
    Adam, AdamConfig, Checkpoint, DEFAULT_N_HIPER, Error, HiperEmbedding, NoisePredictor, NoiseSchedule,
    Result, TailLoss, TextEmbedding, TorchGenerator,
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

/// A run in progress: the tail, the optimiser and the random numbers.
///
/// Each step draws noise and then a timestep from the generator, in this order; with the VAE's sample drawn before from the
/// same generator, a seed gives the losses that PyTorch gives.
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
    /// `latents [1, 4, h, w]`: the picture's, scaled. `generator`: as the draw of the VAE's sample left it.
    ///
    /// # Errors
    /// When a setting or a shape is outside its range.
    pub fn new(
        config: PersonalisationConfig,
        latents: &Tensor,
        source: &TextEmbedding,
        schedule: NoiseSchedule,
        generator: TorchGenerator,
    ) -> Result<Self> {
        let rate = config.adam.learning_rate;
        if !(rate.is_finite() && rate > 0.0) {
            return Err(Error::Argument {
                argument: "learning_rate",
                expected: "above 0".into(),
                got: rate.to_string(),
            });
        }
        if config.train_steps == 0 {
            return Err(Error::Argument {
                argument: "train_steps",
                expected: "at least 1".into(),
                got: "0".into(),
            });
        }
        if schedule.alphas_cumprod.is_empty() || latents.rank() != 4 || latents.dims()[0] != 1 {
            let (expected, got) =
                ("[1, 4, h, w] and a schedule that is not empty".into(), format!("{:?}", latents.dims()));
            return Err(Error::Argument { argument: "latents", expected, got });
        }
        let (head, tail) = source.split(config.n_hiper)?;
        let adam = Adam::new(config.adam, tail.tensor().elem_count());
        Ok(Self { config, schedule, latents: latents.detach(), head, tail, adam, generator, last_loss: None })
    }

    /// Continues a stored run; everything that follows is bit for bit what it would have been.
    ///
    /// # Errors
    /// When the checkpoint belongs to other settings or another model.
    pub fn resume(self, checkpoint: Checkpoint) -> Result<Self> {
        let Checkpoint { tail, adam, generator, last_loss } = checkpoint;
        let same = tail.n_hiper() == self.tail.n_hiper()
            && tail.width() == self.tail.width()
            && adam.config == self.config.adam;
        if !same || adam.steps > self.config.train_steps {
            return Err(Error::Argument {
                argument: "checkpoint",
                expected: format!(
                    "a tail of [{}, {}] learned at rate {} for at most {} steps",
                    self.tail.n_hiper(),
                    self.tail.width(),
                    self.config.adam.learning_rate,
                    self.config.train_steps
                ),
                got: format!(
                    "[{}, {}] at rate {}, {} steps",
                    tail.n_hiper(),
                    tail.width(),
                    adam.config.learning_rate,
                    adam.steps
                ),
            });
        }
        let tail = HiperEmbedding::new(tail.tensor().to_device(self.head.device())?)?;
        Ok(Self { tail, adam, generator, last_loss, ..self })
    }

    /// What must be stored to continue from here.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            tail: self.tail.clone(),
            adam: self.adam.clone(),
            generator: self.generator.clone(),
            last_loss: self.last_loss,
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

    /// Steps taken so far.
    pub fn steps_taken(&self) -> usize {
        self.adam.steps
    }

    /// The loss of the last step taken.
    pub fn last_loss(&self) -> Option<f64> {
        self.last_loss
    }

    /// Takes one step, or none when all are taken. To cancel, do not call it again; [`checkpoint`](Self::checkpoint) holds
    /// what a later run needs.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the loss is NaN or infinite: the tail then stays as it was.
    pub fn step(&mut self, network: &impl NoisePredictor) -> Result<Option<Step>> {
        if self.adam.steps >= self.config.train_steps {
            return Ok(None);
        }
        let step = self.adam.steps + 1;
        let noise = self.generator.randn_tensor(self.latents.dims(), self.latents.device())?;
        let timestep = self.generator.randint(self.schedule.num_train_timesteps() as u32) as usize;
        let result = network.loss_and_gradient(&TailLoss {
            noisy_latents: &self.schedule.add_noise(&self.latents, &noise, timestep)?,
            timestep: timestep as f64,
            head: &self.head,
            tail: self.tail.tensor(),
            target: &self.schedule.target(&self.latents, &noise, timestep)?,
        })?;
        if !result.loss.is_finite() || result.tail_gradient.iter().any(|g| !g.is_finite()) {
            return Err(Error::NotFinite { step, loss: result.loss });
        }
        let mut values: Vec<f32> = self.tail.tensor().flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
        self.adam.step(&mut values, &result.tail_gradient);
        let shape = (self.tail.n_hiper(), self.tail.width());
        self.tail = HiperEmbedding::new(Tensor::from_vec(values, shape, self.head.device())?)?;
        self.last_loss = Some(result.loss);
        Ok(Some(Step { step, timestep, loss: result.loss }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PredictionType;
    use candle_core::DType;

    /// A smooth network whose answer depends on every entry of the text: a small random projection, tanh, and a mean.
    fn network(latents: &Tensor, timestep: f64, text: &Tensor) -> candle_core::Result<Tensor> {
        let (_, t, d) = text.dims3()?;
        let weights: Vec<f32> = (0..t * d * 3).map(|i| ((i * 37 % 101) as f32 - 50.0) / 400.0).collect();
        let weights = Tensor::from_vec(weights, (t * d, 3), text.device())?;
        let features = text.reshape((1, t * d))?.matmul(&weights)?.tanh()?;
        latents.broadcast_mul(&((features.mean_all()? + timestep / 1000.0)?))
    }

    fn start(train_steps: usize) -> Personalisation {
        let mut generator = TorchGenerator::new(3);
        let latents = generator.randn_tensor(&[1, 4, 6, 6], &Device::Cpu).unwrap();
        let source = TextEmbedding::new(generator.randn_tensor(&[1, 9, 8], &Device::Cpu).unwrap()).unwrap();
        let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::VPrediction);
        let config = PersonalisationConfig { n_hiper: 2, train_steps, ..Default::default() };
        Personalisation::new(config, &latents, &source, schedule, generator).unwrap()
    }

    fn finish(mut run: Personalisation) -> (Vec<Step>, Vec<Vec<f32>>) {
        let mut steps = Vec::new();
        while let Some(step) = run.step(&network).unwrap() {
            steps.push(step);
        }
        (steps, run.tail().tensor().to_vec2().unwrap())
    }

    #[test]
    fn stopping_and_resuming_changes_nothing() {
        let (steps, whole) = finish(start(12));
        let mut first = start(12);
        for _ in 0..5 {
            first.step(&network).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint.safetensors");
        first.checkpoint().save(&path).unwrap();
        let (rest, resumed) = finish(start(12).resume(Checkpoint::load(&path).unwrap()).unwrap());
        assert_eq!(steps[5..], rest);
        assert_eq!(whole, resumed);
    }

    #[test]
    fn only_the_tail_moves() {
        let mut run = start(3);
        let head = run.head.to_vec3::<f32>().unwrap();
        let tail = run.tail.tensor().to_vec2::<f32>().unwrap();
        while run.step(&network).unwrap().is_some() {}
        assert_eq!(run.head.to_vec3::<f32>().unwrap(), head);
        assert_ne!(run.tail.tensor().to_vec2::<f32>().unwrap(), tail);
    }

    #[test]
    fn a_loss_that_is_not_finite_leaves_the_tail_alone() {
        let broken =
            |latents: &Tensor, _t: f64, text: &Tensor| latents.broadcast_mul(&(text.mean_all()? * f64::NAN)?);
        let mut run = start(3);
        let before = run.tail.tensor().to_vec2::<f32>().unwrap();
        let error = run.step(&broken).unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 1, .. }), "{error}");
        assert_eq!(run.tail.tensor().to_vec2::<f32>().unwrap(), before);
    }

    #[test]
    fn a_network_without_a_gradient_is_found_out() {
        let cut =
            |latents: &Tensor, _t: f64, text: &Tensor| latents.broadcast_mul(&text.detach().mean_all()?);
        assert!(matches!(start(1).step(&cut), Err(Error::NoGradient)));
    }

    #[test]
    fn the_gradient_agrees_with_central_differences() {
        /// f32 networks, differences of 1e-2: three digits.
        const TOLERANCE: f64 = 1e-3;
        let run = start(1);
        let mut generator = TorchGenerator::new(9);
        let target = generator.randn_tensor(&[1, 4, 6, 6], &Device::Cpu).unwrap();
        let step = TailLoss {
            noisy_latents: &run.latents,
            timestep: 300.0,
            head: &run.head,
            tail: run.tail.tensor(),
            target: &target,
        };
        let (gradient, differences) = check_gradient_of(&step, &generator.randn(16));
        assert!((gradient - differences).abs() < TOLERANCE * differences.abs(), "{gradient} {differences}");
    }

    fn check_gradient_of(step: &TailLoss<'_>, direction: &[f32]) -> (f64, f64) {
        crate::check_gradient(&network, step, direction, 1e-2).unwrap()
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        let latents = Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let source = TextEmbedding::new(Tensor::zeros((1, 7, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 10, PredictionType::Epsilon);
        let new = |config| {
            Personalisation::new(config, &latents, &source, schedule.clone(), TorchGenerator::new(0))
        };
        assert!(new(PersonalisationConfig { n_hiper: 0, ..Default::default() }).is_err());
        assert!(new(PersonalisationConfig { n_hiper: 7, ..Default::default() }).is_err());
        assert!(new(PersonalisationConfig { train_steps: 0, ..Default::default() }).is_err());
        let adam = AdamConfig { learning_rate: f64::NAN, ..Default::default() };
        assert!(new(PersonalisationConfig { adam, ..Default::default() }).is_err());
    }
}
