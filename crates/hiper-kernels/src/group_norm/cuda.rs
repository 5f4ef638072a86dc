//! Sums over shares of the pixels, then one pass that writes; both at once where a block takes a whole group:
//! `kernels/group_norm.cu`.

use candle_core::{DType, Result};

use super::GroupNormFunction;
use crate::frozen::FrozenFunction;
use crate::gpu::{Affine, Argument, Array, Gpu, Launch, View, kept, type_name};
use crate::{Activation, Error};

/// Groups of a block, and its threads.
const GROUPS: usize = 8;
const THREADS: usize = 256;

/// Values of a group for each block, and blocks at most: a thread then has some pixels, and a card its fill.
const SHARE: usize = 1024;
const MAX_SPLITS: usize = 128;

/// Numbers of a group that a block takes whole, at most: what it reads again is near then, and one launch is less than two.
const WHOLE: usize = 20 * 1024;
/// Channels that a thread reads at once.
const EIGHT: usize = 8;

/// Shared memory of the blocks that write, and of those that have a whole group.
const SHARED_BYTES: usize = 128;
const SHARED_BYTES_OF_WHOLE: usize = 192;

/// The blocks of one launch, or of one after the other.
struct Blocks<'a, G: Gpu> {
    norm: &'a GroupNormFunction,
    affine: &'a Affine<G>,
    dtype: DType,
    batch: usize,
    pixels: usize,
    splits: usize,
    silu: bool,
}

impl<'a, G: Gpu> Blocks<'a, G> {
    fn new(norm: &'a GroupNormFunction, x: View<'_, G>, batch: usize) -> Result<Self> {
        let silu = match norm.activation {
            None => false,
            Some(Activation::Silu) => true,
            Some(other) => {
                let what = format!("{other:?} after it");
                return Err(Error::Unsupported { op: GroupNormFunction::NAME, what }.into());
            }
        };
        let affine = kept::<Affine<G>>(&norm.card)?;
        let pixels = x.len / (batch * norm.weight.len());
        let depth = norm.weight.len() / norm.num_groups;
        let splits = (pixels * depth / SHARE).clamp(1, MAX_SPLITS);
        Ok(Self { norm, affine, dtype: x.dtype, batch, pixels, splits, silu })
    }

    fn depth(&self) -> usize {
        self.norm.weight.len() / self.norm.num_groups
    }

    /// Whether a block takes a whole group.
    fn whole(&self) -> bool {
        self.depth().is_multiple_of(EIGHT) && self.pixels * self.depth() <= WHOLE
    }

    /// `[B, groups, splits, 2]`.
    fn partial(&self, gpu: &G) -> Result<Array<G>> {
        gpu.alloc(DType::F32, self.batch * self.norm.num_groups * self.splits * 2)
    }

    fn launch(&self, kernel: &str) -> Launch {
        let shared_bytes =
            if kernel.ends_with("partial") { 64 * self.depth().max(THREADS) } else { SHARED_BYTES };
        let grid = [self.splits, self.norm.num_groups.div_ceil(GROUPS), self.batch];
        Launch { shared_bytes, ..Launch::new(format!("{kernel}_{}", type_name(self.dtype)), grid) }
    }

    fn launch_whole(&self, kernel: &str) -> Launch {
        let grid = [1, self.norm.num_groups, self.batch];
        let name = format!("{kernel}_{}", type_name(self.dtype));
        Launch { shared_bytes: SHARED_BYTES_OF_WHOLE, ..Launch::new(name, grid) }
    }

    fn sizes(&self) -> [Argument<'a, G>; 3] {
        [self.pixels, self.norm.weight.len(), self.norm.num_groups].map(Argument::from)
    }
}

/// `y`, and mean and 1/σ of each group, `[B, groups, 2]`, which the gradient needs.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    norm: &GroupNormFunction,
    x: View<'_, G>,
    batch: usize,
) -> Result<(Array<G>, Array<G>)> {
    let blocks = Blocks::new(norm, x, batch)?;
    let y = gpu.alloc(x.dtype, x.len)?;
    let statistics = gpu.alloc(DType::F32, batch * norm.num_groups * 2)?;
    let pointers: [Argument<'_, G>; 3] = [(&y).into(), (&statistics).into(), x.into()];
    let affine = [&blocks.affine.weight, &blocks.affine.bias].map(Argument::from);
    let settings = [norm.eps.into(), blocks.silu.into()];
    if blocks.whole() {
        let arguments = [pointers.as_slice(), &affine, &blocks.sizes(), &settings].concat();
        gpu.launch(&blocks.launch_whole("group_norm_whole"), &arguments)?;
        return Ok((y, statistics));
    }
    let partial = blocks.partial(gpu)?;
    let arguments: [Argument<'_, G>; 2] = [(&partial).into(), x.into()];
    gpu.launch(&blocks.launch("group_norm_partial"), &[arguments.as_slice(), &blocks.sizes()].concat())?;
    let arguments = [pointers.as_slice(), &[(&partial).into()], &affine, &blocks.sizes(), &settings].concat();
    gpu.launch(&blocks.launch("group_norm"), &arguments)?;
    Ok((y, statistics))
}

/// `residual` is added: the gradient that reaches the input around the normalisation.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    norm: &GroupNormFunction,
    [x, statistics]: [View<'_, G>; 2],
    batch: usize,
    grad_output: View<'_, G>,
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    let blocks = Blocks::new(norm, x, batch)?;
    let affine = [&blocks.affine.weight, &blocks.affine.bias].map(Argument::from);
    let silu = [blocks.silu.into()];
    let dx = gpu.alloc(x.dtype, x.len)?;
    let pointers = [(&dx).into(), grad_output.into(), x.into(), residual.into(), statistics.into()];
    if blocks.whole() {
        let arguments = [pointers.as_slice(), &affine, &blocks.sizes(), &silu].concat();
        gpu.launch(&blocks.launch_whole("group_norm_whole_gradient"), &arguments)?;
        return Ok(dx);
    }
    let partial = blocks.partial(gpu)?;
    let inputs = [(&partial).into(), grad_output.into(), x.into(), statistics.into()];
    let arguments = [inputs.as_slice(), &affine, &blocks.sizes(), &silu].concat();
    gpu.launch(&blocks.launch("group_norm_gradient_partial"), &arguments)?;
    let arguments = [pointers.as_slice(), &[(&partial).into()], &affine, &blocks.sizes(), &silu].concat();
    gpu.launch(&blocks.launch("group_norm_gradient"), &arguments)?;
    Ok(dx)
}
