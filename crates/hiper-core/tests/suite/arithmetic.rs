//! Random numbers, schedule and optimiser against torch and diffusers.

use candle_core::DType;
use hiper_core::{Adam, AdamConfig, NoiseSchedule, PredictionType, TorchGenerator};

use crate::toy::{Golden, relative_l2, values};

/// torch's `x ** 0.5` is now and then the neighbour of the square root.
const ROUNDING: f64 = 1.2e-7;

/// The script's `SEEDS` and `DRAWS`.
const SEEDS: [u64; 4] = [0, 123, (1 << 32) - 1, (1 << 40) + 5];
const DRAWS: &str = "randn 1;randn 15;randn 16;randn 17;randint 1000;randint 1000;randn 37;randn 15;randn 16;randn 1;\
    randn 40;randint 10;randn 3;randn 1024;randint 268435456;randint 4000000000;randn 1;randint 1;randn 2;randn 33";

#[test]
fn draws_are_torchs() {
    let golden = Golden::load("rng.safetensors");
    for seed in SEEDS {
        let mut generator = TorchGenerator::new(seed);
        for (i, draw) in DRAWS.split(';').enumerate() {
            let want = golden.get(&format!("{seed}.{i:02}"));
            let (what, n) = draw.split_once(' ').unwrap();
            if what == "randn" {
                let (got, want) = (generator.randn(n.parse().unwrap()), values(want));
                let differ = got.iter().zip(&want).filter(|(a, b)| a != b).count();
                assert_eq!(differ, 0, "normals of seed {seed}, draw {i}: {draw}");
            } else {
                let want = want.to_vec1::<i64>().unwrap()[0];
                let got = generator.randint(n.parse().unwrap());
                assert_eq!(i64::from(got), want, "seed {seed}, draw {i}: {draw}");
            }
        }
    }
}

#[test]
fn the_schedules_are_diffusers() {
    let golden = Golden::load("schedule.safetensors");
    let linear = NoiseSchedule::linear(0.0001, 0.02, 1000, PredictionType::Epsilon);
    assert_eq!(linear.alphas_cumprod, golden.f32("linear.alphas_cumprod"));
    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::VPrediction);
    assert_eq!(schedule.alphas_cumprod, golden.f32("scaled_linear.alphas_cumprod"));
    let (latents, noise) = (golden.get("latents"), golden.get("noise"));
    for t in [0, 1, 499, 999] {
        let noisy = schedule.add_noise(latents, noise, t).unwrap();
        let error = relative_l2(&values(&noisy), &golden.f32(&format!("noisy.{t}")));
        assert!(error < ROUNDING, "timestep {t}: noisy latents off by {error}");
        let velocity = schedule.target(latents, noise, t).unwrap();
        let error = relative_l2(&values(&velocity), &golden.f32(&format!("velocity.{t}")));
        assert!(error < ROUNDING, "timestep {t}: velocity off by {error}");
        let epsilon = NoiseSchedule { prediction_type: PredictionType::Epsilon, ..schedule.clone() };
        assert_eq!(values(&epsilon.target(latents, noise, t).unwrap()), values(noise));
    }
}

#[test]
fn adam_is_torchs() {
    let golden = Golden::load("adam.safetensors");
    let rows = |name: &str| golden.get(name).to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    let mut parameters = golden.f32("start");
    let mut adam = Adam::new(AdamConfig::default(), parameters.len());
    for (step, (gradient, want)) in rows("gradients").iter().zip(rows("parameters")).enumerate() {
        adam.step(&mut parameters, gradient).unwrap();
        assert_eq!(parameters, want, "after step {}", step + 1);
    }
    assert_eq!(adam.first_moment, golden.f32("first_moment"));
    assert_eq!(adam.second_moment, golden.f32("second_moment"));
}
