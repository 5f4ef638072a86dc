//! The animal: a few large shapes placed by a pose, dressed by an identity.

use super::canvas::{Canvas, Rgb, Shape};
use super::identity::{Identity, Pattern, Species};

/// What the animal is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pose {
    /// On all its legs.
    Standing,
    /// Upright, haunches on the ground.
    Sitting,
    /// In the air, stretched and turned upward.
    Jumping,
    /// Flat on the ground.
    Lying,
}

impl Pose {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Standing, Self::Sitting, Self::Jumping, Self::Lying];

    /// The word used in captions.
    pub fn word(self) -> &'static str {
        ["standing", "sitting", "jumping", "lying"][self as usize]
    }

    /// The shadow's centre and radii.
    pub(super) fn shadow(self) -> [f32; 4] {
        match self {
            Self::Standing => [0.48, 0.90, 0.32, 0.035],
            Self::Sitting => [0.47, 0.90, 0.27, 0.035],
            Self::Jumping => [0.50, 0.93, 0.22, 0.025],
            Self::Lying => [0.50, 0.88, 0.40, 0.045],
        }
    }

    fn frame(self) -> Frame {
        match self {
            Self::Standing => Frame {
                torso: Oval { x: 0.44, y: 0.58, rx: 0.27, ry: 0.155, turn: 0.0 },
                head: (0.74, 0.36),
                legs: [
                    [(0.25, 0.64), (0.24, 0.76), (0.24, 0.88)],
                    [(0.36, 0.66), (0.37, 0.76), (0.37, 0.88)],
                    [(0.54, 0.66), (0.54, 0.76), (0.53, 0.88)],
                    [(0.64, 0.64), (0.66, 0.76), (0.66, 0.88)],
                ],
                tail: [(0.20, 0.53), (0.08, 0.46), (0.07, 0.30)],
            },
            Self::Sitting => Frame {
                torso: Oval { x: 0.44, y: 0.63, rx: 0.25, ry: 0.185, turn: -58.0 },
                head: (0.60, 0.29),
                legs: [
                    [(0.34, 0.78), (0.30, 0.87), (0.42, 0.875)],
                    [(0.36, 0.78), (0.34, 0.87), (0.48, 0.875)],
                    [(0.54, 0.56), (0.57, 0.72), (0.57, 0.88)],
                    [(0.59, 0.54), (0.65, 0.72), (0.66, 0.88)],
                ],
                tail: [(0.30, 0.80), (0.13, 0.88), (0.10, 0.70)],
            },
            Self::Jumping => Frame {
                torso: Oval { x: 0.46, y: 0.50, rx: 0.27, ry: 0.145, turn: -27.0 },
                head: (0.75, 0.22),
                legs: [
                    [(0.28, 0.60), (0.20, 0.68), (0.10, 0.76)],
                    [(0.34, 0.60), (0.28, 0.72), (0.20, 0.82)],
                    [(0.60, 0.46), (0.74, 0.52), (0.84, 0.46)],
                    [(0.58, 0.50), (0.70, 0.60), (0.82, 0.58)],
                ],
                tail: [(0.24, 0.60), (0.12, 0.56), (0.06, 0.44)],
            },
            Self::Lying => Frame {
                torso: Oval { x: 0.43, y: 0.74, rx: 0.30, ry: 0.135, turn: 0.0 },
                head: (0.76, 0.60),
                legs: [
                    [(0.24, 0.82), (0.34, 0.86), (0.44, 0.86)],
                    [(0.20, 0.82), (0.28, 0.87), (0.38, 0.87)],
                    [(0.62, 0.82), (0.74, 0.87), (0.88, 0.86)],
                    [(0.58, 0.82), (0.70, 0.87), (0.82, 0.87)],
                ],
                tail: [(0.16, 0.76), (0.05, 0.80), (0.05, 0.66)],
            },
        }
    }
}

struct Oval {
    x: f32,
    y: f32,
    rx: f32,
    ry: f32,
    turn: f32,
}

impl Oval {
    /// A point of the oval's own coordinates: (1, 0) is the nose's end of the long axis, (0, −1) the back.
    fn at(&self, along: f32, across: f32) -> (f32, f32) {
        let (sin, cos) = self.turn.to_radians().sin_cos();
        let (dx, dy) = (along * self.rx, across * self.ry);
        (self.x + dx * cos - dy * sin, self.y + dx * sin + dy * cos)
    }

    fn ellipse_at(&self, along: f32, across: f32, rx: f32, ry: f32) -> Shape {
        let (x, y) = self.at(along, across);
        Shape::ellipse(x, y, rx, ry, self.turn)
    }
}

struct Frame {
    torso: Oval,
    head: (f32, f32),
    legs: [[(f32, f32); 3]; 4],
    tail: [(f32, f32); 3],
}

fn shade(color: Rgb, factor: f32) -> Rgb {
    color.map(|c| c * factor)
}

