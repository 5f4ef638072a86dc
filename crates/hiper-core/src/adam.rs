//! Adam (Kingma & Ba, arXiv 1412.6980), with torch.optim.Adam's order of operations.

/// Adam's constants; torch's defaults, and the paper's learning rate.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamConfig {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { learning_rate: 5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// The optimiser's state. It is small (two values a parameter), so it lives on the CPU and is stored whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Adam {
    /// The constants.
    pub config: AdamConfig,
    /// Running mean of the gradient.
    pub first_moment: Vec<f32>,
    /// Running mean of its square.
    pub second_moment: Vec<f32>,
    /// Steps taken.
    pub steps: usize,
}

impl Adam {
    /// For `n` parameters.
    pub fn new(config: AdamConfig, n: usize) -> Self {
        Self { config, first_moment: vec![0.0; n], second_moment: vec![0.0; n], steps: 0 }
    }

    /// Moves `parameters` against `gradient` (algorithm 1).
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn step(&mut self, parameters: &mut [f32], gradient: &[f32]) {
        assert!(parameters.len() == gradient.len() && gradient.len() == self.first_moment.len());
        let AdamConfig { learning_rate, beta1, beta2, eps } = self.config;
        self.steps += 1;
        let correction1 = 1.0 - beta1.powi(self.steps as i32);
        let correction2 = (1.0 - beta2.powi(self.steps as i32)).sqrt();
        let step_size = (learning_rate / correction1) as f32;
        let moments = self.first_moment.iter_mut().zip(&mut self.second_moment);
        for ((p, &g), (m, v)) in parameters.iter_mut().zip(gradient).zip(moments) {
            *m += (g - *m) * (1.0 - beta1) as f32;
            *v = *v * beta2 as f32 + g * g * (1.0 - beta2) as f32;
            *p -= step_size * *m / (v.sqrt() / correction2 as f32 + eps as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_learning_rate_against_the_sign() {
        let mut adam = Adam::new(AdamConfig { learning_rate: 0.1, ..Default::default() }, 3);
        let mut p = [1.0, 1.0, 1.0];
        adam.step(&mut p, &[3.0, -0.5, 0.0]);
        assert!((p[0] - 0.9).abs() < 1e-6 && (p[1] - 1.1).abs() < 1e-6 && p[2] == 1.0, "{p:?}");
    }

    #[test]
    fn matches_torch_over_three_steps() {
        // torch.optim.Adam([p], lr=0.01) on p = [1, -2], gradients [0.5, -1.5], [0.25, 2], [-1, 0.125].
        let mut adam = Adam::new(AdamConfig { learning_rate: 0.01, ..Default::default() }, 2);
        let mut p = [1.0, -2.0];
        for g in [[0.5, -1.5], [0.25, 2.0], [-1.0, 0.125]] {
            adam.step(&mut p, &g);
        }
        for (got, want) in p.iter().zip(TORCH) {
            assert!((got - want).abs() < 2e-7, "{p:?}");
        }
    }

    /// The result of the script in the test above.
    const TORCH: [f32; 2] = [0.982_741_8, -1.993_748_3];
}
