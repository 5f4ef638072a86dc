//! Drawing pictures from sentences, with or without a tail behind them.

use std::cell::Cell;
use std::time::Instant;

use candle_core::Tensor;
use hiper_core::{DEFAULT_TAIL_SCALE, HiperEmbedding, TextEmbedding, TorchGenerator, compose};
use image::RgbImage;
use sd_models::SampleConfig;
use sd_models::schedulers::SchedulerKind;

use crate::console::{Console, Event};
use crate::model::Model;
use crate::picture::from_tensor;
use crate::recipe::{Recipe, TailUse};
use crate::{Result, interrupt};

/// How pictures are drawn; the defaults are the paper authors'.
#[derive(Debug, Clone)]
pub struct Look {
    /// Denoising steps.
    pub steps: usize,
    /// Strength of the guidance.
    pub guidance_scale: f64,
    /// Scheduler.
    pub scheduler: SchedulerKind,
    /// What pictures should not show.
    pub negative_prompt: String,
    /// What the tail is multiplied by in an edit.
    pub tail_scale: f64,
}

impl Default for Look {
    fn default() -> Self {
        Self {
            steps: 50,
            guidance_scale: 7.5,
            scheduler: SchedulerKind::Ddim,
            negative_prompt: String::new(),
            tail_scale: DEFAULT_TAIL_SCALE,
        }
    }
}

/// A tail to put behind sentences.
#[derive(Clone, Copy)]
pub struct Tail<'a> {
    /// Its values.
    pub embedding: &'a HiperEmbedding,
    /// What it is multiplied by.
    pub scale: f64,
    /// Its file, for the picture's metadata.
    pub file: &'a str,
}

/// Draws pictures of one size with one model.
pub struct Painter<'a> {
    model: &'a Model,
    console: &'a Console,
    look: Look,
    height: usize,
    width: usize,
    negative_prompt_embeds: Tensor,
    /// Steps done and to do, over all pictures of this painter.
    done: Cell<usize>,
    total: usize,
}

impl<'a> Painter<'a> {
    /// Gets ready to draw `pictures` pictures of `height` × `width` pixels.
    ///
    /// # Errors
    /// When the scheduler does not know so many steps.
    pub fn new(
        model: &'a Model,
        look: Look,
        [height, width]: [usize; 2],
        pictures: usize,
        console: &'a Console,
    ) -> Result<Self> {
        let scheduler = look.scheduler.build(&model.sd.scheduler_config, look.steps)?;
        let total = pictures * scheduler.timesteps().len();
        let (_, negative_prompt_embeds) = model.sd.encode_prompt(&look.negative_prompt)?;
        console.start(total, 0, "drawing");
        Ok(Self { model, console, look, height, width, negative_prompt_embeds, done: Cell::new(0), total })
    }

    /// Draws one picture.
    ///
    /// # Errors
    /// When the tail does not fit the model, or the user interrupts.
    pub fn paint(&self, prompt: &str, tail: Option<Tail<'_>>, seed: u64) -> Result<RgbImage> {
        let sd = &self.model.sd;
        let text = TextEmbedding::new(sd.encode_prompt(prompt)?.1)?;
        let prompt_embeds = match tail {
            Some(tail) => compose(&text, tail.embedding, tail.scale)?,
            None => text.tensor().clone(),
        };
        let mut generator = TorchGenerator::new(seed);
        let device = &self.model.device;
        let factor = sd.vae_scale_factor();
        let shape = [1, sd.vae.config().latent_channels, self.height / factor, self.width / factor];
        let latents = generator.randn_tensor(&shape, device)?;
        let mut scheduler = self.look.scheduler.build(&sd.scheduler_config, self.look.steps)?;
        let config = SampleConfig {
            prompt_embeds: &prompt_embeds,
            negative_prompt_embeds: &self.negative_prompt_embeds,
            guidance_scale: self.look.guidance_scale,
        };
        let mut noise = |shape: &[usize]| generator.randn_tensor(shape, device);
        let mut started = Instant::now();
        let mut on_step = |_| {
            self.done.set(self.done.get() + 1);
            let seconds = std::mem::replace(&mut started, Instant::now()).elapsed().as_secs_f64();
            self.console.event(&Event::Sample { step: self.done.get(), steps: self.total, seconds });
            !interrupt::requested()
        };
        let latents = sd.sample(&latents, &config, scheduler.as_mut(), &mut noise, &mut on_step)?;
        interrupt::check()?;
        from_tensor(&sd.decode_latents(&latents)?)
    }

    /// What a picture's file says about it.
    pub fn recipe(&self, prompt: &str, tail: Option<Tail<'_>>, seed: u64) -> Recipe {
        Recipe {
            version: env!("CARGO_PKG_VERSION"),
            prompt: prompt.to_owned(),
            negative_prompt: self.look.negative_prompt.clone(),
            seed,
            steps: self.look.steps,
            guidance_scale: self.look.guidance_scale,
            scheduler: self.look.scheduler.name(),
            width: self.width,
            height: self.height,
            model: self.model.name.clone(),
            model_hash: self.model.hash.clone(),
            embedding: tail.map(|tail| TailUse {
                file: tail.file.to_owned(),
                n_hiper: tail.embedding.n_hiper(),
                tail_scale: tail.scale,
            }),
        }
    }
}

/// Warns when the model will not see all of a sentence: `n_hiper` tokens at the end belong to the tail.
///
/// # Errors
/// When the tokenizer fails.
pub fn warn_if_long(model: &Model, text: &str, n_hiper: usize, console: &Console) -> Result<()> {
    let tokenizer = &model.sd.tokenizer;
    let room = tokenizer.max_length().saturating_sub(n_hiper);
    let tokens = tokenizer.encode(text)?.num_tokens;
    if tokens > room {
        let why = if n_hiper == 0 {
            String::new()
        } else {
            format!("; the last {n_hiper} of {} are the tail's", tokenizer.max_length())
        };
        let lost = tokens - room;
        console.warn(format!(
            "the sentence {text:?} has {tokens} tokens, but there is room for {room}{why}: its last {lost} are lost, shorten it"
        ));
    }
    Ok(())
}
