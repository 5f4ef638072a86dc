//! Checks of the command line that need the build, the machine or the model.

use candle_core::Device;

use super::{Common, DTypeChoice, DeviceChoice, Sampling};
use crate::compute::Compute;
use crate::render::Look;
use crate::{Error, Result};

/// Applies the common flags, and says where and how to compute.
pub fn check(common: &Common) -> Result<Compute> {
    let device = match common.device {
        DeviceChoice::Auto | DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda(_) => return Err(not_compiled_in("cuda", "CUDA")),
        DeviceChoice::Metal => return Err(not_compiled_in("metal", "Metal")),
    };
    match common.dtype {
        DTypeChoice::Auto | DTypeChoice::F32 => {}
        DTypeChoice::F16 => return Err(only_f32("f16")),
        DTypeChoice::Bf16 => return Err(only_f32("bf16")),
    }
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|error| {
            Error::refused(format!("--threads {threads}: {error}"), "ask for fewer threads")
        })?;
    }
    Ok(Compute { device, memory: common.memory })
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
