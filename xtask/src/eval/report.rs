//! What is kept of an evaluation: tables for people, JSON for programs, a sheet for the eye.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum as _;
use image::{Rgb, RgbImage, imageops};
use serde::Serialize;

use super::experiment::{Experiment, Row};
use super::measures::{Figures, Mean, means};
use super::questions::Question;
use super::subject::Subject;

/// Columns of a printed table: the figure, its heading, and whether it is a share.
const COLUMNS: [(&str, &str, Kind); 9] = [
    ("coat_error", "coat error", Kind::Number),
    ("coat_ratio", "ratio", Kind::Number),
    ("species", "species", Kind::Share),
    ("pose", "pose", Kind::Share),
    ("background", "background", Kind::Share),
    ("pattern", "pattern", Kind::Share),
    ("collar", "collar", Kind::Share),
    ("psnr", "PSNR", Kind::Number),
    ("psnr_to_vae", "to the VAE's", Kind::Number),
];

#[derive(Clone, Copy)]
enum Kind {
    Number,
    Share,
}

/// A table's rows, and the figures of every picture.
#[derive(Serialize)]
pub struct Table {
    rows: Vec<TableRow>,
}

#[derive(Serialize)]
struct TableRow {
    name: String,
    means: BTreeMap<&'static str, Mean>,
    pictures: Vec<(u64, Figures)>,
}

/// `eval.json`.
#[derive(Serialize)]
pub struct Report<'a, A> {
    command: String,
    model_hash: &'a str,
    settings: &'a A,
    tables: BTreeMap<String, Table>,
}

impl Table {
    /// Of rows of figures, one a picture, with the picture's subject.
    pub fn of_figures(rows: Vec<(String, Vec<(u64, Figures)>)>) -> Self {
        let row = |(name, pictures): (String, Vec<(u64, Figures)>)| {
            let means = means(pictures.iter().map(|(subject, figures)| (*subject, figures)));
            TableRow { name, means, pictures }
        };
        Self { rows: rows.into_iter().map(row).collect() }
    }

    /// Of conditions, after a row of the true pictures: the readers' own error. The first condition is what coat errors are
    /// divided by.
    ///
    /// # Errors
    /// When a true picture cannot be read.
    pub fn of_rows(rows: &[Row], experiment: &Experiment<'_>) -> Result<Self> {
        let mut truth = vec![];
        for subject in experiment.subjects {
            for place in &subject.targets {
                truth.push((subject.seed, experiment.figures(subject, place, &place.picture)?));
            }
        }
        let mut all = vec![("true pictures".to_owned(), truth)];
        all.extend(rows.iter().map(|row| {
            (row.condition.name.clone(), row.drawn.iter().map(|d| (d.subject, d.figures.clone())).collect())
        }));
        let mut table = Self::of_figures(all);
        let mean = |row: &TableRow| row.means.get("coat_error").copied();
        if let Some(Mean { mean: base, .. }) = table.rows.get(1).and_then(mean) {
            for row in &mut table.rows {
                if let Some(Mean { mean, pictures, .. }) = mean(row) {
                    // Of two means: no standard error is claimed.
                    row.means
                        .insert("coat_ratio", Mean { mean: mean / base, standard_error: f64::NAN, pictures });
                }
            }
        }
        Ok(table)
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let shown: Vec<_> = COLUMNS
            .iter()
            .filter(|(key, ..)| self.rows.iter().any(|row| row.means.contains_key(key)))
            .collect();
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut text = line(std::iter::once(String::new()).chain(shown.iter().map(|c| c.1.into())).collect());
        text += &line(vec!["---".into(); shown.len() + 1]);
        for row in &self.rows {
            let cells = shown
                .iter()
                .map(|(key, _, kind)| row.means.get(key).map_or(String::new(), |m| cell(m, *kind)));
            text += &line(std::iter::once(row.name.clone()).chain(cells).collect());
        }
        text
    }
}

fn cell(value: &Mean, kind: Kind) -> String {
    match kind {
        Kind::Share => format!("{:.0} %", 100.0 * value.mean),
        Kind::Number if value.standard_error.is_nan() => format!("{:.2}", value.mean),
        Kind::Number => format!("{:.1} ± {:.1}", value.mean, value.standard_error),
    }
}

impl<'a, A: Serialize> Report<'a, A> {
    /// Before its first table.
    pub fn new(command: String, model_hash: &'a str, settings: &'a A) -> Self {
        Self { command, model_hash, settings, tables: BTreeMap::new() }
    }

    /// Adds a table.
    pub fn push(&mut self, question: Question, table: Table) {
        self.tables.insert(file_name(question), table);
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("{}: cannot write", path.display()))
    }
}

/// A question's name on the command line, and in files.
pub fn file_name(question: Question) -> String {
    question.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A line a subject: the photo; then, for each target, the true picture and the first sample of every row.
pub fn sheet(rows: &[Row], subjects: &[Subject]) -> RgbImage {
    let lines: Vec<Vec<RgbImage>> = subjects
        .iter()
        .map(|subject| {
            let mut line = vec![subject.source.picture.clone()];
            for (index, target) in subject.targets.iter().enumerate() {
                line.push(target.picture.clone());
                let first = |row: &Row| {
                    let of =
                        row.drawn.iter().find(|d| d.subject == subject.seed && d.target == Some((index, 0)));
                    of.map(|drawn| drawn.picture.clone())
                };
                line.extend(rows.iter().filter_map(first));
            }
            line
        })
        .collect();
    grid(&lines)
}

/// Lines of pictures of one size.
pub fn grid(lines: &[Vec<RgbImage>]) -> RgbImage {
    const GAP: u32 = 2;
    let Some((width, height)) = lines.iter().flatten().next().map(RgbImage::dimensions) else {
        return RgbImage::new(1, 1);
    };
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let mut sheet =
        RgbImage::from_pixel(columns * (width + GAP), lines.len() as u32 * (height + GAP), Rgb([255; 3]));
    for (y, line) in (0..).zip(lines) {
        for (x, picture) in (0..).zip(line) {
            imageops::replace(&mut sheet, picture, x * i64::from(width + GAP), y * i64::from(height + GAP));
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_the_figures_that_there_are() {
        let figures = |pose, error| Figures::from([("pose", pose), ("coat_error", error)]);
        let table = Table::of_figures(vec![
            ("tail".into(), vec![(1, figures(1.0, 10.0)), (2, figures(0.0, 20.0))]),
            ("none".into(), vec![(1, Figures::from([("pose", 1.0)]))]),
        ]);
        assert_eq!(
            table.markdown(),
            "|  | coat error | pose |\n| --- | --- | --- |\n| tail | 15.0 ± 5.0 | 50 % |\n| none |  | 100 % |\n"
        );
    }

    #[test]
    fn a_grid_keeps_every_picture_in_its_place() {
        let tile = |v| RgbImage::from_pixel(3, 3, Rgb([v; 3]));
        let sheet = grid(&[vec![tile(1), tile(2)], vec![tile(3)]]);
        let at = |x, y| sheet.get_pixel(x, y).0[0];
        assert_eq!((sheet.dimensions(), at(0, 0), at(5, 2), at(2, 5), at(5, 5)), ((10, 10), 1, 2, 3, 255));
    }
}
