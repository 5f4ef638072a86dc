//! A product, and its definition.

use host_kernels::{Argument, Buffer, Launch, LaunchError};

use crate::common::{Matrix, Storage, Uniform, assert_close, gelu, gelu_derivative, values};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Direction {
    Forward,
    Gradient,
}
use Direction::{Forward, Gradient};

/// A kernel: what it is called before direction and type and behind them, the results of a block, its threads, its shared
/// memory by direction.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    pub prefix: &'static str,
    pub suffix: &'static str,
    pub threads: u32,
    pub rows: usize,
    pub columns: usize,
    pub shared_bytes: [u32; 2],
}

/// A convolution from `inputs` to `outputs` channels, and what rides on the product.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    pub images: usize,
    pub input: [usize; 2],
    pub inputs: usize,
    pub output: [usize; 2],
    pub outputs: usize,
    pub kernel: [usize; 2],
    pub stride: usize,
    pub padding: [usize; 2],
    pub scale: f32,
    pub bias: bool,
    pub image_bias: bool,
    pub residual: bool,
    /// Whether the gradient goes on through a GEGLU; or the result goes through one, of half as many outputs.
    pub gates: bool,
    pub splits: usize,
    /// Behind each row of each matrix.
    pub gap: usize,
}

impl Tile {
    /// Whether weights are packed for it.
    pub fn is_hoppers(&self) -> bool {
        self.prefix == "product_sm90a"
    }
}

/// Weights `[O, taps, I]` as pieces of 8 outputs × 8 inputs, `[O / 8, taps, I / 8, 8, 8]`.
fn packed<T: Copy>(w: &[T], taps: usize, inputs: usize) -> Vec<T> {
    let outputs = w.len() / (taps * inputs);
    let mut packed = Vec::with_capacity(w.len());
    for (first_output, tap) in (0..outputs).step_by(8).flat_map(|o| (0..taps).map(move |tap| (o, tap))) {
        for first_input in (0..inputs).step_by(8) {
            for output in first_output..first_output + 8 {
                let first = (output * taps + tap) * inputs + first_input;
                packed.extend_from_slice(&w[first..first + 8]);
            }
        }
    }
    packed
}

impl Problem {
    pub fn linear(rows: usize, inputs: usize, outputs: usize) -> Self {
        Self {
            images: 1,
            input: [1, rows],
            inputs,
            output: [1, rows],
            outputs,
            kernel: [1, 1],
            stride: 1,
            padding: [0, 0],
            scale: 1.0,
            bias: false,
            image_bias: false,
            residual: false,
            gates: false,
            splits: 1,
            gap: 8,
        }
    }

    /// 3 × 3, padded by 1 in front, and behind as far as the output needs it.
    pub fn convolution(
        images: usize,
        input: [usize; 2],
        output: [usize; 2],
        inputs: usize,
        outputs: usize,
    ) -> Self {
        let linear = Self::linear(1, inputs, outputs);
        Self { images, input, output, kernel: [3, 3], padding: [1, 1], ..linear }
    }

    pub fn with_epilogue(self) -> Self {
        Self { bias: true, image_bias: true, residual: true, scale: 0.75, ..self }
    }

    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Calls `with(input pixel, output pixel, tap)` for all that meet.
    fn each_pair(&self, mut with: impl FnMut(usize, usize, usize)) {
        let hit = |axis: usize, at: usize, tap: usize| {
            let padded = at * self.stride + tap;
            padded.checked_sub(self.padding[axis]).filter(|at| *at < self.input[axis])
        };
        for image in 0..self.images {
            for (y, x) in (0..self.output[0]).flat_map(|y| (0..self.output[1]).map(move |x| (y, x))) {
                for tap in 0..self.taps() {
                    let from = (hit(0, y, tap / self.kernel[1]), hit(1, x, tap % self.kernel[1]));
                    if let (Some(down), Some(right)) = from {
                        let input = (image * self.input[0] + down) * self.input[1] + right;
                        with(input, (image * self.output[0] + y) * self.output[1] + x, tap);
                    }
                }
            }
        }
    }
}

