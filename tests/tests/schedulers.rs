//! Every scheduler against its diffusers class, on a toy network, under the configurations of SD 1.x, SD 2.x and variants.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_tests::{Golden, relative_l2};
use sd_models::schedulers::{SchedulerConfig, SchedulerKind};

/// diffusers computes coefficients in f32 and we in f64: up to 50 steps of rounding.
const TOLERANCE: f64 = 1e-4;
/// Timesteps are small integers, or fractions kept in f32.
const TIMESTEP_TOLERANCE: f64 = 1e-2;

#[test]
fn every_scheduler_equals_its_diffusers_class() {
    let golden =
        Golden::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/schedulers.safetensors")).unwrap();
    let configs: std::collections::BTreeMap<String, SchedulerConfig> =
        serde_json::from_str(golden.text("configs").unwrap()).unwrap();
    let start: Vec<f32> = (0..64).map(|i| (f64::from(i) * 0.7).sin() as f32).collect();
    let start = Tensor::from_vec(start, (1, 4, 4, 4), &Device::Cpu).unwrap();
    let (mut compared, mut wrong) = (0, Vec::new());
    for (name, config) in &configs {
        for kind in SchedulerKind::ALL {
            for steps in [4, 20, 50] {
                let key = format!("{name}/{}/{steps}", kind.name());
                if !golden.has(&format!("{key}/sample")) {
                    continue;
                }
                compared += 1;
                let mut scheduler = kind.build(config, steps).unwrap();
                let expected: Vec<f32> = golden.get(&format!("{key}/timesteps")).unwrap().to_vec1().unwrap();
                let timesteps = scheduler.timesteps().to_vec();
                let same = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() < TIMESTEP_TOLERANCE;
                if timesteps.len() != expected.len() || !timesteps.iter().zip(&expected).all(same) {
                    wrong.push(format!("{key}: timesteps {timesteps:?}, diffusers {expected:?}"));
                    continue;
                }
                let mut calls = 0;
                let mut noise = |shape: &[usize]| {
                    calls += 1;
                    let values = (0..64).map(|i| f64::from(calls - 1 + i).cos() as f32).collect::<Vec<_>>();
                    Tensor::from_vec(values, shape, &Device::Cpu)
                };
                let mut sample = (&start * scheduler.init_noise_sigma()).unwrap();
                for (i, t) in timesteps.iter().enumerate() {
                    let input = scheduler.scale_model_input(&sample, i).unwrap();
                    let output = ((input * 0.3).unwrap() + 0.2 * t.sin()).unwrap();
                    sample = scheduler.step(&output, i, &sample, &mut noise).unwrap();
                }
                let error = relative_l2(&sample, golden.get(&format!("{key}/sample")).unwrap()).unwrap();
                if error.is_nan() || error > TOLERANCE {
                    wrong.push(format!("{key}: {error:e}"));
                }
                assert_eq!(sample.dtype(), DType::F32);
            }
        }
    }
    assert!(compared > 100, "{compared} runs");
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
}
