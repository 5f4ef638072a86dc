//! Twenty steps of personalisation and a twenty-step edit against HiPer in PyTorch, from the same seed.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    DEFAULT_TAIL_SCALE, HiperEmbedding, NoiseSchedule, Personalisation, PersonalisationConfig,
    PredictionType, TextEmbedding, TorchGenerator, compose,
};
use hiper_tests::{Golden, Network, relative_l2};
use sd_models::schedulers::{self, SchedulerKind};
use sd_models::{ModelFiles, SampleConfig, StableDiffusion};

/// Relative error of each step's loss: f32 rounding of two libraries, carried along by the optimiser.
const LOSS_TOLERANCE: f64 = 1e-4;
/// Relative L2 error of the tail after twenty steps: Adam's first steps divide by the gradient's size, so that rounding in
/// the smallest entries shows.
const TAIL_TOLERANCE: f64 = 1e-3;
/// Relative L2 error of the edited latents: twenty guided steps amplify rounding by the guidance scale.
const EDIT_TOLERANCE: f64 = 1e-3;

fn check(name: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let model = StableDiffusion::load(
        &ModelFiles::from_dir(fixtures.join("models").join(name)).unwrap(),
        &Device::Cpu,
    )
    .unwrap();
    let golden = Golden::load(&fixtures.join(format!("method/{name}.safetensors"))).unwrap();
    let seed: u64 = golden.text("seed").unwrap().parse().unwrap();
    let text = |prompt: &str| TextEmbedding::new(model.encode_prompt(prompt).unwrap().1).unwrap();

    let mut generator = TorchGenerator::new(seed);
    let sample_noise = generator.randn_tensor(&[1, 4, 16, 16], &Device::Cpu).unwrap();
    let latents = model.encode_image(golden.get("image").unwrap(), &sample_noise).unwrap();
    let schedule = NoiseSchedule {
        alphas_cumprod: model.scheduler_config.alphas_cumprod(),
        prediction_type: match model.scheduler_config.prediction_type {
            schedulers::PredictionType::Epsilon => PredictionType::Epsilon,
            schedulers::PredictionType::VPrediction => PredictionType::VPrediction,
        },
    };
    let config = PersonalisationConfig { train_steps: 20, ..Default::default() };
    let source = text(golden.text("source").unwrap());
    let mut run = Personalisation::new(config, &latents, &source, schedule, generator).unwrap();
    let losses: Vec<f32> = golden.get("losses").unwrap().to_vec1().unwrap();
    let timesteps: Vec<u32> =
        golden.get("timesteps").unwrap().to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    while let Some(step) = run.step(&Network(&model.unet)).unwrap() {
        let expected = f64::from(losses[step.step - 1]);
        assert_eq!(step.timestep as u32, timesteps[step.step - 1]);
        assert!(
            (step.loss - expected).abs() <= LOSS_TOLERANCE * expected,
            "{name}: {step:?} against {expected}"
        );
    }
    assert_eq!(run.steps_taken(), losses.len());
    let expected_tail = golden.get("tail").unwrap();
    let error = relative_l2(run.tail().tensor(), expected_tail).unwrap();
    assert!(error <= TAIL_TOLERANCE, "{name}: tail {error:e}");

    // The edit from PyTorch's own tail, so that it is judged alone.
    let tail = HiperEmbedding::new(expected_tail.clone()).unwrap();
    let prompt = compose(&text(golden.text("target").unwrap()), &tail, DEFAULT_TAIL_SCALE).unwrap();
    let negative = text("");
    let initial = TorchGenerator::new(seed).randn_tensor(&[1, 4, 16, 16], &Device::Cpu).unwrap();
    let mut ddim = SchedulerKind::Ddim.build(&model.scheduler_config, 20).unwrap();
    let config = SampleConfig {
        prompt_embeds: &prompt,
        negative_prompt_embeds: negative.tensor(),
        guidance_scale: 7.5,
    };
    let mut no_noise = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let edited = model.sample(&initial, &config, ddim.as_mut(), &mut no_noise, &mut |_| true).unwrap();
    let error = relative_l2(&edited, golden.get("edit_latents").unwrap()).unwrap();
    assert!(error <= EDIT_TOLERANCE, "{name}: edited latents {error:e}");
    let picture = model.decode_latents(&edited).unwrap();
    let error = relative_l2(&picture, golden.get("edit_picture").unwrap()).unwrap();
    assert!(error <= EDIT_TOLERANCE, "{name}: picture {error:e}");
}

#[test]
fn sd1_run_equals_pytorch() {
    check("sd1");
}

#[test]
fn sd2_run_equals_pytorch() {
    check("sd2");
}
