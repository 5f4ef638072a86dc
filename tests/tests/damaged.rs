//! Checkpoints of which one tensor is missing.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use sd_models::{AutoencoderKl, ClipTextModel, Error, ModelFiles, Result, UNet2DConditionModel};

/// The fixture checkpoint `name`, copied to where it can be damaged.
fn copy(name: &str) -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models").join(name);
    let to = tempfile::tempdir().unwrap();
    for component in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        std::fs::create_dir(to.path().join(component)).unwrap();
        for entry in from.join(component).read_dir().unwrap() {
            let file = entry.unwrap().path();
            std::fs::copy(&file, to.path().join(component).join(file.file_name().unwrap())).unwrap();
        }
    }
    to
}

/// Writes all tensors but one.
fn write_without(missing: &str, tensors: &SafeTensors<'_>, path: &Path) {
    let rest = tensors.iter().filter(|(tensor, _)| *tensor != missing);
    // Another file under the same name: the old one may still be mapped.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, safetensors::serialize(rest, None).unwrap()).unwrap();
}

/// Takes every tensor of `file` away, one at a time: no layer may do without it.
fn check(name: &str, file: &str, load: impl Fn(&ModelFiles) -> Result<()>) {
    let dir = copy(name);
    let path = dir.path().join(file);
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let files = ModelFiles::from_dir(dir.path()).unwrap();
    load(&files).unwrap();
    assert!(tensors.len() > 30, "{} tensors", tensors.len());
    for missing in tensors.names() {
        write_without(missing, &tensors, &path);
        match load(&files) {
            Err(Error::MissingTensor { file: named, .. }) => {
                assert!(named.ends_with(file), "{missing}: {named}")
            }
            other => panic!("{name}/{file} without {missing}: {other:?}"),
        }
    }
}

fn check_all(name: &str) {
    check(name, "unet/diffusion_pytorch_model.safetensors", |files| {
        UNet2DConditionModel::load(files, &Device::Cpu).map(drop)
    });
    check(name, "vae/diffusion_pytorch_model.safetensors", |files| {
        AutoencoderKl::load(files, &Device::Cpu).map(drop)
    });
    check(name, "text_encoder/model.safetensors", |files| ClipTextModel::load(files, &Device::Cpu).map(drop));
}

#[test]
fn sd1_structure_needs_every_tensor() {
    check_all("sd1");
}

#[test]
fn sd2_structure_needs_every_tensor() {
    check_all("sd2");
}

#[test]
fn weights_that_nobody_read_yet_are_checked_when_they_are() {
    let dir = copy("sd1");
    let path = dir.path().join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    write_without("conv_out.bias", &SafeTensors::deserialize(&bytes).unwrap(), &path);
    let files = ModelFiles::from_dir(dir.path()).unwrap();
    let unet = UNet2DConditionModel::open(&files, &Device::Cpu).unwrap();
    let missing = |result: Result<()>| matches!(result, Err(Error::MissingTensor { field, .. }) if field == "conv_out.bias");
    assert!(missing(unet.read_weights()));
    let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let text = Tensor::zeros((1, 77, unet.cross_attention_dim()), DType::F32, &Device::Cpu).unwrap();
    assert!(missing(unet.forward(&latents, &[1.0], &text).map(drop)));
}
