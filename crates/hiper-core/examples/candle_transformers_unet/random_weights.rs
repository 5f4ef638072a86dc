//! Weights for a network that has no checkpoint: normal numbers, the same in every run.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use hiper_core::TorchGenerator;

/// Gives each weight by its name.
struct RandomWeights;

/// Weights of a network that was never trained. With a checkpoint it would be `VarBuilder::from_buffered_safetensors`.
pub fn random_weights(device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(RandomWeights), DType::F32, device.clone())
}

impl SimpleBackend for RandomWeights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        // FNV-1a.
        let seed = name
            .bytes()
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let values = TorchGenerator::new(seed.into()).randn_tensor(shape.dims(), device)?.to_dtype(dtype)?;
        match shape.dims() {
            // The factors of normalisations are about 1, all biases about 0.
            [_] if name.ends_with("weight") => (values * 0.1)? + 1.0,
            [_] => values * 0.1,
            [_, inputs @ ..] => values / (inputs.iter().product::<usize>() as f64).sqrt(),
            [] => Ok(values),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name} has no shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        // candle-nn asks for older names of its normalisations.
        !name.ends_with("gamma") && !name.ends_with("beta")
    }
}
