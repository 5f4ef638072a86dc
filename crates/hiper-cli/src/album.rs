//! The pictures of a personalisation: previews while it learns, edits and the contact sheet when it is done.

use hiper_core::HiperEmbedding;
use image::RgbImage;

use crate::Result;
use crate::console::Console;
use crate::model::Model;
use crate::output::Output;
use crate::picture::{Cell, draw_sheet, slug};
use crate::render::{Look, Painter, Tail};
use crate::subject::Subject;

/// What the pictures are drawn from.
pub struct Album<'a> {
    /// The model.
    pub model: &'a Model,
    /// Where they go.
    pub output: &'a Output<'a>,
    /// What is said meanwhile.
    pub console: &'a Console,
    /// How they are drawn.
    pub look: &'a Look,
    /// The photo, as the model sees it.
    pub picture: &'a RgbImage,
    /// Sentences and seed.
    pub subject: &'a Subject,
    /// The tail's file, for the pictures' metadata.
    pub file: &'a str,
}

impl Album<'_> {
    /// `[source; tail]`, `[target; 0.8 · tail]` and `[target]` after `step`, side by side: the paper authors' previews.
    ///
    /// # Errors
    /// When the folder cannot be written, or after Ctrl-C.
    pub fn preview(&self, step: usize, tail: &HiperEmbedding) -> Result<()> {
        let targets = &self.subject.target_texts;
        let painter = self.painter(1 + 2 * targets.len())?;
        let mut row = vec![self.reconstruction(&painter, tail)?];
        for target in targets {
            row.push(self.edit(&painter, target, tail)?);
            row.push(self.plain(&painter, target)?);
        }
        self.console.finish();
        let sheet = draw_sheet(&[row.into_iter().map(Some).collect()])?;
        self.output.picture(&format!("preview_step{step}.png"), "preview", &sheet, &[])?;
        Ok(())
    }

    /// The reconstruction, an edit a target text, and the contact sheet: photo, reconstruction and edits over the same
    /// sentences without the tail.
    ///
    /// # Errors
    /// When the folder cannot be written, or after Ctrl-C.
    pub fn edits(&self, tail: &HiperEmbedding) -> Result<()> {
        let (source, targets) = (&self.subject.source_text, &self.subject.target_texts);
        let painter = self.painter(2 * (1 + targets.len()))?;
        let photo = Cell { picture: self.picture.clone(), label: "photo", caption: source.clone() };
        let reconstruction = self.reconstruction(&painter, tail)?;
        self.save(&painter, "reconstruction.png", &reconstruction, Some(self.tail(tail, 1.0)))?;
        let mut with = vec![Some(photo), Some(reconstruction)];
        let mut without = vec![None, Some(self.plain(&painter, source)?)];
        for (i, target) in targets.iter().enumerate() {
            let edit = self.edit(&painter, target, tail)?;
            let name = format!("edit-{:02}-{}.png", i + 1, slug(target)).replace("-.", ".");
            self.save(&painter, &name, &edit, Some(self.tail(tail, self.look.tail_scale)))?;
            with.push(Some(edit));
            without.push(Some(self.plain(&painter, target)?));
        }
        self.console.finish();
        self.output.picture("contact_sheet.png", "contact sheet", &draw_sheet(&[with, without])?, &[])?;
        Ok(())
    }

    fn painter(&self, pictures: usize) -> Result<Painter<'_>> {
        let size = [self.picture.height() as usize, self.picture.width() as usize];
        Painter::new(self.model, self.look.clone(), size, pictures, self.console)
    }

    fn tail<'t>(&'t self, embedding: &'t HiperEmbedding, scale: f64) -> Tail<'t> {
        Tail { embedding, scale, file: self.file }
    }

    /// The tail as it was learned, unscaled, behind its own sentence.
    fn reconstruction(&self, painter: &Painter<'_>, tail: &HiperEmbedding) -> Result<Cell> {
        self.draw(painter, "reconstruction", &self.subject.source_text, Some(self.tail(tail, 1.0)))
    }

    fn edit(&self, painter: &Painter<'_>, target: &str, tail: &HiperEmbedding) -> Result<Cell> {
        self.draw(painter, "edit", target, Some(self.tail(tail, self.look.tail_scale)))
    }

    fn plain(&self, painter: &Painter<'_>, prompt: &str) -> Result<Cell> {
        self.draw(painter, "without the tail", prompt, None)
    }

    fn draw(
        &self,
        painter: &Painter<'_>,
        label: &'static str,
        prompt: &str,
        tail: Option<Tail<'_>>,
    ) -> Result<Cell> {
        let picture = painter.paint(prompt, tail, self.subject.seed)?;
        Ok(Cell { picture, label, caption: prompt.to_owned() })
    }

    fn save(&self, painter: &Painter<'_>, name: &str, cell: &Cell, tail: Option<Tail<'_>>) -> Result<()> {
        let recipe = painter.recipe(&cell.caption, tail, self.subject.seed);
        self.output.picture(name, "picture", &cell.picture, &recipe.texts())?;
        Ok(())
    }
}
