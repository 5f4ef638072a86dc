//! Where the picture is taken.

use super::canvas::{Canvas, Rgb, Shape};
use super::random::Random;

/// The six places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    /// A studio: one soft colour.
    Plain,
    /// Sand, sea and sky.
    Beach,
    /// Trees on grass.
    Forest,
    /// A white field under a pale sky, snow falling.
    Snow,
    /// Dunes under a hot sky.
    Desert,
    /// Lit windows at night.
    City,
}

/// Where the ground meets what is behind it.
const HORIZON: f32 = 0.6;

/// Each place has this many arrangements of its sun, trees, hills and windows: few enough for a small model to know them.
const LAYOUTS: u64 = 4;

impl Background {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Plain, Self::Beach, Self::Forest, Self::Snow, Self::Desert, Self::City];

    /// The words used in captions.
    pub fn phrase(self) -> &'static str {
        [
            "on a plain background",
            "on the beach",
            "in the forest",
            "in the snow",
            "in the desert",
            "in the city at night",
        ][self as usize]
    }

    pub(super) fn draw(self, canvas: &mut Canvas, seed: u64) {
        let mut random = Random::new(seed % LAYOUTS);
        match self {
            Self::Plain => canvas.gradient(0.0, 1.0, [0.80, 0.82, 0.84], [0.70, 0.72, 0.75]),
            Self::Beach => {
                canvas.gradient(0.0, 0.42, [0.36, 0.68, 0.94], [0.74, 0.90, 0.98]);
                canvas.gradient(0.42, 0.64, [0.06, 0.42, 0.68], [0.20, 0.66, 0.78]);
                canvas.gradient(0.64, 1.0, [0.96, 0.88, 0.66], [0.90, 0.78, 0.52]);
                canvas.fill(
                    &Shape::ellipse(random.between(0.1, 0.9), 0.14, 0.08, 0.08, 0.0),
                    [1.0, 0.94, 0.55],
                );
                canvas.fill(&Shape::ellipse(0.5, 0.645, 0.7, 0.018, 0.0), [0.95, 0.98, 0.98]);
            }
            Self::Forest => {
                canvas.gradient(0.0, HORIZON, [0.55, 0.78, 0.70], [0.36, 0.60, 0.40]);
                canvas.gradient(HORIZON, 1.0, [0.24, 0.50, 0.20], [0.16, 0.38, 0.14]);
                for i in 0..5 {
                    let x = i as f32 * 0.22 + random.between(0.0, 0.14);
                    canvas.fill(&rectangle(x - 0.02, 0.30, x + 0.02, 0.66), [0.34, 0.22, 0.12]);
                    let crown = random.between(0.0, 0.08);
                    for (lift, half) in [(0.0, 0.13), (0.13, 0.11), (0.25, 0.08)] {
                        let y = 0.50 - lift - crown;
                        canvas.fill(
                            &Shape::polygon(&[(x - half, y), (x + half, y), (x, y - 0.24)]),
                            [0.08, 0.34 + lift, 0.16],
                        );
                    }
                }
            }
            Self::Snow => {
                canvas.gradient(0.0, HORIZON, [0.66, 0.76, 0.88], [0.84, 0.90, 0.96]);
                for i in 0..3 {
                    let x = 0.1 + i as f32 * 0.4 + random.between(-0.1, 0.1);
                    canvas.fill(
                        &Shape::polygon(&[(x - 0.3, 0.62), (x, 0.28), (x + 0.3, 0.62)]),
                        [0.62, 0.70, 0.82],
                    );
                    canvas.fill(
                        &Shape::polygon(&[(x - 0.08, 0.37), (x, 0.28), (x + 0.08, 0.37)]),
                        [0.97, 0.98, 1.0],
                    );
                }
                canvas.gradient(HORIZON, 1.0, [0.96, 0.97, 1.0], [0.86, 0.90, 0.97]);
                for _ in 0..22 {
                    let (x, y) = (random.between(0.0, 1.0), random.between(0.0, 0.6));
                    canvas.fill(&Shape::ellipse(x, y, 0.013, 0.013, 0.0), [1.0, 1.0, 1.0]);
                }
            }
            Self::Desert => {
                canvas.gradient(0.0, HORIZON, [0.98, 0.62, 0.32], [0.99, 0.86, 0.56]);
                canvas.fill(
                    &Shape::ellipse(random.between(0.15, 0.85), 0.20, 0.09, 0.09, 0.0),
                    [1.0, 0.97, 0.80],
                );
                canvas.gradient(HORIZON, 1.0, [0.86, 0.56, 0.26], [0.74, 0.44, 0.20]);
                let x = random.between(0.2, 0.8);
                canvas.fill(&Shape::ellipse(x, 0.64, 0.45, 0.09, 0.0), [0.90, 0.62, 0.30]);
                let cactus = random.pick(&[0.08, 0.92]);
                let green = [0.20, 0.46, 0.24];
                canvas.fill(&Shape::limb((cactus, 0.72), (cactus, 0.5), (cactus, 0.36), 0.06), green);
                canvas.fill(
                    &Shape::limb((cactus, 0.56), (cactus - 0.07, 0.56), (cactus - 0.07, 0.44), 0.04),
                    green,
                );
                canvas.fill(
                    &Shape::limb((cactus, 0.60), (cactus + 0.07, 0.60), (cactus + 0.07, 0.48), 0.04),
                    green,
                );
            }
            Self::City => {
                canvas.gradient(0.0, 0.66, [0.03, 0.04, 0.16], [0.16, 0.12, 0.34]);
                canvas.fill(
                    &Shape::ellipse(random.between(0.1, 0.9), 0.10, 0.05, 0.05, 0.0),
                    [0.96, 0.95, 0.82],
                );
                for i in 0..5 {
                    let (left, top) = (i as f32 * 0.2, random.between(0.16, 0.40));
                    let wall: Rgb =
                        random.pick(&[[0.10, 0.11, 0.20], [0.14, 0.13, 0.24], [0.08, 0.09, 0.16]]);
                    canvas.fill(&rectangle(left, top, left + 0.19, 0.68), wall);
                    for window in 0..12 {
                        let (x, y) = (
                            left + 0.035 + (window % 3) as f32 * 0.05,
                            top + 0.04 + (window / 3) as f32 * 0.08,
                        );
                        if random.between(0.0, 1.0) < 0.6 && y < 0.62 {
                            canvas.fill(&rectangle(x, y, x + 0.025, y + 0.04), [1.0, 0.86, 0.40]);
                        }
                    }
                }
                canvas.gradient(0.66, 1.0, [0.22, 0.22, 0.28], [0.14, 0.14, 0.20]);
            }
        }
    }
}

fn rectangle(left: f32, top: f32, right: f32, bottom: f32) -> Shape {
    Shape::polygon(&[(left, top), (right, top), (right, bottom), (left, bottom)])
}