pub(super) fn draw(canvas: &mut Canvas, identity: &Identity, pose: Pose) {
    let frame = pose.frame();
    let bird = identity.species == Species::Bird;
    tail(canvas, identity, &frame);
    let leg_width = match identity.species {
        Species::Dog => 0.080,
        Species::Cat => 0.064,
        Species::Rabbit => 0.075,
        Species::Bird => 0.034,
    };
    // A bird stands on the two legs in the middle; its far legs are not there.
    let far: &[usize] = if bird { &[] } else { &[0, 3] };
    let near = [1, 2];
    let leg_color = if bird { [0.93, 0.60, 0.12] } else { identity.body };
    for &i in far {
        leg(canvas, frame.legs[i], leg_width, shade(leg_color, 0.72), shade(identity.belly, 0.8));
    }
    let body = torso(&frame, identity.species);
    if bird {
        for i in near {
            leg(canvas, frame.legs[i], leg_width, leg_color, leg_color);
        }
    }
    let (x, y) = frame.head;
    let shoulder = frame.torso.at(0.62, -0.25);
    let neck_width = match identity.species {
        Species::Dog => 0.17,
        Species::Cat => 0.15,
        Species::Rabbit => 0.17,
        Species::Bird => 0.13,
    };
    let neck = Shape::limb(shoulder, ((x + shoulder.0) / 2.0, (y + shoulder.1) / 2.0), (x, y), neck_width);
    canvas.fill(&neck, identity.body);
    canvas.fill(&body, identity.body);
    canvas.fill_inside(
        &frame.torso.ellipse_at(0.05, 0.85, frame.torso.rx * 0.8, frame.torso.ry * 0.5),
        identity.belly,
        &[&body],
    );
    if bird {
        // Under the pattern, which would else be hidden.
        let (wx, wy) = frame.torso.at(-0.18, -0.12);
        canvas
            .fill(&Shape::ellipse(wx, wy, 0.17, 0.085, frame.torso.turn - 12.0), shade(identity.body, 0.78));
    }
    pattern(canvas, identity, &frame, &body);
    if !bird {
        for i in near {
            leg(canvas, frame.legs[i], leg_width, identity.body, identity.belly);
        }
    }
    if let Some((color, _)) = identity.collar {
        // Across the neck, two thirds of the way to the head.
        let (cx, cy) = (shoulder.0 + (x - shoulder.0) * 0.42, shoulder.1 + (y - shoulder.1) * 0.42);
        let (dx, dy) = (x - shoulder.0, y - shoulder.1);
        let length = (dx * dx + dy * dy).sqrt().max(1e-6);
        let (nx, ny) = (-dy / length * neck_width * 0.56, dx / length * neck_width * 0.56);
        let band = Shape::limb(
            (cx - nx, cy - ny),
            (cx + dx * 0.06, cy + dy * 0.06 + 0.02),
            (cx + nx, cy + ny),
            0.074,
        );
        canvas.fill(&band, color);
    }
    head(canvas, identity, x, y);
}

fn torso(frame: &Frame, species: Species) -> Shape {
    let t = &frame.torso;
    let (wide, high) = match species {
        Species::Dog => (1.0, 0.95),
        Species::Cat => (1.0, 0.82),
        Species::Rabbit => (0.86, 1.16),
        Species::Bird => (0.88, 1.12),
    };
    Shape::ellipse(t.x, t.y, t.rx * wide, t.ry * high, t.turn)
}

fn leg(canvas: &mut Canvas, [hip, knee, foot]: [(f32, f32); 3], width: f32, color: Rgb, paw: Rgb) {
    canvas.fill(&Shape::limb(hip, knee, foot, width), color);
    canvas.fill(&Shape::ellipse(foot.0 + 0.012, foot.1, width * 0.62, width * 0.45, 0.0), paw);
}

fn tail(canvas: &mut Canvas, identity: &Identity, frame: &Frame) {
    let [root, bend, tip] = frame.tail;
    match identity.species {
        Species::Dog => canvas.fill(&Shape::limb(root, bend, tip, 0.062), identity.body),
        Species::Cat => {
            canvas.fill(
                &Shape::limb(root, (bend.0 - 0.03, bend.1 + 0.06), (tip.0, tip.1 - 0.08), 0.042),
                identity.body,
            );
            canvas.fill(&Shape::ellipse(tip.0, tip.1 - 0.08, 0.032, 0.032, 0.0), identity.belly);
        }
        Species::Rabbit => {
            let (x, y) = frame.torso.at(-0.95, 0.05);
            canvas.fill(&Shape::ellipse(x, y, 0.075, 0.075, 0.0), identity.belly);
        }
        Species::Bird => {
            let (x, y) = frame.torso.at(-0.55, 0.0);
            let (dx, dy) = (bend.0 - 0.04 - x, bend.1 + 0.06 - y);
            let fan = [
                (x, y - 0.05),
                (x + dx, y + dy - 0.07),
                (x + dx * 1.1, y + dy),
                (x + dx, y + dy + 0.07),
                (x, y + 0.05),
            ];
            canvas.fill(&Shape::polygon(&fan), shade(identity.body, 0.78));
        }
    }
}

