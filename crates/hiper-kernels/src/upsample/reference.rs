//! The definition, element by element.

pub(super) fn upsample(
    x: &[f64],
    [batch, h, w, channels]: [usize; 4],
    [height, width]: [usize; 2],
) -> Vec<f64> {
    let mut y = Vec::new();
    for b in 0..batch {
        for r in 0..height {
            for c in 0..width {
                for i in 0..channels {
                    y.push(x[((b * h + r * h / height) * w + c * w / width) * channels + i]);
                }
            }
        }
    }
    y
}
