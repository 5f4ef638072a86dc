//! Contact sheets: rows of pictures, each with its caption under it.

use image::imageops::{FilterType, replace, resize};
use image::{Rgb, RgbImage};

use super::text::Pen;
use crate::Result;

/// Pictures smaller than this are enlarged, pixel for pixel, up to four times.
const LEGIBLE_SIDE: u32 = 256;
const MARGIN: u32 = 12;
const TEXT_HEIGHT: f32 = 16.0;
const PAPER: Rgb<u8> = Rgb([255; 3]);
const LABEL_INK: [u8; 3] = [110, 110, 110];
const CAPTION_INK: [u8; 3] = [20, 20, 20];

/// One place of a sheet.
pub struct Cell {
    /// The picture.
    pub picture: RgbImage,
    /// What it is, in grey.
    pub label: &'static str,
    /// The sentence it was drawn from.
    pub caption: String,
}

/// Draws rows of cells; `None` leaves a place empty.
///
/// # Errors
/// When the font in the program is damaged.
pub fn draw_sheet(rows: &[Vec<Option<Cell>>]) -> Result<RgbImage> {
    let pen = Pen::new(TEXT_HEIGHT)?;
    let cells = || rows.iter().flatten().flatten();
    let zoom = cells().map(|c| LEGIBLE_SIDE / c.picture.width().max(1)).min().unwrap_or(1).clamp(1, 4);
    let width = cells().map(|c| c.picture.width() * zoom).max().unwrap_or(0);
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;

    let row_height = |row: &[Option<Cell>]| {
        let pictures = row.iter().flatten().map(|c| c.picture.height() * zoom).max().unwrap_or(0);
        let lines = row.iter().flatten().map(|c| pen.wrap(&c.caption, width).len() + 1).max().unwrap_or(0);
        (pictures, pictures + MARGIN / 2 + lines as u32 * pen.line_height())
    };
    let heights: Vec<_> = rows.iter().map(|row| row_height(row)).collect();
    let total = heights.iter().map(|(_, all)| all + MARGIN).sum::<u32>() + MARGIN;
    let mut sheet = RgbImage::from_pixel(columns * (width + MARGIN) + MARGIN, total, PAPER);

    let mut top = MARGIN;
    for (row, (picture_height, all)) in rows.iter().zip(heights) {
        for (column, cell) in row.iter().enumerate() {
            let Some(cell) = cell else { continue };
            let left = MARGIN + column as u32 * (width + MARGIN);
            let (w, h) = (cell.picture.width() * zoom, cell.picture.height() * zoom);
            let enlarged = resize(&cell.picture, w, h, FilterType::Nearest);
            replace(&mut sheet, &enlarged, i64::from(left), i64::from(top));
            let mut y = top + picture_height + MARGIN / 2;
            pen.draw(&mut sheet, cell.label, (left, y), LABEL_INK);
            for line in pen.wrap(&cell.caption, width) {
                y += pen.line_height();
                pen.draw(&mut sheet, &line, (left, y), CAPTION_INK);
            }
        }
        top += all + MARGIN;
    }
    Ok(sheet)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a colour that no caption has.
    fn cell(side: u32, value: u8, caption: &str) -> Option<Cell> {
        let picture = RgbImage::from_pixel(side, side, Rgb([value, 0, 255]));
        Some(Cell { picture, label: "edit", caption: caption.into() })
    }

    #[test]
    fn small_pictures_are_enlarged_and_stand_side_by_side() {
        let rows =
            [vec![cell(64, 10, "a dog"), cell(64, 90, "a cat")], vec![None, cell(64, 170, "a bird, lying")]];
        let sheet = draw_sheet(&rows).unwrap();
        assert_eq!(sheet.width(), 2 * 256 + 3 * MARGIN);
        assert_eq!(sheet.get_pixel(MARGIN, MARGIN).0, [10, 0, 255]);
        assert_eq!(sheet.get_pixel(MARGIN + 255, MARGIN + 255).0, [10, 0, 255]);
        assert_eq!(sheet.get_pixel(2 * MARGIN + 256, MARGIN).0, [90, 0, 255]);
        let count = |value| sheet.pixels().filter(|p| p.0 == [value, 0, 255]).count();
        assert_eq!([count(10), count(90), count(170)], [256 * 256; 3]);
    }

    #[test]
    fn large_pictures_keep_their_size() {
        let sheet = draw_sheet(&[vec![cell(300, 10, "x"), None]]).unwrap();
        assert_eq!(sheet.width(), 2 * 300 + 3 * MARGIN);
        assert_eq!(draw_sheet(&[]).unwrap().dimensions(), (MARGIN, MARGIN));
    }
}
