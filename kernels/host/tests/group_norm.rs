//! The group norm's kernels against the definition in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, SANITIZER, shuffled};

const EPS: f32 = 1e-5;
/// Roundings of f32 in a row, at most: sums of a thread, a warp and the splits, and the formula.
const ROUNDINGS: f64 = 48.0 * f32::EPSILON as f64;

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    pixels: usize,
    channels: usize,
    groups: usize,
    splits: usize,
}

/// A block has a whole group, or a share of eight groups' pixels, or of some groups', beside the other blocks of a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Whole,
    Shares,
    Together { blocks: usize, groups: usize },
}

impl How {
    /// All that a type has kernels for: clusters of all sizes, and of all numbers of groups.
    fn of<T: Storage>() -> Vec<Self> {
        let clusters =
            [(1, 8), (2, 4), (3, 2), (4, 1), (5, 4), (6, 2), (7, 1), (8, 8), (8, 4), (8, 2), (8, 1)];
        let mut all = Self::clusters(&clusters);
        all.retain(|_| T::NAME != "f32");
        [Self::Whole, Self::Shares].into_iter().chain(all).collect()
    }

    /// Of so many blocks with so many groups. The sanitizer of races knows some thousand threads, and a block has 256.
    fn clusters(sizes: &[(usize, usize)]) -> Vec<Self> {
        let few = sizes.iter().filter(|(blocks, _)| SANITIZER != "thread" || *blocks <= 3);
        few.map(|&(blocks, groups)| Self::Together { blocks, groups }).collect()
    }

    /// Blocks in x and y, and of a cluster.
    fn blocks(self, shape: Shape) -> [usize; 3] {
        match self {
            Self::Whole => [1, shape.groups, 1],
            Self::Shares => [shape.splits, shape.groups.div_ceil(8), 1],
            Self::Together { blocks, groups } => [blocks, shape.groups.div_ceil(groups), blocks],
        }
    }
}

/// What kernels and definition are given: one is the rounded other.
struct Problem<T> {
    shape: Shape,
    silu: bool,
    x: Vec<T>,
    d_y: Vec<T>,
    residual: Vec<T>,
    known: Vec<T>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// What the kernels make of it.
struct Results {
    y: Vec<f64>,
    d_x: Vec<f64>,
    d_x_alone: Vec<f64>,
    /// With what is known of it, in two parts.
    d_x_known: Vec<f64>,
}

impl<T: Storage> Problem<T> {
    fn new(shape: Shape, silu: bool, offset: f64) -> Self {
        let Shape { batch, pixels, channels, .. } = shape;
        let mut random = Uniform((pixels * channels) as u64);
        let numbers = batch * pixels * channels;
        let x = (0..numbers).map(|_| T::round(2.0 * random.next() + offset)).collect();
        Self {
            shape,
            silu,
            x,
            d_y: random.numbers(numbers),
            residual: random.numbers(numbers),
            known: random.numbers(numbers),
            weight: random.numbers(channels),
            bias: random.numbers(channels),
        }
    }

