use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Context, Transformer, TransformerAttention, TransformerBlock};
use crate::gpu::host::on_host;
use crate::tape::Tape;
use crate::testing::{check, check_on_card, normals, rounded};
use crate::{AttentionConfig, AttentionMask, GroupNorm, LayerNorm, Linear, Memory};
use crate::{attention, geglu, group_norm, layer_norm, linear};

/// The sizes of a transformer, and the type of its matrices.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub channels: usize,
    pub context: usize,
    pub heads: usize,
    pub groups: usize,
    pub blocks: u64,
    pub dtype: DType,
    /// Whether weights of one input lie one behind the other.
    pub together: bool,
}

const SMALL: Sizes =
    Sizes { channels: 6, context: 5, heads: 2, groups: 3, blocks: 1, dtype: DType::F32, together: false };

/// Of heads that a card has kernels for.
pub(super) const WIDE: Sizes =
    Sizes { channels: 64, context: 40, heads: 2, groups: 4, blocks: 1, dtype: DType::F16, together: true };

impl Sizes {
    /// A fully connected layer's weights from a seed.
    fn weights(&self, seed: u64, inputs: usize, outputs: usize) -> [Vec<f32>; 2] {
        let scale = (inputs as f32).powf(-0.5);
        let weight: Vec<f32> = normals(inputs * outputs, seed).iter().map(|w| w * scale).collect();
        [rounded(self.dtype, &weight), rounded(self.dtype, &normals(outputs, seed + 1))]
    }

    pub fn tensors(&self, seed: u64, inputs: usize, outputs: usize) -> [Tensor; 2] {
        let [weight, bias] = self.weights(seed, inputs, outputs);
        let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).unwrap();
        [weight.to_dtype(self.dtype).unwrap(), Tensor::from_vec(bias, outputs, &Device::Cpu).unwrap()]
    }

    fn layer(&self, seed: u64, inputs: usize, outputs: usize) -> Linear {
        let [weight, bias] = self.tensors(seed, inputs, outputs);
        Linear::new(weight, Some(&bias)).unwrap()
    }

    fn exact(&self, seed: u64, x: &[f64], inputs: usize, outputs: usize) -> Vec<f64> {
        let [weight, bias] = self.weights(seed, inputs, outputs);
        linear::reference::linear(x, &weight, Some(&bias), inputs)
    }

    fn vector(&self, seed: u64) -> Tensor {
        Tensor::from_vec(normals(self.channels, seed), self.channels, &Device::Cpu).unwrap()
    }

    fn attention_weights(&self, seed: u64, context: usize) -> TransformerAttention {
        let c = self.channels;
        let weights = |seed, inputs| {
            let [weight, bias] = self.tensors(seed, inputs, c);
            (weight.into(), Some(bias))
        };
        let (q, k, v) = (weights(seed, c), weights(seed + 2, context), weights(seed + 4, context));
        let [to_q, to_k, to_v] = if self.together && context == c {
            Linear::side_by_side([q, k, v]).unwrap()
        } else if self.together {
            let [to_k, to_v] = Linear::side_by_side([k, v]).unwrap();
            [self.layer(seed, c, c), to_k, to_v]
        } else {
            [self.layer(seed, c, c), self.layer(seed + 2, context, c), self.layer(seed + 4, context, c)]
        };
        let to_out = self.layer(seed + 6, c, c);
        TransformerAttention { to_q, to_k, to_v, to_out, num_heads: self.heads }
    }

    pub fn transformer(&self) -> Transformer {
        let c = self.channels;
        let norm = |seed| LayerNorm::new(&self.vector(seed), &self.vector(seed + 1), 1e-5).unwrap();
        let block = |i: u64| {
            let seed = 1000 * (i + 1);
            Arc::new(TransformerBlock {
                norm1: norm(seed),
                attn1: self.attention_weights(seed + 10, c),
                norm2: norm(seed + 20),
                attn2: self.attention_weights(seed + 30, self.context),
                norm3: norm(seed + 40),
                ff_in: self.layer(seed + 50, c, 8 * c),
                ff_out: self.layer(seed + 60, 4 * c, c),
            })
        };
        Transformer {
            norm: GroupNorm::new(&self.vector(1), &self.vector(2), self.groups, 1e-6, None).unwrap(),
            proj_in: self.layer(3, c, c),
            blocks: (0..self.blocks).map(block).collect(),
            proj_out: self.layer(5, c, c),
        }
    }

    fn definition(&self, x: &[f64], context: &[f64], [batch, pixels, keys]: [usize; 3]) -> Vec<f64> {
        let c = self.channels;
        let add = |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let norm = |seed: u64, x: &[f64]| {
            layer_norm::reference::layer_norm(x, &normals(c, seed), &normals(c, seed + 1), 1e-5)
        };
        let attend = |seed: u64, x: &[f64], to: &[f64], width: usize, keys: usize| {
            let qkv = [
                self.exact(seed, x, c, c),
                self.exact(seed + 2, to, width, c),
                self.exact(seed + 4, to, width, c),
            ];
            let config = AttentionConfig {
                num_heads: self.heads,
                softmax_scale: ((c / self.heads) as f64).powf(-0.5),
                mask: AttentionMask::None,
            };
            let y = attention::reference::attention(&qkv, [batch, pixels, keys], &config);
            self.exact(seed + 6, &y, c, c)
        };
        let (weight, bias) = (normals(c, 1), normals(c, 2));
        let groups = self.groups;
        let group_norm =
            group_norm::reference::Norm { weight: &weight, bias: &bias, groups, eps: 1e-6, silu: false };
        let mut h = self.exact(3, &group_norm.forward(x, batch), c, c);
        for block in 0..self.blocks {
            let seed = 1000 * (block + 1);
            let normed = norm(seed, &h);
            h = add(attend(seed + 10, &normed, &normed, c, pixels), &h);
            h = add(attend(seed + 30, &norm(seed + 20, &h), context, self.context, keys), &h);
            let gates = self.exact(seed + 50, &norm(seed + 40, &h), c, 8 * c);
            let gated = geglu::reference::geglu(&gates, 4 * c);
            h = add(self.exact(seed + 60, &gated, 4 * c, c), &h);
        }
        add(self.exact(5, &h, c, c), x)
    }
}

