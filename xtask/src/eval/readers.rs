//! What a picture shows, read by small classifiers (`tools/train_demo/readers.py`).

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use hiper_kernels::{Activation, Conv2d, Conv2dConfig, GroupNorm, Linear, Padding};
use image::RgbImage;

use crate::scenes::{Background, Identity, Pose};

static WEIGHTS: &[u8] = include_bytes!("../../assets/readers.safetensors");

/// Width and height that the readers were trained on.
pub const SIZE: u32 = 64;

const SPECIES: &[&str] = &["dog", "cat", "rabbit", "bird"];
const POSES: &[&str] = &["standing", "sitting", "jumping", "lying"];
const BACKGROUNDS: &[&str] = &[
    "on a plain background",
    "on the beach",
    "in the forest",
    "in the snow",
    "in the desert",
    "in the city at night",
];
const PATTERNS: &[&str] = &["none", "spots", "stripes", "patch"];
const COLLARS: &[&str] = &["none", "red", "blue", "green", "yellow", "pink", "white"];

/// The questions and their answers, in the order of [`Reading`].
pub const QUESTIONS: [(&str, &[&str]); 5] = [
    ("species", SPECIES),
    ("pose", POSES),
    ("background", BACKGROUNDS),
    ("pattern", PATTERNS),
    ("collar", COLLARS),
];

/// The answers to [`QUESTIONS`].
pub type Reading = [&'static str; 5];

/// What a scene truly shows.
pub fn truth(who: &Identity, pose: Pose, background: Background) -> Reading {
    [
        who.species.word(),
        pose.word(),
        background.phrase(),
        who.pattern.word().unwrap_or("none"),
        who.collar.map_or("none", |(_, color)| color),
    ]
}

/// Strided convolutions to 4 × 4 pixels, then one linear layer a question.
pub struct Readers {
    trunk: Vec<(Conv2d, GroupNorm)>,
    heads: Vec<Linear>,
}

impl Readers {
    /// Loads them.
    ///
    /// # Errors
    /// When the weights in the program are damaged.
    pub fn load() -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(WEIGHTS, &Device::Cpu)?;
        let get = |name: String| -> Result<Tensor> {
            let tensor = tensors.get(&name).with_context(|| format!("readers.safetensors: no {name}"))?;
            Ok(tensor.to_dtype(DType::F32)?)
        };
        let config = Conv2dConfig { stride: 2, padding: Padding::same(1) };
        let trunk = (0..4)
            .map(|i| {
                let part = |kind: &str, name: &str| get(format!("{kind}.{i}.{name}"));
                let conv = Conv2d::new(part("convs", "weight")?, Some(&part("convs", "bias")?), config)?;
                let (weight, bias) = (part("norms", "weight")?, part("norms", "bias")?);
                Ok((conv, GroupNorm::new(&weight, &bias, 8, 1e-5, Some(Activation::Silu))?))
            })
            .collect::<Result<_>>()?;
        let heads = QUESTIONS
            .iter()
            .map(|(name, _)| {
                let part = |part: &str| get(format!("heads.{name}.{part}"));
                Ok(Linear::new(part("weight")?, Some(&part("bias")?))?)
            })
            .collect::<Result<_>>()?;
        Ok(Self { trunk, heads })
    }

    /// The logits `[B, answers]` of each question.
    fn logits(&self, pictures: &[&RgbImage]) -> Result<Vec<Tensor>> {
        let mut values = Vec::with_capacity(pictures.len() * (SIZE * SIZE * 3) as usize);
        for picture in pictures {
            let (width, height) = picture.dimensions();
            ensure!(
                (width, height) == (SIZE, SIZE),
                "the readers read {SIZE} × {SIZE} pixels, not {width} × {height}"
            );
            values.extend(picture.as_raw().iter().map(|&v| f32::from(v) / 127.5 - 1.0));
        }
        let side = SIZE as usize;
        let mut x = Tensor::from_vec(values, (pictures.len(), side, side, 3), &Device::Cpu)?;
        for (conv, norm) in &self.trunk {
            x = norm.forward(&conv.forward(&x)?)?;
        }
        let x = x.flatten_from(1)?;
        self.heads.iter().map(|head| Ok(head.forward(&x)?)).collect()
    }

    /// Reads a picture.
    ///
    /// # Errors
    /// When it is not [`SIZE`] pixels a side.
    pub fn read(&self, picture: &RgbImage) -> Result<Reading> {
        let mut reading = [""; 5];
        for ((answer, logits), (_, answers)) in
            reading.iter_mut().zip(self.logits(&[picture])?).zip(QUESTIONS)
        {
            *answer = answers[logits.argmax(1)?.to_vec1::<u32>()?[0] as usize];
        }
        Ok(reading)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::subject::picture;
    use crate::scenes::dataset::Scene;

    const HELD_OUT: u64 = 1_000_000_000;

    /// f32 sums in another order, over five layers.
    const TOLERANCE: f32 = 1e-3;

    fn scenes(count: u64) -> (Vec<Scene>, Vec<RgbImage>) {
        (HELD_OUT..HELD_OUT + count)
            .map(|seed| {
                let scene = Scene::random(seed);
                let drawn = picture(&scene.render(SIZE).unwrap(), SIZE).unwrap();
                (scene, drawn)
            })
            .unzip()
    }

    #[test]
    fn the_logits_are_pytorchs() {
        let golden: &[u8] = include_bytes!("../../assets/readers_golden.safetensors");
        let golden = candle_core::safetensors::load_buffer(golden, &Device::Cpu).unwrap();
        let count = golden["pose"].dims()[0];
        let (_, pictures) = scenes(count as u64);
        let logits = Readers::load().unwrap().logits(&pictures.iter().collect::<Vec<_>>()).unwrap();
        for ((question, _), logits) in QUESTIONS.iter().zip(logits) {
            let difference = (logits - &golden[*question]).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            assert!(difference < TOLERANCE, "{question}: {difference}");
        }
    }

    /// On scenes that their training never drew: 99 % of species, pose and background, 97 % of pattern and collar.
    #[test]
    fn held_out_scenes_are_read_right() {
        let readers = Readers::load().unwrap();
        let (scenes, pictures) = scenes(500);
        let mut right = [0usize; 5];
        for (scene, picture) in scenes.iter().zip(&pictures) {
            let truth = truth(&scene.identity, scene.pose, scene.background);
            for (right, (read, truth)) in
                right.iter_mut().zip(readers.read(picture).unwrap().iter().zip(truth))
            {
                *right += usize::from(*read == truth);
            }
        }
        for ((question, _), (right, least)) in
            QUESTIONS.iter().zip(right.into_iter().zip([495, 495, 495, 485, 485]))
        {
            assert!(right >= least, "{question}: {right} of 500 right, {least} expected");
        }
    }

    #[test]
    fn another_size_is_refused() {
        assert!(Readers::load().unwrap().read(&RgbImage::new(32, 64)).is_err());
    }
}
