//! Products with a frozen weight, `kernels/product.cu`: fully connected layers, convolutions, and the gradients to their inputs.

mod plan;

use std::sync::Arc;

use candle_core::{DType, Result};

use super::{Argument, Array, Given, Gpu, View};
use crate::Error;
use plan::{Direction, Plan, Work};

#[cfg(feature = "cuda")]
pub(crate) use plan::in_clusters;

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
    /// `[all O, KH, KW, I]`, packed or not.
    weight: Arc<Array<G>>,
    packed: bool,
    /// `[all O]`.
    bias: Option<Arc<Array<G>>>,
    /// Of the layer's outputs.
    first: usize,
}

impl<G: Gpu> Layer<G> {
    /// `packed`: in pieces of 8 outputs × 8 inputs, `[O / 8, KH, KW, I / 8, 8, 8]`, as Hopper's kernels want them.
    pub(crate) fn new(weight: Array<G>, packed: bool, bias: Option<Array<G>>) -> Self {
        Self { weight: Arc::new(weight), packed, bias: bias.map(Arc::new), first: 0 }
    }

    /// The layer of the same arrays whose outputs begin `outputs` later.
    pub(crate) fn later(&self, outputs: usize) -> Self {
        Self { first: self.first + outputs, ..self.clone() }
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

impl<G: Gpu> Clone for Layer<G> {
    fn clone(&self) -> Self {
        let Self { weight, packed, bias, first } = self;
        Self { weight: weight.clone(), packed: *packed, bias: bias.clone(), first: *first }
    }
}

/// What is added to a product while it is in registers.
pub(crate) struct Added<'a, G: Gpu> {
    /// A row for each image, `[images, O]`, or one for all, `[O]`, beside the layer's bias.
    pub image_bias: Option<View<'a, G>>,
    /// As the result.
    pub residual: Option<View<'a, G>>,
}

impl<G: Gpu> Clone for Added<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for Added<'_, G> {}

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
    let work = Work::new(Direction::Forward, geometry, x.dtype, layer.packed);
    let to = Some(Rows::new(y.view(), outputs));
    let operands = Operands::new(to, Rows::new(x, inputs), layer.rows(geometry));
    run(gpu, &work, &Operands { bias: layer.bias(geometry), added: *added, ..operands })?;
    Ok(y)
}

/// A layer's result and that of a GEGLU behind it.
pub(crate) struct Gated<G: Gpu> {
    /// `[.., 2C]`, if it was to be kept.
    pub halves: Option<Array<G>>,
    /// `[.., C]`.
    pub gated: Array<G>,
}

/// `y = x Wᵀ + bias` and its GEGLU, if there is a kernel that does both. `keep`: whether `y` is wanted too.
pub(crate) fn forward_through_geglu<G: Gpu>(
    gpu: &G,
    geometry: &Geometry,
    layer: &Layer<G>,
    x: View<'_, G>,
    keep: bool,
) -> Result<Option<Gated<G>>> {
    let Geometry { output, inputs, outputs, .. } = *geometry;
    if !layer.packed || !outputs.is_multiple_of(16) {
        return Ok(None);
    }
    let len = output[0] * output[1] * outputs;
    let halves = keep.then(|| gpu.alloc(x.dtype, len)).transpose()?;
    let gated = gpu.alloc(x.dtype, len / 2)?;
    let work = Work { splits: false, ..Work::new(Direction::Forward, geometry, x.dtype, layer.packed) };
    let to = halves.as_ref().map(|halves| Rows::new(halves.view(), outputs));
    let operands = Operands::new(to, Rows::new(x, inputs), layer.rows(geometry));
    run(gpu, &work, &Operands { bias: layer.bias(geometry), gated: Some(gated.view()), ..operands })?;
    Ok(Some(Gated { halves, gated }))
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
    let work = Work::new(Direction::Gradient, geometry, dtype, layer.packed);
    let operands = Operands::new(Some(Rows::new(dx.view(), width)), grad_output, layer.rows(geometry));
    run(gpu, &work, &Operands { added: Added { image_bias: None, residual }, gates, ..operands })?;
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
    let work = Work::new(Direction::Forward, geometry, a.view.dtype, false);
    run(gpu, &work, &Operands { scale, ..Operands::new(Some(to), a, b) })
}

