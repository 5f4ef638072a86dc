//! Who is in the picture.

use super::canvas::Rgb;
use super::random::Random;

/// The four kinds of animal, each with a silhouette of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Species {
    /// Floppy ears, a long snout, a raised tail.
    Dog,
    /// Pointed ears, a short face, a long curved tail.
    Cat,
    /// Long upright ears, a round tail.
    Rabbit,
    /// A beak, a wing, two legs.
    Bird,
}

impl Species {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Dog, Self::Cat, Self::Rabbit, Self::Bird];

    /// The word used in captions.
    pub fn word(self) -> &'static str {
        ["dog", "cat", "rabbit", "bird"][self as usize]
    }
}

/// What is drawn on the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Nothing.
    Plain,
    /// Large round spots.
    Spots,
    /// Broad stripes across the back.
    Stripes,
    /// One large patch.
    Patch,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Spots, Self::Stripes, Self::Patch];

    /// The word used in captions; a plain coat has none.
    pub fn word(self) -> Option<&'static str> {
        [None, Some("spots"), Some("stripes"), Some("patch")][self as usize]
    }
}

/// Everything that stays the same when the animal moves somewhere else.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Which animal.
    pub species: Species,
    /// Colour of the coat.
    pub body: Rgb,
    /// The colour's name in captions.
    pub body_name: &'static str,
    /// Colour of belly, muzzle and paws.
    pub belly: Rgb,
    /// What is drawn on the coat.
    pub pattern: Pattern,
    /// Colour of the pattern and its name.
    pub pattern_color: (Rgb, &'static str),
    /// Colour of the eyes and its name.
    pub eyes: (Rgb, &'static str),
    /// Colour of the collar and its name, if the animal wears one.
    pub collar: Option<(Rgb, &'static str)>,
    /// Length of the ears, 0.8–1.25.
    pub ear_length: f32,
    /// Chooses the background's details (trees, waves, windows).
    pub scene_seed: u64,
}

/// Coats, in sRGB: the name covers a neighbourhood of the colour.
const COATS: [(&str, Rgb); 12] = [
    ("orange", [0.93, 0.53, 0.16]),
    ("brown", [0.50, 0.31, 0.17]),
    ("black", [0.14, 0.14, 0.16]),
    ("white", [0.93, 0.92, 0.89]),
    ("gray", [0.55, 0.56, 0.58]),
    ("golden", [0.88, 0.72, 0.30]),
    ("red", [0.78, 0.20, 0.17]),
    ("blue", [0.24, 0.42, 0.80]),
    ("green", [0.28, 0.62, 0.31]),
    ("pink", [0.93, 0.58, 0.70]),
    ("purple", [0.52, 0.31, 0.68]),
    ("cream", [0.93, 0.84, 0.66]),
];

const COLLARS: [(&str, Rgb); 6] = [
    ("red", [0.86, 0.10, 0.12]),
    ("blue", [0.10, 0.30, 0.90]),
    ("green", [0.08, 0.62, 0.22]),
    ("yellow", [0.98, 0.84, 0.10]),
    ("pink", [0.98, 0.42, 0.66]),
    ("white", [0.97, 0.97, 0.97]),
];

const EYES: [(&str, Rgb); 4] = [
    ("black", [0.05, 0.05, 0.06]),
    ("blue", [0.10, 0.35, 0.85]),
    ("green", [0.10, 0.60, 0.20]),
    ("amber", [0.85, 0.55, 0.05]),
];

impl Identity {
    /// Draws an identity at random.
    pub fn random(random: &mut Random) -> Self {
        let species = random.pick(&Species::ALL);
        let (body_name, body) = random.pick(&COATS);
        let body = body.map(|c| (c + random.between(-0.07, 0.07)).clamp(0.05, 0.97));
        let toward = if random.between(0.0, 1.0) < 0.7 { 0.95 } else { 0.12 };
        let belly = body.map(|c| c + (toward - c) * 0.6);
        let pattern = random.pick(&Pattern::ALL);
        // A pattern that cannot be told from the coat is none: draw again until it can.
        let pattern_color = loop {
            let (name, color) = random.pick(&COATS);
            if distance(color, body) > 0.45 {
                break (color, name);
            }
        };
        let (eye_name, eye) = random.pick(&EYES);
        // Likewise the collar, which seven in ten wear: each of its colours about as often as none.
        let collar = (random.between(0.0, 1.0) < 0.7).then(|| {
            loop {
                let (name, color) = random.pick(&COLLARS);
                if distance(color, body) > 0.35 {
                    break (color, name);
                }
            }
        });
        Self {
            species,
            body,
            body_name,
            belly,
            pattern,
            pattern_color,
            eyes: (eye, eye_name),
            collar,
            ear_length: random.between(0.8, 1.25),
            scene_seed: random.bits(),
        }
    }
}

fn distance(a: Rgb, b: Rgb) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
}
