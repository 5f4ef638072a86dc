//! Which kernels products choose, and what the estimate adds up to.

use candle_core::{Device, Tensor};

use super::super::bridge::keep;
use super::super::host::{Host, on_chip};
use super::super::test_card::at_sizes_of_a_unet;
use super::super::{Chip, Launch};
use super::*;
use crate::testing::{relative_l2, widened};

#[test]
fn the_choice_is_that_of_the_kernels_table() {
    let plan = |packed: bool, geometry: &Geometry| {
        let work = Work::new(Direction::Forward, geometry, DType::F16, packed);
        let Plan { tile, splits, together } = work.plan(Chip::H100, true).expect("a plan");
        (tile.prefix, tile.suffix, splits, together)
    };
    let conv = |geometry: Geometry| Geometry { kernel: [3, 3], padding: [1, 1], ..geometry };
    for (geometry, ampere, hopper) in [
        (Geometry::linear(4096, 320, 2560), ("_128x128", 1), ("_128x320", 1, 2)),
        (Geometry::linear(4096, 320, 320), ("_64x160", 1), ("_64x160", 1, 4)),
        (Geometry::linear(256, 5120, 1280), ("_64x160", 3), ("_64x160", 4, 4)),
        (conv(Geometry::linear(256, 1280, 1280)), ("_128x128", 6), ("_64x160", 4, 4)),
        (conv(Geometry::linear(1024, 640, 640)), ("_128x128", 3), ("_64x160", 2, 4)),
        (conv(Geometry::linear(64, 1280, 1280)), ("_64x64", 5), ("_64x64", 4, 1)),
    ] {
        assert_eq!(plan(false, &geometry), ("product", ampere.0, ampere.1, 1));
        assert_eq!(plan(true, &geometry), ("product_sm90a", hopper.0, hopper.1, hopper.2));
    }
    assert_eq!(plan(false, &Geometry::linear(4096, 4, 320)), ("product", "", 1, 1));
}

/// Products of Stable Diffusion 1.5's UNet for a picture of 512², each as often as it is there.
fn layers_of_sd15(direction: Direction) -> Vec<Geometry> {
    // Keys and values for five, five and six cross-attentions: of the text, and the gradients of its tail's.
    let tokens = if direction == Direction::Forward { 77 } else { 5 };
    let mut layers = vec![Geometry::linear(tokens, 768, 2 * (5 * 320 + 5 * 640 + 6 * 1280))];
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
    // The last, and the first, to whose input nothing has to come back.
    layers.push(conv(64, 320, 4, 3));
    layers.extend((direction == Direction::Forward).then(|| conv(64, 4, 320, 3)));
    // Between the sizes.
    for (size, width) in [(32, 320), (16, 640), (8, 1280)] {
        layers.push(Geometry { input: [2 * size; 2], stride: 2, ..conv(size, width, width, 3) });
    }
    layers.extend([(16, 1280), (32, 1280), (64, 640)].map(|(size, width)| conv(size, width, width, 3)));
    layers
}

/// Of a microsecond on an H100.
const CLOCKS: f64 = 1755.0;

/// Milliseconds of an H100, forward and back, as docs/cuda.md has them.
#[test]
fn products_of_a_step_are_predicted() {
    let predicted = |batch: usize, packed| {
        [Direction::Forward, Direction::Gradient].map(|direction| {
            let layers = layers_of_sd15(direction).into_iter().map(|layer| match layer {
                Geometry { input: [1, rows], inputs, outputs, .. } => {
                    Geometry::linear(batch * rows, inputs, outputs)
                }
                convolution => Geometry { images: batch, ..convolution },
            });
            let clocks = layers.map(|geometry| {
                let in_eights = [geometry.inputs, geometry.outputs].iter().all(|n| n.is_multiple_of(8));
                let work = Work::new(direction, &geometry, DType::F16, packed && in_eights);
                work.clocks(Chip::H100, work.plan(Chip::H100, true).expect("a plan"))
            });
            format!("{:.1}", clocks.sum::<usize>() as f64 / CLOCKS / 1e3)
        })
    };
    assert_eq!(predicted(1, true), ["1.8", "1.8"]);
    assert_eq!(predicted(1, false), ["2.6", "2.5"]);
    assert_eq!(predicted(2, true)[0], "2.8");
    assert_eq!(predicted(8, true), ["8.8", "8.3"]);
}

