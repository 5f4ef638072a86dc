//! Softmax of rows against its definition in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Buffer, Launch, LaunchError};

fn at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
    const ROWS: usize = 3;
    const SCALE: f32 = 30.0; // the largest weight is then many times the smallest, and exp(30) alone fits
    for columns in [1, 31, 255, 256, 257, 1283] {
        let scores: Vec<T> = Uniform(columns as u64).numbers(ROWS * columns);
        let buffer = Buffer::from_slice(&scores);
        let name = format!("softmax_{}", T::NAME);
        Launch { name: &name, grid: [ROWS as u32, 1, 1], block: [256, 1, 1], shared_bytes: 128 }.run(&[
            (&buffer).into(),
            (columns as i32).into(),
            SCALE.into(),
        ])?;
        let expected: Vec<f64> = values(&scores)
            .chunks(columns)
            .flat_map(|row| {
                let exponentials = row.iter().map(|x| (x * f64::from(SCALE)).exp());
                let sum: f64 = exponentials.clone().sum();
                exponentials.map(move |x| x / sum)
            })
            .collect();
        // Rounded once to T; exponents up to 60 in f32 before.
        let relative = T::EPSILON / 2.0 + 64.0 * f64::from(f32::EPSILON);
        let what = format!("{name} of {columns}");
        assert_close(&what, &values(&buffer.to_vec()), &expected, |i| {
            relative * expected[i] + 2f64.powi(-25)
        });
    }
    Ok(())
}

#[test]
fn is_the_definition() -> Result<(), LaunchError> {
    at_all_sizes::<f32>()?;
    at_all_sizes::<f16>()?;
    at_all_sizes::<bf16>()
}
