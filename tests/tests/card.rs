//! The demo model on a card's kernels, run on the CPU, against the same model computed by a CPU in `f32`.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_core::{LossAndGradient, NoisePredictor, TailLoss, TorchGenerator};
use hiper_kernels::on_host;
use hiper_tests::{Network, relative_l2};
use sd_models::{Memory, ModelFiles, RecordedLoss, StableDiffusion};

/// What a hundred layers make of roundings to `f16`: 11 bits, of which the errors of a pass leave 8 or so.
const F16_TOLERANCE: f64 = 1e-2;
/// Of a loss, which is a mean: errors cancel.
const F16_LOSS_TOLERANCE: f64 = 2e-3;
/// `bf16` has three bits less.
const BF16: f64 = 8.0;
/// In `f32` a card sums in another order, and that is all: some roundings of 24 bits a layer.
const F32_TOLERANCE: f64 = 2e-5;
const F32_LOSS_TOLERANCE: f64 = 1e-6;

fn model(dtype: DType, memory: Memory) -> StableDiffusion {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/hiper-cli/assets/demo-model");
    let files = ModelFiles::from_dir(folder).unwrap().with_memory(memory).with_dtype(dtype);
    StableDiffusion::load(&files, &Device::Cpu).unwrap()
}

fn draw(seed: u64, shape: &[usize]) -> Tensor {
    TorchGenerator::new(seed).randn_tensor(shape, &Device::Cpu).unwrap()
}

/// Normal numbers of the shape of a picture's latents.
fn draw_latents(model: &StableDiffusion, seed: u64) -> Tensor {
    let config = model.unet.config();
    draw(seed, &[1, config.in_channels, config.sample_size, config.sample_size])
}

/// Losses and gradients of two subjects in a batch.
fn step(model: &StableDiffusion) -> Vec<LossAndGradient> {
    with_steps(model, |steps| Network(&model.unet).losses_and_gradients(steps).unwrap())
}

/// A step of two subjects.
fn with_steps<R>(model: &StableDiffusion, f: impl FnOnce(&[TailLoss<'_>]) -> R) -> R {
    let text = model.encode_prompt("a photo of a white rabbit").unwrap().1;
    let tails: Vec<Tensor> = (0..2).map(|seed| draw(seed, &[5, text.dim(2).unwrap()])).collect();
    let head = text.narrow(1, 0, text.dim(1).unwrap() - 5).unwrap();
    let pictures: Vec<[Tensor; 2]> =
        (2..4).map(|seed| [seed, seed + 10].map(|s| draw_latents(model, s))).collect();
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
    let exact = step(&model(DType::F32, Memory::Fast));
    for (dtype, memory, [loss_tolerance, tolerance]) in [
        (DType::F32, Memory::Fast, [F32_LOSS_TOLERANCE, F32_TOLERANCE]),
        (DType::F16, Memory::Fast, [F16_LOSS_TOLERANCE, F16_TOLERANCE]),
        (DType::BF16, Memory::Lean, [BF16 * F16_LOSS_TOLERANCE, BF16 * F16_TOLERANCE]),
    ] {
        let on_card = on_host(|| step(&model(dtype, memory)));
        for (got, expected) in on_card.iter().zip(&exact) {
            let error = (got.loss / expected.loss - 1.0).abs();
            assert!(error < loss_tolerance, "{dtype:?}: loss {got:?} {error:e}");
            let error = relative_l2(&gradient(got), &gradient(expected)).unwrap();
            assert!(error < tolerance, "{dtype:?}: gradient {error:e}");
        }
    }
}

/// Recorded for one step and run for another, it forgets nothing of the second.
#[test]
fn a_recorded_step_is_a_step() {
    let model = model(DType::F32, Memory::Fast);
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
        // The loss is a sum in f32 here, and the gradients differ in the order of their factors.
        assert!((got.loss / expected.loss - 1.0).abs() < 1e-5, "{got:?}");
        assert!(relative_l2(&gradient(got), &gradient(expected)).unwrap() < 1e-5);
    }
}

#[test]
fn texts_pictures_and_latents_are_those_of_a_cpu() {
    let run = |model: &StableDiffusion| {
        let text = model.encode_prompt("a rabbit in the snow").unwrap().1;
        let picture = draw(5, &[1, 3, 64, 64]).clamp(-1f32, 1f32).unwrap();
        let latents = model.encode_image(&picture, &draw_latents(model, 6)).unwrap();
        let decoded = model.decode_latents(&latents).unwrap();
        [text, latents, decoded]
    };
    let exact = run(&model(DType::F32, Memory::Fast));
    for (dtype, tolerance) in [(DType::F32, F32_TOLERANCE), (DType::F16, F16_TOLERANCE)] {
        let on_card = on_host(|| run(&model(dtype, Memory::Fast)));
        for (got, expected) in on_card.iter().zip(&exact) {
            assert_eq!(got.dtype(), DType::F32);
            let error = relative_l2(got, expected).unwrap();
            assert!(error < tolerance, "{dtype:?} {:?}: {error:e}", got.dims());
        }
    }
}
