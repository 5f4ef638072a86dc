//! The loss and its gradient against their definitions in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError};

const SCALE: f32 = 1024.0;
const BATCH: usize = 2;

fn mse_loss<T: Storage>() -> Result<(), LaunchError> {
    for (pixels, channels) in [(1, 1), (31, 3), (64, 4), (1023, 1), (257, 4), (4096, 4)] {
        let count = pixels * channels;
        let mut random = Uniform(count as u64);
        let prediction: Vec<T> = random.numbers(BATCH * count);
        let target: Vec<f32> = random.numbers(BATCH * count);
        let (losses, gradient) = (Buffer::<f32>::unwritten(BATCH), Buffer::<T>::unwritten(BATCH * count));
        let given = (Buffer::from_slice(&prediction), Buffer::from_slice(&target));
        let pointers: [Argument<'_>; 4] =
            [(&losses).into(), (&gradient).into(), (&given.0).into(), (&given.1).into()];
        let sizes = [pixels, channels].map(|size| Argument::from(size as i32));
        let name = &format!("mse_loss_{}", T::NAME);
        Launch { name, grid: [BATCH as u32, 1, 1], block: [1024, 1, 1], shared_bytes: 128, cluster: 1 }
            .run(&[&pointers, sizes.as_slice(), &[SCALE.into()]].concat())?;

        let (prediction, target) = (values(&prediction), values(&target));
        let difference = |i: usize| {
            let (image, pixel, channel) = (i / count, i % count / channels, i % channels);
            prediction[i] - target[image * count + channel * pixels + pixel]
        };
        let steepness = 2.0 * f64::from(SCALE) / count as f64;
        let expected: Vec<f64> = (0..BATCH * count).map(|i| steepness * difference(i)).collect();
        // The difference is rounded in f32, where it may be as large as 2.
        let in_f32 = 4.0 * f64::from(f32::EPSILON) * steepness;
        assert_close("d_prediction", &values(&gradient.to_vec()), &expected, |i| {
            T::EPSILON / 2.0 * expected[i].abs().max(T::SMALLEST) + in_f32
        });
        let mean = |image: usize| {
            (0..count).map(|i| difference(image * count + i).powi(2)).sum::<f64>() / count as f64
        };
        let expected: Vec<f64> = (0..BATCH).map(mean).collect();
        assert_close("losses", &values(&losses.to_vec()), &expected, |i| {
            (count.div_ceil(1024) + 16) as f64 * f64::from(f32::EPSILON) * expected[i]
        });
    }
    Ok(())
}

#[test]
fn the_loss_is_the_mean_of_squares_and_the_gradient_is_its_own() -> Result<(), LaunchError> {
    mse_loss::<f32>()?;
    mse_loss::<f16>()?;
    mse_loss::<bf16>()
}