/// `to = a b` of matrices `[m, depth]` and `[depth, n]`.
pub(crate) fn by_columns<G: Gpu>(
    gpu: &G,
    to: Rows<'_, G>,
    [a, b]: [Rows<'_, G>; 2],
    [m, n, depth]: [usize; 3],
) -> Result<()> {
    let geometry = &Geometry::linear(m, n, depth);
    let work = Work::new(Direction::Gradient, geometry, a.view.dtype, false);
    run(gpu, &work, &Operands::new(Some(to), a, b))
}

/// A kernel's arrays, and by what a product is multiplied before anything is added.
struct Operands<'a, G: Gpu> {
    to: Option<Rows<'a, G>>,
    from: Rows<'a, G>,
    weight: Rows<'a, G>,
    bias: Option<View<'a, G>>,
    added: Added<'a, G>,
    gates: Option<View<'a, G>>,
    gated: Option<View<'a, G>>,
    scale: f32,
}

impl<'a, G: Gpu> Operands<'a, G> {
    /// Nothing rides on the product.
    fn new(to: Option<Rows<'a, G>>, from: Rows<'a, G>, weight: Rows<'a, G>) -> Self {
        Self { to, from, weight, bias: None, added: Added::NOTHING, gates: None, gated: None, scale: 1.0 }
    }
}

/// By the plan that takes the fewest clocks.
fn run<G: Gpu>(gpu: &G, work: &Work<'_>, operands: &Operands<'_, G>) -> Result<()> {
    let Operands { from, weight, .. } = operands;
    if weight.view.dtype != work.dtype {
        let (lhs, rhs) = (work.dtype, weight.view.dtype);
        return Err(candle_core::Error::DTypeMismatchBinaryOp { lhs, rhs, op: "a product" }.bt());
    }
    let plan = work.plan(gpu.chip(), from.in_eights() && weight.in_eights());
    let what = || "rows that do not begin at eights, with packed weights".into();
    let plan = plan.ok_or_else(|| Error::Unsupported { op: "a product", what: what() })?;
    run_as(gpu, work, plan, operands)
}

fn run_as<G: Gpu>(gpu: &G, work: &Work<'_>, plan: Plan, operands: &Operands<'_, G>) -> Result<()> {
    let Operands { to, from, weight, bias, added, gates, gated, scale } = operands;
    let splits = plan.splits;
    let Geometry { images, kernel, stride, padding, .. } = *work.geometry;
    let (result, source, n, channels) = work.sides();
    let pixels = images * result[0] * result[1];
    let partial = (splits > 1).then(|| gpu.alloc(DType::F32, splits * pixels * n.next_multiple_of(8)));
    let partial = partial.transpose()?;
    let image_bias_stride = if added.image_bias.is_some_and(|rows| rows.len > n) { n } else { 0 };
    let pointers: [Argument<'_, G>; 9] = [
        to.map(|rows| rows.view).into(),
        partial.as_ref().into(),
        from.view.into(),
        weight.view.into(),
        (*bias).into(),
        added.image_bias.into(),
        added.residual.into(),
        (*gates).into(),
        (*gated).into(),
    ];
    let sizes = [images, result[0], result[1], n, source[0], source[1], channels].map(Argument::from);
    let window = [kernel[0], kernel[1], stride, padding[0], padding[1]].map(Argument::from);
    let strides = [to.map_or(n, |rows| rows.stride), from.stride, weight.stride, n, image_bias_stride]
        .map(Argument::from);
    let counters = (splits > 1).then(|| gpu.counters()).transpose()?;
    let arrivals = counters.as_ref().map(Given::view);
    let rest = [(*scale).into(), splits.into(), arrivals.into()];
    let arguments = [pointers.as_slice(), &sizes, &window, &strides, &rest].concat();
    gpu.launch(&work.launch(plan), &arguments)
}

#[cfg(test)]
mod tests;
