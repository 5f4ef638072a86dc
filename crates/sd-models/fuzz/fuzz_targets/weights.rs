//! Any bytes in place of a safetensors file are refused, or read as what their header says.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use sd_models::{ModelFiles, Weights};
use tempfile::TempDir;

static CHECKPOINT: LazyLock<TempDir> = LazyLock::new(common::empty_checkpoint);

fuzz_target!(|bytes: &[u8]| {
    common::write(&CHECKPOINT, "unet/diffusion_pytorch_model.safetensors", bytes);
    let files = ModelFiles::from_dir(CHECKPOINT.path()).unwrap();
    let _ = files.hash();
    let Ok(weights) = Weights::load(&files, "unet", &Device::Cpu) else { return };
    for (name, _, shape) in weights.tensors() {
        if let Ok(tensor) = weights.get(&name, &shape) {
            assert_eq!(tensor.dims(), &shape[..]);
        }
    }
});
