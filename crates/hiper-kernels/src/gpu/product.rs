//! Products with a frozen weight, `kernels/product.cu`: fully connected layers, convolutions, and the gradients to their inputs.

use std::sync::Arc;

use candle_core::{DType, Result};

use super::{Argument, Array, COUNTERS, Chip, Given, Gpu, Launch, View, type_name};

/// A convolution's sizes; a fully connected layer is one of a picture of a single row, with a kernel of one pixel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub images: usize,
    /// Height and width.
    pub input: [usize; 2],
    pub output: [usize; 2],
    /// Channels.
    pub inputs: usize,
    pub outputs: usize,
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Rows of zeros above, columns to the left; below and to the right as many as the output reads.
    pub padding: [usize; 2],
}

impl Geometry {
    /// A fully connected layer.
    pub(crate) fn linear(rows: usize, inputs: usize, outputs: usize) -> Self {
        let size = [1, rows];
        Self {
            images: 1,
            input: size,
            output: size,
            inputs,
            outputs,
            kernel: [1, 1],
            stride: 1,
            padding: [0, 0],
        }
    }
}

/// A layer's weights on a card: some outputs of arrays that several layers may share.
pub(crate) struct Layer<G: Gpu> {
    /// `[all O, KH, KW, I]`.
    weight: Arc<Array<G>>,
    /// `[all O]`.
    bias: Option<Arc<Array<G>>>,
    /// Of the layer's outputs.
    first: usize,
}

impl<G: Gpu> Layer<G> {
    pub(crate) fn new(weight: Array<G>, bias: Option<Array<G>>) -> Self {
        Self { weight: Arc::new(weight), bias: bias.map(Arc::new), first: 0 }
    }

    /// The layer of the same arrays whose outputs begin `outputs` later.
    pub(crate) fn later(&self, outputs: usize) -> Self {
        Self { weight: self.weight.clone(), bias: self.bias.clone(), first: self.first + outputs }
    }

    /// Whether `other` is what is `outputs` later.
    pub(crate) fn is_followed_by(&self, other: &Self, outputs: usize) -> bool {
        Arc::ptr_eq(&self.weight, &other.weight) && self.first + outputs == other.first
    }

    fn rows(&self, geometry: &Geometry) -> Rows<'_, G> {
        let width = geometry.kernel[0] * geometry.kernel[1] * geometry.inputs;
        Rows::new(self.weight.view().from(self.first * width), width)
    }

    fn bias(&self, geometry: &Geometry) -> Option<View<'_, G>> {
        let bias = self.bias.as_ref()?.view().from(self.first);
        Some(View { len: geometry.outputs, ..bias })
    }
}

/// What is added to a product while it is in registers.
pub(crate) struct Added<'a, G: Gpu> {
    /// A row for each image, `[images, O]`, or one for all, `[O]`, beside the layer's bias.
    pub image_bias: Option<View<'a, G>>,
    /// As the result.
    pub residual: Option<View<'a, G>>,
}

impl<G: Gpu> Added<'_, G> {
    pub(crate) const NOTHING: Self = Self { image_bias: None, residual: None };
}

/// What becomes of a gradient while it is in registers.
pub(crate) enum Onward<'a, G: Gpu> {
    /// Nothing, or the sum with as many numbers.
    Plus(Option<View<'a, G>>),
    /// The gradient of these halves, side by side: the layer's input was the result of their GEGLU.
    ThroughGeglu(View<'a, G>),
}

/// Rows of channels, and the numbers from one to the next.
pub(crate) struct Rows<'a, G: Gpu> {
    pub view: View<'a, G>,
    pub stride: usize,
}

impl<'a, G: Gpu> Rows<'a, G> {
    pub(crate) fn new(view: View<'a, G>, stride: usize) -> Self {
        Self { view, stride }
    }

    /// Whether each row begins where eight numbers can be read at once.
    fn in_eights(&self) -> bool {
        self.view.first.is_multiple_of(8) && self.stride.is_multiple_of(8)
    }
}

impl<G: Gpu> Clone for Rows<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for Rows<'_, G> {}

/// `y = conv(x) + bias (+ image_bias) (+ residual)`.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    geometry: &Geometry,
    layer: &Layer<G>,
    x: View<'_, G>,
    added: &Added<'_, G>,
) -> Result<Array<G>> {
    let Geometry { images, output, inputs, outputs, .. } = *geometry;
    let y = gpu.alloc(x.dtype, images * output[0] * output[1] * outputs)?;
    let (to, from) = (Rows::new(y.view(), outputs), Rows::new(x, inputs));
    let call = Call { direction: Direction::Forward, geometry, dtype: x.dtype, scale: 1.0 };
    call.run(gpu, [to, from, layer.rows(geometry)], layer.bias(geometry), added, None)?;
    Ok(y)
}