    fn run(&self, how: How) -> Result<Results, LaunchError> {
        let Shape { batch, pixels, channels, groups, splits } = self.shape;
        let [across, down, cluster] = how.blocks(self.shape).map(|blocks| blocks as u32);
        let launch = |kernel: &str, shared_bytes, pointers: &[Argument<'_>], numbers: &[Argument<'_>]| {
            let sizes = [pixels, channels, groups].map(|size| Argument::from(size as i32));
            let name = format!("{kernel}_{}", T::NAME);
            let grid = [across, down, batch as u32];
            Launch { name: &name, grid, block: [256, 1, 1], shared_bytes, cluster }
                .run(&[pointers, &sizes, numbers].concat())
        };
        let [x, d_y, residual, known] =
            [&self.x, &self.d_y, &self.residual, &self.known].map(|numbers| Buffer::from_slice(numbers));
        let [weight, bias] = [&self.weight, &self.bias].map(|numbers| Buffer::from_slice(numbers));
        let [y, y_alone, d_x, d_x_alone] = [(); 4].map(|()| Buffer::<T>::unwritten(self.x.len()));
        let [sums, sums_of_gradient] =
            [(); 2].map(|()| Buffer::<f32>::unwritten(batch * groups * splits * 2));
        let statistics = Buffer::<f32>::unwritten(batch * groups * 2);
        let silu = Argument::from(i32::from(self.silu));
        let affine = [Argument::from(&weight), (&bias).into()];
        let forwards = [(&y, (&statistics).into()), (&y_alone, Argument::NULL)];
        let forwards = forwards.map(|(y, statistics)| [y.into(), statistics, (&x).into()]);
        let given = [(&d_y).into(), (&x).into(), (&statistics).into()];
        // Eights apart from the others, where there are any.
        let own = (channels / 16 * 8).max(1).min(channels);
        let [first, rest] = [own, channels - own].map(|width| Buffer::<T>::unwritten(batch * pixels * width));
        let all = Argument::from(channels as i32);
        let [with_residual, with_both] =
            [Argument::NULL, (&known).into()].map(|known| [(&residual).into(), known]);
        let gradients = [
            ([(&d_x).into(), Argument::NULL, all], with_residual),
            ([(&d_x_alone).into(), Argument::NULL, all], [Argument::NULL; 2]),
            ([(&first).into(), (&rest).into(), (own as i32).into()], with_both),
        ];
        let gradients = gradients.map(|(to, added)| [&to[..], &given[..2], &added, &given[2..]].concat());

        match how {
            How::Whole => {
                for forward in forwards {
                    launch("group_norm_whole", 192, &[&forward[..], &affine].concat(), &[EPS.into(), silu])?;
                }
                for gradient in &gradients {
                    launch("group_norm_whole_gradient", 192, &[&gradient[..], &affine].concat(), &[silu])?;
                }
            }
            How::Shares => {
                let partial_bytes = 64 * (channels / groups).max(256) as u32;
                launch("group_norm_partial", partial_bytes, &[(&sums).into(), (&x).into()], &[])?;
                for forward in forwards {
                    let pointers = [&forward[..], &[(&sums).into()], &affine].concat();
                    launch("group_norm", 128, &pointers, &[EPS.into(), silu])?;
                }
                let pointers = [&[(&sums_of_gradient).into()], &given[..], &affine].concat();
                launch("group_norm_gradient_partial", partial_bytes, &pointers, &[silu])?;
                for gradient in &gradients {
                    let pointers = [&gradient[..], &[(&sums_of_gradient).into()], &affine].concat();
                    launch("group_norm_gradient", 128, &pointers, &[silu])?;
                }
            }
            How::Together { blocks, groups: of_block } => {
                let width = channels / groups * of_block;
                let sums = 1216 + 8 * width.max(2048) as u32;
                let columns = width.div_ceil(8);
                let rows = 256 / columns.min(256);
                let read = columns.div_ceil(256) * pixels.div_ceil(blocks).div_ceil(rows) * 256 * 16;
                // Every other launch keeps what it reads.
                let kept = |i: usize, bytes: usize| {
                    if i.is_multiple_of(2) { (sums + bytes as u32, 1.into()) } else { (sums, 0.into()) }
                };
                let of_block = Argument::from(of_block as i32);
                for (i, forward) in forwards.iter().enumerate() {
                    let (pointers, (bytes, kept)) = ([&forward[..], &affine].concat(), kept(i, read));
                    launch("group_norm_sm90a", bytes, &pointers, &[of_block, kept, EPS.into(), silu])?;
                }
                for (i, gradient) in gradients.iter().enumerate() {
                    let (pointers, (bytes, kept)) = ([&gradient[..], &affine].concat(), kept(i, 2 * read));
                    launch("group_norm_sm90a_gradient", bytes, &pointers, &[of_block, kept, silu])?;
                }
            }
        }
        assert_eq!(values(&y.to_vec()), values(&y_alone.to_vec()), "without statistics, {how:?}");
        Ok(Results {
            y: values(&y.to_vec()),
            d_x: values(&d_x.to_vec()),
            d_x_alone: values(&d_x_alone.to_vec()),
            d_x_known: side_by_side([&first, &rest], [own, channels - own]),
        })
    }

    fn definition(&self) -> Definition {
        Definition {
            shape: self.shape,
            silu: self.silu,
            weight: values(&self.weight),
            bias: values(&self.bias),
        }
    }

    /// Of the clusters some, others for other sizes.
    fn check(&self) -> Result<(), LaunchError> {
        let turn = (self.shape.pixels + usize::from(self.silu)) % 5;
        let all = How::of::<T>();
        let (alone, together) = all.split_at(2);
        for &how in alone.iter().chain(together.iter().skip(turn).step_by(5)) {
            self.compare(how, self.run(how)?);
        }
        Ok(())
    }

