//! Any configuration is refused by name, or asks for weights that the (empty) file lacks; schedulers are built and run dry.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use sd_models::schedulers::{SchedulerConfig, SchedulerKind};
use sd_models::{AutoencoderKl, ClipTextModel, ModelFiles, UNet2DConditionModel};
use tempfile::TempDir;

static CHECKPOINT: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = common::empty_checkpoint();
    let empty = [2u64.to_le_bytes().as_slice(), b"{}"].concat();
    for file in ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"] {
        common::write(&dir, &format!("{file}.safetensors"), &empty);
    }
    dir
});

fuzz_target!(|config: &[u8]| {
    for component in ["unet", "vae", "text_encoder"] {
        common::write(&CHECKPOINT, &format!("{component}/config.json"), config);
    }
    common::write(&CHECKPOINT, "scheduler/scheduler_config.json", config);
    let files = ModelFiles::from_dir(CHECKPOINT.path()).unwrap();
    assert!(UNet2DConditionModel::load(&files, &Device::Cpu).is_err());
    assert!(AutoencoderKl::load(&files, &Device::Cpu).is_err());
    assert!(ClipTextModel::load(&files, &Device::Cpu).is_err());
    if let Ok(config) = SchedulerConfig::load(&files) {
        for name in ["ddpm", "ddim", "pndm", "euler", "euler-a", "dpm++", "unipc"] {
            let kind: SchedulerKind = name.parse().unwrap();
            let _ = kind.build(&config, 7);
        }
    }
});
