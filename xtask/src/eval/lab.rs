//! The method, run through the libraries as `hiper` runs it.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use hiper_core::{
    AdamConfig, HiperEmbedding, NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType,
    TextEmbedding, TorchGenerator, compose,
};
use hiper_tests::Network;
use image::RgbImage;
use sd_models::schedulers::{self, SchedulerKind};
use sd_models::{ModelFiles, SampleConfig, StableDiffusion};

/// A model, and how pictures are drawn with it.
pub struct Lab {
    sd: StableDiffusion,
    /// The model's fingerprint.
    pub model_hash: String,
    num_inference_steps: usize,
    unconditional: Tensor,
}

/// How a tail is learned; how long, the caller's marks say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learning {
    /// Tokens of the tail.
    pub n_hiper: usize,
    /// Adam's.
    pub learning_rate: f64,
}

/// Tails to learn from one picture.
pub struct Lesson<'a> {
    /// The picture.
    pub picture: &'a RgbImage,
    /// Its sentence.
    pub caption: String,
    /// How.
    pub learning: Learning,
    /// A tail after each of these numbers of steps.
    pub marks: Vec<usize>,
    /// Of noise and timesteps.
    pub seed: u64,
}

/// A picture to draw.
pub struct Request<'a> {
    /// The sentence.
    pub caption: &'a str,
    /// A tail to put behind it, and its scale.
    pub tail: Option<(&'a HiperEmbedding, f64)>,
    /// Of the first noise.
    pub seed: u64,
}

impl Lab {
    /// Loads the model in `folder`, to draw with `num_inference_steps` steps of DDIM.
    ///
    /// # Errors
    /// When it is no checkpoint.
    pub fn open(folder: &Path, num_inference_steps: usize) -> Result<Self> {
        let files = ModelFiles::from_dir(folder)?;
        let model_hash = files.hash()?;
        let sd = StableDiffusion::load(&files, &Device::Cpu)?;
        let (_, unconditional) = sd.encode_prompt("")?;
        Ok(Self { sd, model_hash, num_inference_steps, unconditional })
    }

    /// Width and height of its pictures.
    pub fn size(&self) -> u32 {
        self.sd.default_size() as u32
    }

    /// A sentence's embedding.
    ///
    /// # Errors
    /// When the tokenizer and the text encoder do not fit each other.
    pub fn embed(&self, caption: &str) -> Result<TextEmbedding> {
        Ok(TextEmbedding::new(self.sd.encode_prompt(caption)?.1)?)
    }

    /// The tails of every lesson, a tail a mark; all lessons are learned in one pass of the network, each as it would be alone.
    ///
    /// # Errors
    /// When a step fails, a setting does not fit the model, or the lessons' tails are of different lengths.
    pub fn personalise(&self, lessons: &[Lesson<'_>]) -> Result<Vec<Vec<HiperEmbedding>>> {
        let mut runs = lessons.iter().map(|lesson| self.begin(lesson)).collect::<Result<Vec<_>>>()?;
        let mut learned: Vec<_> = lessons.iter().map(|lesson| vec![None; lesson.marks.len()]).collect();
        while !runs.iter().all(Personalisation::is_finished) {
            let mut learning: Vec<_> = runs.iter_mut().collect();
            let moved = Personalisation::steps_together(&mut learning, &Network(&self.sd.unet), 1)?;
            for (((run, steps), lesson), tails) in runs.iter().zip(moved).zip(lessons).zip(&mut learned) {
                let Some(step) = steps?.pop() else { continue };
                for (tail, _) in tails.iter_mut().zip(&lesson.marks).filter(|(_, mark)| **mark == step.step) {
                    *tail = Some(run.tail().clone());
                }
            }
        }
        let all = learned.into_iter().map(|tails| tails.into_iter().collect::<Option<_>>());
        all.collect::<Option<_>>().context("a mark of 0 steps")
    }

    fn begin(&self, lesson: &Lesson<'_>) -> Result<Personalisation> {
        let source = self.embed(&lesson.caption)?;
        let mut generator = TorchGenerator::new(lesson.seed);
        let noise = generator.randn_tensor(&self.latent_shape(), &Device::Cpu)?;
        let latents = self.sd.encode_image(&to_tensor(lesson.picture)?, &noise)?;
        let Learning { n_hiper, learning_rate } = lesson.learning;
        let config = PersonalisationConfig {
            n_hiper,
            train_steps: lesson.marks.iter().copied().max().unwrap_or(0),
            adam: AdamConfig { learning_rate, ..AdamConfig::default() },
        };
        Ok(Personalisation::new(config, &latents, &source, self.schedule(), generator)?)
    }

    /// Draws pictures, all in one batch; each is what it would be alone.
    ///
    /// # Errors
    /// When a tail does not fit the model.
    pub fn draw(&self, requests: &[Request<'_>], guidance_scale: f64) -> Result<Vec<RgbImage>> {
        if requests.is_empty() {
            return Ok(vec![]);
        }
        let (mut latents, mut prompts) = (vec![], vec![]);
        for request in requests {
            let text = self.embed(request.caption)?;
            prompts.push(match request.tail {
                Some((tail, scale)) => compose(&text, tail, scale)?,
                None => text.tensor().clone(),
            });
            latents.push(TorchGenerator::new(request.seed).randn_tensor(&self.latent_shape(), &Device::Cpu)?);
        }
        let negatives = vec![&self.unconditional; requests.len()];
        let config = SampleConfig {
            prompt_embeds: &Tensor::cat(&prompts, 0)?,
            negative_prompt_embeds: &Tensor::cat(&negatives, 0)?,
            guidance_scale,
        };
        let mut ddim = SchedulerKind::Ddim.build(&self.sd.scheduler_config, self.num_inference_steps)?;
        let mut no_noise = |_: &[usize]| candle_core::bail!("DDIM draws no noise");
        let latents = Tensor::cat(&latents, 0)?;
        let latents = self.sd.sample(&latents, &config, ddim.as_mut(), &mut no_noise, &mut |_| true)?;
        self.decode(&latents)
    }

    /// What the autoencoder alone makes of a picture.
    ///
    /// # Errors
    /// When it is too small.
    pub fn through_vae(&self, picture: &RgbImage) -> Result<RgbImage> {
        let latents = (self.sd.vae.encode(&to_tensor(picture)?)?.mean * self.sd.vae.config().scaling_factor)?;
        self.decode(&latents)?.pop().context("no picture")
    }

    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let pixels = self.sd.decode_latents(latents)?;
        (0..pixels.dims()[0]).map(|i| to_picture(&pixels.get(i)?)).collect()
    }

    fn latent_shape(&self) -> [usize; 4] {
        let side = self.sd.unet.config().sample_size;
        [1, self.sd.vae.config().latent_channels, side, side]
    }

    fn schedule(&self) -> NoiseSchedule {
        NoiseSchedule {
            alphas_cumprod: self.sd.scheduler_config.alphas_cumprod(),
            prediction_type: match self.sd.scheduler_config.prediction_type {
                schedulers::PredictionType::Epsilon => PredictionType::Epsilon,
                schedulers::PredictionType::VPrediction => PredictionType::VPrediction,
            },
        }
    }
}

/// `[1, 3, H, W]` in [−1, 1].
fn to_tensor(picture: &RgbImage) -> Result<Tensor> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let values: Vec<f32> = picture.as_raw().iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
    let pixels = Tensor::from_vec(values, (1, height, width, 3), &Device::Cpu)?;
    Ok(pixels.permute((0, 3, 1, 2))?.contiguous()?)
}

