//! A held-out subject: the picture to learn from, and where the same identity is to appear.

use anyhow::{Context, Result};
use image::RgbImage;

use crate::scenes::dataset::Scene;
use crate::scenes::{Background, Identity, Picture, Pose, render};

/// A subject and its places.
pub struct Subject {
    /// The seed that it follows from.
    pub seed: u64,
    /// Who.
    pub identity: Identity,
    /// What the photo shows.
    pub source: Place,
    /// What the edits should show.
    pub targets: Vec<Place>,
}

/// A pose on a background, as the identity truly looks there.
pub struct Place {
    /// Doing what.
    pub pose: Pose,
    /// Where.
    pub background: Background,
    /// The true picture.
    pub picture: RgbImage,
    /// Pixels that show bare coat, nothing else.
    pub coat: Vec<bool>,
}

/// How many targets a subject can have.
pub const MOST_TARGETS: u8 = 6;

impl Subject {
    /// The subject of scene `seed`, whose picture is the source. Its targets walk through the other backgrounds, the last one
    /// the source's own in another pose.
    ///
    /// # Errors
    /// When `size` cannot be drawn.
    pub fn of_seed(seed: u64, targets: u8, size: u32) -> Result<Self> {
        let Scene { identity, pose, background } = Scene::random(seed);
        let targets = (1..=usize::from(targets))
            .map(|i| {
                let pose = Pose::ALL[(pose as usize + i) % Pose::ALL.len()];
                let background = Background::ALL[(background as usize + i) % Background::ALL.len()];
                Place::draw(&identity, pose, background, size)
            })
            .collect::<Result<_>>()?;
        let source = Place::draw(&identity, pose, background, size)?;
        Ok(Self { seed, identity, source, targets })
    }
}

impl Place {
    /// Draws it.
    ///
    /// # Errors
    /// When `size` cannot be drawn.
    pub fn draw(identity: &Identity, pose: Pose, background: Background, size: u32) -> Result<Self> {
        /// A coverage of 250 of 255 is inside; 12 levels off the coat's colour is something else.
        const INSIDE: u8 = 250;
        const NEAR: f32 = 12.0;
        let drawn =
            render(identity, pose, background, size).with_context(|| format!("cannot draw {size} pixels"))?;
        let is_coat = |rgb: &[u8]| {
            rgb.iter().zip(identity.body).all(|(&v, coat)| (f32::from(v) - coat * 255.0).abs() < NEAR)
        };
        let coat =
            drawn.rgb.chunks_exact(3).zip(&drawn.silhouette).map(|(rgb, &a)| a > INSIDE && is_coat(rgb));
        Ok(Self { pose, background, coat: coat.collect(), picture: picture(&drawn, size)? })
    }
}

/// The colours of a drawn scene.
///
/// # Errors
/// When it is not `size` pixels a side.
pub fn picture(drawn: &Picture, size: u32) -> Result<RgbImage> {
    RgbImage::from_raw(size, size, drawn.rgb.clone()).context("a picture of the wrong size")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_differs_from_the_source_and_from_the_others() {
        for seed in 0..50 {
            let subject = Subject::of_seed(seed, MOST_TARGETS, 32).unwrap();
            let mut seen = vec![(subject.source.pose, subject.source.background)];
            for target in &subject.targets {
                assert!(!seen.contains(&(target.pose, target.background)), "seed {seed}");
                seen.push((target.pose, target.background));
            }
        }
    }

    #[test]
    fn bare_coat_is_found_in_every_pose() {
        for seed in 0..50 {
            let subject = Subject::of_seed(seed, MOST_TARGETS, 64).unwrap();
            for place in std::iter::once(&subject.source).chain(&subject.targets) {
                let count = place.coat.iter().filter(|c| **c).count();
                assert!(count > 40, "seed {seed}, {:?}: {count} pixels", place.pose);
            }
        }
    }
}
