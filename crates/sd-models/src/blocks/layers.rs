//! Layers from their weights: the names under which diffusers stores them are `weight` and `bias`.

use hiper_kernels::{Activation, Conv2d, Conv2dConfig, GroupNorm, LayerNorm, Linear, Padding};

use crate::{Error, Result, Weights};

/// A fully connected layer `[O, I]` with its bias.
pub(crate) fn linear(weights: &Weights, inputs: usize, outputs: usize) -> Result<Linear> {
    let weight = weights.get_matrix("weight", &[outputs, inputs])?;
    Ok(Linear::new(weight, Some(&weights.get("bias", &[outputs])?))?)
}

/// A 1×1 convolution, which channels-last is a fully connected layer; stored either way.
pub(crate) fn pointwise(weights: &Weights, inputs: usize, outputs: usize) -> Result<Linear> {
    let weight = match weights.get_matrix("weight", &[outputs, inputs, 1, 1]) {
        Err(Error::TensorShape { got, .. }) if got == [outputs, inputs] => {
            weights.get_matrix("weight", &[outputs, inputs])?
        }
        other => other?.reshape(&[outputs, inputs])?,
    };
    Ok(Linear::new(weight, Some(&weights.get("bias", &[outputs])?))?)
}

/// A 3×3 convolution.
pub(crate) fn conv2d(
    weights: &Weights,
    inputs: usize,
    outputs: usize,
    stride: usize,
    padding: Padding,
) -> Result<Conv2d> {
    let weight = weights.get_matrix("weight", &[outputs, inputs, 3, 3])?;
    let bias = weights.get("bias", &[outputs])?;
    Ok(Conv2d::new(weight, Some(&bias), Conv2dConfig { stride, padding })?)
}

/// A group normalisation and what follows it.
pub(crate) fn group_norm(
    weights: &Weights,
    channels: usize,
    groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Result<GroupNorm> {
    let (weight, bias) = (weights.get("weight", &[channels])?, weights.get("bias", &[channels])?);
    Ok(GroupNorm::new(&weight, &bias, groups, eps, activation)?)
}

/// A layer normalisation.
pub(crate) fn layer_norm(weights: &Weights, channels: usize, eps: f64) -> Result<LayerNorm> {
    let (weight, bias) = (weights.get("weight", &[channels])?, weights.get("bias", &[channels])?);
    Ok(LayerNorm::new(&weight, &bias, eps)?)
}
