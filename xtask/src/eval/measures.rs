//! Figures of a picture against the truth, and their means.

use std::collections::BTreeMap;

use image::RgbImage;

use super::readers::{QUESTIONS, Reading};

/// Distance (0–441) between the mean colour of `picture` where `coat` is true and the coat's own, in 0–1. `None` without coat.
pub fn coat_error(picture: &RgbImage, coat: &[bool], color: [f32; 3]) -> Option<f64> {
    let (mut sum, mut count) = ([0.0; 3], 0.0);
    for (pixel, _) in picture.pixels().zip(coat).filter(|(_, coat)| **coat) {
        for (sum, value) in sum.iter_mut().zip(pixel.0) {
            *sum += f64::from(value);
        }
        count += 1.0;
    }
    let square = |(sum, color): (&f64, f32)| (sum / count - 255.0 * f64::from(color)).powi(2);
    (count > 0.0).then(|| sum.iter().zip(color).map(square).sum::<f64>().sqrt())
}

/// Peak signal-to-noise ratio in dB of two pictures of one size; infinite when they are equal.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares: f64 =
        a.as_raw().iter().zip(b.as_raw()).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) * a.as_raw().len() as f64 / squares).log10()
}

/// Named figures of one picture: shares are 0 or 1.
pub type Figures = BTreeMap<&'static str, f64>;

/// Which questions are read right.
pub fn right(reading: &Reading, truth: &Reading) -> Figures {
    QUESTIONS
        .iter()
        .zip(reading.iter().zip(truth))
        .map(|((name, _), (a, b))| (*name, f64::from(u8::from(a == b))))
        .collect()
}

/// The mean of a figure and its standard error, over subjects: pictures of one subject are not independent.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Mean {
    /// The mean over subjects of each one's mean.
    pub mean: f64,
    /// Its standard error; 0 for a single subject.
    pub standard_error: f64,
    /// How many pictures.
    pub pictures: usize,
}

/// The mean of every figure over `(subject, figures)`.
pub fn means<'a>(pictures: impl Iterator<Item = (u64, &'a Figures)>) -> BTreeMap<&'static str, Mean> {
    let mut by_name: BTreeMap<&'static str, BTreeMap<u64, Vec<f64>>> = BTreeMap::new();
    for (subject, figures) in pictures {
        for (name, value) in figures {
            by_name.entry(name).or_default().entry(subject).or_default().push(*value);
        }
    }
    let mean_of = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    by_name
        .into_iter()
        .map(|(name, subjects)| {
            let each: Vec<f64> = subjects.values().map(|values| mean_of(values)).collect();
            let (mean, n) = (mean_of(&each), each.len() as f64);
            let squares: f64 = each.iter().map(|v| (v - mean).powi(2)).sum();
            let standard_error = if each.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 };
            (name, Mean { mean, standard_error, pictures: subjects.values().map(Vec::len).sum() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn coat_error_is_the_distance_of_means_where_there_is_coat() {
        let picture = RgbImage::from_fn(4, 1, |x, _| Rgb([[10, 20, 30, 200][x as usize], 0, 0]));
        let error = coat_error(&picture, &[true, false, true, false], [0.0, 0.0, 40.0 / 255.0]).unwrap();
        assert!((error - (20f64.powi(2) + 40f64.powi(2)).sqrt()).abs() < 1e-5, "{error}");
        assert_eq!(coat_error(&picture, &[false; 4], [0.0; 3]), None);
    }

    #[test]
    fn psnr_of_a_known_difference() {
        let (black, gray) = (RgbImage::new(3, 3), RgbImage::from_pixel(3, 3, Rgb([51; 3])));
        assert!((psnr(&black, &gray) - 20.0 * 5f64.log10()).abs() < 1e-12);
        assert_eq!(psnr(&gray, &gray), f64::INFINITY);
    }

    #[test]
    fn every_subject_counts_alike() {
        let figures: Vec<(u64, Figures)> =
            [(1, 0.0), (1, 0.0), (1, 0.0), (2, 1.0)].map(|(s, v)| (s, BTreeMap::from([("x", v)]))).into();
        let mean = means(figures.iter().map(|(s, f)| (*s, f)))["x"];
        assert_eq!(mean, Mean { mean: 0.5, standard_error: 0.5, pictures: 4 });
    }

    #[test]
    fn readings_are_compared_question_by_question() {
        let truth = ["dog", "sitting", "in the snow", "spots", "none"];
        let figures = right(&["dog", "lying", "in the snow", "spots", "red"], &truth);
        assert_eq!(figures.values().sum::<f64>(), 3.0);
        assert_eq!((figures["pose"], figures["collar"], figures["pattern"]), (0.0, 0.0, 1.0));
    }
}
