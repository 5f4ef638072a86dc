//! Adam (Kingma & Ba, arXiv 1412.6980) beside a network on a card, so that its steps need not wait for the host:
//! `kernels/adam.cu`.

use candle_core::{DType, Result, Tensor};

use crate::error::check_shape;
use crate::gpu::{Argument, Array, Card, Gpu, Launch, View, check_dtype, on_card, type_name, with_views};

/// Adam's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConstants {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// Parameters of `B` subjects and their optimiser, on a card, in `f32`. Nothing moves from one subject to another.
#[derive(Debug, Clone)]
pub struct AdamState {
    /// `[B, n]`.
    pub parameters: Tensor,
    /// Running mean of the gradient, `[B, n]`.
    pub first_moment: Tensor,
    /// Running mean of its square, `[B, n]`.
    pub second_moment: Tensor,
    /// `[B, 2]`: steps taken, and 1 once a subject has stopped.
    pub counts: Tensor,
}

impl AdamState {
    /// The state after a step against `gradient [B, n]`, of any type, which is `gradient_scale` times that of the `losses [B]`. A
    /// subject stops, for good, before the first step whose loss, gradient or moved parameter is not finite.
    ///
    /// # Errors
    /// When shapes disagree, another tensor is not `f32`, or one is not on a card: hiper-core has an Adam for the CPU.
    pub fn step(
        &self,
        gradient: &Tensor,
        losses: &Tensor,
        gradient_scale: f64,
        constants: &AdamConstants,
    ) -> Result<Self> {
        let shape = self.parameters.dims();
        let ok = matches!(shape, &[b, n] if b > 0 && n > 0);
        check_shape(ok, NAME, "parameters", || "[B, n], no size 0".into(), shape)?;
        for (name, tensor, expected) in [
            ("first_moment", &self.first_moment, shape),
            ("second_moment", &self.second_moment, shape),
            ("gradient", gradient, shape),
            ("losses", losses, &shape[..1]),
            ("counts", &self.counts, &[shape[0], 2]),
        ] {
            check_shape(tensor.dims() == expected, NAME, name, || format!("{expected:?}"), tensor.dims())?;
        }
        check_dtype(gradient, NAME)?;
        let inputs = [&self.parameters, &self.first_moment, &self.second_moment, losses, &self.counts];
        if let Some(other) = inputs.iter().find(|tensor| tensor.dtype() != DType::F32) {
            return Err(candle_core::Error::UnsupportedDTypeForOp(other.dtype(), NAME).bt());
        }
        on_card!(Card::needed(gradient, NAME)?, gpu => {
            let [n, counts] = [shape[0] * shape[1], shape[0] * 2];
            let [parameters, first_moment, second_moment, counts] =
                [n, n, n, counts].map(|len| gpu.alloc(DType::F32, len));
            let after = [parameters?, first_moment?, second_moment?, counts?];
            let inputs =
                [&self.parameters, &self.first_moment, &self.second_moment, &self.counts, gradient, losses];
            let scale = gradient_scale as f32;
            with_views(&gpu, inputs, |views| step(&gpu, &after, views, scale, shape, constants))?;
            let [parameters, first_moment, second_moment, counts] = after;
            Ok(Self {
                parameters: parameters.into_tensor(&gpu, shape)?,
                first_moment: first_moment.into_tensor(&gpu, shape)?,
                second_moment: second_moment.into_tensor(&gpu, shape)?,
                counts: counts.into_tensor(&gpu, self.counts.dims())?,
            })
        })
    }

    /// Overwrites this state's numbers with another's.
    ///
    /// # Errors
    /// When shapes or devices disagree.
    pub fn set(&self, state: &Self) -> Result<()> {
        for (to, from) in [
            (&self.parameters, &state.parameters),
            (&self.first_moment, &state.first_moment),
            (&self.second_moment, &state.second_moment),
            (&self.counts, &state.counts),
        ] {
            to.slice_set(&from.contiguous()?, 0, 0)?;
        }
        Ok(())
    }
}

const NAME: &str = "adam";

/// A block to a subject.
fn step<G: Gpu>(
    gpu: &G,
    after: &[Array<G>; 4],
    inputs: [View<'_, G>; 6],
    gradient_scale: f32,
    shape: &[usize],
    constants: &AdamConstants,
) -> Result<()> {
    let AdamConstants { learning_rate, beta1, beta2, eps } = *constants;
    let [.., gradient, _] = &inputs;
    let name = format!("adam_{}", type_name(gradient.dtype));
    let launch = Launch { threads: 1024, shared_bytes: 16, ..Launch::new(name, [shape[0], 1, 1]) };
    let after = after.each_ref().map(Argument::from);
    let inputs = inputs.map(Argument::from);
    let numbers = [learning_rate, beta1, beta2, eps].map(Argument::from);
    let arguments = [&after, inputs.as_slice(), &[shape[1].into()], &numbers, &[gradient_scale.into()]];
    gpu.launch(&launch, &arguments.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    use crate::gpu::host::on_host;

    fn losses() -> Tensor {
        Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap()
    }

    fn state() -> AdamState {
        let zeros = || Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let counts = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        AdamState { parameters: zeros(), first_moment: zeros(), second_moment: zeros(), counts }
    }

    const CONSTANTS: AdamConstants =
        AdamConstants { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    /// The kernel's arithmetic is looked at in kernels/host/tests/adam.rs.
    #[test]
    fn a_cards_first_step_has_the_learning_rates_length_and_the_second_subject_stops() {
        let gradient = Tensor::new(&[[3f32, -0.5, 0.0], [1.0, f32::NAN, 1.0]], &Device::Cpu).unwrap();
        let (before, kept) = (state(), state());
        let after = on_host(|| before.step(&gradient, &losses(), 8.0, &CONSTANTS)).unwrap();
        let rows = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
        for (got, expected) in rows(&after.parameters).concat().iter().zip([-0.1, 0.1, 0.0, 0.0, 0.0, 0.0]) {
            assert!((got - expected).abs() < 1e-7, "{got} {expected}");
        }
        assert_eq!(rows(&after.counts), [[1.0, 0.0], [0.0, 1.0]]);
        assert_eq!(rows(&before.parameters), rows(&kept.parameters));
        before.set(&after).unwrap();
        assert_eq!(rows(&before.parameters), rows(&after.parameters));
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let gradient = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let on_cpu = state().step(&gradient, &losses(), 1.0, &CONSTANTS).unwrap_err().to_string();
        assert!(on_cpu.contains("CPU"), "{on_cpu}");
        let other = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(on_host(|| state().step(&other, &losses(), 1.0, &CONSTANTS)).is_err());
    }
}
