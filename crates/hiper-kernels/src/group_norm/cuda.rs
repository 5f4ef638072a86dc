//! Sums over shares of the pixels, then one pass that writes; both at once where a block takes a whole group: `kernels/group_norm.cu`.
//! On Hopper both at once, too, where the blocks that share a group are a cluster: `kernels/group_norm_sm90a.cu`.

use candle_core::{DType, Result};

use super::GroupNormFunction;
use crate::frozen::FrozenFunction;
use crate::gpu::{Affine, Argument, Array, Chip, Gpu, Launch, View, kept, type_name};
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

/// Blocks of a cluster: as many as every Hopper has beside each other.
const TOGETHER: usize = 8;
/// Channels of such a block at least: 64 bytes, two of the pieces that memory comes in.
const MIN_WIDTH: usize = 32;

/// Shared memory of the blocks that write, of those that have a whole group, and of those in clusters, beside a thread's sums.
const SHARED_BYTES: usize = 128;
const SHARED_BYTES_OF_WHOLE: usize = 192;
const SHARED_BYTES_OF_CLUSTER: usize = 1216;

/// What such a block may keep there of what it reads, at most, so that a multiprocessor has two of them. The others' sums come with a
/// barrier that leaves nothing in the first-level cache.
const MOST_KEPT: usize = 96 * 1024;
/// Bytes that a thread reads at once.
const PIECE: usize = 16;

/// How the work is shared out.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Plan {
    /// A block takes a group.
    Whole,
    /// The blocks of a cluster take so many groups, each a share of the pixels.
    Together { groups: usize },
    /// Blocks take eight groups, each a share of the pixels: in two launches.
    Shares { splits: usize },
}

impl Plan {
    fn new(chip: Chip, dtype: DType, pixels: usize, depth: usize, groups: usize) -> Self {
        if depth.is_multiple_of(EIGHT) && pixels * depth <= WHOLE {
            return Self::Whole;
        }
        let of_cluster = groups_of_cluster(depth);
        let blocks = TOGETHER * groups.div_ceil(of_cluster);
        if chip.sm90a && dtype != DType::F32 && is_faster_together(pixels * depth * groups, blocks) {
            return Self::Together { groups: of_cluster };
        }
        Self::Shares { splits: (pixels * depth / SHARE).clamp(1, MAX_SPLITS) }
    }
}

/// The fewest, for the most blocks, that have eights of channels.
fn groups_of_cluster(depth: usize) -> usize {
    let fits = |groups: &usize| (groups * depth).is_multiple_of(EIGHT) && groups * depth >= MIN_WIDTH;
    [1, 2, 4].into_iter().find(fits).unwrap_or(GROUPS)
}

/// Whether one launch takes no longer than two, of an image's gradient, which moves more than the way forward: an estimate in clocks of
/// an H100.
///
/// Either way 12 bytes a number are moved: x and the results' gradient, both again, a residual, and what is written. A
/// multiprocessor has 32 bytes a clock, the card 2300 (4 TB/s, of the second-level cache), if its blocks do not wait for each other;
/// those of clusters do, twice, so that no more than 64 of them count. A launch more costs 1.5 µs. So with 64 blocks one launch
/// is better up to 63 000 numbers for each, 4096 × 960, with 32 up to 12 500: large pictures of the autoencoder take two. (What a block
/// keeps is nearer the second time; blocks with so many numbers keep none.)
///
/// It depends on the card's kind and an image alone: the batch must not change a bit.
fn is_faster_together(numbers: usize, blocks: usize) -> bool {
    const BYTES: usize = 12;
    const OF_MULTIPROCESSOR: usize = 32;
    const OF_CARD: usize = 2300;
    const MOST_BLOCKS: usize = 64;
    const LAUNCH: usize = 2600;
    let together = BYTES * numbers / (OF_MULTIPROCESSOR * blocks.min(MOST_BLOCKS));
    together <= BYTES * numbers / OF_CARD + LAUNCH
}

/// The blocks of one launch, or of one after the other.
struct Blocks<'a, G: Gpu> {
    norm: &'a GroupNormFunction,
    affine: &'a Affine<G>,
    dtype: DType,
    batch: usize,
    pixels: usize,
    plan: Plan,
    silu: bool,
}