/// Runs a kernel; compares all results.
pub fn check<T: Storage>(direction: Direction, tile: Tile, problem: Problem) -> Result<(), LaunchError> {
    let Problem { images, inputs, outputs, gap, splits, .. } = problem;
    let taps = problem.taps();
    let (result, source, n, channels) = match direction {
        Forward => (problem.output, problem.input, outputs, inputs),
        Gradient => (problem.input, problem.output, inputs, outputs),
    };
    let pixels = images * result[0] * result[1];
    let mut random = Uniform(17 + pixels as u64 + 1000 * n as u64);
    let a: Vec<T> = random.numbers(images * source[0] * source[1] * channels);
    let w: Vec<T> = random.numbers(outputs * taps * inputs);
    let bias: Vec<T> = random.numbers(n);
    let image_bias: Vec<T> = random.numbers(images * n);
    let residual: Vec<T> = random.numbers(pixels * n);

    let gated = direction == Gradient && problem.gates;
    let width = if gated { 2 * n } else { n };
    let gates: Vec<T> = (0..pixels * width).map(|_| T::round(4.0 * random.next())).collect();

    let through = direction == Forward && problem.gates;
    let of_geglu = Matrix::<T>::unwritten(pixels, n / 2, 0);

    let c = Matrix::<T>::unwritten(pixels, width, gap);
    let partial = Buffer::<f32>::unwritten(splits * pixels * n.next_multiple_of(8));
    let buffers = [
        Matrix::from_slice(&a, channels, gap),
        if tile.is_hoppers() {
            Matrix::from_slice(&packed(&w, taps, inputs), taps * inputs, 0)
        } else {
            Matrix::from_slice(&w, taps * inputs, gap)
        },
        Matrix::from_slice(&bias, n, 0),
        Matrix::from_slice(&image_bias, n, gap),
        Matrix::from_slice(&residual, n, gap),
        Matrix::from_slice(&gates, width, gap),
    ];
    let given = |given: bool, matrix: usize| if given { (&buffers[matrix]).into() } else { Argument::NULL };
    let mut arguments: Vec<Argument<'_>> = vec![
        (&c).into(),
        if splits > 1 { (&partial).into() } else { Argument::NULL },
        given(true, 0),
        given(true, 1),
        given(problem.bias, 2),
        given(problem.image_bias, 3),
        given(problem.residual, 4),
        given(gated, 5),
        if through { (&of_geglu).into() } else { Argument::NULL },
    ];
    let numbers = [
        images,
        result[0],
        result[1],
        n,
        source[0],
        source[1],
        channels,
        problem.kernel[0],
        problem.kernel[1],
        problem.stride,
        problem.padding[0],
        problem.padding[1],
    ];
    arguments.extend(numbers.map(|number| Argument::from(number as i32)));
    let strides =
        [c.stride(), buffers[0].stride(), buffers[1].stride(), buffers[4].stride(), buffers[3].stride()];
    arguments.extend(strides.map(Argument::from));

    let (verb, step) = match direction {
        Forward => ("forward", 1),
        Gradient => ("gradient", problem.stride),
    };
    let phase_rows = images * result[0].div_ceil(step) * result[1].div_ceil(step);
    let tiles_down = phase_rows.div_ceil(tile.rows);
    let blocks = tiles_down * n.div_ceil(tile.columns);
    let together = |size: &usize| *size == 1 || tile.is_hoppers() && tiles_down.is_multiple_of(*size);
    let cluster = [4, 2, 1].into_iter().find(together).unwrap_or(1) as u32;
    let arrivals = Buffer::from_slice(&vec![0_u32; step * step * blocks]);
    arguments.extend([Argument::from(problem.scale), Argument::from(splits as i32)]);
    arguments.push(if splits > 1 { (&arrivals).into() } else { Argument::NULL });
    Launch {
        name: &format!("{}_{verb}_{}{}", tile.prefix, T::NAME, tile.suffix),
        grid: [blocks as u32, 1, (step * step * splits) as u32],
        block: [tile.threads, 1, 1],
        shared_bytes: tile.shared_bytes[direction as usize],
        cluster,
    }
    .run(&arguments)?;
    if splits > 1 {
        assert!(partial.to_vec().iter().all(|x| !x.is_nan()), "a split left partial sums out");
        assert!(arrivals.to_vec().iter().all(|&n| n == 0), "the next launch would miss a split");
    }

    let [a, w, bias, image_bias, residual] =
        [a, w, bias, image_bias, residual].map(|numbers| values(&numbers));
    let mut expected = vec![0.0; pixels * n];
    let mut magnitude = vec![0.0; pixels * n];
    problem.each_pair(|input, output, tap| {
        let (to, from) = if direction == Forward { (output, input) } else { (input, output) };
        for j in 0..n {
            for k in 0..channels {
                let (o, i) = if direction == Forward { (j, k) } else { (k, j) };
                let product = a[from * channels + k] * w[(o * taps + tap) * inputs + i];
                expected[to * n + j] += product;
                magnitude[to * n + j] += product.abs();
            }
        }
    });
    let scale = f64::from(problem.scale);
    for (i, (x, magnitude)) in expected.iter_mut().zip(&mut magnitude).enumerate() {
        let image = i / n / (result[0] * result[1]);
        let added = f64::from(u8::from(problem.bias)) * bias[i % n]
            + f64::from(u8::from(problem.image_bias)) * image_bias[image * n + i % n];
        let rest = f64::from(u8::from(problem.residual)) * residual[i];
        *x = *x * scale + added + rest;
        *magnitude = *magnitude * scale + added.abs() + rest.abs();
    }
    if gated {
        [expected, magnitude] =
            [through_geglu(&expected, &gates, n, false), through_geglu(&magnitude, &gates, n, true)];
    }
    // Rounded once to T. Before, a sum in f32 of as many terms, and a few operations.
    let terms = (channels * taps + 16) as f64;
    let tolerance = |i: usize| {
        T::EPSILON / 2.0 * expected[i].abs().max(T::SMALLEST)
            + terms * f64::from(f32::EPSILON) / 2.0 * magnitude[i].max(f64::from(f32::MIN_POSITIVE))
    };
    let what = format!("{direction:?} {tile:?} {problem:?}");
    assert_close(&what, &c.values(), &expected, tolerance);
    if through {
        // Of the halves as they are rounded: what the gradient knows of them.
        let of_row = |row: &[f64]| {
            let (a, b) = row.split_at(n / 2);
            a.iter().zip(b).map(|(a, b)| (a * gelu(*b), (a * b).abs())).collect::<Vec<_>>()
        };
        let (result, magnitude): (Vec<f64>, Vec<f64>) = c.values().chunks(n).flat_map(of_row).unzip();
        let tolerance = |i: usize| {
            T::EPSILON / 2.0 * result[i].abs().max(T::SMALLEST) + f64::from(f32::EPSILON) * magnitude[i]
        };
        assert_close(&what, &of_geglu.values(), &result, tolerance);
    }
    Ok(())
}

/// From the gradient `d` of a GEGLU's result, `n` wide, to that of its halves; or how large its terms are at most.
fn through_geglu<T: Storage>(d: &[f64], gates: &[T], n: usize, magnitude: bool) -> Vec<f64> {
    let of_row = |(d, halves): (&[f64], &[T])| {
        let (a, b) = halves.split_at(n);
        let gelu = |b: &T| if magnitude { b.value().abs() } else { gelu(b.value()) };
        let slope = |(a, b): (&T, &T)| {
            if magnitude {
                a.value().abs() * (1.0 + b.value().abs())
            } else {
                a.value() * gelu_derivative(b.value())
            }
        };
        let of_a = b.iter().zip(d).map(|(b, d)| d * gelu(b));
        let of_b = a.iter().zip(b).zip(d).map(|(gate, d)| d * slope(gate));
        of_a.chain(of_b).collect::<Vec<_>>()
    };
    d.chunks(n).zip(gates.chunks(2 * n)).flat_map(of_row).collect()
}