/// Not all cards have the shared memory that the largest tiles ask for.
#[test]
fn a_card_plans_what_fits_into_its_shared_memory() {
    let sizes = |chip: Chip| {
        let mut sizes = Vec::new();
        for (geometry, direction) in [Direction::Forward, Direction::Gradient]
            .into_iter()
            .flat_map(|direction| layers_of_sd15(direction).into_iter().map(move |layer| (layer, direction)))
        {
            for dtype in [DType::F16, DType::BF16, DType::F32] {
                let work = Work::new(direction, &geometry, dtype, false);
                let plans = work.plans(chip, true);
                assert!(!plans.is_empty(), "{work:?}");
                sizes.extend(plans.into_iter().map(|plan| work.launch(plan).shared_bytes));
            }
        }
        sizes
    };
    assert!(sizes(Chip::H100).into_iter().any(|bytes| bytes > Chip::RTX4090.shared_bytes));
    assert!(sizes(Chip::RTX4090).into_iter().all(|bytes| bytes <= Chip::RTX4090.shared_bytes));
}

/// The kernels that nobody chose, too: of small layers, or of a UNet's with a line for each, how long it took and how long was
/// predicted.
#[test]
fn a_card_has_the_same_results_by_all_plans() -> Result<()> {
    let Some(card) = crate::testing::card().filter(|_| at_sizes_of_a_unet()) else {
        return all_plans_agree(|_| small_layers().into(), |_, _, _| Ok(()));
    };
    let layers = |direction| {
        let mut layers = layers_of_sd15(direction);
        layers.sort_by_key(|layer| format!("{layer:?}"));
        layers.dedup_by_key(|layer| format!("{layer:?}"));
        layers
    };
    println!(
        "direction\timages\theight\twidth\tdepth\tcolumns\tkernel\tsplits\tcluster\tmicroseconds\tpredicted"
    );
    all_plans_agree(layers, |work, plan, launch| {
        let Geometry { images, kernel, .. } = work.geometry;
        let ([height, width], _, columns, channels) = work.sides();
        let (depth, direction) = (channels * kernel[0] * kernel[1], work.direction);
        let Launch { name, cluster, .. } = work.launch(plan);
        let (time, predicted) = (card.time(launch)?, work.clocks(card.chip(), plan) as f64 / CLOCKS);
        println!(
            "{direction:?}\t{images}\t{height}\t{width}\t{depth}\t{columns}\t{name}\t{}\t{cluster}\t{time:.2}\t{predicted:.2}",
            plan.splits
        );
        Ok(())
    })
}

/// A convolution with steps enough to be split, over several images; a linear layer of blocks enough for clusters.
fn small_layers() -> [Geometry; 2] {
    let convolution = Geometry {
        images: 2,
        input: [9, 8],
        output: [9, 8],
        kernel: [3, 3],
        padding: [1, 1],
        ..Geometry::linear(1, 72, 40)
    };
    [convolution, Geometry::linear(509, 136, 24)]
}