#[test]
fn matches_the_definition_kept_and_computed_again() {
    for (blocks, [batch, height, width, keys]) in [(1, [1, 3, 2, 4]), (2, [2, 2, 2, 3])] {
        let sizes = Sizes { blocks, ..SMALL };
        let transformer = sizes.transformer();
        for memory in [Memory::Fast, Memory::Lean] {
            check(
                &[&[batch, height, width, sizes.channels], &[batch, keys, sizes.context]],
                |x| transformer.forward(&x[0], &Context::whole(&x[1]), memory),
                |x| sizes.definition(&x[0], &x[1], [batch, height * width, keys]),
            );
        }
    }
}

#[test]
fn matches_the_definition_on_a_card() {
    // Queries enough for the gradients of keys to be summed over two parts of them, once. No kernel has heads of 24 or `f32`.
    for (blocks, [batch, height, width, keys], dtype, channels) in [
        (1, [1, 12, 11, 7], DType::F16, 64),
        (2, [2, 2, 3, 5], DType::F16, 64),
        (1, [2, 3, 3, 17], DType::BF16, 64),
        (2, [2, 3, 3, 5], DType::F32, 64),
        (1, [2, 3, 2, 5], DType::F32, 12),
        (1, [1, 3, 2, 16], DType::F16, 48),
        (2, [2, 2, 3, 5], DType::BF16, 48),
    ] {
        for (memory, together) in [(Memory::Fast, true), (Memory::Lean, true), (Memory::Lean, false)] {
            let sizes = Sizes { channels, context: 40, heads: 2, groups: 4, blocks, dtype, together };
            let transformer = on_host(|| sizes.transformer());
            check_on_card(
                dtype,
                &[&[batch, height, width, sizes.channels], &[batch, keys, sizes.context]],
                |x| transformer.forward(&x[0], &Context::whole(&x[1]), memory),
                |x| sizes.definition(&x[0], &x[1], [batch, height * width, keys]),
            );
        }
    }
}

