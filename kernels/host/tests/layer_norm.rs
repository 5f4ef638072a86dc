//! The layer norm's kernels against the definition in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, shuffled};

const EPS: f32 = 1e-5;
/// Roundings of f32 in a row, at most: sums of a lane and a warp, and the formula.
const ROUNDINGS: f64 = 48.0 * f32::EPSILON as f64;

/// Of one row: y, d_x, x̂ and 1/σ.
struct Expected {
    y: Vec<f64>,
    d_x: Vec<f64>,
    normalised: Vec<f64>,
    inverse: f64,
}

fn definition(x: &[f64], d_y: &[f64], weight: &[f64], bias: &[f64]) -> Expected {
    let mean_of = |numbers: &dyn Fn(usize) -> f64| (0..x.len()).map(numbers).sum::<f64>() / x.len() as f64;
    let mean = mean_of(&|i| x[i]);
    let inverse = 1.0 / (mean_of(&|i| (x[i] - mean).powi(2)) + f64::from(EPS)).sqrt();
    let normalised: Vec<f64> = x.iter().map(|x| (x - mean) * inverse).collect();
    let g: Vec<f64> = d_y.iter().zip(weight).map(|(d_y, weight)| d_y * weight).collect();
    let (mean_g, mean_product) = (mean_of(&|i| g[i]), mean_of(&|i| g[i] * normalised[i]));
    Expected {
        y: (0..x.len()).map(|i| normalised[i] * weight[i] + bias[i]).collect(),
        d_x: (0..x.len()).map(|i| (g[i] - mean_g - normalised[i] * mean_product) * inverse).collect(),
        normalised,
        inverse,
    }
}

/// Runs and checks both kernels; the results' bits.
fn check<T: Storage>(rows: usize, channels: usize, offset: f64) -> Result<Vec<u64>, LaunchError> {
    let mut random = Uniform((rows * channels) as u64);
    let given: Vec<T> = (0..rows * channels).map(|_| T::round(2.0 * random.next() + offset)).collect();
    let [d_y_given, residual_given]: [Vec<T>; 2] = [(); 2].map(|()| random.numbers(rows * channels));
    let [weight_given, bias_given]: [Vec<f32>; 2] = [(); 2].map(|()| random.numbers(channels));
    let [x, d_y, residual] = [&given, &d_y_given, &residual_given].map(|numbers| Buffer::from_slice(numbers));
    let [weight, bias] = [&weight_given, &bias_given].map(|numbers| Buffer::from_slice(numbers));
    let [y, d_x, d_x_alone] = [(); 3].map(|()| Buffer::<T>::unwritten(rows * channels));
    let launch = |kernel: &str, pointers: &[Argument<'_>]| {
        let name = format!("{kernel}_{}", T::NAME);
        let numbers = [(rows as i32).into(), (channels as i32).into(), EPS.into()];
        Launch {
            name: &name,
            grid: [rows.div_ceil(8) as u32, 1, 1],
            block: [256, 1, 1],
            shared_bytes: 0,
            cluster: 1,
        }
        .run(&[pointers, &numbers].concat())
    };
    launch("layer_norm", &[(&y).into(), (&x).into(), (&weight).into(), (&bias).into()])?;
    for (d_x, residual) in [(&d_x, (&residual).into()), (&d_x_alone, Argument::NULL)] {
        launch("layer_norm_gradient", &[d_x.into(), (&d_y).into(), (&x).into(), residual, (&weight).into()])?;
    }

    let (given, d_y, residual) = (values(&given), values(&d_y_given), values(&residual_given));
    let (weight, bias) = (values(&weight_given), values(&bias_given));
    let [y, d_x, d_x_alone] = [y, d_x, d_x_alone].map(|results| values(&results.to_vec()));
    let rounded = |value: f64| T::EPSILON / 2.0 * value.abs().max(T::SMALLEST);
    for row in 0..rows {
        let what = format!("{} {rows} × {channels}, row {row}", T::NAME);
        let part = row * channels..(row + 1) * channels;
        let expected = definition(&given[part.clone()], &d_y[part.clone()], &weight, &bias);
        let Expected { normalised, inverse, .. } = &expected;
        // x̂ errs by roundings of the mean, in units of σ, and of itself; weights, biases and d_y are below 1.
        let largest = given[part.clone()].iter().fold(0.0, |largest, x| x.abs().max(largest));
        let of_x_hat = |i: usize| ROUNDINGS * (largest * inverse + f64::abs(normalised[i]) + 1.0);
        assert_close(&format!("y of {what}"), &y[part.clone()], &expected.y, |i| {
            rounded(expected.y[i]) + of_x_hat(i)
        });
        let sum: Vec<f64> = expected.d_x.iter().zip(&residual[part.clone()]).map(|(a, b)| a + b).collect();
        for (got, wanted) in [(&d_x, &sum), (&d_x_alone, &expected.d_x)] {
            assert_close(&format!("d_x of {what}"), &got[part.clone()], wanted, |i| {
                rounded(wanted[i]) + of_x_hat(i) * inverse * (3.0 + normalised[i].abs())
            });
        }
    }
    Ok([y, d_x, d_x_alone].into_iter().flatten().map(f64::to_bits).collect())
}

fn at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
    for (rows, channels) in [
        (1, 1),
        (7, 31),
        (8, 32),
        (9, 33),
        (3, 255),
        (3, 256),
        (2, 257),
        (2, 8),
        (5, 320),
        (17, 127),
        (2, 1280),
    ] {
        check::<T>(rows, channels, 0.5)?;
    }
    Ok(())
}

#[test]
fn f32_is_the_definition() -> Result<(), LaunchError> {
    at_all_sizes::<f32>()
}

#[test]
fn f16_is_the_definition() -> Result<(), LaunchError> {
    at_all_sizes::<f16>()
}

#[test]
fn bf16_is_the_definition() -> Result<(), LaunchError> {
    at_all_sizes::<bf16>()
}

#[test]
fn a_mean_far_from_zero_costs_no_digits() -> Result<(), LaunchError> {
    check::<f32>(2, 1280, 1000.0).map(drop)
}

#[test]
fn the_order_of_threads_changes_no_bit() -> Result<(), LaunchError> {
    let expected = check::<bf16>(9, 328, 0.5)?;
    for seed in 1..4 {
        assert_eq!(shuffled(seed, || check::<bf16>(9, 328, 0.5))?, expected);
    }
    Ok(())
}

#[test]
fn the_definition_of_the_gradient_is_that_of_differences() {
    const STEP: f64 = 1e-5;
    let mut random = Uniform(1);
    let [x, d_y, weight, bias]: [Vec<f64>; 4] = [(); 4].map(|()| values(&random.numbers::<f32>(17)));
    let loss = |i: usize, step: f64| -> f64 {
        let mut x = x.clone();
        x[i] += step;
        definition(&x, &d_y, &weight, &bias).y.iter().zip(&d_y).map(|(y, d_y)| y * d_y).sum()
    };
    let differences: Vec<f64> = (0..17).map(|i| (loss(i, STEP) - loss(i, -STEP)) / (2.0 * STEP)).collect();
    // The loss, below 20, keeps 16 digits, of which the step costs 5; its third derivative is about 1.
    assert_close("d_x", &definition(&x, &d_y, &weight, &bias).d_x, &differences, |_| 1e-8);
}