    fn compare(&self, how: How, results: Results) {
        let what = format!("{} {:?}, SiLU {}, {how:?}", T::NAME, self.shape, self.silu);
        let definition = self.definition();
        let (x, d_y, residual) = (values(&self.x), values(&self.d_y), values(&self.residual));
        let Expected { y, d_x, inverse, largest_x, normalised } = definition.expected(&x, &d_y);
        let rounded = |value: f64| T::EPSILON / 2.0 * value.abs().max(T::SMALLEST);
        // x̂ errs by roundings of the mean, in units of σ, and of itself; the rest is of the size of weights and biases, below 1.
        let of_x_hat = |i: usize| ROUNDINGS * (largest_x * inverse[i] + normalised[i].abs() + 1.0);
        assert_close(&format!("y of {what}"), &results.y, &y, |i| rounded(y[i]) + of_x_hat(i));
        // g is below 1.1, and smooth in x̂ with a slope below 1; x̂ enters twice more by way of its products' mean.
        let of_gradient = |i: usize| of_x_hat(i) * inverse[i] * (3.0 + normalised[i].abs());
        let with_residual: Vec<f64> =
            d_x.iter().zip(&residual).map(|(d_x, residual)| d_x + residual).collect();
        assert_close(&format!("d_x of {what}"), &results.d_x, &with_residual, |i| {
            rounded(with_residual[i]) + of_gradient(i)
        });
        let with_both: Vec<f64> =
            with_residual.iter().zip(values(&self.known)).map(|(d_x, known)| d_x + known).collect();
        assert_close(&format!("d_x in two parts of {what}"), &results.d_x_known, &with_both, |i| {
            rounded(with_both[i]) + of_gradient(i)
        });
        assert_close(&format!("d_x without residual of {what}"), &results.d_x_alone, &d_x, |i| {
            rounded(d_x[i]) + of_gradient(i)
        });
    }
}

/// Rows of two parts.
fn side_by_side<T: Storage>(parts: [&Buffer<T>; 2], [a_width, b_width]: [usize; 2]) -> Vec<f64> {
    let [a, b] = parts.map(|part| values(&part.to_vec()));
    let rows = a.chunks(a_width).enumerate();
    rows.flat_map(|(row, a)| [a, &b[row * b_width..][..b_width]].concat()).collect()
}

struct Definition {
    shape: Shape,
    silu: bool,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

/// The results, and what their tolerances depend on.
struct Expected {
    y: Vec<f64>,
    d_x: Vec<f64>,
    inverse: Vec<f64>,
    largest_x: f64,
    normalised: Vec<f64>,
}

impl Definition {
    /// The places of each group's numbers.
    fn groups(&self) -> impl Iterator<Item = Vec<usize>> {
        let Shape { batch, pixels, channels, groups, .. } = self.shape;
        let depth = channels / groups;
        (0..batch * groups).map(move |i| {
            let first = i / groups * pixels * channels + i % groups * depth;
            (0..pixels * depth).map(|j| first + j / depth * channels + j % depth).collect()
        })
    }

