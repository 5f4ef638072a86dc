//! The sinusoidal embedding of timesteps that are on a card: `kernels/timestep.cu`.

use candle_core::{DType, Result, Tensor};

use crate::error::check_shape;
use crate::gpu::{Card, Gpu, Launch, on_card, with_views};

/// The sinusoids of `timesteps [B]`, `[B, channels]` in `f32`: `[sin(t f), cos(t f)]`, the halves exchanged by
/// `flip_sin_to_cos`, with `f_i = 10000^(−i / (channels / 2 − freq_shift))`; of diffusers' `get_timestep_embedding`.
///
/// # Errors
/// When they are of another shape or type, or not on a card.
pub fn timestep_embedding(
    timesteps: &Tensor,
    channels: usize,
    flip_sin_to_cos: bool,
    freq_shift: f32,
) -> Result<Tensor> {
    const NAME: &str = "timestep_embedding";
    let batch = timesteps.elem_count();
    let ok = timesteps.rank() == 1 && batch * channels > 0;
    check_shape(ok, NAME, "timesteps", || "[B], no size 0".into(), timesteps.dims())?;
    if timesteps.dtype() != DType::F32 {
        return Err(candle_core::Error::UnsupportedDTypeForOp(timesteps.dtype(), NAME).bt());
    }
    on_card!(Card::needed(timesteps, NAME)?, gpu => {
        let embedding = gpu.alloc(DType::F32, batch * channels)?;
        let launch = Launch::new(format!("{NAME}_f32"), [channels.div_ceil(256), batch, 1]);
        with_views(&gpu, [timesteps], |[timesteps]| {
            let settings = [channels.into(), flip_sin_to_cos.into(), freq_shift.into()];
            gpu.launch(&launch, &[&[(&embedding).into(), timesteps.into()], &settings[..]].concat())
        })?;
        embedding.into_tensor(&gpu, &[batch, channels])
    })
}

/// The kernel's numbers are looked at in kernels/host/tests/timestep.rs.
#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    use crate::gpu::host::on_host;

    #[test]
    fn a_card_makes_a_row_for_each_timestep() {
        let timesteps = Tensor::new(&[0f32, 1.0], &Device::Cpu).unwrap();
        let rows =
            on_host(|| timestep_embedding(&timesteps, 4, true, 0.0)).unwrap().to_vec2::<f32>().unwrap();
        let expected = [[1.0, 1.0, 0.0, 0.0], [1f32.cos(), 0.01f32.cos(), 1f32.sin(), 0.01f32.sin()]];
        for (got, expected) in rows.concat().iter().zip(expected.concat()) {
            assert!((got - expected).abs() < 1e-6, "{rows:?}");
        }
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let timesteps = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
        assert!(timestep_embedding(&timesteps, 6, true, 0.0).unwrap_err().to_string().contains("CPU"));
        on_host(|| {
            assert!(timestep_embedding(&timesteps, 0, true, 0.0).is_err());
            assert!(timestep_embedding(&timesteps.reshape((1, 2)).unwrap(), 6, true, 0.0).is_err());
            assert!(timestep_embedding(&timesteps.to_dtype(DType::U32).unwrap(), 6, true, 0.0).is_err());
        });
    }
}
