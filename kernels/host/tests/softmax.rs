//! Softmax of rows against its definition in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Buffer, Launch, LaunchError};

fn at_all_sizes<T: Storage>(rows: usize, causal: bool) -> Result<(), LaunchError> {
    const SCALE: f32 = 30.0; // the largest weight is then many times the smallest, and exp(30) alone fits
    for columns in [1, 31, 255, 256, 257, 1283] {
        let scores: Vec<T> = Uniform(columns as u64).numbers(rows * columns);
        let buffer = Buffer::from_slice(&scores);
        let name = format!("softmax_{}", T::NAME);
        Launch { name: &name, grid: [rows as u32, 1, 1], block: [256, 1, 1], shared_bytes: 128, cluster: 1 }
            .run(&[(&buffer).into(), (columns as i32).into(), SCALE.into(), i32::from(causal).into()])?;
        let expected: Vec<f64> = values(&scores)
            .chunks(columns)
            .enumerate()
            .flat_map(|(row, scores)| {
                let seen = if causal { columns.min(row + 1) } else { columns };
                let exponentials = scores[..seen].iter().map(|x| (x * f64::from(SCALE)).exp());
                let sum: f64 = exponentials.clone().sum();
                exponentials.map(move |x| x / sum).chain(std::iter::repeat_n(0.0, columns - seen))
            })
            .collect();
        // Rounded once to T; exponents up to 60 in f32 before. What is hidden is 0.
        let relative = T::EPSILON / 2.0 + 64.0 * f64::from(f32::EPSILON);
        let what = format!("{name} of {columns}, causal: {causal}");
        assert_close(&what, &values(&buffer.to_vec()), &expected, |i| {
            if expected[i] == 0.0 { 0.0 } else { relative * expected[i] + 2f64.powi(-25) }
        });
    }
    Ok(())
}

#[test]
fn is_the_definition() -> Result<(), LaunchError> {
    // Rows beyond the threads of a block see more columns than it has.
    for (rows, causal) in [(3, false), (259, true)] {
        at_all_sizes::<f32>(rows, causal)?;
        at_all_sizes::<f16>(rows, causal)?;
        at_all_sizes::<bf16>(rows, causal)?;
    }
    Ok(())
}

fn gradient_at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
    const ROWS: usize = 3;
    const SCALE: f32 = 0.125;
    for columns in [1, 31, 255, 256, 257, 1283] {
        let mut random = Uniform(columns as u64);
        let [gradients, numbers]: [Vec<T>; 2] = [(); 2].map(|()| random.numbers(ROWS * columns));
        let weights: Vec<T> = numbers.iter().map(|x| T::round(x.value().abs() / columns as f64)).collect();
        let (buffer, given) = (Buffer::from_slice(&gradients), Buffer::from_slice(&weights));
        let name = format!("softmax_gradient_{}", T::NAME);
        Launch { name: &name, grid: [ROWS as u32, 1, 1], block: [256, 1, 1], shared_bytes: 128, cluster: 1 }
            .run(&[(&buffer).into(), (&given).into(), (columns as i32).into(), SCALE.into()])?;
        let (gradients, weights) = (values(&gradients), values(&weights));
        let rows = gradients.chunks(columns).zip(weights.chunks(columns));
        let expected: Vec<f64> = rows
            .flat_map(|(gradients, weights)| {
                let sum: f64 = gradients.iter().zip(weights).map(|(g, w)| g * w).sum();
                gradients.iter().zip(weights).map(move |(g, w)| f64::from(SCALE) * w * (g - sum))
            })
            .collect();
        // Rounded once to T; before, in f32, a difference of numbers up to 1 times scale and weight.
        let tolerance = |i: usize| {
            T::EPSILON / 2.0 * expected[i].abs().max(T::SMALLEST)
                + 8.0 * f64::from(f32::EPSILON) * f64::from(SCALE) * weights[i]
        };
        assert_close(&format!("{name} of {columns}"), &values(&buffer.to_vec()), &expected, tolerance);
    }
    Ok(())
}

#[test]
fn gradient_is_the_definition() -> Result<(), LaunchError> {
    gradient_at_all_sizes::<f32>()?;
    gradient_at_all_sizes::<f16>()?;
    gradient_at_all_sizes::<bf16>()
}
