//! The timestep embedding's kernels against diffusers' formula.

mod common;

use common::{assert_close, values};
use host_kernels::{Buffer, Launch, LaunchError};

/// `get_timestep_embedding`: frequencies and phases in f32, as it has them.
fn definition(timestep: f32, channels: usize, flip_sin_to_cos: bool, freq_shift: f32) -> Vec<f64> {
    let half = channels / 2;
    let phases = (0..half).map(|i| {
        let exponent = -(10_000f32.ln()) * i as f32 / (half as f32 - freq_shift);
        f64::from(timestep * f64::from(exponent).exp() as f32)
    });
    let (sin, cos) = (phases.clone().map(f64::sin), phases.map(f64::cos));
    let mut embedding: Vec<f64> =
        if flip_sin_to_cos { cos.chain(sin).collect() } else { sin.chain(cos).collect() };
    embedding.resize(channels, 0.0);
    embedding
}

#[test]
fn is_that_of_diffusers() -> Result<(), LaunchError> {
    let timesteps = [0f32, 1.0, 37.0, 500.5, 999.0];
    for (channels, flip, freq_shift) in
        [(320, true, 0.0), (320, false, 1.0), (2, true, 0.0), (257, true, 1.0), (255, false, 0.0)]
    {
        let embedding = Buffer::<f32>::unwritten(timesteps.len() * channels);
        let given = Buffer::from_slice(&timesteps);
        let grid = [channels.div_ceil(256) as u32, timesteps.len() as u32, 1];
        Launch { name: "timestep_embedding_f32", grid, block: [256, 1, 1], shared_bytes: 0, cluster: 1 }
            .run(&[
                (&embedding).into(),
                (&given).into(),
                (channels as i32).into(),
                i32::from(flip).into(),
                freq_shift.into(),
            ])?;
        let expected: Vec<f64> =
            timesteps.iter().flat_map(|&timestep| definition(timestep, channels, flip, freq_shift)).collect();
        let rounding = f64::from(f32::EPSILON);
        assert_close(&format!("{channels} channels"), &values(&embedding.to_vec()), &expected, |_| rounding);
    }
    Ok(())
}

#[test]
fn the_definition_has_known_values() {
    // Two frequencies, 1 and 10000^(-1/2).
    let expected = [999f64.cos(), 9.99f64.cos(), 999f64.sin(), 9.99f64.sin()];
    assert_close("four channels", &definition(999.0, 4, true, 0.0), &expected, |_| 1e-6);
}
