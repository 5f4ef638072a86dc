//! What the UNet and the VAE are made of, named after diffusers' classes. Activations are channels-last.

mod attention;
mod layers;
mod precision;
mod resnet_block_2d;
mod sampling;
mod timesteps;
mod transformer_2d_model;

pub(crate) use attention::Attention;
pub(crate) use layers::{conv2d, group_norm, layer_norm, linear, pointwise};
pub(crate) use precision::Precision;
pub(crate) use resnet_block_2d::{ResnetBlock2D, ResnetConfig};
pub(crate) use sampling::{Downsample2D, Upsample2D};
pub(crate) use timesteps::TimestepEmbedding;
pub(crate) use transformer_2d_model::{TextLayers, Transformer2DConfig, Transformer2DModel};
