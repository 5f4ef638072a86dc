//! Checks of the command line that need the build, the machine or the model.

use candle_core::{DType, Device};

use super::{Common, DTypeChoice, DeviceChoice, Sampling};
use crate::compute::Compute;
use crate::render::Look;
use crate::{Error, Result};

/// Applies the common flags, and says where and how to compute.
pub fn check(common: &Common) -> Result<Compute> {
    if std::env::var("HIPER_SM90A").is_ok_and(|wanted| wanted == "0") {
        sd_models::forgo_sm90a();
    }
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
    let dtype = dtype(common.dtype, device.is_cpu())?;
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|error| {
            Error::refused(format!("--threads {threads}: {error}"), "ask for fewer threads")
        })?;
    }
    Ok(Compute { device, dtype, memory: common.memory })
}

/// What the networks compute in.
fn dtype(choice: DTypeChoice, on_cpu: bool) -> Result<DType> {
    Ok(match (choice, on_cpu) {
        (DTypeChoice::Auto, true) | (DTypeChoice::F32, _) => DType::F32,
        (DTypeChoice::F16, true) => return Err(only_f32("f16")),
        (DTypeChoice::Bf16, true) => return Err(only_f32("bf16")),
        (DTypeChoice::Auto | DTypeChoice::F16, false) => DType::F16,
        (DTypeChoice::Bf16, false) => DType::BF16,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_computes_in_every_type_and_a_cpu_in_one() {
        use DTypeChoice::{Auto, Bf16, F16, F32};
        for (choice, on_card) in
            [(Auto, DType::F16), (F32, DType::F32), (F16, DType::F16), (Bf16, DType::BF16)]
        {
            assert_eq!(dtype(choice, false).unwrap(), on_card);
            assert_eq!(dtype(choice, true).ok(), matches!(choice, Auto | F32).then_some(DType::F32));
        }
    }
}
