//! The demo model on a card's kernels against the same model computed by a CPU in `f32`. The CPU runs the kernels, or, with the
//! feature `cuda` and `HIPER_TEST_DEVICE=cuda:0`, that card.

#![allow(clippy::unwrap_used)]

mod operators;
mod recordings;

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use hiper_core::{LossAndGradient, NoisePredictor, TailLoss, TorchGenerator};
use hiper_kernels::{GENERATOR_STATE, draw_noise, on_test_device};
use hiper_tests::{Network, relative_l2};
use sd_models::{
    AdamConstants, AdamState, Memory, ModelFiles, OptimisationConfig, RecordedOptimisation, StableDiffusion,
    Target,
};

/// What a hundred layers make of roundings to `f16`: 11 bits, of which the errors of a pass leave 8 or so.
const F16_TOLERANCE: f64 = 1e-2;
/// Of a loss, which is a mean: errors cancel.
const F16_LOSS_TOLERANCE: f64 = 2e-3;
/// `bf16` has three bits less.
const BF16: f64 = 8.0;
/// In `f32` a card sums in another order (kernels run on a CPU are within 2e-6, losses within 7e-8), and its own exponentials
/// are approximate.
const F32_TOLERANCE: f64 = 1e-4;
const F32_LOSS_TOLERANCE: f64 = 1e-5;

/// Cargo says where this package is; beside a test without cargo there is what the test reads of the workspace.
fn package() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

fn model(dtype: DType, memory: Memory, device: &Device) -> StableDiffusion {
    let folder = package().join("../crates/hiper-cli/assets/demo-model");
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
    for (dtype, memory, [loss_tolerance, tolerance]) in [
        (DType::F32, Memory::Fast, [F32_LOSS_TOLERANCE, F32_TOLERANCE]),
        (DType::F16, Memory::Fast, [F16_LOSS_TOLERANCE, F16_TOLERANCE]),
        (DType::BF16, Memory::Lean, [BF16 * F16_LOSS_TOLERANCE, BF16 * F16_TOLERANCE]),
    ] {
        let on_card = on_test_device(|device| step(&model(dtype, memory, device)));
        for (got, expected) in on_card.iter().zip(&exact) {
            let error = (got.loss / expected.loss - 1.0).abs();
            assert!(error < loss_tolerance, "{dtype:?}: loss {got:?} {error:e}");
            let error = relative_l2(&gradient(got), &gradient(expected)).unwrap();
            assert!(error < tolerance, "{dtype:?}: gradient {error:e}");
        }
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
    for (dtype, tolerance) in [(DType::F32, F32_TOLERANCE), (DType::F16, F16_TOLERANCE)] {
        let on_card = on_test_device(|device| run(&model(dtype, Memory::Fast, device)));
        for (got, expected) in on_card.iter().zip(&exact) {
            assert_eq!(got.dtype(), DType::F32);
            let error = relative_l2(got, expected).unwrap();
            assert!(error < tolerance, "{dtype:?} {:?}: {error:e}", got.dims());
        }
    }
}

/// A card draws what hiper-core draws.
#[test]
fn a_cards_draws_are_torchs_bit_for_bit() {
    const SHAPE: [usize; 4] = [2, 4, 16, 16];
    let mut generators = [5, 6].map(TorchGenerator::new);
    on_test_device(|device| {
        let state = |generator: &TorchGenerator| {
            let state = generator.state();
            [state.words, vec![state.index as u32]].concat()
        };
        let states = generators.each_ref().map(state).concat();
        let mut states = Tensor::from_vec(states, (2, GENERATOR_STATE), device).unwrap();
        for _ in 0..3 {
            let drawn = draw_noise(&states, &SHAPE, 1000).unwrap();
            for (i, generator) in generators.iter_mut().enumerate() {
                let numbers = generator.randn(SHAPE[1..].iter().product());
                assert_eq!(values(&drawn.noise.get(i).unwrap()), numbers);
                assert_eq!(values(&drawn.timesteps)[i], generator.randint(1000) as f32);
            }
            states = drawn.generators;
        }
    });
}

/// A loss may overflow where its gradient does not.
#[test]
fn a_recorded_optimisation_stops_before_a_loss_that_is_not_finite() {
    on_test_device(|device| {
        let model = model(DType::F32, Memory::Fast, device);
        let width = model.unet.cross_attention_dim();
        // With no signal at any timestep the network sees noise alone, and should answer the latents: 1e20 of the second.
        let latents = draw_latents(&model, 1, device);
        let latents = Tensor::cat(&[&latents, &(&latents * 1e20).unwrap()], 0).unwrap();
        let (head, tail) = (draw(3, &[2, 72, width], device), draw(4, &[2, 5, width], device));
        let zeros = |shape: [usize; 2]| Tensor::zeros(&shape, DType::F32, device).unwrap();
        let before = AdamState {
            parameters: tail.flatten_from(1).unwrap(),
            first_moment: zeros([2, 5 * width]),
            second_moment: zeros([2, 5 * width]),
            counts: zeros([2, 2]),
        };
        let adam = AdamConstants { learning_rate: 5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        let config = OptimisationConfig { adam, target: Target::Velocity, alphas_cumprod: vec![0.0; 10] };
        let recorded = RecordedOptimisation::new(&model.unet, [&latents, &head, &tail], config).unwrap();
        let generators = Tensor::zeros((2, GENERATOR_STATE), DType::U32, device).unwrap();
        let (losses, after) = recorded.run(&latents, &head, &before, &generators, 2).unwrap();
        assert!(losses.iter().all(|step| step[0].is_finite() && step[1] == f32::INFINITY), "{losses:?}");
        assert_eq!(values(&after.counts), [2.0, 0.0, 0.0, 1.0]);
        let moved = |i: usize| {
            values(&after.parameters.get(i).unwrap()) != values(&before.parameters.get(i).unwrap())
        };
        assert_eq!([moved(0), moved(1)], [true, false]);
    });
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
