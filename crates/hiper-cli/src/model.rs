//! Which checkpoint a command works with.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Device;
use sd_models::{ModelFiles, StableDiffusion};

use crate::compute::Compute;
use crate::console::{Console, Event};
use crate::{Error, Result, demo_model, interrupt};

/// An opened checkpoint; [`Model::read_unet`] reads the UNet's weights.
pub struct Model {
    /// Its networks.
    pub sd: StableDiffusion,
    /// How messages and metadata call it.
    pub name: String,
    /// Its fingerprint.
    pub hash: String,
    /// Where it computes.
    pub device: Device,
    /// How long opening took.
    opening: Duration,
}

impl Model {
    /// Opens what `--model` names.
    ///
    /// # Errors
    /// When it is not a checkpoint in the diffusers layout, or is damaged.
    pub fn open(path: Option<&Path>, compute: &Compute) -> Result<Self> {
        let started = Instant::now();
        let files = files(path)?;
        let (name, hash) = (files.name().to_owned(), files.hash()?);
        let device = &compute.device;
        let memory = compute.memory_for(&files)?;
        let files = files.with_memory(memory).with_dtype(compute.dtype);
        let sd = StableDiffusion::open(&files, device)?;
        interrupt::check()?;
        Ok(Self { sd, name, hash, device: device.clone(), opening: started.elapsed() })
    }

    /// Reads the UNet's weights. They take the memory that encoding a photo leaves, so photos come first.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn read_unet(&self, console: &Console) -> Result<()> {
        let started = Instant::now();
        self.sd.unet.read_weights()?;
        interrupt::check()?;
        let seconds = (self.opening + started.elapsed()).as_secs_f64();
        console.event(&Event::ModelLoaded { model: &self.name, model_hash: &self.hash, seconds });
        Ok(())
    }
}

/// The files of what `--model` names: a folder, `org/name` in the Hugging Face cache, or the embedded model.
///
/// # Errors
/// When there is no such checkpoint.
pub fn files(path: Option<&Path>) -> Result<ModelFiles> {
    let Some(path) = path else { return demo_model::files() };
    match hub_id(path) {
        Some(id) if !path.exists() => {
            let cache = hub_cache().ok_or_else(|| {
                Error::refused(
                    format!("--model {id}: not a folder, and there is no home folder to look for a Hugging Face cache in"),
                    "set HF_HOME, or give a folder",
                )
            })?;
            Ok(ModelFiles::from_hub_cache(cache, id)?)
        }
        _ => Ok(ModelFiles::from_dir(path)?),
    }
}

/// `org/name`, if the path can be read so.
fn hub_id(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let part = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (organisation, name) = text.split_once('/')?;
    (part(organisation) && part(name)).then_some(text)
}

/// Where the Hugging Face tools keep models.
fn hub_cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE").or_else(|| variable("HF_HOME").map(|home| home.join("hub"))).or_else(|| {
        let cache =
            variable("XDG_CACHE_HOME").or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
        Some(cache.join("huggingface/hub"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        let id = |text: &str| hub_id(Path::new(text)).is_some();
        assert!(id("CompVis/stable-diffusion-v1-4"));
        for path in ["model", "./model", "../model", "/a/b", "a/b/c", "a b/c", "models/"] {
            assert!(!id(path), "{path}");
        }
    }
}
