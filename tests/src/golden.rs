//! Every part of a checkpoint against the values that `tools/fixtures/models.py` wrote.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use hiper_core::{NoisePredictor, TailLoss, TextEmbedding};
use sd_models::{ModelFiles, StableDiffusion};

use crate::{Network, relative_l2};

/// A file of golden values.
pub struct Golden {
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    /// Reads a golden file.
    ///
    /// # Errors
    /// When it is not a safetensors file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        Ok(Self { tensors, metadata: header.metadata().clone().unwrap_or_default() })
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("the golden file has no {name}"))
    }

    /// A metadata field by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn text(&self, name: &str) -> Result<&str> {
        Ok(self.metadata.get(name).with_context(|| format!("the golden file has no {name}"))?)
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

/// The largest relative L2 error of a part that counts as equal in f32: two libraries that sum in different orders, through
/// some fifty layers. Central differences have an error of their own.
pub fn tolerance(part: &str) -> f64 {
    if part.ends_with("differences") { 1e-3 } else { 1e-4 }
}

/// The relative L2 error of each part, by name.
///
/// # Errors
/// When the checkpoint cannot be loaded or run.
pub fn parity(files: &ModelFiles, golden: &Golden) -> Result<Vec<(&'static str, f64)>> {
    let model = StableDiffusion::load(files, &Device::Cpu)?;
    let mut errors = Vec::new();
    let (tokens, embedding) = model.encode_prompt(golden.text("prompt")?)?;
    let ids: Vec<u32> = golden.get("ids")?.to_dtype(DType::U32)?.to_vec1()?;
    errors.push(("token ids", if tokens.ids == ids { 0.0 } else { f64::INFINITY }));
    errors.push(("text embedding", relative_l2(&embedding, golden.get("embedding")?)?));

    errors.push((
        "vae encode (mean)",
        relative_l2(&model.vae.encode(golden.get("image")?)?.mean, golden.get("vae_mean")?)?,
    ));
    let latents = golden.get("latents")?;
    errors.push(("vae decode", relative_l2(&model.vae.decode(latents)?, golden.get("decoded")?)?));

    let timestep: f64 = golden.text("timestep")?.parse()?;
    // From here on with PyTorch's embedding, so that each part is judged alone.
    let embedding = golden.get("embedding")?;
    let noise_pred = model.unet.forward(latents, &[timestep], embedding)?;
    errors.push(("unet prediction", relative_l2(&noise_pred, golden.get("noise_pred")?)?));

    let (head, tail) = TextEmbedding::new(embedding.clone())?.split(golden.get("tail_gradient")?.dim(0)?)?;
    let target = golden.get("noise")?;
    let step = TailLoss { noisy_latents: latents, timestep, head: &head, tail: tail.tensor(), target };
    let got = Network(&model.unet).losses_and_gradients(&[step])?.remove(0);
    let loss = Tensor::new(&[got.loss as f32], &Device::Cpu)?;
    errors.push(("loss", relative_l2(&loss, golden.get("loss")?)?));
    let gradient = Tensor::from_vec(got.tail_gradient, tail.tensor().shape(), &Device::Cpu)?;
    errors.push(("tail gradient", relative_l2(&gradient, golden.get("tail_gradient")?)?));
    if golden.has("directions") {
        let directions = golden.get("directions")?;
        let count = directions.dim(0)?;
        let slopes = directions.reshape((count, ()))?.matmul(&gradient.reshape(((), 1))?)?;
        errors.push((
            "tail gradient, f64 differences",
            relative_l2(&slopes, golden.get("directional_derivatives")?)?,
        ));
    }
    Ok(errors)
}
