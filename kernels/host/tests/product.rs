//! Products with a frozen weight against their definition in f64: linear layers, convolutions, their gradients.

mod common;

use common::{Matrix, Storage, Uniform, assert_close, gelu, gelu_derivative, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, shuffled};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    Forward,
    Gradient,
}
use Direction::{Forward, Gradient};

/// A kernel: what it is called before direction and type and behind them, the results of a block, its threads, its shared
/// memory by direction.
#[derive(Clone, Copy, Debug)]
struct Tile {
    prefix: &'static str,
    suffix: &'static str,
    threads: u32,
    rows: usize,
    columns: usize,
    shared_bytes: [u32; 2],
}

const TILES: [Tile; 6] = [
    SMALL,
    Tile { suffix: "_128x128", rows: 128, columns: 128, shared_bytes: [100_352, 103_424], ..SMALL },
    Tile { suffix: "_64x160", columns: 160, shared_bytes: [87_552, 90_624], ..SMALL },
    Tile { shared_bytes: [99_840; 2], prefix: "product_sm90a", ..SMALL },
    Tile { suffix: "_64x160", columns: 160, shared_bytes: [173_568; 2], prefix: "product_sm90a", ..SMALL },
    Tile {
        suffix: "_128x160",
        rows: 128,
        columns: 160,
        threads: 256,
        shared_bytes: [186_368; 2],
        prefix: "product_sm90a",
    },
];
const SMALL: Tile = Tile {
    prefix: "product",
    suffix: "_64x64",
    threads: 128,
    rows: 64,
    columns: 64,
    shared_bytes: [50_688, 53_760],
};
/// For numbers of channels that are no eights, and for f32.
const PLAIN: Tile = Tile { suffix: "", shared_bytes: [10_240; 2], ..SMALL };

/// A convolution from `inputs` to `outputs` channels, and what rides on the product.
#[derive(Clone, Copy, Debug)]
struct Problem {
    images: usize,
    input: [usize; 2],
    inputs: usize,
    output: [usize; 2],
    outputs: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: [usize; 2],
    scale: f32,
    bias: bool,
    image_bias: bool,
    residual: bool,
    /// Whether the gradient goes on through a GEGLU.
    gates: bool,
    splits: usize,
    /// Behind each row of each matrix.
    gap: usize,
}