impl<'a, G: Gpu> Blocks<'a, G> {
    fn new(gpu: &G, norm: &'a GroupNormFunction, x: View<'_, G>, batch: usize) -> Result<Self> {
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
        let plan = Plan::new(gpu.chip(), x.dtype, pixels, depth, norm.num_groups);
        Ok(Self { norm, affine, dtype: x.dtype, batch, pixels, plan, silu })
    }

    /// The launch of a kernel that is called after the plan, and of the one before it, if there are two.
    fn launch(&self, kernel: &str) -> Launch {
        let groups = self.norm.num_groups;
        let depth = self.norm.weight.len() / groups;
        let (across, down, shared_bytes, cluster) = match self.plan {
            Plan::Whole => (1, groups, SHARED_BYTES_OF_WHOLE, 1),
            Plan::Together { groups: each } => {
                let sums = 8 * (each * depth).max(THREADS * EIGHT);
                let bytes = SHARED_BYTES_OF_CLUSTER + sums + self.kept_bytes(kernel);
                (TOGETHER, groups.div_ceil(each), bytes, TOGETHER)
            }
            Plan::Shares { splits } => {
                let partial = kernel.ends_with("partial");
                let bytes = if partial { 64 * depth.max(THREADS) } else { SHARED_BYTES };
                (splits, groups.div_ceil(GROUPS), bytes, 1)
            }
        };
        let prefix = match self.plan {
            Plan::Whole => "group_norm_whole",
            Plan::Together { .. } => "group_norm_sm90a",
            Plan::Shares { .. } => "group_norm",
        };
        let name = format!("{prefix}{kernel}_{}", type_name(self.dtype));
        Launch { shared_bytes, cluster, ..Launch::new(name, [across, down, self.batch]) }
    }

    /// `[B, groups, splits, 2]`, between two launches.
    fn partial(&self, gpu: &G) -> Result<Option<Array<G>>> {
        let Plan::Shares { splits } = self.plan else { return Ok(None) };
        gpu.alloc(DType::F32, self.batch * self.norm.num_groups * splits * 2).map(Some)
    }

    fn affine(&self) -> [Argument<'a, G>; 2] {
        [&self.affine.weight, &self.affine.bias].map(Argument::from)
    }

    /// And how many groups a cluster takes, and whether its blocks keep what they read.
    fn sizes(&self, kernel: &str) -> Vec<Argument<'a, G>> {
        let mut sizes = vec![self.pixels, self.norm.weight.len(), self.norm.num_groups];
        if let Plan::Together { groups } = self.plan {
            sizes.extend([groups, usize::from(self.kept_bytes(kernel) > 0)]);
        }
        sizes.into_iter().map(Argument::from).collect()
    }

    /// Shared memory for what a block of a cluster reads, x, and of the gradient d_y too, in the order of its threads' pieces; 0 if that
    /// is too much.
    fn kept_bytes(&self, kernel: &str) -> usize {
        let Plan::Together { groups } = self.plan else { return 0 };
        let columns = (groups * self.norm.weight.len() / self.norm.num_groups).div_ceil(EIGHT);
        let rows = THREADS / columns.min(THREADS);
        let places = columns.div_ceil(THREADS) * self.pixels.div_ceil(TOGETHER).div_ceil(rows);
        let read = if kernel == "_gradient" { 2 } else { 1 };
        let bytes = places * THREADS * PIECE * read;
        if bytes <= MOST_KEPT { bytes } else { 0 }
    }
}

