//! `hiper personalize`: a photo and a sentence to a tail; then edits, and a contact sheet.

use std::path::Path;

use hiper_core::{
    AdamConfig, HiperFile, HiperMetadata, NoiseSchedule, Personalisation, PersonalisationConfig,
    PredictionType, TextEmbedding, TorchGenerator,
};
use image::RgbImage;
use sd_models::schedulers;

use crate::Result;
use crate::album::Album;
use crate::args::Personalize;
use crate::compute::Compute;
use crate::console::{Console, Event};
use crate::model::Model;
use crate::output::Output;
use crate::picture::{Geometry, Photo, prepare, read_photo, to_tensor};
use crate::render::{Look, warn_if_long};
use crate::run::{Checkpoints, Settings, Training};

/// The finished tail.
const TAIL: &str = "hiper.safetensors";

/// A photo and where it comes from.
pub struct Photographed {
    file: String,
    photo: Photo,
}

impl Photographed {
    /// Reads it.
    ///
    /// # Errors
    /// When it is no picture that can be used.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self { file: path.display().to_string(), photo: read_photo(path)? })
    }
}

/// `hiper personalize`.
pub fn run(args: &Personalize, compute: &Compute, console: &Console) -> Result<()> {
    let photo = Photographed::read(&args.input_image)?;
    let output = Output::create(&args.output_dir, console)?;
    let model = Model::open(args.model.path.as_deref(), compute, console)?;
    personalize(args, &photo, &model, &output, Look::default(), console)
}

/// Learns the tail and draws what was asked for.
///
/// # Errors
/// When a setting does not fit the model or the folder's earlier run, when the disk is full, or after Ctrl-C.
pub fn personalize(
    args: &Personalize,
    photo: &Photographed,
    model: &Model,
    output: &Output<'_>,
    look: Look,
    console: &Console,
) -> Result<()> {
    let picture = prepared(args, photo, model, console)?;
    for text in std::iter::once(&args.source_text).chain(&args.target_text) {
        warn_if_long(model, text, usize::from(args.n_hiper), console)?;
    }
    let training = Training {
        model,
        output,
        console,
        origin: origin(args, photo, model),
        checkpoint_every: args.checkpoint_every,
        preview_every: args.preview_every,
    };
    let mut run = begin(args, &picture, model)?;

    let settings = settings(args, photo, &picture, model);
    let checkpoints = Checkpoints::list(output.folder())?;
    if !checkpoints.is_empty() {
        settings.check_same_run(output)?;
    }
    settings.save(output)?;
    if args.resume {
        run = training.resume(run, &checkpoints)?;
    }

    let path = output.path(TAIL);
    let file = path.display().to_string();
    let album = Album { model, output, console, look, picture: &picture, args, file: &file };
    training.finish(&mut run, &mut |step, tail| album.preview(step, tail))?;

    HiperFile { tail: run.tail().clone(), metadata: training.metadata(&run) }.save(&path)?;
    output.wrote(&path, "tail");
    if args.target_text.is_empty() { Ok(()) } else { album.edits(run.tail()) }
}

/// The photo as the model sees it.
fn prepared(args: &Personalize, photo: &Photographed, model: &Model, console: &Console) -> Result<RgbImage> {
    let geometry = Geometry::of(&model.sd);
    let side = geometry.side("--resolution", args.resolution)?;
    let pixels = &photo.photo.pixels;
    let picture = prepare(pixels, side, args.crop, args.seed, geometry)?;
    console.event(&Event::Photo {
        file: &photo.file,
        original: pixels.dimensions().into(),
        used: picture.dimensions().into(),
    });
    Ok(picture)
}

/// The run before its first step. The generator's first draw is the VAE's sample, as in PyTorch.
fn begin(args: &Personalize, picture: &RgbImage, model: &Model) -> Result<Personalisation> {
    let sd = &model.sd;
    let source = TextEmbedding::new(sd.encode_prompt(&args.source_text)?.1)?;
    let mut generator = TorchGenerator::new(args.seed);
    let factor = sd.vae_scale_factor();
    let (height, width) = (picture.height() as usize / factor, picture.width() as usize / factor);
    let noise =
        generator.randn_tensor(&[1, sd.vae.config().latent_channels, height, width], &model.device)?;
    let latents = sd.encode_image(&to_tensor(picture, &model.device)?, &noise)?;
    let schedule = NoiseSchedule {
        alphas_cumprod: sd.scheduler_config.alphas_cumprod(),
        prediction_type: match sd.scheduler_config.prediction_type {
            schedulers::PredictionType::Epsilon => PredictionType::Epsilon,
            schedulers::PredictionType::VPrediction => PredictionType::VPrediction,
        },
    };
    let config = PersonalisationConfig {
        n_hiper: usize::from(args.n_hiper),
        train_steps: args.train_steps,
        adam: AdamConfig { learning_rate: args.learning_rate, ..Default::default() },
    };
    Ok(Personalisation::new(config, &latents, &source, schedule, generator)?)
}

fn settings(args: &Personalize, photo: &Photographed, picture: &RgbImage, model: &Model) -> Settings {
    Settings {
        source_text: args.source_text.clone(),
        n_hiper: usize::from(args.n_hiper),
        learning_rate: args.learning_rate,
        seed: args.seed,
        crop: args.crop,
        width: picture.width(),
        height: picture.height(),
        image_hash: photo.photo.hash.clone(),
        base_model_hash: model.hash.clone(),
    }
}

fn origin(args: &Personalize, photo: &Photographed, model: &Model) -> HiperMetadata {
    HiperMetadata {
        base_model: Some(model.name.clone()),
        base_model_hash: Some(model.hash.clone()),
        image_hash: Some(photo.photo.hash.clone()),
        source_text: Some(args.source_text.clone()),
        seed: Some(args.seed),
        ..Default::default()
    }
}
