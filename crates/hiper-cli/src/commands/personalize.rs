//! `hiper personalize`: photos and sentences to tails; then edits, and a contact sheet of each.

use std::path::Path;

use hiper_core::{
    AdamConfig, HiperFile, HiperMetadata, NoiseSchedule, Personalisation, PersonalisationConfig,
    PredictionType, TextEmbedding, TorchGenerator,
};
use image::RgbImage;
use sd_models::schedulers;

use crate::album::Album;
use crate::args::{Learning, Personalize};
use crate::compute::{Compute, subjects_at_once};
use crate::console::{Console, Event};
use crate::model::Model;
use crate::output::Output;
use crate::picture::{Geometry, prepare, read_photo, to_tensor};
use crate::render::{Look, warn_if_long};
use crate::run::{Checkpoints, Run, Settings, Training};
use crate::subject::Subject;
use crate::{Error, Result, manifest};

/// The finished tail.
const TAIL: &str = "hiper.safetensors";

/// `hiper personalize`.
pub fn run(args: &Personalize, compute: &Compute, console: &Console) -> Result<()> {
    let subjects = subjects(args)?;
    // What is wrong with a photo is said before a model is loaded, and before anything is written.
    for subject in &subjects {
        read_photo(&subject.image).map_err(|error| error.of(subject.name.as_deref()))?;
    }
    let outputs = outputs(&subjects, &args.output_dir, console)?;
    let model = Model::open(args.model.path.as_deref(), compute)?;
    let look = Look::default();
    let job = Job { learning: &args.learning, batch_size: args.batch_size, model: &model, look, console };
    job.personalize(&subjects, &outputs)
}

fn subjects(args: &Personalize) -> Result<Vec<Subject>> {
    if let Some(path) = &args.manifest {
        return manifest::read(path, args.learning.seed);
    }
    let (Some(image), Some(source_text)) = (args.input_image.clone(), args.source_text.clone()) else {
        return Err(Error::Usage("personalize: --input-image and --source-text, or --manifest".into()));
    };
    let (target_texts, seed) = (args.target_text.clone(), args.learning.seed);
    Ok(vec![Subject { name: None, image, source_text, target_texts, seed }])
}

/// The folder itself for one subject, a folder in it for each of several.
fn outputs<'a>(subjects: &[Subject], folder: &Path, console: &'a Console) -> Result<Vec<Output<'a>>> {
    let place = |subject: &Subject| subject.name.as_ref().map_or(folder.to_owned(), |name| folder.join(name));
    subjects.iter().map(|subject| Output::create(&place(subject), console)).collect()
}

/// How subjects are learned and drawn.
pub struct Job<'a> {
    /// How their tails are learned.
    pub learning: &'a Learning,
    /// Most subjects in one pass of the network; by default what memory allows.
    pub batch_size: Option<usize>,
    /// The model.
    pub model: &'a Model,
    /// How their pictures are drawn.
    pub look: Look,
    /// What is said meanwhile.
    pub console: &'a Console,
}

/// A subject about to be learned.
struct Prepared<'a> {
    subject: &'a Subject,
    output: &'a Output<'a>,
    /// The photo as the model sees it.
    picture: RgbImage,
    /// SHA-256 of the photo's file.
    image_hash: String,
    checkpoints: Checkpoints,
}