impl Problem {
    fn linear(rows: usize, inputs: usize, outputs: usize) -> Self {
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
    fn convolution(
        images: usize,
        input: [usize; 2],
        output: [usize; 2],
        inputs: usize,
        outputs: usize,
    ) -> Self {
        let linear = Self::linear(1, inputs, outputs);
        Self { images, input, output, kernel: [3, 3], padding: [1, 1], ..linear }
    }

    fn with_epilogue(self) -> Self {
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
fn check<T: Storage>(direction: Direction, tile: Tile, problem: Problem) -> Result<(), LaunchError> {
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

    let c = Matrix::<T>::unwritten(pixels, width, gap);
    let partial = Buffer::<f32>::unwritten(splits * pixels * n.next_multiple_of(8));
    let buffers = [
        Matrix::from_slice(&a, channels, gap),
        Matrix::from_slice(&w, taps * inputs, gap),
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
    let blocks = phase_rows.div_ceil(tile.rows) * n.div_ceil(tile.columns);
    let arrivals = Buffer::from_slice(&vec![0_u32; step * step * blocks]);
    arguments.extend([Argument::from(problem.scale), Argument::from(splits as i32)]);
    arguments.push(if splits > 1 { (&arrivals).into() } else { Argument::NULL });
    Launch {
        name: &format!("{}_{verb}_{}{}", tile.prefix, T::NAME, tile.suffix),
        grid: [blocks as u32, 1, (step * step * splits) as u32],
        block: [tile.threads, 1, 1],
        shared_bytes: tile.shared_bytes[direction as usize],
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
    assert_close(&format!("{direction:?} {tile:?} {problem:?}"), &c.values(), &expected, tolerance);
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

fn both<T: Storage>(tile: Tile, problem: Problem) -> Result<(), LaunchError> {
    check::<T>(Forward, tile, problem)?;
    check::<T>(Gradient, tile, problem)
}

#[test]
fn linear_layers_at_sizes_around_the_blocks() -> Result<(), LaunchError> {
    for tile in TILES {
        for (rows, inputs, outputs) in [
            (1, 8, 8),
            (tile.rows - 1, 64, tile.columns - 8),
            (tile.rows, 72, tile.columns),
            (tile.rows + 1, 56, tile.columns + 8),
        ] {
            check::<f16>(Forward, tile, Problem::linear(rows, inputs, outputs))?;
            check::<f16>(Gradient, tile, Problem::linear(rows, outputs, inputs))?;
        }
        check::<bf16>(Forward, tile, Problem::linear(19, 264, 40))?;
        check::<bf16>(Gradient, tile, Problem::linear(19, 40, 264))?;
    }
    Ok(())
}

#[test]
fn results_need_not_be_eights_in_the_forward_direction() -> Result<(), LaunchError> {
    for outputs in [1, 3, 4, 63, 65] {
        check::<f16>(Forward, SMALL, Problem::linear(5, 136, outputs).with_epilogue())?;
    }
    check::<bf16>(Forward, SMALL, Problem::convolution(1, [5, 4], [5, 4], 16, 3).with_epilogue())
}

#[test]
fn convolutions() -> Result<(), LaunchError> {
    for tile in TILES {
        // Several images in a block, and an image over several.
        both::<f16>(tile, Problem::convolution(3, [5, 7], [5, 7], 24, 40))?;
    }
    both::<f16>(SMALL, Problem::convolution(1, [11, 13], [11, 13], 72, 8))?;
    both::<bf16>(SMALL, Problem::convolution(2, [8, 8], [8, 8], 8, 72))?;
    let one = Problem { kernel: [1, 1], padding: [0, 0], ..Problem::convolution(2, [4, 6], [4, 6], 40, 16) };
    both::<f16>(SMALL, one)?;
    let oblong =
        Problem { kernel: [2, 5], padding: [0, 3], ..Problem::convolution(1, [6, 5], [5, 6], 8, 16) };
    both::<f16>(SMALL, oblong)
}

#[test]
fn strides() -> Result<(), LaunchError> {
    for tile in TILES {
        both::<f16>(tile, Problem { stride: 2, ..Problem::convolution(2, [8, 6], [4, 3], 24, 16) })?;
    }
    // Odd sizes: phases differ in size. Padding behind alone, as the VAE has it. Phases without a tap.
    both::<f16>(SMALL, Problem { stride: 2, ..Problem::convolution(2, [7, 9], [4, 5], 72, 8) })?;
    both::<bf16>(
        SMALL,
        Problem { stride: 2, padding: [0, 0], ..Problem::convolution(1, [8, 6], [4, 3], 8, 24) },
    )?;
    let one = Problem { kernel: [1, 1], padding: [0, 0], ..Problem::convolution(1, [6, 5], [3, 3], 16, 8) };
    both::<f16>(SMALL, Problem { stride: 2, ..one })?;
    both::<f16>(SMALL, Problem { stride: 3, ..Problem::convolution(1, [7, 8], [3, 3], 8, 8) })
}

#[test]
fn what_rides_on_a_product() -> Result<(), LaunchError> {
    let problem = Problem { images: 2, ..Problem::linear(9, 24, 40).with_epilogue() };
    both::<f16>(SMALL, problem)?;
    both::<f32>(PLAIN, problem)?;
    for [bias, image_bias, residual] in [0, 1, 2].map(|which| [0, 1, 2].map(|i| i == which)) {
        both::<bf16>(SMALL, Problem { images: 2, bias, image_bias, residual, ..Problem::linear(9, 24, 40) })?;
    }
    for tile in TILES {
        both::<f16>(tile, Problem { images: 2, ..Problem::linear(35, 16, 24).with_epilogue() })?;
    }
    both::<f16>(SMALL, Problem { stride: 2, ..Problem::convolution(2, [4, 4], [2, 2], 8, 8).with_epilogue() })
}

#[test]
fn gradients_that_go_on_through_a_geglu() -> Result<(), LaunchError> {
    for tile in TILES {
        for splits in [1, 2] {
            let problem = Problem { gates: true, splits, scale: 0.75, ..Problem::linear(67, 24, 136) };
            check::<f16>(Gradient, tile, problem)?;
            check::<bf16>(Gradient, tile, Problem { inputs: tile.columns + 8, ..problem })?;
        }
    }
    let odd = Problem { gates: true, gap: 3, ..Problem::linear(65, 11, 7) };
    check::<f32>(Gradient, PLAIN, odd)?;
    check::<f16>(Gradient, PLAIN, odd)
}

#[test]
fn splits_of_the_depth() -> Result<(), LaunchError> {
    // Nine steps, and more splits than that.
    for splits in [2, 3, 5, 11] {
        let problem = Problem { splits, ..Problem::convolution(2, [3, 5], [3, 5], 24, 32).with_epilogue() };
        both::<f16>(SMALL, problem)?;
        both::<f32>(PLAIN, problem)?;
    }
    for tile in TILES {
        check::<bf16>(Forward, tile, Problem { splits: 2, ..Problem::linear(67, 328, 168) })?;
        check::<f16>(Gradient, tile, Problem { splits: 2, ..Problem::linear(67, 168, 328) })?;
    }
    both::<f16>(SMALL, Problem { splits: 2, stride: 2, ..Problem::convolution(1, [5, 5], [3, 3], 8, 8) })?;
    check::<f16>(Forward, SMALL, Problem { splits: 3, ..Problem::linear(7, 200, 3).with_epilogue() })
}

#[test]
fn any_number_of_channels_without_tensor_cores() -> Result<(), LaunchError> {
    fn at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
        for (rows, inputs, outputs) in [(1, 1, 1), (63, 15, 63), (64, 16, 64), (65, 17, 67)] {
            both::<T>(PLAIN, Problem { gap: 1, ..Problem::linear(rows, inputs, outputs) })?;
        }
        both::<T>(
            PLAIN,
            Problem { gap: 0, ..Problem::convolution(2, [5, 6], [5, 6], 4, 11).with_epilogue() },
        )?;
        both::<T>(PLAIN, Problem { gap: 3, stride: 2, ..Problem::convolution(2, [7, 6], [4, 3], 3, 7) })?;
        both::<T>(PLAIN, Problem { gap: 1, splits: 3, ..Problem::convolution(1, [4, 4], [4, 4], 7, 5) })
    }
    at_all_sizes::<f32>()?;
    at_all_sizes::<f16>()?;
    at_all_sizes::<bf16>()
}

#[test]
fn no_result_depends_on_the_order_of_threads() -> Result<(), LaunchError> {
    for seed in 1..3 {
        shuffled(seed, || {
            let problem = Problem::convolution(2, [6, 5], [6, 5], 72, 24).with_epilogue();
            for tile in TILES {
                both::<f16>(tile, problem)?;
            }
            both::<f16>(SMALL, Problem { splits: 3, ..problem })?;
            both::<f32>(PLAIN, problem)
        })?;
    }
    Ok(())
}
