//! Subjects in one pass of the UNet against the same subjects one at a time.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{Device, Tensor};
use hiper_core::{
    NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType, TextEmbedding, TorchGenerator,
};
use hiper_tests::Network;
use sd_models::{Memory, ModelFiles, UNet2DConditionModel};

const STEPS: usize = 3;

fn unet(name: &str, memory: Memory) -> UNet2DConditionModel {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models").join(name);
    UNet2DConditionModel::load(&ModelFiles::from_dir(folder).unwrap().with_memory(memory), &Device::Cpu)
        .unwrap()
}

fn subject(seed: u64, unet: &UNet2DConditionModel, side: usize) -> Personalisation {
    let mut generator = TorchGenerator::new(seed);
    let mut draw = |shape: &[usize]| generator.randn_tensor(shape, &Device::Cpu).unwrap();
    let source = TextEmbedding::new(draw(&[1, 77, unet.cross_attention_dim()])).unwrap();
    let latents = draw(&[1, 4, side, side]);
    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon);
    let config = PersonalisationConfig { train_steps: STEPS, ..Default::default() };
    Personalisation::new(config, &latents, &source, schedule, generator).unwrap()
}

/// Steps' timesteps and losses, and the tail at the end.
type Run = (Vec<(usize, f64)>, Vec<f32>);

fn together(mut runs: Vec<Personalisation>, unet: &UNet2DConditionModel) -> Vec<Run> {
    let mut told = vec![Vec::new(); runs.len()];
    for _ in 0..STEPS {
        let mut runs: Vec<&mut Personalisation> = runs.iter_mut().collect();
        let moved = Personalisation::steps_together(&mut runs, &Network(unet), 1).unwrap();
        for (told, steps) in told.iter_mut().zip(moved) {
            told.extend(steps.unwrap().iter().map(|step| (step.timestep, step.loss)));
        }
    }
    let tail = |run: &Personalisation| run.tail().tensor().flatten_all().unwrap().to_vec1().unwrap();
    told.into_iter().zip(&runs).map(|(told, run)| (told, tail(run))).collect()
}

/// On a CPU a sum runs in the same order whatever the batch, so the results are equal to the last bit. 16 × 16 latents take
/// one kind of Winograd tile, 24 × 24 both.
#[test]
fn three_subjects_in_one_pass_are_three_runs() {
    for (name, side, memory) in [
        ("sd1", 16, Memory::Fast),
        ("sd1", 16, Memory::Lean),
        ("sd2", 16, Memory::Fast),
        ("sd1", 24, Memory::Fast),
    ] {
        let unet = unet(name, memory);
        let subjects: Vec<Personalisation> = (0..3).map(|seed| subject(seed, &unet, side)).collect();
        let alone = subjects.iter().flat_map(|subject| together(vec![subject.clone()], &unet));
        let alone: Vec<Run> = alone.collect();
        let timesteps: Vec<usize> = alone.iter().map(|(steps, _)| steps[0].0).collect();
        assert!(timesteps[0] != timesteps[1] && timesteps[1] != timesteps[2]);
        assert!(together(subjects, &unet) == alone, "{name} {side} {memory:?}");
    }
}

#[test]
fn a_timestep_for_each_or_one_for_all() {
    let unet = unet("sd1", Memory::Fast);
    let mut generator = TorchGenerator::new(0);
    let latents = generator.randn_tensor(&[2, 4, 16, 16], &Device::Cpu).unwrap();
    let text = generator.randn_tensor(&[2, 77, unet.cross_attention_dim()], &Device::Cpu).unwrap();
    let predict = |timesteps: &[f64]| unet.forward(&latents, timesteps, &text);
    let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(predict(&[300.0]).unwrap()), values(predict(&[300.0, 300.0]).unwrap()));
    assert_ne!(values(predict(&[300.0]).unwrap()), values(predict(&[300.0, 301.0]).unwrap()));
    for wrong in [&[][..], &[1.0, 2.0, 3.0]] {
        let error = predict(wrong).unwrap_err().to_string();
        assert!(error.contains("timesteps") && error.contains("1 or 2"), "{error}");
    }
}
