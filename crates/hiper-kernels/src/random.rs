//! The random numbers of a personalisation step, and what is mixed of them, on a card: `kernels/random.cu`.

use candle_core::{DType, Result, Tensor};

use crate::error::check_shape;
use crate::gpu::{Argument, Card, Gpu, Launch, on_card, with_views};

/// Numbers of a generator's state: the 624 words of mt19937, and how many of them are used.
pub const GENERATOR_STATE: usize = 625;

/// What [`draw_noise`] draws.
#[derive(Debug, Clone)]
pub struct Drawn {
    /// Standard normal, as the latents.
    pub noise: Tensor,
    /// `[B]`, whole numbers.
    pub timesteps: Tensor,
    /// The generators after these draws.
    pub generators: Tensor,
}

/// Noise of `shape [B, C, h, w]`, then a timestep below `num_train_timesteps`, for each subject from its own generator: what torch
/// draws on a CPU by `randn` and `randint`. `generators [B, 625]` of `u32` are states of mt19937 ([`GENERATOR_STATE`]).
///
/// # Errors
/// When shapes disagree, a subject has fewer than 16 numbers, or the generators are not on a card.
pub fn draw_noise(generators: &Tensor, shape: &[usize], num_train_timesteps: usize) -> Result<Drawn> {
    const NAME: &str = "draw_noise";
    let (batch, count) = rows(shape);
    let enough = count >= 16 && (1..1 << 28).contains(&num_train_timesteps);
    check_shape(enough, NAME, "noise", || "[B, C, h, w], 16 numbers each".into(), shape)?;
    let expected = [batch, GENERATOR_STATE];
    let ok = generators.dims() == expected;
    check_shape(ok, NAME, "generators", || format!("{expected:?}"), generators.dims())?;
    if generators.dtype() != DType::U32 {
        return Err(candle_core::Error::UnsupportedDTypeForOp(generators.dtype(), NAME).bt());
    }
    on_card!(Card::needed(generators, NAME)?, gpu => {
        let after = gpu.alloc(DType::U32, batch * GENERATOR_STATE)?;
        let [noise, timesteps] = [gpu.alloc(DType::F32, batch * count)?, gpu.alloc(DType::F32, batch)?];
        let launch = Launch {
            threads: 1024,
            shared_bytes: 2 * (GENERATOR_STATE - 1) * size_of::<u32>(),
            ..Launch::new("draw_f32".into(), [batch, 1, 1])
        };
        let sizes = [count.into(), num_train_timesteps.into()];
        with_views(&gpu, [generators], |[before]| {
            let pointers = [(&noise).into(), (&timesteps).into(), (&after).into(), before.into()];
            gpu.launch(&launch, &[&pointers, &sizes[..]].concat())
        })?;
        Ok(Drawn {
            noise: noise.into_tensor(&gpu, shape)?,
            timesteps: timesteps.into_tensor(&gpu, &[batch])?,
            generators: after.into_tensor(&gpu, &expected)?,
        })
    })
}

/// `√ᾱ_t latents + √(1 − ᾱ_t) noise`, `[B, C, h, w]` in `f32`, each of the batch at its own of `timesteps [B]`, whole numbers that
/// `alphas_cumprod` has an ᾱ for.
///
/// # Errors
/// When shapes or types disagree, or a tensor is not on a card: hiper-core mixes on a CPU.
pub fn add_noise(
    latents: &Tensor,
    noise: &Tensor,
    timesteps: &Tensor,
    alphas_cumprod: &Tensor,
) -> Result<Tensor> {
    mix("add_noise", [latents, noise, timesteps, alphas_cumprod])
}

/// `√ᾱ_t noise − √(1 − ᾱ_t) latents`, of the same as [`add_noise`].
///
/// # Errors
/// The same.
pub fn velocity(
    latents: &Tensor,
    noise: &Tensor,
    timesteps: &Tensor,
    alphas_cumprod: &Tensor,
) -> Result<Tensor> {
    mix("velocity", [latents, noise, timesteps, alphas_cumprod])
}

