//! Which kernel computes a product, and on which grid: the estimate in `kernels/product.cu`.

use candle_core::DType;

use super::super::{COUNTERS, Chip, Launch, type_name};
use super::Geometry;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Direction {
    Forward,
    Gradient,
}

/// A kernel: what it is called before direction and type and behind them, the results of a block, its threads, its shared
/// memory in either direction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub prefix: &'static str,
    pub suffix: &'static str,
    pub rows: usize,
    pub columns: usize,
    threads: usize,
    shared_bytes: [usize; 2],
    /// Channels of a step, and its clocks.
    depth: usize,
    clocks: usize,
}

const SMALL: Tile = Tile {
    prefix: "product",
    suffix: "_64x64",
    rows: 64,
    columns: 64,
    threads: 128,
    shared_bytes: [50_688, 53_760],
    depth: 64,
    clocks: 400,
};

const TILES: [Tile; 3] = [
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
];

/// For packed weights, which blocks in clusters share.
const HOPPERS: [Tile; 4] = [
    Tile {
        prefix: "product_sm90a",
        suffix: "_128x320",
        rows: 128,
        columns: 320,
        threads: 256,
        shared_bytes: [231_488; 2],
        clocks: 1400,
        ..SMALL
    },
    Tile {
        prefix: "product_sm90a",
        suffix: "_128x160",
        rows: 128,
        columns: 160,
        threads: 256,
        shared_bytes: [186_448; 2],
        clocks: 770,
        ..SMALL
    },
    Tile {
        prefix: "product_sm90a",
        suffix: "_64x160",
        columns: 160,
        shared_bytes: [173_664; 2],
        clocks: 480,
        ..SMALL
    },
    Tile { prefix: "product_sm90a", shared_bytes: [99_936; 2], clocks: 290, ..SMALL },
];

/// Blocks of a cluster.
const TOGETHER: [usize; 3] = [1, 2, 4];

/// The launch by which a card is asked how many clusters of four run beside each other.
#[cfg(feature = "cuda")]
pub(crate) fn in_clusters() -> Launch {
    let Tile { prefix, suffix, threads, shared_bytes, .. } = HOPPERS[0];
    let launch = Launch::new(format!("{prefix}_forward_f16{suffix}"), [4, 1, 1]);
    Launch { threads, shared_bytes: shared_bytes[0], cluster: 4, ..launch }
}

/// For numbers of channels that are no eights, and for `f32`.
/// A step goes from one tap's channels to the next's.
const PLAIN: Tile = Tile { suffix: "", shared_bytes: [10_240; 2], depth: 16, clocks: 800, ..SMALL };

/// Steps of a split at least: fewer would not hide the way from memory.
const MIN_STEPS: usize = 4;
const MAX_SPLITS: usize = 16;

/// What is to be computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work<'a> {
    pub direction: Direction,
    pub geometry: &'a Geometry,
    pub dtype: DType,
    /// The weight.
    pub packed: bool,
    /// Whether the depth may be split.
    pub splits: bool,
}

/// A kernel, into how many parts it splits the depth, and of how many blocks each sends the others what they have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub tile: Tile,
    pub splits: usize,
    pub together: usize,
}

impl<'a> Work<'a> {
    pub(super) fn new(direction: Direction, geometry: &'a Geometry, dtype: DType, packed: bool) -> Self {
        Self { direction, geometry, dtype, packed, splits: true }
    }

    /// Sizes of the result and of what is gathered, and their channels.
    pub(super) fn sides(&self) -> ([usize; 2], [usize; 2], usize, usize) {
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
        let (_, _, n, _) = self.sides();
        self.blocks_down(tile) * n.div_ceil(tile.columns)
    }

    fn blocks_down(&self, tile: Tile) -> usize {
        let (result, ..) = self.sides();
        let step = if self.direction == Direction::Gradient { self.geometry.stride } else { 1 };
        let rows = self.geometry.images * result[0].div_ceil(step) * result[1].div_ceil(step);
        rows.div_ceil(tile.rows)
    }

    /// What takes the fewest [clocks](Self::clocks). `in_eights`: whether all rows begin where eight numbers can be read at once.
    pub(super) fn plan(&self, chip: Chip, in_eights: bool) -> Option<Plan> {
        self.plans(chip, in_eights).into_iter().min_by_key(|&plan| self.clocks(chip, plan))
    }

