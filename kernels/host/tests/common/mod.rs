//! What the kernels' tests share: storage types, random numbers, comparison.
#![allow(dead_code)] // each test file uses its part

use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Number};

/// A type that kernels store numbers in.
pub trait Storage: Number {
    /// As kernels are named.
    const NAME: &'static str;
    /// The distance from 1 to the next number: rounding errs by half of it.
    const EPSILON: f64;
    /// The smallest normal number: rounding of smaller ones errs as much as of this one.
    const SMALLEST: f64;
    fn round(value: f64) -> Self;
    fn value(self) -> f64;
}

macro_rules! storage {
    ($type:ty, $name:literal, $epsilon:expr, $smallest:expr, $round:expr) => {
        impl Storage for $type {
            const NAME: &'static str = $name;
            const EPSILON: f64 = $epsilon;
            const SMALLEST: f64 = $smallest;
            fn round(value: f64) -> Self {
                $round(value)
            }
            fn value(self) -> f64 {
                f64::from(self)
            }
        }
    };
}
storage!(f32, "f32", 1.1920929e-7, 1.1754943e-38, |value| value as f32);
storage!(f16, "f16", 1.0 / 1024.0, 1.0 / 16384.0, f16::from_f64);
storage!(bf16, "bf16", 1.0 / 128.0, 1.1754943e-38, bf16::from_f64);

/// Numbers in −1…1 (splitmix64).
pub struct Uniform(pub u64);

impl Uniform {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as f64 / u64::MAX as f64 * 2.0 - 1.0
    }

    /// `len` numbers of a type.
    pub fn numbers<T: Storage>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::round(self.next())).collect()
    }
}

/// As `f64`.
pub fn values<T: Storage>(numbers: &[T]) -> Vec<f64> {
    numbers.iter().map(|x| x.value()).collect()
}

/// Every number of `got` is as expected, give or take the tolerance of its index.
pub fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let tolerance = tolerance(i);
        assert!(
            (got - expected).abs() <= tolerance,
            "{what}[{i}] = {got}, expected {expected} ± {tolerance:.2e}"
        );
    }
}

/// Rows in a wider buffer, with a gap of NaN behind each.
pub struct Matrix<T> {
    buffer: Buffer<T>,
    width: usize,
    stride: usize,
}

impl<T: Storage> Matrix<T> {
    /// Rows of `width` numbers, and a gap behind each.
    pub fn from_slice(numbers: &[T], width: usize, gap: usize) -> Self {
        let stride = width + gap;
        let unwritten = Buffer::<T>::unwritten(1).to_vec()[0];
        let mut all = vec![unwritten; numbers.len() / width * stride];
        for (row, numbers) in all.chunks_mut(stride).zip(numbers.chunks(width)) {
            row[..width].copy_from_slice(numbers);
        }
        Self { buffer: Buffer::from_slice(&all), width, stride }
    }

    /// The same, to be written by a kernel.
    pub fn unwritten(rows: usize, width: usize, gap: usize) -> Self {
        let stride = width + gap;
        Self { buffer: Buffer::unwritten(rows * stride), width, stride }
    }

    /// From row to row.
    pub fn stride(&self) -> i32 {
        self.stride as i32
    }

    /// The numbers without the gaps, which are as they were.
    pub fn values(&self) -> Vec<f64> {
        let all = values(&self.buffer.to_vec());
        let gaps = all.chunks(self.stride).flat_map(|row| &row[self.width..]);
        assert!(gaps.into_iter().all(|x| x.is_nan()), "a kernel wrote between rows");
        all.chunks(self.stride).flat_map(|row| &row[..self.width]).copied().collect()
    }
}

impl<'a, T: Storage> From<&'a Matrix<T>> for Argument<'a> {
    fn from(matrix: &'a Matrix<T>) -> Self {
        (&matrix.buffer).into()
    }
}

/// Φ(x) = ½ + φ(x) (x + x³/3 + x⁵/15 + …) (Abramowitz & Stegun 26.2.11).
fn normal_cdf(x: f64) -> f64 {
    let (mut term, mut sum, mut k) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() {
        k += 2.0;
        term *= x * x / k;
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
}

pub fn gelu(x: f64) -> f64 {
    x * normal_cdf(x)
}

pub fn gelu_derivative(x: f64) -> f64 {
    normal_cdf(x) + x * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
}