fn mix(name: &'static str, inputs: [&Tensor; 4]) -> Result<Tensor> {
    let [latents, noise, timesteps, alphas_cumprod] = inputs;
    let shape = latents.dims();
    let (batch, count) = rows(shape);
    check_shape(batch * count > 0, name, "latents", || "[B, C, h, w], no size 0".into(), shape)?;
    check_shape(noise.dims() == shape, name, "noise", || format!("{shape:?}"), noise.dims())?;
    check_shape(timesteps.dims() == [batch], name, "timesteps", || format!("[{batch}]"), timesteps.dims())?;
    let ok = alphas_cumprod.rank() == 1;
    check_shape(ok, name, "alphas_cumprod", || "[num_train_timesteps]".into(), alphas_cumprod.dims())?;
    if let Some(other) = inputs.iter().find(|tensor| tensor.dtype() != DType::F32) {
        return Err(candle_core::Error::UnsupportedDTypeForOp(other.dtype(), name).bt());
    }
    on_card!(Card::needed(latents, name)?, gpu => {
        let mixed = gpu.alloc(DType::F32, batch * count)?;
        let launch = Launch::new(format!("{name}_f32"), [count.div_ceil(256), batch, 1]);
        with_views(&gpu, inputs, |views| {
            let pointers = [(&mixed).into()].into_iter().chain(views.map(Argument::from));
            gpu.launch(&launch, &pointers.chain([count.into()]).collect::<Vec<_>>())
        })?;
        mixed.into_tensor(&gpu, shape)
    })
}

/// Subjects, and numbers of each.
fn rows(shape: &[usize]) -> (usize, usize) {
    (shape.first().copied().unwrap_or(0), shape.iter().skip(1).product())
}

/// The kernels' numbers are looked at in kernels/host/tests/random.rs.
#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    use crate::gpu::host::on_host;

    fn generators() -> Tensor {
        // Words that are all equal are a state too; the second subject's are half used.
        let mut words = vec![0x1234_5678u32; 2 * GENERATOR_STATE];
        (words[GENERATOR_STATE - 1], words[2 * GENERATOR_STATE - 1]) = (624, 300);
        Tensor::from_vec(words, (2, GENERATOR_STATE), &Device::Cpu).unwrap()
    }

    #[test]
    fn a_cards_subject_draws_the_same_alone_and_in_a_batch() {
        let both = generators();
        let before = both.to_vec2::<u32>().unwrap();
        let drawn = on_host(|| draw_noise(&both, &[2, 4, 3, 3], 1000)).unwrap();
        assert_eq!(drawn.noise.dims(), [2, 4, 3, 3]);
        assert_eq!(both.to_vec2::<u32>().unwrap(), before);
        for i in 0..2 {
            let own = on_host(|| draw_noise(&both.narrow(0, i, 1)?, &[1, 4, 3, 3], 1000)).unwrap();
            for (alone, in_batch) in [(&own.noise, &drawn.noise), (&own.timesteps, &drawn.timesteps)] {
                let in_batch = in_batch.narrow(0, i, 1).unwrap();
                let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(numbers(alone), numbers(&in_batch));
            }
            let state = |tensor: &Tensor, i: usize| tensor.get(i).unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(state(&own.generators, 0), state(&drawn.generators, i));
        }
    }

    #[test]
    fn a_card_mixes_each_of_a_batch_at_its_own_timestep() {
        let filled = |x: f32| Tensor::full(x, (2, 4, 2, 2), &Device::Cpu).unwrap();
        let alphas = Tensor::new(&[1f32, 0.64, 0.36], &Device::Cpu).unwrap();
        let timesteps = Tensor::new(&[2f32, 0.0], &Device::Cpu).unwrap();
        for (mix, expected) in [
            (add_noise as fn(&_, &_, &_, &_) -> _, [0.6 * 2.0 + 0.8 * 3.0, 2.0]),
            (velocity, [0.6 * 3.0 - 0.8 * 2.0, 3.0]),
        ] {
            let mixed = on_host(|| mix(&filled(2.0), &filled(3.0), &timesteps, &alphas)).unwrap();
            for (row, expected) in
                mixed.flatten_from(1).unwrap().to_vec2::<f32>().unwrap().iter().zip(expected)
            {
                assert!(row.iter().all(|x| (x - expected).abs() < 1e-6), "{row:?} {expected}");
            }
        }
    }

    #[test]
    fn what_they_cannot_do_is_refused() {
        let (state, timesteps) = (generators(), Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap());
        let on_cpu = draw_noise(&state, &[2, 4, 2, 2], 1000).unwrap_err().to_string();
        assert!(on_cpu.contains("CPU"), "{on_cpu}");
        on_host(|| {
            assert!(draw_noise(&state, &[2, 4, 2, 2], 1000).is_ok());
            for (generators, shape, timesteps) in [
                (&state, [2, 1, 3, 5], 1000), // fewer than 16 numbers
                (&state, [3, 4, 2, 2], 1000),
                (&state, [2, 4, 2, 2], 0),
                (&timesteps, [2, 4, 2, 2], 1000),
            ] {
                assert!(draw_noise(generators, &shape, timesteps).is_err(), "{shape:?} {timesteps}");
            }
        });
    }
}
