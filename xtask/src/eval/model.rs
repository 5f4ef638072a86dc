//! The model without the method: its autoencoder, and what it draws from full captions.

use anyhow::Result;
use image::RgbImage;

use super::captions;
use super::experiment::Experiment;
use super::lab::Request;
use super::measures::{self, Figures};
use super::report::{Table, grid};
use super::subject::Subject;

/// Pictures drawn in one batch.
const BATCH: usize = 8;

/// Measures `count` scenes from seed `first` on; returns the table, and a sheet of the first ones.
///
/// # Errors
/// When the model's pictures have another size than the readers read.
pub fn measure(
    experiment: &Experiment<'_>,
    count: u64,
    first: u64,
    progress: &mut dyn FnMut(String),
) -> Result<(Table, RgbImage)> {
    let lab = experiment.lab;
    let subjects = (first..first + count)
        .map(|seed| Subject::of_seed(seed, 0, lab.size()))
        .collect::<Result<Vec<_>>>()?;
    let mut rows: [(&str, Vec<(u64, Figures)>); 4] =
        ["drawn by program", "through the autoencoder", "from full captions", "from short captions"]
            .map(|name| (name, vec![]));
    let mut sheet = vec![];
    for (done, part) in subjects.chunks(BATCH).enumerate() {
        progress(format!("{} of {count} scenes", done * BATCH));
        let mut columns = [vec![], vec![], vec![], vec![]];
        let caption = |subject: &Subject, full: bool| {
            let (who, place) = (&subject.identity, &subject.source);
            match full {
                true => captions::full(who, place.pose, place.background),
                false => captions::short(who, Some(place.pose), Some(place.background)),
            }
        };
        columns[0] = part.iter().map(|s| s.source.picture.clone()).collect();
        columns[1] = columns[0].iter().map(|picture| lab.through_vae(picture)).collect::<Result<_>>()?;
        for (column, full) in [(2, true), (3, false)] {
            let captions: Vec<_> = part.iter().map(|s| caption(s, full)).collect();
            let requests: Vec<_> = part
                .iter()
                .zip(&captions)
                .map(|(s, caption)| Request { caption, tail: None, seed: s.seed })
                .collect();
            columns[column] = lab.draw(&requests, experiment.guidance_scale)?;
        }
        for (i, subject) in part.iter().enumerate() {
            for (column, (_, rows)) in columns.iter().zip(&mut rows) {
                rows.push((subject.seed, experiment.figures(subject, &subject.source, &column[i])?));
            }
            let psnr = measures::psnr(&columns[1][i], &columns[0][i]);
            if let Some((_, figures)) = rows[1].1.last_mut() {
                figures.insert("psnr", psnr);
            }
            sheet.push(columns.iter().map(|column| column[i].clone()).collect());
        }
    }
    let table =
        Table::of_figures(rows.into_iter().map(|(name, figures)| (name.to_owned(), figures)).collect());
    sheet.truncate(2 * BATCH);
    Ok((table, grid(&sheet)))
}
