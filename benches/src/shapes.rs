//! Which operators, at which shapes: those that the UNet of Stable Diffusion 1.5 spends its time in at 512².

use std::sync::Arc;

use candle_core::{Result, Tensor};
use hiper_kernels::{
    Activation, AttentionConfig, AttentionMask, Context, Conv2d, Conv2dConfig, GroupNorm, LayerNorm, Linear,
    Memory, Padding, ResnetBlock, Transformer, TransformerAttention, TransformerBlock, attention, geglu,
};

use crate::{Operator, Work, filled};

/// Tokens of a text and their width.
const TEXT: [usize; 2] = [77, 768];
const NUM_HEADS: usize = 8;

/// Calls `f` with one operator after the other; each is freed before the next is made.
///
/// # Errors
/// What making an operator, or `f`, gives.
pub fn for_each_operator<E: From<candle_core::Error>>(
    mut f: impl FnMut(Operator) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    for (i, o, size) in [(320, 320, 64), (960, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8)] {
        f(convolution(i, o, size)?)?;
    }
    for (rows, i, o) in [(4096, 320, 320), (4096, 320, 2560), (1024, 640, 5120), (256, 1280, 10240)] {
        f(fully_connected(rows, i, o)?)?;
    }
    for (queries, keys, head_dim) in [(4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40)] {
        f(attend(queries, keys, head_dim)?)?;
    }
    for (channels, size) in [(320, 64), (640, 32), (1280, 16)] {
        f(group_normalisation(channels, size)?)?;
        f(layer_normalisation(channels, size)?)?;
        f(gated_gelu(4 * channels, size * size)?)?;
        f(residual_block(channels, size)?)?;
        f(transformer(channels, size)?)?;
    }
    Ok(())
}

fn operator(
    name: String,
    [forward_work, gradient_work]: [Work; 2],
    input: &[usize],
    apply: impl Fn(&Tensor) -> Result<Tensor> + 'static,
) -> Result<Operator> {
    Ok(Operator { name, forward_work, gradient_work, input: filled(input)?, apply: Box::new(apply) })
}

/// As many operations backward as forward.
fn flops(count: usize) -> [Work; 2] {
    [Work::Flops(count as u64); 2]
}

/// Numbers read and written forward, then backward.
fn floats(forward: usize, gradient: usize) -> [Work; 2] {
    [Work::Bytes(4 * forward as u64), Work::Bytes(4 * gradient as u64)]
}

fn conv(channels_in: usize, channels_out: usize) -> Result<Conv2d> {
    let config = Conv2dConfig { stride: 1, padding: Padding::same(1) };
    Conv2d::new(filled(&[channels_out, channels_in, 3, 3])?, Some(&filled(&[channels_out])?), config)
}

fn linear(inputs: usize, outputs: usize) -> Result<Linear> {
    Linear::new(filled(&[outputs, inputs])?, Some(&filled(&[outputs])?))
}

fn group_norm(channels: usize) -> Result<GroupNorm> {
    let weight = filled(&[channels])?;
    GroupNorm::new(&weight, &weight, 32, 1e-5, Some(Activation::Silu))
}

fn layer_norm(channels: usize) -> Result<LayerNorm> {
    let weight = filled(&[channels])?;
    LayerNorm::new(&weight, &weight, 1e-5)
}

fn convolution(channels_in: usize, channels_out: usize, size: usize) -> Result<Operator> {
    let layer = conv(channels_in, channels_out)?;
    let name = format!("conv2d 3×3 {channels_in}→{channels_out} @{size}²");
    let work = flops(2 * 9 * channels_in * channels_out * size * size);
    operator(name, work, &[1, size, size, channels_in], move |x| layer.forward(x))
}

fn fully_connected(rows: usize, inputs: usize, outputs: usize) -> Result<Operator> {
    let layer = linear(inputs, outputs)?;
    let name = format!("linear {rows}×{inputs}→{outputs}");
    operator(name, flops(2 * rows * inputs * outputs), &[1, rows, inputs], move |x| layer.forward(x))
}

/// Two products forward; backward five: the scores once more, and the gradients to v, the scores, q and k.
fn attention_flops(queries: usize, keys: usize, width: usize) -> [usize; 2] {
    [2, 5].map(|products| products * 2 * queries * keys * width)
}

fn attend(queries: usize, keys: usize, head_dim: usize) -> Result<Operator> {
    let softmax_scale = (head_dim as f64).powf(-0.5);
    let config = AttentionConfig { num_heads: NUM_HEADS, softmax_scale, mask: AttentionMask::None };
    let width = NUM_HEADS * head_dim;
    let k = filled(&[1, keys, width])?;
    let work = attention_flops(queries, keys, width).map(|count| Work::Flops(count as u64));
    let name = format!("attention {queries}×{keys} d{head_dim}");
    operator(name, work, &[1, queries, width], move |q| attention(q, &k, &k, &config))
}

