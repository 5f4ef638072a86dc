//! The demo model's world: animals drawn by program.
//!
//! A scene is an [`Identity`] in a [`Pose`] on a [`Background`]. The same identity can be drawn in any pose and on any
//! background, which is the ground truth that no collection of photographs has. Everything follows from a seed.

mod background;
mod body;
mod canvas;
pub mod dataset;
mod identity;
mod random;

pub use background::Background;
pub use body::Pose;
pub use identity::Identity;
pub use random::Random;

use canvas::Canvas;

/// Pictures are drawn this many times larger in each direction, then box-filtered.
const OVERSAMPLING: u32 = 4;

/// A drawn scene.
pub struct Picture {
    /// `size × size × 3` bytes, row-major RGB.
    pub rgb: Vec<u8>,
    /// `size × size`: how much of each pixel the subject covers, 0–255.
    pub silhouette: Vec<u8>,
}

/// Draws a scene, anti-aliased, at any size from 8 pixels. `None` when the size is 0 or too large to allocate.
pub fn render(identity: &Identity, pose: Pose, background: Background, size: u32) -> Option<Picture> {
    let large = size.checked_mul(OVERSAMPLING)?;
    let mut scene = Canvas::new(large)?;
    background.draw(&mut scene, identity.scene_seed);
    let mut subject = Canvas::new(large)?;
    body::draw(&mut subject, identity, pose);
    scene.shadow(pose.shadow());
    scene.put(&subject);
    let (rgba, subject) = (scene.shrink(OVERSAMPLING), subject.shrink(OVERSAMPLING));
    Some(Picture {
        rgb: rgba.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
        silhouette: subject.chunks_exact(4).map(|p| p[3]).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_draws_a_large_subject() {
        for seed in 0..24 {
            let identity = Identity::random(&mut Random::new(seed));
            for pose in Pose::ALL {
                for background in Background::ALL {
                    let picture = render(&identity, pose, background, 32).unwrap();
                    let covered = picture.silhouette.iter().filter(|&&a| a > 127).count();
                    assert!(covered > 32 * 32 / 10, "{identity:?} {pose:?}: {covered} pixels");
                }
            }
        }
    }

    #[test]
    fn the_silhouette_is_where_the_coat_is() {
        let mut identity = Identity::random(&mut Random::new(3));
        for pose in Pose::ALL {
            let before = render(&identity, pose, Background::City, 48).unwrap();
            identity.body = identity.body.map(|c| 1.0 - c);
            let after = render(&identity, pose, Background::City, 48).unwrap();
            let changed = |i: usize| (0..3).any(|c| before.rgb[i * 3 + c].abs_diff(after.rgb[i * 3 + c]) > 8);
            let (inside, outside): (Vec<usize>, Vec<usize>) =
                (0..48 * 48).partition(|&i| before.silhouette[i] > 127);
            assert!(
                outside.iter().filter(|&&i| before.silhouette[i] == 0).all(|&i| !changed(i)),
                "{pose:?}: outside changed"
            );
            assert!(
                inside.iter().filter(|&&i| changed(i)).count() * 3 > inside.len(),
                "{pose:?}: the coat stayed"
            );
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_picture() {
        let draw = || {
            let identity = Identity::random(&mut Random::new(7));
            render(&identity, Pose::Sitting, Background::Beach, 64).unwrap().rgb
        };
        assert_eq!(draw(), draw());
    }

    #[test]
    fn a_size_that_cannot_be_drawn_is_refused() {
        let identity = Identity::random(&mut Random::new(7));
        assert!(render(&identity, Pose::Sitting, Background::Beach, 0).is_none());
        assert!(render(&identity, Pose::Sitting, Background::Beach, u32::MAX).is_none());
    }
}
