//! The definition, group by group.

pub(crate) struct Norm<'a> {
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub groups: usize,
    pub eps: f64,
    pub silu: bool,
}

impl Norm<'_> {
    pub(crate) fn forward(&self, x: &[f64], batch: usize) -> Vec<f64> {
        let channels = self.weight.len();
        let per_group = channels / self.groups;
        let image = x.len() / batch;
        let group_of = |i: usize| (i / image, i % channels / per_group);
        let mut y = vec![0.0; x.len()];
        for b in 0..batch {
            for g in 0..self.groups {
                let members: Vec<usize> = (0..x.len()).filter(|&i| group_of(i) == (b, g)).collect();
                let n = members.len() as f64;
                let mean = members.iter().map(|&i| x[i]).sum::<f64>() / n;
                let var = members.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / n;
                for i in members {
                    let c = i % channels;
                    let z =
                        (x[i] - mean) / (var + self.eps).sqrt() * self.weight[c] as f64 + self.bias[c] as f64;
                    y[i] = if self.silu { z / (1.0 + (-z).exp()) } else { z };
                }
            }
        }
        y
    }
}