/// Calls `with` what was computed, by which plan, and the launch.
fn all_plans_agree(
    layers: impl Fn(Direction) -> Vec<Geometry>,
    with: impl Fn(&Work<'_>, Plan, &dyn Fn() -> Result<()>) -> Result<()>,
) -> Result<()> {
    for direction in [Direction::Forward, Direction::Gradient] {
        for (geometry, packed) in layers(direction).iter().flat_map(|layer| [(layer, false), (layer, true)]) {
            let work = Work::new(direction, geometry, DType::F16, packed);
            on_chip(Chip::H100, || plans_agree(&work, &with))?;
        }
    }
    Ok(())
}

fn plans_agree(
    work: &Work<'_>,
    with: impl Fn(&Work<'_>, Plan, &dyn Fn() -> Result<()>) -> Result<()>,
) -> Result<()> {
    let gpu = Host::current().ok_or(Error::Device)?;
    if work.packed && !gpu.chip().sm90a {
        return Ok(());
    }
    let Geometry { images, kernel, inputs, outputs, .. } = *work.geometry;
    let (result, source, n, channels) = work.sides();
    // What packed weights mean is another test's matter.
    let from = random(&gpu, images * source[0] * source[1] * channels, 1)?;
    let width = kernel[0] * kernel[1] * inputs;
    let weight = random(&gpu, outputs * width, 2)?;
    let mut first: Option<Vec<f32>> = None;
    for plan in work.plans(gpu.chip(), true).into_iter().filter(|plan| plan.splits.is_power_of_two()) {
        let to = gpu.alloc(work.dtype, images * result[0] * result[1] * n)?;
        let [rows, gathered] = [Rows::new(to.view(), n), Rows::new(from.view(), channels)];
        let operands = Operands::new(Some(rows), gathered, Rows::new(weight.view(), width));
        run_as(&gpu, work, plan, &operands)?;
        with(work, plan, &|| run_as(&gpu, work, plan, &operands))?;
        let len = to.len;
        // Of many, some.
        let some = if len > 1 << 16 { 61 } else { 1 };
        let values = widened(&to.into_tensor(&gpu, &[len])?).into_iter().step_by(some).collect::<Vec<_>>();
        let first = first.get_or_insert_with(|| values.clone());
        let expected: Vec<f64> = first.iter().map(|&x| x.into()).collect();
        let error = relative_l2(&values, &expected);
        assert!(error < 1e-3, "{work:?} by {plan:?}: {error:e}");
    }
    Ok(())
}

fn random(gpu: &Host, len: usize, seed: u64) -> Result<Array<Host>> {
    let some = crate::testing::normals(len.min(1 << 16), seed);
    let numbers: Vec<f32> = some.iter().copied().cycle().take(len).collect();
    keep(gpu, &Tensor::from_vec(numbers, len, &Device::Cpu)?.to_dtype(DType::F16)?)
}

#[test]
fn a_geglu_behind_a_layer_on_a_card_has_the_bits_that_two_kernels_give() -> Result<()> {
    on_chip(Chip::H100, || {
        let gpu = Host::current().ok_or(Error::Device)?;
        let (rows, inputs, half) = (67, 72, 168);
        let geometry = Geometry::linear(rows, inputs, 2 * half);
        let packed = gpu.chip().sm90a;
        let [weight, bias] = [random(&gpu, 2 * half * inputs, 1)?, random(&gpu, 2 * half, 2)?];
        let (layer, x) = (Layer::new(weight, packed, Some(bias)), random(&gpu, rows * inputs, 3)?);
        let values = |array: Array<Host>| -> Result<Vec<f32>> {
            let len = array.len;
            Ok(widened(&array.into_tensor(&gpu, &[len])?))
        };
        let by_one = |keep| forward_through_geglu(&gpu, &geometry, &layer, x.view(), keep);
        let (Some(kept), Some(alone)) = (by_one(true)?, by_one(false)?) else {
            assert!(!packed, "a card that packs weights has the kernel");
            return Ok(());
        };
        let halves = forward(&gpu, &geometry, &layer, x.view(), &Added::NOTHING)?;
        let gated = values(crate::geglu::cuda::forward(&gpu, halves.view(), half)?)?;
        assert_eq!(kept.halves.map(values).transpose()?, Some(values(halves)?));
        assert_eq!(values(kept.gated)?, gated);
        assert_eq!((alone.halves.is_none(), values(alone.gated)?), (true, gated));
        Ok(())
    })
}
