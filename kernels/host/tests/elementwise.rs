//! The kernels that compute number by number, and those that move numbers, against definitions in f64.

mod common;

use common::{Storage, Uniform, assert_close, gelu, gelu_derivative, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError};

/// Around what a thread, a warp and a block take.
const COUNTS: [usize; 9] = [1, 7, 8, 9, 257, 2047, 2048, 2049, 4099];
/// Around a block's rows and numbers, multiples of 8 and others.
const WIDTHS: [usize; 6] = [1, 8, 9, 31, 320, 2056];
/// Roundings of f32 in a row, at most; exp and erf err by a few units.
const ROUNDINGS: f64 = 24.0 * f32::EPSILON as f64;

fn launch(name: &str, grid: [usize; 3], arguments: &[Argument<'_>]) -> Result<(), LaunchError> {
    let grid = grid.map(|blocks| blocks as u32);
    Launch { name, grid, block: [256, 1, 1], shared_bytes: 0, cluster: 1 }.run(arguments)
}

/// Blocks of a kernel whose threads take N numbers of rows with such widths.
fn blocks(rows: usize, width: usize, widths: &[usize]) -> [usize; 3] {
    let n = if widths.iter().all(|width| width.is_multiple_of(8)) { 8 } else { 1 };
    [(rows * width / n).div_ceil(256), 1, 1]
}

/// Half a unit of the type at `value`.
fn rounded<T: Storage>(value: f64) -> f64 {
    T::EPSILON / 2.0 * value.abs().max(T::SMALLEST)
}

/// Calls a generic function for each storage type.
macro_rules! for_all_types {
    ($function:ident) => {{
        $function::<f32>()?;
        $function::<f16>()?;
        $function::<bf16>()
    }};
}

fn swish(x: f64, k: f64) -> f64 {
    x / (1.0 + (-k * x).exp())
}

fn swish_derivative(x: f64, k: f64) -> f64 {
    let s = 1.0 / (1.0 + (-k * x).exp());
    s * (1.0 + k * x * (1.0 - s))
}

type Function = fn(f64) -> f64;
/// Name, definition, derivative.
const ACTIVATIONS: [(&str, Function, Function); 3] = [
    ("silu", |x| swish(x, 1.0), |x| swish_derivative(x, 1.0)),
    ("gelu", gelu, gelu_derivative),
    ("quick_gelu", |x| swish(x, 1.702), |x| swish_derivative(x, 1.702)),
];

fn activations<T: Storage>() -> Result<(), LaunchError> {
    for (name, function, derivative) in ACTIVATIONS {
        for count in COUNTS {
            let mut random = Uniform(count as u64);
            let x: Vec<T> = (0..count).map(|_| T::round(6.0 * random.next())).collect();
            let d_y: Vec<T> = random.numbers(count);
            let (y, d_x) = (Buffer::<T>::unwritten(count), Buffer::<T>::unwritten(count));
            let (given, d_y_given) = (Buffer::from_slice(&x), Buffer::from_slice(&d_y));
            let (grid, count_given) = ([count.div_ceil(2048), 1, 1], Argument::from(count as i64));
            let kernel = format!("{name}_{}", T::NAME);
            launch(&kernel, grid, &[(&y).into(), (&given).into(), count_given])?;
            let gradient = format!("{name}_gradient_{}", T::NAME);
            launch(&gradient, grid, &[(&d_x).into(), (&d_y_given).into(), (&given).into(), count_given])?;

            let expected: Vec<f64> = values(&x).into_iter().map(function).collect();
            assert_close(&kernel, &values(&y.to_vec()), &expected, |i| {
                rounded::<T>(expected[i]) + ROUNDINGS * x[i].value().abs()
            });
            let expected: Vec<f64> =
                x.iter().zip(&d_y).map(|(x, d_y)| d_y.value() * derivative(x.value())).collect();
            // The factors of x in a derivative err by its size.
            assert_close(&gradient, &values(&d_x.to_vec()), &expected, |i| {
                rounded::<T>(expected[i]) + ROUNDINGS * (1.0 + x[i].value().abs())
            });
        }
    }
    Ok(())
}

#[test]
fn activations_are_their_definitions() -> Result<(), LaunchError> {
    for_all_types!(activations)
}

/// To the left of 0 a sum of 1 and an error function would have few digits.
#[test]
fn small_values_of_gelu_are_as_exact_as_large_ones() -> Result<(), LaunchError> {
    let x: Vec<f32> = (-500..=500).map(|i| i as f32 / 100.0).collect();
    let (y, given) = (Buffer::<f32>::unwritten(x.len()), Buffer::from_slice(&x));
    launch("gelu_f32", [1, 1, 1], &[(&y).into(), (&given).into(), Argument::from(x.len() as i64)])?;
    let expected: Vec<f64> = values(&x).into_iter().map(gelu).collect();
    assert_close("gelu_f32", &values(&y.to_vec()), &expected, |i| 3e-6 * expected[i].abs());
    Ok(())
}

#[test]
fn derivatives_are_those_of_differences() {
    const STEP: f64 = 1e-5;
    for (name, function, derivative) in ACTIVATIONS {
        let x: Vec<f64> = (-30..=30).map(|i| f64::from(i) / 5.0).collect();
        let expected: Vec<f64> =
            x.iter().map(|x| (function(x + STEP) - function(x - STEP)) / (2.0 * STEP)).collect();
        let got: Vec<f64> = x.into_iter().map(derivative).collect();
        // 16 digits of numbers up to 6, of which the step costs 5; third derivatives are about 1.
        assert_close(name, &got, &expected, |_| 1e-9);
    }
}

#[test]
fn activations_far_from_zero_are_their_limits() -> Result<(), LaunchError> {
    let x = [-1e30f32, -1000.0, -100.0, -88.0, 100.0, 1e30];
    for (name, ..) in ACTIVATIONS {
        let (y, given) = (Buffer::<f32>::unwritten(x.len()), Buffer::from_slice(&x));
        let count = Argument::from(x.len() as i64);
        launch(&format!("{name}_f32"), [1, 1, 1], &[(&y).into(), (&given).into(), count])?;
        let expected: Vec<f64> = x.iter().map(|&x| f64::from(x.max(0.0))).collect();
        assert_close(name, &values(&y.to_vec()), &expected, |_| 1e-30);
        let ones = Buffer::from_slice(&[1f32; 6]);
        let arguments = [(&y).into(), (&ones).into(), (&given).into(), count];
        launch(&format!("{name}_gradient_f32"), [1, 1, 1], &arguments)?;
        let expected: Vec<f64> = x.iter().map(|&x| f64::from(u8::from(x > 0.0))).collect();
        assert_close(name, &values(&y.to_vec()), &expected, |_| 1e-30);
    }
    Ok(())
}

fn add<T: Storage>() -> Result<(), LaunchError> {
    for count in COUNTS {
        let mut random = Uniform(count as u64);
        let [a, b]: [Vec<T>; 2] = [random.numbers(count), random.numbers(count)];
        let y = Buffer::<T>::unwritten(count);
        let given = [&a, &b].map(|numbers| Buffer::from_slice(numbers));
        let arguments = [(&y).into(), (&given[0]).into(), (&given[1]).into(), (count as i64).into()];
        launch(&format!("add_{}", T::NAME), [count.div_ceil(2048), 1, 1], &arguments)?;
        let expected: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a.value() + b.value()).collect();
        assert_close("add", &values(&y.to_vec()), &expected, |i| rounded::<T>(expected[i]));
    }
    Ok(())
}

