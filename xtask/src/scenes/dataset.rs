//! `cargo xtask scenes`: pictures and what is in them, for the training under `tools/train_demo`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::canvas::Rgb;
use super::{Background, Identity, Picture, Pose, Random, render};

/// Scenes drawn at once, over all cores.
const BATCH: u64 = 1024;

/// Writes `count` scenes of `size` pixels: `images.u8` (`count × size × size × 3` bytes), `silhouettes.u8`
/// (`count × size × size`) and `scenes.jsonl` (a line a scene). Scene `i` has the seed `seed + i`.
pub fn write(dir: &Path, count: u64, size: u32, seed: u64) -> Result<()> {
    let mut files = Files::create(dir)?;
    let mut first = 0;
    while first < count {
        let part = first..count.min(first + BATCH);
        first = part.end;
        let drawn: Vec<_> = part
            .into_par_iter()
            .map(|i| {
                let scene = Scene::random(seed + i);
                scene.render(size).map(|picture| (scene, picture))
            })
            .collect::<Result<_>>()?;
        for (scene, picture) in &drawn {
            files.push(scene, picture)?;
        }
    }
    files.finish()
}

/// Writes `count` subjects in every pose on every background, in the files of [`write()`]. Subject `i` is the one of scene
/// `seed + i`; its 24 pictures follow each other, backgrounds fastest.
pub fn write_every_view(dir: &Path, count: u64, size: u32, seed: u64) -> Result<()> {
    let mut files = Files::create(dir)?;
    for i in 0..count {
        let mut scene = Scene::random(seed + i);
        for pose in Pose::ALL {
            for background in Background::ALL {
                (scene.pose, scene.background) = (pose, background);
                files.push(&scene, &scene.render(size)?)?;
            }
        }
    }
    files.finish()
}

/// The three files of a set of scenes, being written.
struct Files {
    images: BufWriter<File>,
    silhouettes: BufWriter<File>,
    scenes: BufWriter<File>,
}

impl Files {
    fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("{}: cannot create the folder", dir.display()))?;
        let create = |name: &str| -> Result<BufWriter<File>> {
            let path = dir.join(name);
            Ok(BufWriter::new(
                File::create(&path).with_context(|| format!("{}: cannot write", path.display()))?,
            ))
        };
        Ok(Self {
            images: create("images.u8")?,
            silhouettes: create("silhouettes.u8")?,
            scenes: create("scenes.jsonl")?,
        })
    }

    /// Writes one scene.
    fn push(&mut self, scene: &Scene, picture: &Picture) -> Result<()> {
        self.images.write_all(&picture.rgb)?;
        self.silhouettes.write_all(&picture.silhouette)?;
        Ok(writeln!(self.scenes, "{}", scene.describe())?)
    }

    fn finish(mut self) -> Result<()> {
        self.images.flush()?;
        self.silhouettes.flush()?;
        Ok(self.scenes.flush()?)
    }
}

/// Writes a sheet of `columns × rows` random scenes as one PNG.
pub fn write_sheet(path: &Path, columns: u32, rows: u32, size: u32, seed: u64) -> Result<()> {
    let mut sheet = image::RgbImage::new(columns * size, rows * size);
    for i in 0..columns * rows {
        let picture = Scene::random(seed + u64::from(i)).render(size)?;
        let tile =
            image::RgbImage::from_raw(size, size, picture.rgb).context("a picture of the wrong size")?;
        let (x, y) = (i % columns * size, i / columns * size);
        image::imageops::replace(&mut sheet, &tile, i64::from(x), i64::from(y));
    }
    sheet.save(path).with_context(|| format!("{}: cannot write", path.display()))
}

/// One scene and its seed's choices.
pub struct Scene {
    /// Who.
    pub identity: Identity,
    /// Doing what.
    pub pose: Pose,
    /// Where.
    pub background: Background,
}

impl Scene {
    /// The scene of a seed.
    pub fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let identity = Identity::random(&mut random);
        Self { identity, pose: random.pick(&Pose::ALL), background: random.pick(&Background::ALL) }
    }

    /// Draws it.
    pub fn render(&self, size: u32) -> Result<Picture> {
        render(&self.identity, self.pose, self.background, size)
            .with_context(|| format!("--size {size}: from 1 to 2048"))
    }

    /// What is in the picture, in the words that captions use.
    pub fn describe(&self) -> Value {
        let who = &self.identity;
        json!({
            "species": who.species.word(),
            "pose": self.pose.word(),
            "background": self.background.phrase(),
            "body": who.body_name,
            "body_rgb": bytes(who.body),
            "pattern": who.pattern.word().map(|word| [who.pattern_color.1, word]),
            "eyes": who.eyes.1,
            "collar": who.collar.map(|(_, name)| name),
            "collar_rgb": who.collar.map(|(color, _)| bytes(color)),
        })
    }
}

fn bytes(color: Rgb) -> [u8; 3] {
    color.map(|c| (c * 255.0).round() as u8)
}