/// Of `[3, H, W]`, clamped to [−1, 1].
fn to_picture(pixels: &Tensor) -> Result<RgbImage> {
    let (_, height, width) = pixels.dims3()?;
    let values: Vec<f32> = pixels.permute((1, 2, 0))?.flatten_all()?.to_vec1()?;
    let bytes = values.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8);
    RgbImage::from_raw(width as u32, height as u32, bytes.collect()).context("a picture of the wrong size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn lab() -> Lab {
        Lab::open(Path::new(crate::eval::DEMO_MODEL), 2).unwrap()
    }

    #[test]
    fn pixels_come_back_unchanged() {
        let picture = RgbImage::from_fn(8, 5, |x, y| Rgb([(x * 31) as u8, (y * 50) as u8, (x * y) as u8]));
        assert_eq!(to_picture(&to_tensor(&picture).unwrap().get(0).unwrap()).unwrap(), picture);
    }

    #[test]
    fn a_picture_does_not_depend_on_the_others_of_its_batch() {
        let lab = lab();
        let requests: Vec<_> = ["a dog sitting", "a bird in the snow"]
            .into_iter()
            .zip([3, 4])
            .map(|(caption, seed)| Request { caption, tail: None, seed })
            .collect();
        let together = lab.draw(&requests, 7.5).unwrap();
        for (request, expected) in requests.iter().zip(&together) {
            let alone = lab.draw(std::slice::from_ref(request), 7.5).unwrap();
            // f32 sums may be ordered otherwise in a batch: one level of 255.
            let far = alone[0].as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(far.unwrap() <= 1, "{far:?} levels apart");
        }
        assert_ne!(together[0], together[1]);
    }

    #[test]
    fn a_mark_is_the_run_that_ends_there() {
        let lab = lab();
        let picture = RgbImage::from_pixel(lab.size(), lab.size(), Rgb([200, 120, 30]));
        let lesson = |learning_rate, marks: &[usize]| Lesson {
            picture: &picture,
            caption: "a dog".into(),
            learning: Learning { n_hiper: 2, learning_rate },
            marks: marks.to_vec(),
            seed: 5,
        };
        let values = |tail: &HiperEmbedding| tail.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let both = lab.personalise(&[lesson(0.02, &[1, 3]), lesson(0.01, &[1, 2])]).unwrap().pop().unwrap();
        let short = lab.personalise(&[lesson(0.01, &[1])]).unwrap().pop().unwrap();
        assert_eq!(values(&both[0]), values(&short[0]));
        assert_ne!(values(&both[0]), values(&both[1]));
        assert!(lab.personalise(&[lesson(0.01, &[0])]).is_err());
    }
}