#[test]
fn a_sum_is_its_definition() -> Result<(), LaunchError> {
    for_all_types!(add)
}

fn concatenate<T: Storage>() -> Result<(), LaunchError> {
    for (rows, widths) in
        [(1, [1, 1]), (3, [8, 8]), (5, [8, 3]), (2, [7, 16]), (9, [640, 320]), (2, [2056, 8])]
    {
        let mut random = Uniform(widths[0] as u64);
        let parts: [Vec<T>; 2] = widths.map(|width| random.numbers(rows * width));
        let whole = Buffer::<T>::unwritten(rows * (widths[0] + widths[1]));
        let given = parts.each_ref().map(|part| Buffer::from_slice(part));
        let sizes = [rows, widths[0], widths[1]].map(|size| Argument::from(size as i32));
        let grid = blocks(rows, widths[0] + widths[1], &widths);
        let arguments = [&[&whole, &given[0], &given[1]].map(Argument::from), &sizes[..]].concat();
        launch(&format!("concatenate_{}", T::NAME), grid, &arguments)?;

        let [a, b] = parts.each_ref().map(|part| values(part));
        let each_row = a.chunks(widths[0]).zip(b.chunks(widths[1]));
        let expected: Vec<f64> = each_row.flat_map(|(a, b)| [a, b].concat()).collect();
        assert_eq!(values(&whole.to_vec()), expected);
    }
    Ok(())
}

#[test]
fn parts_are_put_side_by_side() -> Result<(), LaunchError> {
    for_all_types!(concatenate)
}

