//! Drawing in unit coordinates: (0, 0) is the top left corner, (1, 1) the bottom right.

use tiny_skia::{
    Color, FillRule, GradientStop, LinearGradient, Mask, Paint, PathBuilder, Pixmap, PixmapPaint, Point,
    Rect, SpreadMode, Stroke, Transform,
};

/// Red, green, blue in 0–1.
pub type Rgb = [f32; 3];

/// A closed outline in unit coordinates.
#[derive(Clone)]
pub struct Shape(Option<tiny_skia::Path>);

impl Shape {
    /// An ellipse around `(x, y)`, turned by `degrees` (clockwise on the screen).
    pub fn ellipse(x: f32, y: f32, rx: f32, ry: f32, degrees: f32) -> Self {
        let place = Transform::from_translate(x, y).pre_concat(Transform::from_rotate(degrees));
        let oval = Rect::from_ltrb(-rx, -ry, rx, ry).and_then(PathBuilder::from_oval);
        Self(oval.and_then(|oval| oval.transform(place)))
    }

    /// A polygon.
    pub fn polygon(points: &[(f32, f32)]) -> Self {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            if i == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
        }
        path.close();
        Self(path.finish())
    }

    /// A thick round-ended curve from `a` to `b`, bent towards `control`.
    pub fn limb(a: (f32, f32), control: (f32, f32), b: (f32, f32), width: f32) -> Self {
        let mut path = PathBuilder::new();
        path.move_to(a.0, a.1);
        path.quad_to(control.0, control.1, b.0, b.1);
        let stroke = Stroke { width, line_cap: tiny_skia::LineCap::Round, ..Stroke::default() };
        // A resolution of 200 steps a unit keeps the outline smooth at any size we draw.
        Self(path.finish().and_then(|p| p.stroke(&stroke, 200.0)))
    }
}

/// A square picture.
pub struct Canvas(Pixmap);

impl Canvas {
    /// A transparent canvas of `size` pixels a side.
    pub fn new(size: u32) -> Option<Self> {
        // 64 million pixels: far above what anyone draws, far below what would exhaust memory.
        if size > 8192 {
            return None;
        }
        Pixmap::new(size, size).map(Self)
    }

    fn scale(&self) -> Transform {
        Transform::from_scale(self.0.width() as f32, self.0.height() as f32)
    }

    /// Fills `shape`.
    pub fn fill(&mut self, shape: &Shape, color: Rgb) {
        self.fill_in(shape, color, None);
    }

    /// Fills the part of `shape` that lies inside `clip`.
    pub fn fill_inside(&mut self, shape: &Shape, color: Rgb, clip: &[&Shape]) {
        let Some(mut mask) = Mask::new(self.0.width(), self.0.height()) else { return };
        for clip in clip {
            if let Some(path) = &clip.0 {
                mask.fill_path(path, FillRule::Winding, true, self.scale());
            }
        }
        self.fill_in(shape, color, Some(&mask));
    }

    fn fill_in(&mut self, shape: &Shape, color: Rgb, mask: Option<&Mask>) {
        let Some(path) = &shape.0 else { return };
        let mut paint = Paint { anti_alias: true, ..Paint::default() };
        paint.set_color(opaque(color));
        let scale = self.scale();
        self.0.fill_path(path, &paint, FillRule::Winding, scale, mask);
    }

    /// Fills the rows `top..bottom` with a vertical gradient.
    pub fn gradient(&mut self, top: f32, bottom: f32, from: Rgb, to: Rgb) {
        let stops = vec![GradientStop::new(0.0, opaque(from)), GradientStop::new(1.0, opaque(to))];
        let (start, end) = (Point::from_xy(0.0, top), Point::from_xy(0.0, bottom));
        let (Some(shader), Some(rect)) = (
            LinearGradient::new(start, end, stops, SpreadMode::Pad, Transform::identity()),
            Rect::from_ltrb(0.0, top, 1.0, bottom),
        ) else {
            return;
        };
        let paint = Paint { shader, anti_alias: true, ..Paint::default() };
        let scale = self.scale();
        self.0.fill_rect(rect, &paint, scale, None);
    }

    /// Darkens an ellipse: what stands, lies or flies above the ground throws a shadow.
    pub fn shadow(&mut self, [x, y, rx, ry]: [f32; 4]) {
        let Some(path) = Shape::ellipse(x, y, rx, ry, 0.0).0 else { return };
        let mut paint = Paint { anti_alias: true, ..Paint::default() };
        paint.set_color(Color::from_rgba(0.0, 0.0, 0.0, 0.28).unwrap_or(Color::BLACK));
        let scale = self.scale();
        self.0.fill_path(&path, &paint, FillRule::Winding, scale, None);
    }

    /// Puts another canvas of the same size on top.
    pub fn put(&mut self, other: &Canvas) {
        self.0.draw_pixmap(0, 0, other.0.as_ref(), &PixmapPaint::default(), Transform::identity(), None);
    }

    /// The mean of each `factor × factor` block, premultiplied RGBA.
    pub fn shrink(&self, factor: u32) -> Vec<u8> {
        let (width, factor) = (self.0.width() as usize, factor as usize);
        let size = width / factor;
        let data = self.0.data();
        let mut out = Vec::with_capacity(size * size * 4);
        for pixel in 0..size * size {
            let (row, col) = (pixel / size, pixel % size);
            for channel in 0..4 {
                let sum: usize = (0..factor * factor)
                    .map(|i| {
                        let (y, x) = (row * factor + i / factor, col * factor + i % factor);
                        data[(y * width + x) * 4 + channel] as usize
                    })
                    .sum();
                out.push(((sum + factor * factor / 2) / (factor * factor)) as u8);
            }
        }
        out
    }
}

fn opaque([r, g, b]: Rgb) -> Color {
    Color::from_rgba(r.clamp(0.0, 1.0), g.clamp(0.0, 1.0), b.clamp(0.0, 1.0), 1.0).unwrap_or(Color::BLACK)
}