#[test]
fn the_gradient_to_the_context_does_not_need_one_to_the_input() {
    let sizes = Sizes { blocks: 2, ..SMALL };
    let (transformer, c) = (sizes.transformer(), sizes.channels);
    let x = Tensor::from_vec(normals(4 * c, 1), (1, 2, 2, c), &Device::Cpu).unwrap();
    for memory in [Memory::Fast, Memory::Lean] {
        check(
            &[&[1, 3, sizes.context]],
            |context| transformer.forward(&x, &Context::whole(&context[0]), memory),
            |context| {
                let x: Vec<f64> = normals(4 * c, 1).iter().map(|&v| v as f64).collect();
                sizes.definition(&x, &context[0], [1, 4, 3])
            },
        );
    }
}

/// A frozen head before the tails of a batch.
pub(super) struct Head {
    sizes: Sizes,
    values: Vec<f32>,
    batch: usize,
    tokens: usize,
}

impl Head {
    pub fn new(sizes: Sizes, batch: usize, tokens: usize) -> Self {
        let values = rounded(sizes.dtype, &normals(batch * tokens * sizes.context, 9));
        Self { sizes, values, batch, tokens }
    }

    pub fn before(&self, tail: &Tensor) -> Result<Context> {
        let shape = (self.batch, self.tokens, self.sizes.context);
        let head = Tensor::from_slice(&self.values, shape, &Device::Cpu)?;
        Context::of_head_and_tail(&head.to_dtype(tail.dtype())?, tail)
    }

    /// Of two pixels.
    pub fn definition(&self, x: &[f64], tails: &[f64]) -> Vec<f64> {
        let width = self.sizes.context;
        let tail_len = tails.len() / self.batch;
        let of_each = self.values.chunks(self.tokens * width).zip(tails.chunks(tail_len));
        let context: Vec<f64> = of_each
            .flat_map(|(head, tail)| head.iter().map(|&v| f64::from(v)).chain(tail.iter().copied()))
            .collect();
        self.sizes.definition(x, &context, [self.batch, 2, self.tokens + tail_len / width])
    }
}

#[test]
fn a_tails_gradient_is_its_part_of_the_contexts() {
    // More tokens than a block of keys has; a tail of less than a panel, and of more.
    for (blocks, [batch, tokens, tail]) in [(1, [1, 295, 5]), (2, [2, 57, 20])] {
        let sizes = Sizes { blocks, ..SMALL };
        let (transformer, head) = (sizes.transformer(), Head::new(sizes, batch, tokens));
        for memory in [Memory::Fast, Memory::Lean] {
            check(
                &[&[batch, 1, 2, sizes.channels], &[batch, tail, sizes.context]],
                |x| transformer.forward(&x[0], &head.before(&x[1])?, memory),
                |x| head.definition(&x[0], &x[1]),
            );
        }
    }
}

#[test]
fn a_tails_gradient_is_its_part_of_the_contexts_on_a_card() {
    for (channels, dtype, [batch, tokens, tail]) in
        [(64, DType::F16, [2, 15, 5]), (64, DType::F32, [2, 6, 3]), (48, DType::BF16, [1, 2, 17])]
    {
        let together = dtype == DType::F16;
        let sizes = Sizes { channels, context: 40, heads: 2, groups: 4, blocks: 2, dtype, together };
        let (transformer, head) = (on_host(|| sizes.transformer()), Head::new(sizes, batch, tokens));
        check_on_card(
            dtype,
            &[&[batch, 1, 2, channels], &[batch, tail, sizes.context]],
            |x| transformer.forward(&x[0], &head.before(&x[1])?, Memory::Fast),
            |x| head.definition(&x[0], &x[1]),
        );
    }
}

