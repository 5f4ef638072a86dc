//! Drawing captions.

use ab_glyph::{Font, FontRef, Glyph, PxScale, ScaleFont, point};
use image::{Rgb, RgbImage};

use crate::{Error, Result};

static FONT: &[u8] = include_bytes!("../../assets/font/DejaVuSans-subset.ttf");

/// A font at one size.
pub struct Pen {
    font: FontRef<'static>,
    scale: PxScale,
}

impl Pen {
    /// Letters of `pixels` height, ascent to descent.
    ///
    /// # Errors
    /// When the font in the program is damaged.
    pub fn new(pixels: f32) -> Result<Self> {
        let font = FontRef::try_from_slice(FONT)
            .map_err(|e| Error::refused(format!("the font: {e}"), "build hiper again"))?;
        Ok(Self { font, scale: PxScale::from(pixels) })
    }

    /// From one line to the next, in pixels.
    pub fn line_height(&self) -> u32 {
        self.font.as_scaled(self.scale).height().ceil() as u32
    }

    fn width(&self, text: &str) -> f32 {
        let font = self.font.as_scaled(self.scale);
        text.chars().map(|c| font.h_advance(font.glyph_id(c))).sum()
    }

    /// Breaks a text into lines of at most `width` pixels; a word that is longer is broken itself.
    pub fn wrap(&self, text: &str, width: u32) -> Vec<String> {
        let fits = |line: &str| self.width(line) <= width as f32;
        let mut lines: Vec<String> = Vec::new();
        let mut line = String::new();
        for word in text.split_whitespace() {
            let longer = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
            if fits(&longer) {
                line = longer;
                continue;
            }
            if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            for c in word.chars() {
                line.push(c);
                if line.chars().count() > 1 && !fits(&line) {
                    line.pop();
                    lines.push(std::mem::replace(&mut line, c.to_string()));
                }
            }
        }
        if !line.is_empty() {
            lines.push(line);
        }
        lines
    }

    /// Draws one line with its upper left corner at `(x, y)`.
    pub fn draw(&self, picture: &mut RgbImage, text: &str, (x, y): (u32, u32), ink: [u8; 3]) {
        let font = self.font.as_scaled(self.scale);
        let mut at = point(x as f32, y as f32 + font.ascent());
        for c in text.chars() {
            let glyph: Glyph = font.glyph_id(c).with_scale_and_position(self.scale, at);
            at.x += font.h_advance(glyph.id);
            let Some(outline) = self.font.outline_glyph(glyph) else { continue };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, coverage| {
                let (px, py) = (corner.x as i64 + i64::from(dx), corner.y as i64 + i64::from(dy));
                let inside = (0..i64::from(picture.width())).contains(&px)
                    && (0..i64::from(picture.height())).contains(&py);
                if inside {
                    let Rgb(paper) = picture.get_pixel_mut(px as u32, py as u32);
                    for (paper, ink) in paper.iter_mut().zip(ink) {
                        let mixed = f32::from(*paper)
                            + (f32::from(ink) - f32::from(*paper)) * coverage.clamp(0.0, 1.0);
                        *paper = mixed.round() as u8;
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_width_and_all_letters() {
        let pen = Pen::new(14.0).unwrap();
        let text = "a dog sitting on the beach with an incomprehensibilitiesandmore collar";
        for width in [30, 80, 300] {
            let lines = pen.wrap(text, width);
            assert!(lines.iter().all(|line| pen.width(line) <= width as f32), "{lines:?}");
            let letters = |s: &str| s.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            assert_eq!(letters(&lines.concat()), letters(text));
        }
        assert!(pen.wrap(" ", 50).is_empty());
    }

    #[test]
    fn ink_lands_on_the_paper_and_nowhere_else() {
        let pen = Pen::new(14.0).unwrap();
        let mut paper = RgbImage::from_pixel(60, 20, Rgb([255; 3]));
        pen.draw(&mut paper, "Hié犬", (2, 1), [0; 3]);
        assert!(paper.pixels().any(|p| p.0[0] < 60));
        pen.draw(&mut paper, "far outside", (58, 500), [0; 3]);
    }
}
