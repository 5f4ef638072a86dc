//! Products with a frozen weight against their definition in f64: linear layers, convolutions, their gradients.

mod check;
#[path = "../common/mod.rs"]
mod common;

use check::Direction::{Forward, Gradient};
use check::{Problem, Tile, check};
use common::Storage;
use half::{bf16, f16};
use host_kernels::{LaunchError, shuffled};

const TILES: [Tile; 7] = [
    SMALL,
    Tile { suffix: "_128x128", rows: 128, columns: 128, shared_bytes: [100_352, 103_424], ..SMALL },
    Tile { suffix: "_64x160", columns: 160, shared_bytes: [87_552, 90_624], ..SMALL },
    Tile { shared_bytes: [99_936; 2], prefix: "product_sm90a", ..SMALL },
    Tile { suffix: "_64x160", columns: 160, shared_bytes: [173_664; 2], prefix: "product_sm90a", ..SMALL },
    Tile {
        suffix: "_128x160",
        rows: 128,
        columns: 160,
        threads: 256,
        shared_bytes: [186_448; 2],
        prefix: "product_sm90a",
    },
    Tile {
        suffix: "_128x320",
        rows: 128,
        columns: 320,
        threads: 256,
        shared_bytes: [231_488; 2],
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
fn results_that_go_on_through_a_geglu() -> Result<(), LaunchError> {
    for tile in TILES.into_iter().filter(Tile::is_hoppers) {
        for half in [8, tile.columns / 2, tile.columns / 2 + 24] {
            let problem = Problem { gates: true, bias: true, ..Problem::linear(67, 136, 2 * half) };
            check::<f16>(Forward, tile, problem)?;
            check::<bf16>(Forward, tile, Problem { bias: false, gap: 0, ..problem })?;
        }
    }
    Ok(())
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

/// More steps than have a place in shared memory, twice.
#[test]
fn blocks_that_share_weights() -> Result<(), LaunchError> {
    for seed in 0..3 {
        shuffled(seed, || {
            for tile in TILES.into_iter().filter(Tile::is_hoppers) {
                for together in [2, 4] {
                    let rows = together * tile.rows - 3;
                    check::<f16>(Forward, tile, Problem::linear(rows, 13 * 64 + 8, tile.columns - 8))?;
                    check::<bf16>(Gradient, tile, Problem::linear(rows, tile.columns - 8, 13 * 64 + 8))?;
                }
            }
            Ok::<(), LaunchError>(())
        })?;
    }
    Ok(())
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