#[test]
fn a_card_computes_the_gradients_that_are_wanted() {
    let (dtype, together) = (DType::F16, true);
    let sizes = Sizes { channels: 64, context: 40, heads: 2, groups: 4, blocks: 2, dtype, together };
    let transformer = on_host(|| sizes.transformer());
    let exact = |values: &[f32]| values.iter().map(|&v| v as f64).collect::<Vec<_>>();
    let (x_shape, c_shape) = ([1, 2, 2, 64], [1, 3, 40]);
    let (x, context) = (rounded(sizes.dtype, &normals(256, 11)), rounded(sizes.dtype, &normals(120, 12)));
    let tensor = |values: &[f32], shape: &[usize]| {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap().to_dtype(sizes.dtype).unwrap()
    };
    check_on_card(
        sizes.dtype,
        &[&c_shape],
        |c| transformer.forward(&tensor(&x, &x_shape), &Context::whole(&c[0]), Memory::Fast),
        |c| sizes.definition(&exact(&x), &c[0], [1, 4, 3]),
    );
    check_on_card(
        sizes.dtype,
        &[&x_shape],
        |x| transformer.forward(&x[0], &Context::whole(&tensor(&context, &c_shape)), Memory::Lean),
        |x| sizes.definition(&x[0], &exact(&context), [1, 4, 3]),
    );
}

/// A transformer and its input, added: the gradient that goes around is known before the transformer's.
fn beside_its_input(transformer: &Transformer, context: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (mut tape, context) = (Tape::default(), Context::whole(context));
    let (x, text) = (tape.input(x), context.on(&mut tape)?);
    let h = transformer.on(&mut tape, &x, (&context, &text), Memory::Fast)?;
    let sum = (h.tensor() + x.tensor())?;
    let y = tape.step(&[&h, &x], sum, |d| Ok(vec![Some(d.clone()), Some(d.clone())]));
    tape.end(&y)
}

#[test]
fn what_is_known_of_the_inputs_gradient_is_added() {
    let definition = |sizes: Sizes| {
        move |x: &[Vec<f64>]| -> Vec<f64> {
            sizes.definition(&x[0], &x[1], [1, 4, 3]).iter().zip(&x[0]).map(|(y, x)| y + x).collect()
        }
    };
    let shapes = |sizes: Sizes| [vec![1, 2, 2, sizes.channels], vec![1, 3, sizes.context]];
    let transformer = SMALL.transformer();
    let [x, context] = shapes(SMALL);
    check(&[&x, &context], |x| beside_its_input(&transformer, &x[1], &x[0]), definition(SMALL));
    let transformer = on_host(|| WIDE.transformer());
    let [x, context] = shapes(WIDE);
    let on_card = |x: &[Tensor]| beside_its_input(&transformer, &x[1], &x[0]);
    check_on_card(WIDE.dtype, &[&x, &context], on_card, definition(WIDE));
}

#[test]
fn wrong_shapes_are_errors() {
    let (transformer, channels, context) = (SMALL.transformer(), SMALL.channels, SMALL.context);
    let x = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let good = [x(&[1, 2, 2, channels]), x(&[1, 3, context])];
    let forward = |x: &Tensor, tokens: &Tensor| transformer.forward(x, &Context::whole(tokens), Memory::Fast);
    assert!(forward(&good[0], &good[1]).is_ok());
    assert!(forward(&x(&[1, 2, 2, 9]), &good[1]).is_err());
    assert!(forward(&good[0], &x(&[2, 3, context])).is_err());
    assert!(forward(&good[0], &x(&[1, 3, 4])).is_err());
    assert!(Context::of_head_and_tail(&good[1], &x(&[1, 2, 4])).is_err());
    let error = on_host(|| forward(&good[0], &good[1])).unwrap_err().to_string();
    assert!(error.contains("same device"), "{error}");
}
