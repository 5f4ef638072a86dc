//! `y[r, o] = Σᵢ x[r, i] W[o, i] + b[o]`, as written.

pub(crate) fn linear(x: &[f64], weight: &[f32], bias: Option<&Vec<f32>>, inputs: usize) -> Vec<f64> {
    let outputs = weight.len() / inputs;
    let mut y = Vec::new();
    for row in x.chunks(inputs) {
        for o in 0..outputs {
            let sum: f64 = (0..inputs).map(|i| row[i] * weight[o * inputs + i] as f64).sum();
            y.push(sum + bias.map_or(0.0, |b| b[o] as f64));
        }
    }
    y
}