fn group_normalisation(channels: usize, size: usize) -> Result<Operator> {
    let layer = group_norm(channels)?;
    let count = channels * size * size;
    let name = format!("group_norm+silu {channels} @{size}²");
    operator(name, floats(2 * count, 3 * count), &[1, size, size, channels], move |x| layer.forward(x))
}

fn layer_normalisation(channels: usize, size: usize) -> Result<Operator> {
    let layer = layer_norm(channels)?;
    let count = channels * size * size;
    let name = format!("layer_norm {}×{channels}", size * size);
    operator(name, floats(2 * count, 3 * count), &[1, size * size, channels], move |x| layer.forward(x))
}

fn gated_gelu(channels: usize, rows: usize) -> Result<Operator> {
    let count = channels * rows;
    let name = format!("geglu {rows}×{channels}");
    operator(name, floats(3 * count, 5 * count), &[1, rows, 2 * channels], geglu)
}

fn residual_block(channels: usize, size: usize) -> Result<Operator> {
    let block = ResnetBlock {
        norm1: group_norm(channels)?,
        conv1: conv(channels, channels)?,
        norm2: group_norm(channels)?,
        conv2: conv(channels, channels)?,
        conv_shortcut: None,
        output_scale_factor: 1.0,
    };
    let name = format!("resnet block {channels} @{size}²");
    let work = flops(2 * 2 * 9 * channels * channels * size * size);
    let time = filled(&[1, channels])?;
    operator(name, work, &[1, size, size, channels], move |x| block.forward(x, Some(&time), Memory::Fast))
}

/// The projections of an attention of `width` to what is `context` wide.
fn projections(width: usize, context: usize) -> Result<TransformerAttention> {
    Ok(TransformerAttention {
        to_q: linear(width, width)?,
        to_k: linear(context, width)?,
        to_v: linear(context, width)?,
        to_out: linear(width, width)?,
        num_heads: NUM_HEADS,
    })
}

/// Operations of one transformer with one block: linear layers (of the pixels, then of the text) and both attentions.
fn transformer_flops(pixels: usize, channels: usize) -> [usize; 2] {
    let [tokens, width] = TEXT;
    // proj_in and proj_out, q k v out of the self-attention, q out of the cross-attention, 8 + 4 of the feed-forward.
    let linear = 2 * pixels * channels * channels * (2 + 4 + 2 + 12) + 2 * 2 * tokens * width * channels;
    let [own, text] = [pixels, tokens].map(|keys| attention_flops(pixels, keys, channels));
    [0, 1].map(|way| linear + own[way] + text[way])
}

fn transformer(channels: usize, size: usize) -> Result<Operator> {
    let block = TransformerBlock {
        norm1: layer_norm(channels)?,
        attn1: projections(channels, channels)?,
        norm2: layer_norm(channels)?,
        attn2: projections(channels, TEXT[1])?,
        norm3: layer_norm(channels)?,
        ff_in: linear(channels, 8 * channels)?,
        ff_out: linear(4 * channels, channels)?,
    };
    let weight = filled(&[channels])?;
    let transformer = Transformer {
        norm: GroupNorm::new(&weight, &weight, 32, 1e-6, None)?,
        proj_in: linear(channels, channels)?,
        blocks: vec![Arc::new(block)],
        proj_out: linear(channels, channels)?,
    };
    let context = Context::whole(&filled(&[1, TEXT[0], TEXT[1]])?);
    let work = transformer_flops(size * size, channels).map(|count| Work::Flops(count as u64));
    let name = format!("transformer {channels} @{size}²");
    operator(name, work, &[1, size, size, channels], move |x| transformer.forward(x, &context, Memory::Fast))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted_as_by_hand() {
        // 4096 queries and keys of 8 heads of 40: q kᵀ and p v, 2·4096·4096·320 each.
        assert_eq!(attention_flops(4096, 4096, 320)[0], 21_474_836_480);
        // At one pixel of one channel: 20 products of two, the text's k and v, and attention to one pixel and 77 tokens.
        assert_eq!(transformer_flops(1, 1), [40 + 4 * 77 * 768 + 4 * 78, 40 + 4 * 77 * 768 + 10 * 78]);
    }

    #[test]
    fn small_operators_have_a_gradient() {
        for operator in
            [residual_block(32, 4), transformer(32, 4), group_normalisation(32, 4), gated_gelu(3, 5)]
        {
            let operator = operator.unwrap();
            let x = candle_core::Var::from_tensor(&operator.input).unwrap();
            let y = operator.apply(&x).unwrap();
            let grads = y.backward().unwrap();
            assert_eq!(grads.get(&x).unwrap().dims(), x.dims(), "{}", operator.name);
        }
    }
}
