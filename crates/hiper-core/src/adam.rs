//! Adam (Kingma & Ba, arXiv 1412.6980), with torch.optim.Adam's order of operations.

use crate::{Error, Result};

/// Adam's constants; torch's defaults, and the paper's learning rate.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamConfig {
    /// Step size, above 0.
    pub learning_rate: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment, at least 0.
    pub eps: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { learning_rate: 5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

impl AdamConfig {
    /// Refuses constants outside their range.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { learning_rate, beta1, beta2, eps } = *self;
        let beta = "at least 0 and below 1";
        for (argument, expected, value, valid) in [
            ("learning_rate", "a number above 0", learning_rate, learning_rate > 0.0),
            ("beta1", beta, beta1, (0.0..1.0).contains(&beta1)),
            ("beta2", beta, beta2, (0.0..1.0).contains(&beta2)),
            ("eps", "at least 0", eps, eps >= 0.0),
        ] {
            if !(valid && value.is_finite()) {
                return Err(Error::argument(argument, expected, value));
            }
        }
        Ok(())
    }
}

/// The optimiser's state. It is small (two values a parameter), so it lives on the CPU and is stored whole.
///
/// ```
/// use hiper_core::{Adam, AdamConfig};
///
/// let mut adam = Adam::new(AdamConfig { learning_rate: 0.1, ..Default::default() }, 2);
/// let mut parameters = [1.0, 1.0];
/// adam.step(&mut parameters, &[3.0, -0.5])?;
/// assert_eq!(parameters, [0.9, 1.1]); // the first step has the learning rate's length, against the sign
/// # Ok::<(), hiper_core::Error>(())
/// ```
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
    /// # Errors
    /// When the lengths differ; nothing has moved then.
    pub fn step(&mut self, parameters: &mut [f32], gradient: &[f32]) -> Result<()> {
        let n = parameters.len();
        for (argument, length) in [
            ("gradient", gradient.len()),
            ("first_moment", self.first_moment.len()),
            ("second_moment", self.second_moment.len()),
        ] {
            if length != n {
                return Err(Error::argument(argument, format!("{n} values, as the parameters"), length));
            }
        }
        let AdamConfig { learning_rate, beta1, beta2, eps } = self.config;
        self.steps += 1;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = (1.0 - beta2.powf(self.steps as f64)).sqrt() as f32;
        let step_size = (learning_rate / correction1) as f32;
        let (rest1, beta2, rest2, eps) =
            ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32, eps as f32);
        let moments = self.first_moment.iter_mut().zip(&mut self.second_moment);
        for ((p, &g), (m, v)) in parameters.iter_mut().zip(gradient).zip(moments) {
            *m = (g - *m).mul_add(rest1, *m);
            *v = (rest2 * g).mul_add(g, *v * beta2);
            *p -= step_size * *m / (v.sqrt() / correction2 + eps);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_gradient_is_no_move() {
        let mut adam = Adam::new(AdamConfig::default(), 2);
        let mut p = [1.0, -2.0];
        adam.step(&mut p, &[0.0, 0.0]).unwrap();
        assert_eq!(p, [1.0, -2.0]);
    }

    #[test]
    fn other_lengths_are_refused_before_anything_moves() {
        let mut adam = Adam::new(AdamConfig::default(), 3);
        let before = adam.clone();
        assert!(adam.step(&mut [0.0; 3], &[1.0; 2]).is_err());
        assert!(adam.step(&mut [0.0; 2], &[1.0; 2]).is_err());
        assert_eq!(adam, before);
    }

    #[test]
    fn constants_outside_their_range_are_refused() {
        let default = AdamConfig::default();
        assert!(default.check().is_ok());
        for config in [
            AdamConfig { learning_rate: 0.0, ..default },
            AdamConfig { learning_rate: f64::NAN, ..default },
            AdamConfig { learning_rate: f64::INFINITY, ..default },
            AdamConfig { beta1: 1.0, ..default },
            AdamConfig { beta2: -0.1, ..default },
            AdamConfig { eps: -1e-8, ..default },
        ] {
            assert!(config.check().is_err(), "{config:?}");
        }
    }
}
