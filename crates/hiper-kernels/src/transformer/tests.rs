use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Transformer, TransformerAttention, TransformerBlock};
use crate::testing::{check, normals};
use crate::{AttentionConfig, AttentionMask, GroupNorm, LayerNorm, Linear, Memory};
use crate::{attention, geglu, group_norm, layer_norm, linear};

const CHANNELS: usize = 6;
const CONTEXT: usize = 5;
const HEADS: usize = 2;

/// A fully connected layer's weights from a seed.
fn weights(seed: u64, inputs: usize, outputs: usize) -> [Vec<f32>; 2] {
    let scale = (inputs as f32).powf(-0.5);
    [normals(inputs * outputs, seed).iter().map(|w| w * scale).collect(), normals(outputs, seed + 1)]
}

fn layer(seed: u64, inputs: usize, outputs: usize) -> Linear {
    let [weight, bias] = weights(seed, inputs, outputs);
    let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).unwrap();
    Linear::new(&weight, Some(&Tensor::from_vec(bias, outputs, &Device::Cpu).unwrap())).unwrap()
}

fn exact(seed: u64, x: &[f64], inputs: usize, outputs: usize) -> Vec<f64> {
    let [weight, bias] = weights(seed, inputs, outputs);
    linear::reference::linear(x, &weight, Some(&bias), inputs)
}

fn vector(seed: u64) -> Tensor {
    Tensor::from_vec(normals(CHANNELS, seed), CHANNELS, &Device::Cpu).unwrap()
}

fn attention_weights(seed: u64, context: usize) -> TransformerAttention {
    TransformerAttention {
        to_q: layer(seed, CHANNELS, CHANNELS),
        to_k: layer(seed + 2, context, CHANNELS),
        to_v: layer(seed + 4, context, CHANNELS),
        to_out: layer(seed + 6, CHANNELS, CHANNELS),
        num_heads: HEADS,
    }
}

fn transformer(blocks: u64) -> Transformer {
    let norm = |seed| LayerNorm::new(&vector(seed), &vector(seed + 1), 1e-5).unwrap();
    let block = |i: u64| {
        let seed = 1000 * (i + 1);
        Arc::new(TransformerBlock {
            norm1: norm(seed),
            attn1: attention_weights(seed + 10, CHANNELS),
            norm2: norm(seed + 20),
            attn2: attention_weights(seed + 30, CONTEXT),
            norm3: norm(seed + 40),
            ff_in: layer(seed + 50, CHANNELS, 8 * CHANNELS),
            ff_out: layer(seed + 60, 4 * CHANNELS, CHANNELS),
        })
    };
    Transformer {
        norm: GroupNorm::new(&vector(1), &vector(2), 3, 1e-6, None).unwrap(),
        proj_in: layer(3, CHANNELS, CHANNELS),
        blocks: (0..blocks).map(block).collect(),
        proj_out: layer(5, CHANNELS, CHANNELS),
    }
}

fn definition(x: &[f64], context: &[f64], [batch, pixels, keys]: [usize; 3], blocks: u64) -> Vec<f64> {
    let add = |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let norm = |seed: u64, x: &[f64]| {
        layer_norm::reference::layer_norm(x, &normals(CHANNELS, seed), &normals(CHANNELS, seed + 1), 1e-5)
    };
    let attend = |seed: u64, x: &[f64], to: &[f64], width: usize, keys: usize| {
        let qkv = [
            exact(seed, x, CHANNELS, CHANNELS),
            exact(seed + 2, to, width, CHANNELS),
            exact(seed + 4, to, width, CHANNELS),
        ];
        let config = AttentionConfig {
            num_heads: HEADS,
            softmax_scale: ((CHANNELS / HEADS) as f64).powf(-0.5),
            mask: AttentionMask::None,
        };
        let y = attention::reference::attention(&qkv, [batch, pixels, keys], &config);
        exact(seed + 6, &y, CHANNELS, CHANNELS)
    };
    let (weight, bias) = (normals(CHANNELS, 1), normals(CHANNELS, 2));
    let group_norm =
        group_norm::reference::Norm { weight: &weight, bias: &bias, groups: 3, eps: 1e-6, silu: false };
    let mut h = exact(3, &group_norm.forward(x, batch), CHANNELS, CHANNELS);
    for block in 0..blocks {
        let seed = 1000 * (block + 1);
        let normed = norm(seed, &h);
        h = add(attend(seed + 10, &normed, &normed, CHANNELS, pixels), &h);
        h = add(attend(seed + 30, &norm(seed + 20, &h), context, CONTEXT, keys), &h);
        let gates = exact(seed + 50, &norm(seed + 40, &h), CHANNELS, 8 * CHANNELS);
        let gated = geglu::reference::geglu(&gates, 4 * CHANNELS);
        h = add(exact(seed + 60, &gated, 4 * CHANNELS, CHANNELS), &h);
    }
    add(exact(5, &h, CHANNELS, CHANNELS), x)
}

#[test]
fn matches_the_definition_kept_and_computed_again() {
    for (blocks, [batch, height, width, keys]) in [(1, [1, 3, 2, 4]), (2, [2, 2, 2, 3])] {
        let transformer = transformer(blocks);
        for memory in [Memory::Fast, Memory::Lean] {
            check(
                &[&[batch, height, width, CHANNELS], &[batch, keys, CONTEXT]],
                |x| transformer.forward(&x[0], &x[1], memory),
                |x| definition(&x[0], &x[1], [batch, height * width, keys], blocks),
            );
        }
    }
}

#[test]
fn the_gradient_to_the_context_does_not_need_one_to_the_input() {
    let transformer = transformer(2);
    let x = Tensor::from_vec(normals(4 * CHANNELS, 1), (1, 2, 2, CHANNELS), &Device::Cpu).unwrap();
    for memory in [Memory::Fast, Memory::Lean] {
        check(
            &[&[1, 3, CONTEXT]],
            |c| transformer.forward(&x, &c[0], memory),
            |c| {
                let x: Vec<f64> = normals(4 * CHANNELS, 1).iter().map(|&v| v as f64).collect();
                definition(&x, &c[0], [1, 4, 3], 2)
            },
        );
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let transformer = transformer(1);
    let x = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let good = [x(&[1, 2, 2, CHANNELS]), x(&[1, 3, CONTEXT])];
    assert!(transformer.forward(&good[0], &good[1], Memory::Fast).is_ok());
    assert!(transformer.forward(&x(&[1, 2, 2, 9]), &good[1], Memory::Fast).is_err());
    assert!(transformer.forward(&good[0], &x(&[2, 3, CONTEXT]), Memory::Fast).is_err());
    assert!(transformer.forward(&good[0], &x(&[1, 3, 4]), Memory::Fast).is_err());
}