/// `dx = convᵀ(dy)`, and what that becomes.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    geometry: &Geometry,
    layer: &Layer<G>,
    grad_output: Rows<'_, G>,
    onward: Onward<'_, G>,
) -> Result<Array<G>> {
    let Geometry { images, input, inputs, .. } = *geometry;
    let (residual, gates, width) = match onward {
        Onward::Plus(residual) => (residual, None, inputs),
        Onward::ThroughGeglu(gates) => (None, Some(gates), 2 * inputs),
    };
    let dtype = grad_output.view.dtype;
    let dx = gpu.alloc(dtype, images * input[0] * input[1] * width)?;
    let call = Call { direction: Direction::Gradient, geometry, dtype, scale: 1.0 };
    let rows = [Rows::new(dx.view(), width), grad_output, layer.rows(geometry)];
    call.run(gpu, rows, None, &Added { image_bias: None, residual }, gates)?;
    Ok(dx)
}

/// `to = scale · a bᵀ` of matrices `[m, depth]` and `[n, depth]`.
pub(crate) fn by_rows<G: Gpu>(
    gpu: &G,
    to: Rows<'_, G>,
    [a, b]: [Rows<'_, G>; 2],
    [m, n, depth]: [usize; 3],
    scale: f32,
) -> Result<()> {
    let geometry = &Geometry::linear(m, depth, n);
    let call = Call { direction: Direction::Forward, geometry, dtype: a.view.dtype, scale };
    call.run(gpu, [to, a, b], None, &Added::NOTHING, None)
}

/// `to = a b` of matrices `[m, depth]` and `[depth, n]`.
pub(crate) fn by_columns<G: Gpu>(
    gpu: &G,
    to: Rows<'_, G>,
    [a, b]: [Rows<'_, G>; 2],
    [m, n, depth]: [usize; 3],
) -> Result<()> {
    let geometry = &Geometry::linear(m, n, depth);
    let call = Call { direction: Direction::Gradient, geometry, dtype: a.view.dtype, scale: 1.0 };
    call.run(gpu, [to, a, b], None, &Added::NOTHING, None)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Direction {
    Forward,
    Gradient,
}

/// A kernel: what it is called before direction and type and behind them, the results of a block, its threads, its shared
/// memory in either direction.
#[derive(Debug, Clone, Copy)]
struct Tile {
    prefix: &'static str,
    suffix: &'static str,
    rows: usize,
    columns: usize,
    threads: usize,
    shared_bytes: [usize; 2],
    /// Clocks of a step.
    clocks: usize,
}

const SMALL: Tile = Tile {
    prefix: "product",
    suffix: "_64x64",
    rows: 64,
    columns: 64,
    threads: 128,
    shared_bytes: [50_688, 53_760],
    clocks: 400,
};

/// Those behind the first three are Hopper's.
const TILES: [Tile; 6] = [
    Tile {
        suffix: "_128x128",
        rows: 128,
        columns: 128,
        shared_bytes: [100_352, 103_424],
        clocks: 830,
        ..SMALL
    },
    Tile { suffix: "_64x160", columns: 160, shared_bytes: [87_552, 90_624], clocks: 670, ..SMALL },
    SMALL,
    Tile {
        prefix: "product_sm90a",
        suffix: "_128x160",
        rows: 128,
        columns: 160,
        threads: 256,
        shared_bytes: [186_368; 2],
        clocks: 770,
    },
    Tile { prefix: "product_sm90a", shared_bytes: [99_840; 2], clocks: 290, ..SMALL },
    Tile {
        prefix: "product_sm90a",
        suffix: "_64x160",
        columns: 160,
        shared_bytes: [173_568; 2],
        clocks: 480,
        ..SMALL
    },
];

/// For numbers of channels that are no eights, and for `f32`. Its own steps are 16 channels deep and take 800 clocks.
const PLAIN: Tile = Tile { suffix: "", shared_bytes: [10_240; 2], clocks: 4 * 800, ..SMALL };

/// Channels of a step.
const DEPTH: usize = 64;

/// Steps of a split at least: fewer would not hide the way from memory.
const MIN_STEPS: usize = 4;
const MAX_SPLITS: usize = 16;

struct Call<'a> {
    direction: Direction,
    geometry: &'a Geometry,
    dtype: DType,
    /// Of the product, before anything is added.
    scale: f32,
}

impl Call<'_> {
    fn run<G: Gpu>(
        &self,
        gpu: &G,
        [to, from, weight]: [Rows<'_, G>; 3],
        bias: Option<View<'_, G>>,
        added: &Added<'_, G>,
        gates: Option<View<'_, G>>,
    ) -> Result<()> {
        if weight.view.dtype != self.dtype {
            let (lhs, rhs) = (self.dtype, weight.view.dtype);
            return Err(candle_core::Error::DTypeMismatchBinaryOp { lhs, rhs, op: "a product" }.bt());
        }
        let Geometry { images, kernel, stride, padding, .. } = *self.geometry;
        let (result, source, n, channels) = self.sides();
        let pixels = images * result[0] * result[1];
        let in_eights = from.in_eights() && weight.in_eights();
        let (tile, splits) = self.plan(gpu.chip(), in_eights);

        let partial = (splits > 1).then(|| gpu.alloc(DType::F32, splits * pixels * n.next_multiple_of(8)));
        let partial = partial.transpose()?;
        let image_bias_stride = if added.image_bias.is_some_and(|rows| rows.len > n) { n } else { 0 };
        let pointers: [Argument<'_, G>; 8] = [
            to.view.into(),
            partial.as_ref().into(),
            from.view.into(),
            weight.view.into(),
            bias.into(),
            added.image_bias.into(),
            added.residual.into(),
            gates.into(),
        ];
        let sizes = [images, result[0], result[1], n, source[0], source[1], channels].map(Argument::from);
        let window = [kernel[0], kernel[1], stride, padding[0], padding[1]].map(Argument::from);
        let strides = [to.stride, from.stride, weight.stride, n, image_bias_stride].map(Argument::from);
        let counters = (splits > 1).then(|| gpu.counters()).transpose()?;
        let arrivals = counters.as_ref().map(Given::view);
        let rest = [self.scale.into(), splits.into(), arrivals.into()];
        let arguments = [pointers.as_slice(), &sizes, &window, &strides, &rest].concat();

        let verb = match self.direction {
            Direction::Forward => "forward",
            Direction::Gradient => "gradient",
        };
        let name = format!("{}_{verb}_{}{}", tile.prefix, type_name(self.dtype), tile.suffix);
        let grid = [self.blocks(tile), 1, self.phases() * splits];
        let shared_bytes = tile.shared_bytes[self.direction as usize];
        gpu.launch(&Launch { name, grid, threads: tile.threads, shared_bytes }, &arguments)
    }

    /// Sizes of the result and of what is gathered, and their channels.
    fn sides(&self) -> ([usize; 2], [usize; 2], usize, usize) {
        let Geometry { input, output, inputs, outputs, .. } = *self.geometry;
        match self.direction {
            Direction::Forward => (output, input, outputs, inputs),
            Direction::Gradient => (input, output, inputs, outputs),
        }
    }

    /// Blocks of a split.
    fn tiles(&self, tile: Tile) -> usize {
        self.blocks(tile) * self.phases()
    }

    /// Those of a phase: the gradient of a stride s has s² of them, each with the pixels that lie s apart.
    fn blocks(&self, tile: Tile) -> usize {
        let (result, _, n, _) = self.sides();
        let step = if self.direction == Direction::Gradient { self.geometry.stride } else { 1 };
        let rows = self.geometry.images * result[0].div_ceil(step) * result[1].div_ceil(step);
        rows.div_ceil(tile.rows) * n.div_ceil(tile.columns)
    }

    /// The kernel, and into how many parts it splits the depth: what takes the fewest [clocks](Self::clocks).
    fn plan(&self, chip: Chip, in_eights: bool) -> (Tile, usize) {
        let Geometry { inputs, .. } = *self.geometry;
        let (_, _, n, channels) = self.sides();
        let widths = [channels, inputs, if self.direction == Direction::Forward { 8 } else { n }];
        let in_eights = in_eights && widths.iter().all(|width| width.is_multiple_of(8));
        let tensor_cores = self.dtype != DType::F32 && in_eights;
        let tiles = match (tensor_cores, chip.sm90a) {
            (true, true) => TILES.as_slice(),
            (true, false) => &TILES[..3],
            (false, _) => &[PLAIN],
        };
        let steps = self.steps();
        let splits = (1..=MAX_SPLITS).filter(|&splits| splits == 1 || steps >= splits * MIN_STEPS);
        let choices = splits.flat_map(|splits| tiles.iter().map(move |&tile| (tile, splits)));
        let choices = choices.filter(|&(tile, splits)| splits == 1 || self.tiles(tile) <= COUNTERS);
        choices.min_by_key(|&choice| self.clocks(chip, choice)).unwrap_or((PLAIN, 1))
    }

    /// The estimate in the kernels' source: blocks go in waves over the multiprocessors; the last of a tile adds up its splits.
    fn clocks(&self, chip: Chip, (tile, splits): (Tile, usize)) -> usize {
        /// Of a block beside its steps; to find out which is the last; bytes of a clock that a block reads, of sums.
        const BLOCK: usize = 2000;
        const ARRIVAL: usize = 2000;
        const BYTES: usize = 48;
        let waves = (self.tiles(tile) * splits).div_ceil(chip.multiprocessors);
        let sum = if splits > 1 { ARRIVAL + (1 + splits) * tile.rows * tile.columns * 4 / BYTES } else { 0 };
        waves * (self.steps().div_ceil(splits) * tile.clocks + BLOCK) + sum
    }

    /// Of a phase.
    fn steps(&self) -> usize {
        let (Geometry { kernel, .. }, (_, _, _, channels)) = (*self.geometry, self.sides());
        (kernel[0] * kernel[1]).div_ceil(self.phases()) * channels.div_ceil(DEPTH)
    }

    fn phases(&self) -> usize {
        match self.direction {
            Direction::Forward => 1,
            Direction::Gradient => self.geometry.stride * self.geometry.stride,
        }
    }
}

#[cfg(test)]
#[path = "product_tests.rs"]
mod tests;
