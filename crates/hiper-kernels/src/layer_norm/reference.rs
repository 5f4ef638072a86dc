//! The definition, row by row.

pub(crate) fn layer_norm(x: &[f64], weight: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let n = weight.len() as f64;
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / n;
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            let scale = 1.0 / (var + eps).sqrt();
            row.iter()
                .zip(weight)
                .zip(bias)
                .map(move |((v, &w), &b)| (v - mean) * scale * w as f64 + b as f64)
        })
        .collect()
}
