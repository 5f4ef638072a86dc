//! The same edit under every scheduler against `StableDiffusionPipeline` with the diffusers class, from the same seed.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_core::{HiperEmbedding, TextEmbedding, TorchGenerator, compose};
use hiper_tests::Golden;
use sd_models::schedulers::SchedulerKind;
use sd_models::{ModelFiles, SampleConfig, StableDiffusion};

/// Two libraries that sum in f32 in different orders differ by a rounding of some 8-bit values.
const MIN_PSNR_DB: f64 = 45.0;

fn check(name: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let files = ModelFiles::from_dir(fixtures.join("models").join(name)).unwrap();
    let model = StableDiffusion::load(&files, &Device::Cpu).unwrap();
    let golden = Golden::load(&fixtures.join(format!("edits/{name}.safetensors"))).unwrap();
    let method = Golden::load(&fixtures.join(format!("method/{name}.safetensors"))).unwrap();
    let number = |field: &str| golden.text(field).unwrap().parse::<f64>().unwrap();
    let text = |prompt: &str| TextEmbedding::new(model.encode_prompt(prompt).unwrap().1).unwrap();

    let tail = HiperEmbedding::new(method.get("tail").unwrap().clone()).unwrap();
    let prompt = compose(&text(golden.text("prompt").unwrap()), &tail, number("tail_scale")).unwrap();
    let negative = text("");
    let config = SampleConfig {
        prompt_embeds: &prompt,
        negative_prompt_embeds: negative.tensor(),
        guidance_scale: number("guidance_scale"),
    };
    let pictures: Vec<Vec<f64>> = SchedulerKind::ALL
        .into_iter()
        .map(|kind| {
            let mut scheduler = kind.build(&model.scheduler_config, number("steps") as usize).unwrap();
            // One generator: the initial latents, then the noise of each step.
            let mut generator = TorchGenerator::new(number("seed") as u64);
            let side = model.unet.config().sample_size;
            let latents = generator.randn_tensor(&[1, 4, side, side], &Device::Cpu).unwrap();
            let mut noise = |shape: &[usize]| generator.randn_tensor(shape, &Device::Cpu);
            let latents =
                model.sample(&latents, &config, scheduler.as_mut(), &mut noise, &mut |_| true).unwrap();
            eight_bit(&model.decode_latents(&latents).unwrap())
        })
        .collect();
    let psnr = |picture: usize, of: SchedulerKind| {
        let expected = golden.get(of.name()).unwrap().flatten_all().unwrap();
        psnr_db(&pictures[picture], &expected.to_dtype(DType::F64).unwrap().to_vec1().unwrap())
    };
    for (i, kind) in SchedulerKind::ALL.into_iter().enumerate() {
        let psnr = psnr(i, kind);
        assert!(psnr >= MIN_PSNR_DB, "{name}, {}: {psnr:.1} dB", kind.name());
    }
    // The bar tells methods apart: with fresh noise in each step, DDPM's picture is another than DDIM's.
    let apart = psnr(0, SchedulerKind::Ddim);
    assert_eq!(SchedulerKind::ALL[0], SchedulerKind::Ddpm);
    assert!(apart < MIN_PSNR_DB / 1.5, "{name}: {apart:.1} dB");
}

/// A decoded picture `[1, 3, H, W]` in [−1, 1] as 8-bit values, `[H, W, 3]`.
fn eight_bit(picture: &Tensor) -> Vec<f64> {
    let picture = picture.squeeze(0).unwrap().permute((1, 2, 0)).unwrap().flatten_all().unwrap();
    let values: Vec<f32> = picture.to_vec1().unwrap();
    values.iter().map(|v| f64::from(((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even())).collect()
}

/// Peak signal-to-noise ratio of 8-bit values.
fn psnr_db(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    10.0 * (255f64.powi(2) * a.len() as f64 / squares).log10()
}

#[test]
fn sd1_edits_equal_diffusers() {
    check("sd1");
}

#[test]
fn sd2_edits_equal_diffusers() {
    check("sd2");
}
