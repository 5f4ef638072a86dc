//! Checks of the command line that need the build, the machine or the model.

use candle_core::{DType, Device};

use super::{Common, DTypeChoice, DeviceChoice, Sampling};
use crate::compute::Compute;
use crate::render::Look;
use crate::{Error, Result};

/// Applies the common flags, and says where and how to compute.
pub fn check(common: &Common) -> Result<Compute> {
    let device = match common.device {
        DeviceChoice::Auto if cfg!(feature = "cuda") => sd_models::cuda_device(0).unwrap_or(Device::Cpu),
        DeviceChoice::Auto | DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda(_) if !cfg!(feature = "cuda") => return Err(not_compiled_in("cuda", "CUDA")),
        DeviceChoice::Cuda(number) => sd_models::cuda_device(number).map_err(|error| {
            let message = format!("--device cuda:{number}: {error}");
            Error::refused(message, "nvidia-smi lists the cards; --device cpu needs none")
        })?,
        DeviceChoice::Metal => return Err(not_compiled_in("metal", "Metal")),
    };
    let dtype = match (common.dtype, device.is_cpu()) {
        (DTypeChoice::Auto | DTypeChoice::F32, true) => DType::F32,
        (DTypeChoice::F16, true) => return Err(only_f32("f16")),
        (DTypeChoice::Bf16, true) => return Err(only_f32("bf16")),
        (DTypeChoice::Auto | DTypeChoice::F16, false) => DType::F16,
        (DTypeChoice::Bf16, false) => DType::BF16,
        (DTypeChoice::F32, false) => {
            let message = "--dtype f32: a card computes in f16 or bf16";
            return Err(Error::refused(message, "use --dtype f16, or --device cpu"));
        }
    };
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|error| {
            Error::refused(format!("--threads {threads}: {error}"), "ask for fewer threads")
        })?;
    }
    Ok(Compute { device, dtype, memory: common.memory })
}

fn not_compiled_in(flag: &str, name: &str) -> Error {
    Error::refused(
        format!("--device {flag}: {name} is not compiled into this build of hiper"),
        "use --device cpu",
    )
}

fn only_f32(dtype: &str) -> Error {
    Error::refused(
        format!("--dtype {dtype}: the CPU computes in f32 only"),
        "use --dtype f32; checkpoints stored in f16 or bf16 load all the same",
    )
}

/// How `edit` and `generate` draw.
pub fn look(sampling: &Sampling, tail_scale: f64) -> Look {
    Look {
        steps: sampling.steps,
        guidance_scale: sampling.guidance_scale,
        scheduler: sampling.scheduler,
        negative_prompt: sampling.negative_prompt.clone(),
        tail_scale,
    }
}
