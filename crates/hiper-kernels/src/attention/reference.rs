//! The definition, score matrix and all.

use super::{AttentionConfig, AttentionMask};

pub(crate) fn attention(
    x: &[Vec<f64>],
    [batch, queries, keys]: [usize; 3],
    config: &AttentionConfig,
) -> Vec<f64> {
    let [q, k, v] = [&x[0], &x[1], &x[2]];
    let width = q.len() / (batch * queries);
    let d = width / config.num_heads;
    let mut y = vec![0.0; q.len()];
    for b in 0..batch {
        for i in 0..queries {
            for h in 0..config.num_heads {
                let at = |row: usize, c: usize| row * width + h * d + c;
                let seen = if config.mask == AttentionMask::Causal { keys.min(i + 1) } else { keys };
                let score = |j: usize| -> f64 {
                    (0..d).map(|c| q[at(b * queries + i, c)] * k[at(b * keys + j, c)]).sum::<f64>()
                        * config.softmax_scale
                };
                let weights: Vec<f64> = (0..seen).map(|j| score(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for c in 0..d {
                    y[at(b * queries + i, c)] =
                        (0..seen).map(|j| weights[j] / total * v[at(b * keys + j, c)]).sum();
                }
            }
        }
    }
    y
}
