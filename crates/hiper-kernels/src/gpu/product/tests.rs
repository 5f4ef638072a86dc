//! Which kernels products choose, and what the estimate adds up to.

use super::super::Chip;
use super::*;

#[test]
fn the_choice_is_that_of_the_kernels_table() {
    let plan = |packed: bool, geometry: &Geometry| {
        let work = Work { direction: Direction::Forward, geometry, dtype: DType::F16, packed };
        let Plan { tile, splits, together } = work.plan(Chip::H100, true).expect("a plan");
        (tile.prefix, tile.suffix, splits, together)
    };
    let conv = |geometry: Geometry| Geometry { kernel: [3, 3], padding: [1, 1], ..geometry };
    for (geometry, ampere, hopper) in [
        (Geometry::linear(4096, 320, 2560), ("_128x128", 1), ("_128x160", 1, 4)),
        (Geometry::linear(4096, 320, 320), ("_128x128", 1), ("_64x160", 1, 4)),
        (Geometry::linear(256, 5120, 1280), ("_128x128", 5), ("_64x160", 4, 4)),
        (conv(Geometry::linear(256, 1280, 1280)), ("_128x128", 6), ("_64x160", 4, 4)),
        (conv(Geometry::linear(1024, 640, 640)), ("_128x128", 3), ("_64x160", 2, 4)),
        (conv(Geometry::linear(64, 1280, 1280)), ("_64x64", 6), ("_64x64", 4, 1)),
    ] {
        assert_eq!(plan(false, &geometry), ("product", ampere.0, ampere.1, 1));
        assert_eq!(plan(true, &geometry), ("product_sm90a", hopper.0, hopper.1, hopper.2));
    }
    assert_eq!(plan(false, &Geometry::linear(4096, 4, 320)), ("product", "", 1, 1));
}

/// Products of Stable Diffusion 1.5's UNet for a picture of 512², each as often as it is there.
fn layers_of_sd15() -> Vec<Geometry> {
    let mut layers = Vec::new();
    let conv = |size: usize, inputs, outputs, kernel: usize| {
        let sides = [size, size];
        let (kernel, padding) = ([kernel; 2], [kernel / 2; 2]);
        Geometry { images: 1, input: sides, output: sides, inputs, outputs, kernel, stride: 1, padding }
    };
    let mut block = |size: usize, inputs: usize, width: usize, attends: bool| {
        layers.extend([conv(size, inputs, width, 3), conv(size, width, width, 3)]);
        layers.extend((inputs != width).then(|| conv(size, inputs, width, 1)));
        if attends {
            let linear = |inputs, outputs| Geometry::linear(size * size, inputs, outputs);
            layers.extend([linear(width, width); 5]);
            layers.extend([linear(width, 3 * width), linear(width, 8 * width), linear(4 * width, width)]);
            layers.push(Geometry::linear(77, 768, 2 * width));
        }
    };
    for (size, inputs, width) in [(64, 320, 320), (32, 320, 640), (16, 640, 1280), (8, 1280, 1280)] {
        block(size, inputs, width, size > 8);
        block(size, width, width, size > 8);
    }
    block(8, 1280, 1280, true);
    block(8, 1280, 1280, false);
    for (size, width, inputs) in [
        (8, 1280, [2560, 2560, 2560]),
        (16, 1280, [2560, 2560, 1920]),
        (32, 640, [1920, 1280, 960]),
        (64, 320, [960, 640, 640]),
    ] {
        for inputs in inputs {
            block(size, inputs, width, size > 8);
        }
    }
    // Between the sizes.
    for (size, width) in [(32, 320), (16, 640), (8, 1280)] {
        layers.push(Geometry { input: [2 * size; 2], stride: 2, ..conv(size, width, width, 3) });
    }
    layers.extend([(16, 1280), (32, 1280), (64, 640)].map(|(size, width)| conv(size, width, width, 3)));
    layers
}

/// Milliseconds of an H100, forward and back, as docs/cuda.md has them.
#[test]
fn products_of_a_step_are_predicted() {
    let predicted = |batch: usize, packed| {
        let layers = layers_of_sd15().into_iter().map(|layer| match layer {
            Geometry { input: [1, rows], inputs, outputs, .. } => {
                Geometry::linear(batch * rows, inputs, outputs)
            }
            convolution => Geometry { images: batch, ..convolution },
        });
        let layers: Vec<Geometry> = layers.collect();
        [Direction::Forward, Direction::Gradient].map(|direction| {
            let clocks = layers.iter().map(|geometry| {
                let work = Work { direction, geometry, dtype: DType::F16, packed };
                work.plan(Chip::H100, true).map_or(0, |plan| work.clocks(Chip::H100, plan))
            });
            format!("{:.1}", clocks.sum::<usize>() as f64 / 1.755e6)
        })
    };
    assert_eq!(predicted(1, true), ["1.7", "1.7"]);
    assert_eq!(predicted(1, false), ["2.4", "2.4"]);
    assert_eq!(predicted(2, true)[0], "2.6");
    assert_eq!(predicted(8, true), ["8.1", "7.9"]);
}
