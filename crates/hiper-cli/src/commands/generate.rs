//! `hiper edit` and `hiper generate`: sentences to pictures, with and without a tail.

use hiper_core::HiperFile;

use crate::args::{Edit, Generate, Sampling, look};
use crate::compute::Compute;
use crate::console::Console;
use crate::model::Model;
use crate::output::Output;
use crate::picture::{Geometry, slug};
use crate::render::{Painter, Tail, warn_if_long};
use crate::{Error, Result};

/// `hiper edit`.
pub fn edit(args: &Edit, compute: &Compute, console: &Console) -> Result<()> {
    let file = HiperFile::load(&args.embedding)?;
    let name = args.embedding.display().to_string();
    let tail = Tail { embedding: &file.tail, scale: args.tail_scale, file: &name };
    let model = Model::open(args.sampling.model.path.as_deref(), compute)?;
    check_fits(&tail, &model)?;
    if let Some(hash) = file.metadata.base_model_hash.filter(|hash| *hash != model.hash) {
        let base = file.metadata.base_model.unwrap_or_default();
        let short = |hash: &str| hash.chars().take(10).collect::<String>();
        console.warn(format!(
            "{name}: learned with {base} (hash {}), which is another model than {} (hash {})",
            short(&hash),
            model.name,
            short(&model.hash)
        ));
    }
    draw(&args.sampling, Some(tail), &model, console)
}

/// `hiper generate`.
pub fn generate(args: &Generate, compute: &Compute, console: &Console) -> Result<()> {
    let model = Model::open(args.sampling.model.path.as_deref(), compute)?;
    draw(&args.sampling, None, &model, console)
}

fn check_fits(tail: &Tail<'_>, model: &Model) -> Result<()> {
    let (width, n_hiper) = (tail.embedding.width(), tail.embedding.n_hiper());
    let (expected, tokens) = (model.sd.unet.cross_attention_dim(), model.sd.tokenizer.max_length());
    let wrong = if width != expected {
        format!("the tail has width {width}, the model {} takes {expected}", model.name)
    } else if n_hiper >= tokens {
        format!(
            "the tail has {n_hiper} tokens, which leave no room in the {tokens} of the model {}",
            model.name
        )
    } else {
        return Ok(());
    };
    Err(Error::refused(
        format!("{}: {wrong}", tail.file),
        "give --model the checkpoint that the tail was learned with; hiper inspect names it",
    ))
}

fn draw(args: &Sampling, tail: Option<Tail<'_>>, model: &Model, console: &Console) -> Result<()> {
    let geometry = Geometry::of(&model.sd);
    let size = [geometry.side("--height", args.height)?, geometry.side("--width", args.width)?];
    let n_hiper = tail.map_or(0, |tail| tail.embedding.n_hiper());
    for prompt in &args.prompt {
        warn_if_long(model, prompt, n_hiper, console)?;
    }
    warn_if_long(model, &args.negative_prompt, 0, console)?;
    let output = Output::create(&args.output_dir, console)?;
    model.read_unet(console)?;
    let scale = tail.map_or(1.0, |tail| tail.scale);
    let painter = Painter::new(model, look(args, scale), size, args.prompt.len() * args.images, console)?;
    for (i, prompt) in args.prompt.iter().enumerate() {
        for seed in (0..args.images as u64).map(|image| args.seed.wrapping_add(image)) {
            let picture = painter.paint(prompt, tail, seed)?;
            let name = format!("{:02}-{}-seed{seed}.png", i + 1, slug(prompt)).replace("--", "-");
            output.picture(&name, "picture", &picture, &painter.recipe(prompt, tail, seed).texts())?;
        }
    }
    console.finish();
    Ok(())
}