    fn expected(&self, x: &[f64], d_y: &[f64]) -> Expected {
        let zeros = || vec![0.0; x.len()];
        let (mut y, mut d_x, mut inverse, mut normalised) = (zeros(), zeros(), zeros(), zeros());
        for members in self.groups() {
            let count = members.len() as f64;
            let mean = members.iter().map(|&i| x[i]).sum::<f64>() / count;
            let variance = members.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / count;
            let scale = 1.0 / (variance + f64::from(EPS)).sqrt();
            let mut g = Vec::new();
            for &i in &members {
                let channel = i % self.shape.channels;
                (normalised[i], inverse[i]) = ((x[i] - mean) * scale, scale);
                let z = normalised[i] * self.weight[channel] + self.bias[channel];
                let sigmoid = 1.0 / (1.0 + (-z).exp());
                let slope = if self.silu { sigmoid * (1.0 + z * (1.0 - sigmoid)) } else { 1.0 };
                y[i] = if self.silu { z * sigmoid } else { z };
                g.push(d_y[i] * slope * self.weight[channel]);
            }
            let mean_g = g.iter().sum::<f64>() / count;
            let mean_product = members.iter().zip(&g).map(|(&i, g)| g * normalised[i]).sum::<f64>() / count;
            for (&i, g) in members.iter().zip(&g) {
                d_x[i] = (g - mean_g - normalised[i] * mean_product) * scale;
            }
        }
        let largest_x = x.iter().fold(0.0, |largest, x| x.abs().max(largest));
        Expected { y, d_x, inverse, largest_x, normalised }
    }
}

fn shape(batch: usize, pixels: usize, channels: usize, groups: usize, splits: usize) -> Shape {
    Shape { batch, pixels, channels, groups, splits }
}

fn at_all_sizes<T: Storage>() -> Result<(), LaunchError> {
    let shapes = [
        // One pixel, and more splits than pixels.
        shape(1, 1, 32, 4, 1),
        shape(2, 1, 64, 8, 3),
        // Ten channels to a group, as at 320: 25 pixels abreast.
        shape(1, 24, 80, 8, 1),
        shape(1, 25, 80, 8, 1),
        shape(1, 26, 80, 8, 1),
        shape(1, 97, 160, 16, 3),
        // Of 20, 30 and 60: some tiles' widths are no eights. A thread has many pixels.
        shape(1, 53, 160, 8, 3),
        shape(1, 150, 240, 8, 2),
        shape(2, 11, 480, 8, 2),
        // Splits that leave the last ones short or without pixels.
        shape(1, 10, 40, 4, 7),
        // More groups than a block's; number by number; one channel to a group; one group.
        shape(1, 31, 36, 9, 2),
        shape(1, 33, 39, 13, 2),
        shape(2, 67, 10, 10, 2),
        shape(1, 131, 7, 1, 4),
        // Deep groups: a thread has several columns.
        shape(1, 5, 2064, 8, 2),
        shape(1, 3, 524, 4, 2),
    ];
    for shape in shapes {
        for silu in [false, true] {
            Problem::<T>::new(shape, silu, 0.5).check()?;
        }
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
fn the_definition_of_the_gradient_is_that_of_differences() {
    const STEP: f64 = 1e-5;
    for silu in [false, true] {
        let problem = Problem::<f32>::new(shape(2, 5, 12, 3, 1), silu, 0.5);
        let (definition, x, d_y) = (problem.definition(), values(&problem.x), values(&problem.d_y));
        let loss = |i: usize, step: f64| -> f64 {
            let mut x = x.clone();
            x[i] += step;
            definition.expected(&x, &d_y).y.iter().zip(&d_y).map(|(y, d_y)| y * d_y).sum()
        };
        let differences: Vec<f64> =
            (0..x.len()).map(|i| (loss(i, STEP) - loss(i, -STEP)) / (2.0 * STEP)).collect();
        // The loss, up to 60, keeps 16 digits, of which the step costs 5; its third derivative is about 1.
        assert_close("d_x", &definition.expected(&x, &d_y).d_x, &differences, |_| 1e-8);
    }
}

#[test]
fn a_mean_far_from_zero_costs_no_digits() -> Result<(), LaunchError> {
    // Of f32's 24 bits, 1000 takes 10; E[x²] − E[x]² would need 20 of them.
    Problem::<f32>::new(shape(1, 1009, 32, 8, 5), false, 1000.0).check()?;
    // Nor does it of f16's numbers, an eighth apart at 200.
    Problem::<f16>::new(shape(1, 1009, 32, 8, 5), false, 200.0).check()
}

#[test]
fn neither_order_nor_batch_changes_a_bit() -> Result<(), LaunchError> {
    let together = Problem::<f16>::new(shape(2, 53, 80, 8, 3), true, 0.5);
    let bits = |results: &Results| -> Vec<u64> {
        [&results.y, &results.d_x, &results.d_x_alone, &results.d_x_known]
            .into_iter()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    };
    let image = together.x.len() / 2;
    let half = |numbers: &[f16]| numbers[image..].to_vec();
    let alone = Problem {
        shape: Shape { batch: 1, ..together.shape },
        x: half(&together.x),
        d_y: half(&together.d_y),
        residual: half(&together.residual),
        known: half(&together.known),
        weight: together.weight.clone(),
        bias: together.bias.clone(),
        ..together
    };
    let clusters = How::clusters(&[(8, 4), (8, 1), (3, 2)]);
    for how in [How::Whole, How::Shares].into_iter().chain(clusters) {
        let expected = bits(&together.run(how)?);
        for seed in 1..4 {
            assert_eq!(bits(&shuffled(seed, || together.run(how))?), expected);
        }
        let second: Vec<u64> = expected.chunks(image).skip(1).step_by(2).flatten().copied().collect();
        assert_eq!(bits(&alone.run(how)?), second);
    }
    Ok(())
}