fn geglu<T: Storage>() -> Result<(), LaunchError> {
    for (rows, width) in WIDTHS.into_iter().flat_map(|width| [(1, width), (3, width)]) {
        let mut random = Uniform((rows * width) as u64);
        let x: Vec<T> = (0..2 * rows * width).map(|_| T::round(4.0 * random.next())).collect();
        let d_y: Vec<T> = random.numbers(rows * width);
        let (y, d_x) = (Buffer::<T>::unwritten(rows * width), Buffer::<T>::unwritten(2 * rows * width));
        let (given, d_y_given) = (Buffer::from_slice(&x), Buffer::from_slice(&d_y));
        let (grid, sizes) = (blocks(rows, width, &[width]), [rows, width].map(|size| (size as i32).into()));
        let [rows_given, width_given] = sizes;
        let arguments = [(&y).into(), (&given).into(), rows_given, width_given];
        launch(&format!("geglu_{}", T::NAME), grid, &arguments)?;
        let arguments = [(&d_x).into(), (&d_y_given).into(), (&given).into(), rows_given, width_given];
        launch(&format!("geglu_gradient_{}", T::NAME), grid, &arguments)?;

        let (x, d_y) = (values(&x), values(&d_y));
        let mut expected = [Vec::new(), Vec::new()];
        for (x, d_y) in x.chunks(2 * width).zip(d_y.chunks(width)) {
            let (a, b) = x.split_at(width);
            expected[0].extend(a.iter().zip(b).map(|(a, b)| a * gelu(*b)));
            expected[1].extend(b.iter().zip(d_y).map(|(b, d_y)| d_y * gelu(*b)));
            expected[1].extend((0..width).map(|i| d_y[i] * a[i] * gelu_derivative(b[i])));
        }
        // Products of two numbers up to 4.
        for (got, expected) in [y, d_x].iter().zip(&expected) {
            assert_close(&format!("{rows} × {width}"), &values(&got.to_vec()), expected, |i| {
                rounded::<T>(expected[i]) + ROUNDINGS * 16.0
            });
        }
    }
    Ok(())
}

#[test]
fn geglu_is_its_definition() -> Result<(), LaunchError> {
    for_all_types!(geglu)
}

fn upsample<T: Storage>() -> Result<(), LaunchError> {
    const BATCH: usize = 2;
    for ([height, width], [out_height, out_width], channels) in [
        ([1, 1], [2, 2], 8),
        ([2, 3], [4, 6], 3),
        ([5, 7], [10, 14], 40),
        ([3, 2], [5, 3], 8),
        ([4, 5], [3, 5], 1),
        ([2, 3], [4, 6], 1032),
    ] {
        let (pixels, out_pixels) = (height * width, out_height * out_width);
        let mut random = Uniform(pixels as u64);
        let x: Vec<T> = random.numbers(BATCH * pixels * channels);
        let d_y: Vec<T> = random.numbers(BATCH * out_pixels * channels);
        let (y, d_x) = (Buffer::<T>::unwritten(d_y.len()), Buffer::<T>::unwritten(x.len()));
        let (given, d_y_given) = (Buffer::from_slice(&x), Buffer::from_slice(&d_y));
        let sizes = [height, width, out_height, out_width, channels].map(|size| Argument::from(size as i32));
        let grid = |height, width| [blocks(width, channels, &[channels])[0], height, BATCH];
        let arguments = [&[(&y).into(), (&given).into()], &sizes[..]].concat();
        launch(&format!("upsample_nearest_{}", T::NAME), grid(out_height, out_width), &arguments)?;
        let arguments = [&[(&d_x).into(), (&d_y_given).into()], &sizes[..]].concat();
        launch(&format!("upsample_nearest_gradient_{}", T::NAME), grid(height, width), &arguments)?;

        let (x, d_y) = (values(&x), values(&d_y));
        // Where output number i was read.
        let source = |i: usize| {
            let (pixel, channel) = (i / channels, i % channels);
            let (image, row, column) =
                (pixel / out_pixels, pixel / out_width % out_height, pixel % out_width);
            let (row, column) = (row * height / out_height, column * width / out_width);
            ((image * height + row) * width + column) * channels + channel
        };
        let expected: Vec<f64> = (0..d_y.len()).map(|i| x[source(i)]).collect();
        assert_eq!(values(&y.to_vec()), expected);
        let mut expected = vec![0.0; x.len()];
        (0..d_y.len()).for_each(|i| expected[source(i)] += d_y[i]);
        // A sum of four numbers or fewer.
        assert_close("d_x", &values(&d_x.to_vec()), &expected, |i| {
            rounded::<T>(expected[i]) + ROUNDINGS * 4.0
        });
    }
    Ok(())
}

#[test]
fn upsampling_is_its_definition() -> Result<(), LaunchError> {
    for_all_types!(upsample)
}

fn transpose<T: Storage>() -> Result<(), LaunchError> {
    for (rows, columns) in [(1, 1), (1, 4), (64, 4), (257, 3), (31, 9)] {
        let x: Vec<T> = Uniform(rows as u64).numbers(rows * columns);
        let (y, given) = (Buffer::<T>::unwritten(x.len()), Buffer::from_slice(&x));
        let sizes = [rows, columns].map(|size| Argument::from(size as i32));
        let grid = [(rows * columns).div_ceil(256), 1, 1];
        launch(&format!("transpose_{}", T::NAME), grid, &[[(&y).into(), (&given).into()], sizes].concat())?;
        let x = values(&x);
        let expected: Vec<f64> = (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect();
        assert_eq!(values(&y.to_vec()), expected);
    }
    Ok(())
}

#[test]
fn a_transpose_is_its_definition() -> Result<(), LaunchError> {
    for_all_types!(transpose)
}