fn pattern(canvas: &mut Canvas, identity: &Identity, frame: &Frame, body: &Shape) {
    let t = &frame.torso;
    let color = identity.pattern_color.0;
    match identity.pattern {
        Pattern::Plain => {}
        Pattern::Spots => {
            for (along, across) in
                [(-0.68, -0.15), (-0.30, -0.55), (-0.22, 0.25), (0.12, -0.25), (0.50, 0.15), (0.48, -0.62)]
            {
                canvas.fill_inside(&t.ellipse_at(along, across, 0.054, 0.054), color, &[body]);
            }
        }
        Pattern::Stripes => {
            for along in [-0.66, -0.30, 0.06, 0.42] {
                let (a, b) = (t.at(along, -1.2), t.at(along - 0.08, 0.42));
                let middle = ((a.0 + b.0) / 2.0, (a.1 + b.1) / 2.0);
                canvas.fill_inside(&Shape::limb(a, middle, b, 0.054), color, &[body]);
            }
        }
        Pattern::Patch => {
            canvas.fill_inside(&t.ellipse_at(-0.30, -0.45, t.rx * 0.56, t.ry * 0.85), color, &[body])
        }
    }
}

fn head(canvas: &mut Canvas, identity: &Identity, x: f32, y: f32) {
    let body = identity.body;
    let ear = identity.ear_length;
    let dark = shade(body, 0.72);
    match identity.species {
        Species::Dog => {
            canvas.fill(&Shape::ellipse(x, y, 0.135, 0.125, 0.0), body);
            canvas.fill(&Shape::ellipse(x + 0.125, y + 0.045, 0.085, 0.06, 0.0), identity.belly);
            canvas.fill(&Shape::ellipse(x + 0.20, y + 0.02, 0.028, 0.024, 0.0), [0.08, 0.06, 0.06]);
            canvas.fill(&Shape::ellipse(x - 0.085, y + 0.03 * ear, 0.055, 0.115 * ear, 12.0), dark);
        }
        Species::Cat => {
            for side in [-0.085, 0.065] {
                let tip = (x + side * 1.25, y - 0.11 - 0.10 * ear);
                canvas.fill(
                    &Shape::polygon(&[(x + side - 0.06, y - 0.06), tip, (x + side + 0.06, y - 0.07)]),
                    dark,
                );
            }
            canvas.fill(&Shape::ellipse(x, y, 0.135, 0.115, 0.0), body);
            canvas.fill(&Shape::ellipse(x + 0.07, y + 0.05, 0.065, 0.045, 0.0), identity.belly);
            canvas.fill(&Shape::ellipse(x + 0.09, y + 0.025, 0.018, 0.014, 0.0), [0.85, 0.40, 0.45]);
        }
        Species::Rabbit => {
            for (side, lean) in [(-0.07, -10.0), (0.02, 6.0)] {
                canvas.fill(&Shape::ellipse(x + side, y - 0.14 - 0.05 * ear, 0.036, 0.13 * ear, lean), dark);
                canvas.fill(
                    &Shape::ellipse(x + side, y - 0.14 - 0.05 * ear, 0.016, 0.09 * ear, lean),
                    [0.95, 0.68, 0.72],
                );
            }
            canvas.fill(&Shape::ellipse(x, y, 0.115, 0.105, 0.0), body);
            canvas.fill(&Shape::ellipse(x + 0.07, y + 0.045, 0.06, 0.045, 0.0), identity.belly);
            canvas.fill(&Shape::ellipse(x + 0.105, y + 0.02, 0.016, 0.013, 0.0), [0.85, 0.40, 0.45]);
        }
        Species::Bird => {
            let beak = [(x + 0.07, y - 0.035), (x + 0.21, y + 0.015), (x + 0.07, y + 0.05)];
            canvas.fill(&Shape::polygon(&beak), [0.96, 0.66, 0.10]);
            canvas.fill(&Shape::ellipse(x, y, 0.105, 0.10, 0.0), body);
            let crest = [(x - 0.05, y - 0.06), (x - 0.10, y - 0.10 - 0.08 * ear), (x + 0.01, y - 0.09)];
            canvas.fill(&Shape::polygon(&crest), dark);
        }
    }
    let (ex, ey) = (x + 0.045, y - 0.03);
    canvas.fill(&Shape::ellipse(ex, ey, 0.036, 0.036, 0.0), [0.98, 0.98, 0.98]);
    canvas.fill(&Shape::ellipse(ex + 0.006, ey, 0.026, 0.026, 0.0), identity.eyes.0);
}
