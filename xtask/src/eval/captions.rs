//! The sentences that scenes are described with: `tools/train_demo/captions.py`, word for word.

use crate::scenes::{Background, Identity, Pose};

fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// Everything: body colour, pattern, collar, eyes, pose and background.
pub fn full(who: &Identity, pose: Pose, background: Background) -> String {
    let pattern = match who.pattern.word() {
        None => "no markings".into(),
        Some("patch") => format!("{} {} patch", article(who.pattern_color.1), who.pattern_color.1),
        Some(word) => format!("{} {word}", who.pattern_color.1),
    };
    let collar = who.collar.map_or("no collar".into(), |(_, color)| format!("a {color} collar"));
    let (body, species) = (who.body_name, who.species.word());
    let (eyes, article) = (who.eyes.1, article(body));
    let (pose, background) = (pose.word(), background.phrase());
    format!("{article} {body} {species} with {pattern}, {collar} and {eyes} eyes {pose} {background}")
}

/// What a user writes: species, pose and background; without pose or background if `None`.
pub fn short(who: &Identity, pose: Option<Pose>, background: Option<Background>) -> String {
    let species = who.species.word();
    let mut words = vec![article(species), species];
    words.extend(pose.map(Pose::word));
    words.extend(background.map(Background::phrase));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::Random;

    /// `captions.full` and `captions.short` of the first scenes that `cargo xtask scenes --seed 0` draws.
    #[test]
    fn they_are_the_captions_of_the_training() {
        let expected = include_str!("../../assets/captions_golden.txt").lines();
        for (seed, line) in (0..).zip(expected) {
            let scene = crate::scenes::dataset::Scene::random(seed);
            let (pose, background) = (scene.pose, scene.background);
            let full = full(&scene.identity, pose, background);
            let short = short(&scene.identity, Some(pose), Some(background));
            assert_eq!(format!("{full} | {short}"), line, "seed {seed}");
        }
    }

    #[test]
    fn what_is_left_out_is_left_out() {
        let who = Identity::random(&mut Random::new(3));
        let species = who.species.word();
        assert_eq!(short(&who, None, None), format!("{} {species}", article(species)));
        assert!(short(&who, Some(Pose::Lying), None).ends_with(" lying"));
    }
}