/// `y`, and mean and 1/σ of each group, `[B, groups, 2]`, which the gradient needs.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    norm: &GroupNormFunction,
    x: View<'_, G>,
    batch: usize,
) -> Result<(Array<G>, Array<G>)> {
    let blocks = Blocks::new(gpu, norm, x, batch)?;
    let y = gpu.alloc(x.dtype, x.len)?;
    let statistics = gpu.alloc(DType::F32, batch * norm.num_groups * 2)?;
    let mut pointers: Vec<Argument<'_, G>> = vec![(&y).into(), (&statistics).into(), x.into()];
    let (affine, sizes) = (blocks.affine(), blocks.sizes(""));
    let partial = blocks.partial(gpu)?;
    if let Some(partial) = &partial {
        let arguments: [Argument<'_, G>; 2] = [partial.into(), x.into()];
        gpu.launch(&blocks.launch("_partial"), &[arguments.as_slice(), &sizes].concat())?;
        pointers.push(partial.into());
    }
    let settings = [norm.eps.into(), blocks.silu.into()];
    gpu.launch(&blocks.launch(""), &[pointers.as_slice(), &affine, &sizes, &settings].concat())?;
    Ok((y, statistics))
}

/// What becomes of a gradient while it is in registers.
pub(crate) struct Onward<'a, G: Gpu> {
    /// What is added: gradients that reach the input around the normalisation.
    pub residuals: [Option<View<'a, G>>; 2],
    /// Whether its first channels, so many, are to lie apart from the others.
    pub own: Option<usize>,
}

/// The gradient to the input, and what is added to it.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    norm: &GroupNormFunction,
    inputs: [View<'_, G>; 2],
    batch: usize,
    grad_output: View<'_, G>,
    residuals: [Option<View<'_, G>>; 2],
) -> Result<Array<G>> {
    let onward = Onward { residuals, own: None };
    Ok(input_gradients(gpu, norm, inputs, batch, grad_output, onward)?.0)
}

/// The same, perhaps in two parts.
pub(crate) fn input_gradients<G: Gpu>(
    gpu: &G,
    norm: &GroupNormFunction,
    [x, statistics]: [View<'_, G>; 2],
    batch: usize,
    grad_output: View<'_, G>,
    Onward { residuals: [residual, known], own }: Onward<'_, G>,
) -> Result<(Array<G>, Option<Array<G>>)> {
    let blocks = Blocks::new(gpu, norm, x, batch)?;
    let (pixels, channels) = (batch * blocks.pixels, norm.weight.len());
    let first = own.unwrap_or(channels);
    let dx = gpu.alloc(x.dtype, pixels * first)?;
    let rest = own.map(|own| gpu.alloc(x.dtype, pixels * (channels - own))).transpose()?;
    let given = [grad_output.into(), x.into()];
    let added = [residual.into(), known.into(), statistics.into()];
    let to = [(&dx).into(), rest.as_ref().into(), first.into()];
    let mut pointers: Vec<Argument<'_, G>> = [&to[..], &given, &added].concat();
    let (affine, sizes, silu) = (blocks.affine(), blocks.sizes("_gradient"), [blocks.silu.into()]);
    let partial = blocks.partial(gpu)?;
    if let Some(partial) = &partial {
        let inputs = [partial.into(), grad_output.into(), x.into(), statistics.into()];
        let arguments = [inputs.as_slice(), &affine, &sizes, &silu].concat();
        gpu.launch(&blocks.launch("_gradient_partial"), &arguments)?;
        pointers.push(partial.into());
    }
    gpu.launch(&blocks.launch("_gradient"), &[pointers.as_slice(), &affine, &sizes, &silu].concat())?;
    Ok((dx, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_takes_one_launch_where_that_is_faster() {
        let plan = |chip, dtype, pixels, channels| Plan::new(chip, dtype, pixels, channels / 32, 32);
        for (pixels, channels, groups) in [
            (4096, 320, 4),
            (4096, 640, 2),
            (4096, 960, 4),
            (1024, 320, 4),
            (1024, 640, 2),
            (1024, 960, 4),
            (1024, 1280, 1),
            (1024, 1920, 2),
            (256, 1920, 2),
        ] {
            for dtype in [DType::F16, DType::BF16] {
                let hoppers = plan(Chip::H100, dtype, pixels, channels);
                assert_eq!(hoppers, Plan::Together { groups }, "{pixels} × {channels}");
            }
            for (chip, dtype) in [(Chip::H100, DType::F32), (Chip::RTX4090, DType::F16)] {
                let plan = plan(chip, dtype, pixels, channels);
                assert!(matches!(plan, Plan::Shares { .. }), "{pixels} × {channels}: {plan:?}");
            }
        }
        // Of the autoencoder.
        for (pixels, channels) in [(16384, 512), (65536, 256), (262_144, 128), (16384, 128)] {
            let plan = plan(Chip::H100, DType::F16, pixels, channels);
            assert_eq!(plan, Plan::Shares { splits: MAX_SPLITS.min(pixels * channels / 32 / SHARE) });
        }
        assert_eq!(plan(Chip::H100, DType::F16, 256, 1280), Plan::Whole);
    }
}
