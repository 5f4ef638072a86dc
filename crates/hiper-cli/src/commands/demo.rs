//! `hiper demo`: the whole story on the embedded model.

use super::personalize::Job;
use crate::Result;
use crate::args::{Crop, Demo, Learning};
use crate::compute::Compute;
use crate::console::Console;
use crate::demo_model;
use crate::model::Model;
use crate::output::Output;
use crate::render::Look;
use crate::run::Checkpoints;
use crate::subject::Subject;

/// Personalises the embedded photo and edits it with the embedded sentences.
pub fn run(args: &Demo, compute: &Compute, console: &Console) -> Result<()> {
    let story = demo_model::story()?;
    let output = Output::create(&args.out, console)?;
    let photo = output.write("photo.png", demo_model::photo()?)?;
    output.wrote(&photo, "photo");
    let model = Model::open(None, compute)?;
    let subject = Subject {
        name: None,
        image: photo,
        source_text: story.source_text,
        target_texts: story.target_texts,
        seed: story.seed,
    };
    let learning = Learning {
        n_hiper: hiper_core::DEFAULT_N_HIPER as u16,
        train_steps: story.train_steps,
        learning_rate: hiper_core::AdamConfig::default().learning_rate,
        seed: story.seed,
        resolution: None,
        crop: Crop::Center,
        checkpoint_every: 0,
        preview_every: 0,
        // Interrupted earlier: go on.
        resume: !Checkpoints::list(output.folder())?.is_empty(),
    };
    let look = Look { steps: story.steps, ..Look::default() };
    let job = Job { learning: &learning, batch_size: None, model: &model, look, console };
    job.personalize(&[subject], &[output])
}