impl Job<'_> {
    /// Learns the subjects' tails, batch by batch, and draws what was asked for.
    ///
    /// # Errors
    /// When a setting does not fit the model or a folder's earlier run, when the disk is full, or after Ctrl-C. When some
    /// subjects cannot be learned, the others are all the same.
    pub fn personalize(&self, subjects: &[Subject], outputs: &[Output<'_>]) -> Result<()> {
        let prepared = subjects.iter().zip(outputs).map(|(subject, output)| {
            self.prepare(subject, output).map_err(|error| error.of(subject.name.as_deref()))
        });
        let mut prepared = prepared.collect::<Result<Vec<_>>>()?;
        for prepared in &prepared {
            self.settings(prepared).save(prepared.output)?;
        }
        // Pictures of one size fit into one batch; otherwise the manifest's order stays.
        prepared.sort_by_key(|prepared| prepared.picture.dimensions());
        let begin =
            |prepared| self.begin(prepared).map_err(|error| error.of(prepared.subject.name.as_deref()));
        let mut runs = prepared.iter().map(begin).collect::<Result<Vec<_>>>()?.into_iter();
        self.model.read_unet(self.console)?;
        let mut failed = Vec::new();
        for same_size in prepared.chunk_by(|a, b| a.picture.dimensions() == b.picture.dimensions()) {
            let size = same_size[0].picture.dimensions();
            let batch_size =
                self.batch_size.unwrap_or_else(|| subjects_at_once(&self.model.sd, &self.model.device, size));
            for batch in same_size.chunks(batch_size) {
                failed.extend(self.learn(batch, runs.by_ref().take(batch.len()).collect())?);
            }
        }
        match (failed.pop(), subjects) {
            (None, _) => Ok(()),
            (Some(error), [_]) => Err(error),
            (Some(error), _) => {
                failed.push(error);
                Err(Error::Subjects { total: subjects.len(), failed })
            }
        }
    }

    fn prepare<'a>(&self, subject: &'a Subject, output: &'a Output<'a>) -> Result<Prepared<'a>> {
        let geometry = Geometry::of(&self.model.sd);
        let side = geometry.side("--resolution", self.learning.resolution)?;
        let photo = read_photo(&subject.image)?;
        let picture = prepare(&photo.pixels, side, self.learning.crop, subject.seed, geometry)?;
        self.console.event(&Event::Photo {
            file: &subject.image.display().to_string(),
            original: photo.pixels.dimensions().into(),
            used: picture.dimensions().into(),
        });
        for text in std::iter::once(&subject.source_text).chain(&subject.target_texts) {
            warn_if_long(self.model, text, usize::from(self.learning.n_hiper), self.console)?;
        }
        let checkpoints = Checkpoints::list(output.folder())?;
        let prepared = Prepared { subject, output, picture, image_hash: photo.hash, checkpoints };
        if !prepared.checkpoints.is_empty() {
            self.settings(&prepared).check_same_run(output)?;
        }
        Ok(prepared)
    }

    /// Learns the tails of one batch and draws their pictures; what was wrong with those that could not be learned.
    fn learn(&self, batch: &[Prepared<'_>], mut runs: Vec<Run<'_>>) -> Result<Vec<Error>> {
        let tails = batch.iter().map(|prepared| prepared.output.path(TAIL)).collect::<Vec<_>>();
        let files = tails.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        let album = |i: usize| {
            let Prepared { subject, output, picture, .. } = &batch[i];
            let (model, look, console) = (self.model, &self.look, self.console);
            Album { model, output, console, look, picture, subject, file: &files[i] }
        };
        let training = Training {
            unet: &self.model.sd.unet,
            device: &self.model.device,
            console: self.console,
            train_steps: self.learning.train_steps,
            checkpoint_every: self.learning.checkpoint_every,
            preview_every: self.learning.preview_every,
        };
        training.finish(&mut runs, &mut |i, step, tail| album(i).preview(step, tail))?;

        // All tails first: pictures can be drawn again.
        for (run, path) in runs.iter().zip(&tails).filter(|(run, _)| run.failure.is_none()) {
            let tail = run.personalisation.tail().clone();
            HiperFile { tail, metadata: run.metadata() }.save(path)?;
            run.output.wrote(path, "tail");
        }
        let mut failed = Vec::new();
        for (i, run) in runs.into_iter().enumerate() {
            match run.failure {
                Some(error) => failed.push(Error::from(error).of(run.name)),
                None if batch[i].subject.target_texts.is_empty() => {}
                None => album(i).edits(run.personalisation.tail())?,
            }
        }
        Ok(failed)
    }

    /// The run before its first step, or after the newest checkpoint. The generator's first draw is the VAE's sample, as in
    /// PyTorch.
    fn begin<'a>(&self, prepared: &Prepared<'a>) -> Result<Run<'a>> {
        let Prepared { subject, output, picture, checkpoints, .. } = prepared;
        let (sd, device) = (&self.model.sd, &self.model.device);
        let source = TextEmbedding::new(sd.encode_prompt(&subject.source_text)?.1)?;
        let mut generator = TorchGenerator::new(subject.seed);
        let factor = sd.vae_scale_factor();
        let (height, width) = (picture.height() as usize / factor, picture.width() as usize / factor);
        let noise = generator.randn_tensor(&[1, sd.vae.config().latent_channels, height, width], device)?;
        let latents = sd.encode_image(&to_tensor(picture, device)?, &noise)?;
        let schedule = NoiseSchedule {
            alphas_cumprod: sd.scheduler_config.alphas_cumprod(),
            prediction_type: match sd.scheduler_config.prediction_type {
                schedulers::PredictionType::Epsilon => PredictionType::Epsilon,
                schedulers::PredictionType::VPrediction => PredictionType::VPrediction,
            },
        };
        let config = PersonalisationConfig {
            n_hiper: usize::from(self.learning.n_hiper),
            train_steps: self.learning.train_steps,
            adam: AdamConfig { learning_rate: self.learning.learning_rate, ..Default::default() },
        };
        let personalisation = Personalisation::new(config, &latents, &source, schedule, generator)?;
        let (name, origin) = (subject.name.as_deref(), self.origin(prepared));
        let mut run = Run { name, personalisation, output, origin, failure: None };
        if self.learning.resume {
            run.resume(checkpoints, self.console)?;
        }
        Ok(run)
    }

    fn settings(&self, prepared: &Prepared<'_>) -> Settings {
        let Prepared { subject, picture, image_hash, .. } = prepared;
        Settings {
            source_text: subject.source_text.clone(),
            n_hiper: usize::from(self.learning.n_hiper),
            learning_rate: self.learning.learning_rate,
            seed: subject.seed,
            crop: self.learning.crop,
            width: picture.width(),
            height: picture.height(),
            image_hash: image_hash.clone(),
            base_model_hash: self.model.hash.clone(),
        }
    }

    fn origin(&self, prepared: &Prepared<'_>) -> HiperMetadata {
        HiperMetadata {
            base_model: Some(self.model.name.clone()),
            base_model_hash: Some(self.model.hash.clone()),
            image_hash: Some(prepared.image_hash.clone()),
            source_text: Some(prepared.subject.source_text.clone()),
            seed: Some(prepared.subject.seed),
            ..Default::default()
        }
    }
}