    /// All that compute it on blocks that the chip has.
    pub(super) fn plans(&self, chip: Chip, in_eights: bool) -> Vec<Plan> {
        let Geometry { inputs, .. } = *self.geometry;
        let (_, _, n, channels) = self.sides();
        let widths = [channels, inputs, if self.direction == Direction::Forward { 8 } else { n }];
        let in_eights = in_eights && widths.iter().all(|width| width.is_multiple_of(8));
        let tiles = match (self.packed, self.dtype != DType::F32 && in_eights) {
            (true, true) => HOPPERS.as_slice(),
            (true, false) => &[],
            (false, true) => &TILES,
            (false, false) => &[PLAIN],
        };
        let tiles = tiles.iter().filter(|tile| self.shared_bytes(tile) <= chip.shared_bytes);
        let choices = (1..=MAX_SPLITS).flat_map(|splits| tiles.clone().map(move |&tile| (tile, splits)));
        let choices = choices.filter(|&(tile, splits)| splits == 1 || self.can_be_split(tile, splits));
        let plans = choices.flat_map(|(tile, splits)| {
            let sizes = TOGETHER.iter().filter(move |&&together| self.can_be_together(chip, tile, together));
            sizes.map(move |&together| Plan { tile, splits, together })
        });
        plans.collect()
    }

    /// A plan's launch.
    pub(super) fn launch(&self, Plan { tile, splits, together }: Plan) -> Launch {
        let verb = match self.direction {
            Direction::Forward => "forward",
            Direction::Gradient => "gradient",
        };
        Launch {
            name: format!("{}_{verb}_{}{}", tile.prefix, type_name(self.dtype), tile.suffix),
            grid: [self.blocks(tile), 1, self.phases() * splits],
            threads: tile.threads,
            shared_bytes: self.shared_bytes(&tile),
            cluster: together,
        }
    }

    fn shared_bytes(&self, tile: &Tile) -> usize {
        tile.shared_bytes[self.direction as usize]
    }

    fn can_be_split(&self, tile: Tile, splits: usize) -> bool {
        self.splits && self.steps(tile) >= splits * MIN_STEPS && self.tiles(tile) <= COUNTERS
    }

    /// Whether blocks with the same weights are whole clusters of so many.
    fn can_be_together(&self, chip: Chip, tile: Tile, size: usize) -> bool {
        let down = self.blocks_down(tile);
        size == 1 || self.packed && down.is_multiple_of(size) && chip.at_once(size) > 0
    }

    /// The estimate in the kernels' source: blocks go in waves over the multiprocessors; the last of a tile adds up its splits.
    pub(super) fn clocks(&self, chip: Chip, Plan { tile, splits, together }: Plan) -> usize {
        /// Of a block beside its steps and results; to find out which is the last; bytes of a clock that a block reads, of sums.
        const BLOCK: usize = 1400;
        const ARRIVAL: usize = 2000;
        const BYTES: usize = 48;
        let blocks = self.tiles(tile) * splits;
        let waves = blocks.div_ceil(chip.at_once(together));
        // Bytes of a clock that the second-level cache has for a block.
        let share = (32 * chip.multiprocessors / blocks.min(chip.multiprocessors)).min(64);
        let copied = (tile.rows + tile.columns / together) * tile.depth * self.dtype.size_in_bytes();
        let step = tile.clocks.max(copied / share);
        let sum = if splits > 1 { ARRIVAL + (1 + splits) * tile.rows * tile.columns * 4 / BYTES } else { 0 };
        // They pass through shared memory as f32; are written, and as many perhaps added, in two bytes each.
        let results = tile.rows * tile.columns * 8 / 128 + tile.rows * tile.columns * 4 / share;
        waves * (self.steps(tile).div_ceil(splits) * step + BLOCK + results) + sum
    }

    /// Of a phase.
    fn steps(&self, tile: Tile) -> usize {
        let (Geometry { kernel, .. }, (_, _, _, channels)) = (*self.geometry, self.sides());
        let taps = (kernel[0] * kernel[1]).div_ceil(self.phases());
        let plain = tile.depth == PLAIN.depth;
        if plain { (taps * channels).div_ceil(tile.depth) } else { taps * channels.div_ceil(tile.depth) }
    }

    fn phases(&self) -> usize {
        match self.direction {
            Direction::Forward => 1,
            Direction::Gradient => self.geometry.stride * self.geometry.stride,
        }
    }
}
