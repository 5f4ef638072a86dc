//! `y[b, r, c, o] = Σ x[b, r·s + kh − top, c·s + kw − left, i] W[o, i, kh, kw] + b[o]`, as written.

use super::Conv2dConfig;

pub(crate) struct Conv<'a> {
    pub weights: &'a [f32],
    pub bias: &'a [f32],
    pub kernel: usize,
    pub config: Conv2dConfig,
}

impl Conv<'_> {
    pub(crate) fn forward(&self, x: &[f64], [batch, height, width, inputs]: [usize; 4]) -> Vec<f64> {
        let (k, s, p) = (self.kernel, self.config.stride, self.config.padding);
        let rows = (height + p.top + p.bottom - k) / s + 1;
        let cols = (width + p.left + p.right - k) / s + 1;
        let mut y = Vec::new();
        for b in 0..batch {
            for r in 0..rows {
                for c in 0..cols {
                    for (o, &bias) in self.bias.iter().enumerate() {
                        let mut sum = bias as f64;
                        for kh in 0..k {
                            for kw in 0..k {
                                let (Some(row), Some(col)) =
                                    ((r * s + kh).checked_sub(p.top), (c * s + kw).checked_sub(p.left))
                                else {
                                    continue;
                                };
                                if row >= height || col >= width {
                                    continue;
                                }
                                for i in 0..inputs {
                                    let weight = self.weights[((o * inputs + i) * k + kh) * k + kw] as f64;
                                    sum += x[((b * height + row) * width + col) * inputs + i] * weight;
                                }
                            }
                        }
                        y.push(sum);
                    }
                }
            }
        }
        y
    }
}
