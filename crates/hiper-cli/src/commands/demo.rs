//! `hiper demo`: the whole story on the embedded model.

use super::personalize::{Photographed, personalize};
use crate::Result;
use crate::args::{self, Crop, Demo, Personalize};
use crate::compute::Compute;
use crate::console::Console;
use crate::demo_model;
use crate::model::Model;
use crate::output::Output;
use crate::render::Look;
use crate::run::Checkpoints;

/// Personalises the embedded photo and edits it with the embedded sentences.
pub fn run(args: &Demo, compute: &Compute, console: &Console) -> Result<()> {
    let story = demo_model::story()?;
    let output = Output::create(&args.out, console)?;
    let photo = output.write("photo.png", demo_model::photo()?)?;
    output.wrote(&photo, "photo");
    let photo = Photographed::read(&photo)?;
    let model = Model::open(None, compute, console)?;
    let look = Look { steps: story.steps, ..Look::default() };
    let args = Personalize {
        input_image: output.path("photo.png"),
        source_text: story.source_text,
        target_text: story.target_texts,
        output_dir: args.out.clone(),
        model: args::Model { path: None },
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
    personalize(&args, &photo, &model, &output, look, console)
}
