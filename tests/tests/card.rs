//! The demo model on a card's kernels against the same model computed by a CPU in `f32`. The CPU runs the kernels, or, with the
//! feature `cuda` and `HIPER_TEST_DEVICE=cuda:0`, that card.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_core::{LossAndGradient, NoisePredictor, TailLoss, TorchGenerator};
use hiper_kernels::{cuda_device, on_host};
use hiper_tests::{Network, relative_l2};
use sd_models::{Memory, ModelFiles, RecordedLoss, StableDiffusion};

/// What a hundred layers make of roundings to `f16`: 11 bits, of which the errors of a pass leave 8 or so.
const F16_TOLERANCE: f64 = 1e-2;
/// Of a loss, which is a mean: errors cancel.
const F16_LOSS_TOLERANCE: f64 = 2e-3;
/// `bf16` has three bits less.
const BF16: f64 = 8.0;

/// The card, if there is one.
fn card() -> Option<Device> {
    let name = std::env::var("HIPER_TEST_DEVICE").ok()?;
    let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
    Some(cuda_device(ordinal.expect("HIPER_TEST_DEVICE is cuda:N")).unwrap())
}

/// Calls `f` with the device whose tensors a card's kernels compute.
fn on_card<R>(f: impl FnOnce(&Device) -> R) -> R {
    match card() {
        Some(card) => f(&card),
        None => on_host(|| f(&Device::Cpu)),
    }
}

fn model(dtype: DType, memory: Memory, device: &Device) -> StableDiffusion {
    // Cargo says where this package is; beside a test without cargo there is what the test reads of the workspace.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let folder = Path::new(&package).join("../crates/hiper-cli/assets/demo-model");
    let files = ModelFiles::from_dir(folder).unwrap().with_memory(memory).with_dtype(dtype);
    StableDiffusion::load(&files, device).unwrap()
}

fn draw(seed: u64, shape: &[usize], device: &Device) -> Tensor {
    TorchGenerator::new(seed).randn_tensor(shape, device).unwrap()
}

/// Normal numbers of the shape of a picture's latents.
fn draw_latents(model: &StableDiffusion, seed: u64, device: &Device) -> Tensor {
    let config = model.unet.config();
    draw(seed, &[1, config.in_channels, config.sample_size, config.sample_size], device)
}

/// Losses and gradients of two subjects in a batch.
fn step(model: &StableDiffusion) -> Vec<LossAndGradient> {
    with_steps(model, |steps| Network(&model.unet).losses_and_gradients(steps).unwrap())
}

/// A step of two subjects.
fn with_steps<R>(model: &StableDiffusion, f: impl FnOnce(&[TailLoss<'_>]) -> R) -> R {
    let text = model.encode_prompt("a photo of a white rabbit").unwrap().1;
    let device = text.device();
    let tails: Vec<Tensor> = (0..2).map(|seed| draw(seed, &[5, text.dim(2).unwrap()], device)).collect();
    let head = text.narrow(1, 0, text.dim(1).unwrap() - 5).unwrap();
    let pictures: Vec<[Tensor; 2]> =
        (2..4).map(|seed| [seed, seed + 10].map(|s| draw_latents(model, s, device))).collect();
    let steps: Vec<TailLoss<'_>> = pictures
        .iter()
        .zip(&tails)
        .zip([700.0, 120.0])
        .map(|(([noisy_latents, target], tail), timestep)| TailLoss {
            noisy_latents,
            timestep,
            head: &head,
            tail,
            target,
        })
        .collect();
    f(&steps)
}

fn gradient(of: &LossAndGradient) -> Tensor {
    Tensor::new(of.tail_gradient.as_slice(), &Device::Cpu).unwrap()
}

#[test]
fn a_step_has_the_loss_and_the_gradient_of_a_cpu() {
    let exact = step(&model(DType::F32, Memory::Fast, &Device::Cpu));
    for (dtype, memory, factor) in [(DType::F16, Memory::Fast, 1.0), (DType::BF16, Memory::Lean, BF16)] {
        let on_card = on_card(|device| step(&model(dtype, memory, device)));
        for (got, expected) in on_card.iter().zip(&exact) {
            let error = (got.loss / expected.loss - 1.0).abs();
            assert!(error < factor * F16_LOSS_TOLERANCE, "{dtype:?}: loss {got:?} {error:e}");
            let error = relative_l2(&gradient(got), &gradient(expected)).unwrap();
            assert!(error < factor * F16_TOLERANCE, "{dtype:?}: gradient {error:e}");
        }
    }
}

/// Recorded for one step and run for another, it forgets nothing of the second.
#[test]
fn a_recorded_step_is_a_step() {
    // Recorded on a card, or done again on a CPU; there the gradients differ in the order of their factors alone.
    let (device, dtype, loss_tolerance, tolerance) = match card() {
        Some(card) => (card, DType::F16, F16_LOSS_TOLERANCE, F16_TOLERANCE),
        None => (Device::Cpu, DType::F32, 1e-5, 1e-5),
    };
    let model = model(dtype, Memory::Fast, &device);
    let expected = step(&model);
    let got = with_steps(&model, |steps| {
        let stack = |of: fn(&TailLoss<'_>) -> Tensor| {
            Tensor::cat(&steps.iter().map(of).collect::<Vec<_>>(), 0).unwrap()
        };
        let (latents, target) = (stack(|step| step.noisy_latents.clone()), stack(|step| step.target.clone()));
        let text = stack(|step| step.encoder_hidden_states(step.tail).unwrap());
        let recorded = RecordedLoss::new(&model.unet, &latents, &text).unwrap();
        recorded.run(&target, &[1.0, 2.0], &text.zeros_like().unwrap(), &latents).unwrap();
        assert!(recorded.run(&latents, &[1.0], &text, &target).is_err());
        let (losses, gradients) = recorded.run(&latents, &[700.0, 120.0], &text, &target).unwrap();
        let tails = gradients.narrow(1, 72, 5).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        let each = losses.iter().zip(tails);
        each.map(|(&loss, tail_gradient)| LossAndGradient { loss: loss.into(), tail_gradient })
            .collect::<Vec<_>>()
    });
    for (got, expected) in got.iter().zip(&expected) {
        // The loss is a sum in f32 here.
        assert!((got.loss / expected.loss - 1.0).abs() < loss_tolerance, "{got:?}");
        assert!(relative_l2(&gradient(got), &gradient(expected)).unwrap() < tolerance);
    }
}

#[test]
fn texts_pictures_and_latents_are_those_of_a_cpu() {
    let run = |model: &StableDiffusion| {
        let text = model.encode_prompt("a rabbit in the snow").unwrap().1;
        let device = text.device();
        let picture = draw(5, &[1, 3, 64, 64], device).clamp(-1f32, 1f32).unwrap();
        let latents = model.encode_image(&picture, &draw_latents(model, 6, device)).unwrap();
        let decoded = model.decode_latents(&latents).unwrap();
        [text, latents, decoded]
    };
    let exact = run(&model(DType::F32, Memory::Fast, &Device::Cpu));
    let on_card = on_card(|device| run(&model(DType::F16, Memory::Fast, device)));
    for (got, expected) in on_card.iter().zip(&exact) {
        assert_eq!(got.dtype(), DType::F32);
        let error = relative_l2(got, expected).unwrap();
        assert!(error < F16_TOLERANCE, "{:?}: {error:e}", got.dims());
    }
}
