use candle_core::{DType, Device, Result, Tensor};

use super::ResnetBlock;
use crate::cpu::isa::Isa;
use crate::gpu::host::on_host;
use crate::tape::Tape;
use crate::testing::{CARD_DTYPES, check, check_on_card, normals, rounded};
use crate::{
    Activation, Conv2d, Conv2dConfig, GroupNorm, Linear, Memory, Padding, conv2d, group_norm, linear,
};

const GROUPS: usize = 2;

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// The weights of a block, as numbers.
struct Weights {
    channels: [usize; 2],
    norms: [[Vec<f32>; 2]; 2],
    convs: [[Vec<f32>; 2]; 2],
    shortcut: [Vec<f32>; 2],
    /// `[1, O]`, or one for each picture of a batch.
    time: Vec<f32>,
}

impl Weights {
    fn new(channels: [usize; 2], times: usize) -> Self {
        let [i, o] = channels;
        Self {
            channels,
            norms: [[normals(i, 10), normals(i, 11)], [normals(o, 12), normals(o, 13)]],
            convs: [[normals(9 * i * o, 14), normals(o, 15)], [normals(9 * o * o, 16), normals(o, 17)]],
            shortcut: [normals(i * o, 18), normals(o, 19)],
            time: normals(times * o, 20),
        }
    }

    /// As a type has them.
    fn rounded(self, dtype: DType) -> Self {
        let both = |pair: [Vec<f32>; 2]| pair.map(|values| rounded(dtype, &values));
        let (convs, shortcut, time) = (self.convs.map(both), both(self.shortcut), rounded(dtype, &self.time));
        Self { convs, shortcut, time, ..self }
    }

    fn block(&self) -> Result<ResnetBlock> {
        self.block_of(DType::F32)
    }

    fn block_of(&self, dtype: DType) -> Result<ResnetBlock> {
        let [i, o] = self.channels;
        let matrix = |values: &[f32], shape: &[usize]| tensor(values, shape).to_dtype(dtype);
        let config = Conv2dConfig { stride: 1, padding: Padding::same(1) };
        let norm = |n: usize, c: usize| {
            let [weight, bias] = &self.norms[n];
            GroupNorm::new(&tensor(weight, &[c]), &tensor(bias, &[c]), GROUPS, 1e-5, Some(Activation::Silu))
        };
        let conv = |n: usize, c: usize| {
            let [weight, bias] = &self.convs[n];
            Conv2d::new(matrix(weight, &[o, c, 3, 3])?, Some(&tensor(bias, &[o])), config)
        };
        let shortcut =
            || Linear::new(matrix(&self.shortcut[0], &[o, i])?, Some(&tensor(&self.shortcut[1], &[o])));
        Ok(ResnetBlock {
            norm1: norm(0, i)?,
            conv1: conv(0, i)?,
            norm2: norm(1, o)?,
            conv2: conv(1, o)?,
            conv_shortcut: (i != o).then(shortcut).transpose()?,
            output_scale_factor: 2.0,
        })
    }

    fn definition(&self, x: &[f64], [b, h, w]: [usize; 3]) -> Vec<f64> {
        let [i, o] = self.channels;
        let norm = |n: usize, x: &[f64]| {
            let [weight, bias] = &self.norms[n];
            group_norm::reference::Norm { weight, bias, groups: GROUPS, eps: 1e-5, silu: true }.forward(x, b)
        };
        let conv = |n: usize, x: &[f64], c: usize| {
            let [weights, bias] = &self.convs[n];
            let config = Conv2dConfig { stride: 1, padding: Padding::same(1) };
            conv2d::reference::Conv { weights, bias, kernel: 3, config }.forward(x, [b, h, w, c])
        };
        let mut hidden = conv(0, &norm(0, x), i);
        let times = self.time.chunks(o).cycle();
        for (picture, time) in hidden.chunks_mut(h * w * o).zip(times) {
            picture.iter_mut().enumerate().for_each(|(at, v)| *v += time[at % o] as f64);
        }
        let y = conv(1, &norm(1, &hidden), o);
        let shortcut = if i == o {
            x.to_vec()
        } else {
            linear::reference::linear(x, &self.shortcut[0], Some(&self.shortcut[1]), i)
        };
        y.iter().zip(shortcut).map(|(y, s)| (y + s) / 2.0).collect()
    }
}

#[test]
fn matches_the_definition_kept_and_computed_again() {
    for (channels, [b, h, w], times) in
        [([4, 4], [1, 5, 4], 1), ([6, 4], [2, 3, 3], 1), ([6, 4], [3, 5, 3], 3)]
    {
        let weights = Weights::new(channels, times);
        let block = weights.block().unwrap();
        let time = tensor(&weights.time, &[times, channels[1]]);
        for memory in [Memory::Fast, Memory::Lean] {
            check(
                &[&[b, h, w, channels[0]]],
                |x| block.forward(&x[0], Some(&time), memory),
                |x| weights.definition(&x[0], [b, h, w]),
            );
        }
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let block = Weights::new([4, 4], 1).block().unwrap();
    let x = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(block.forward(&x(&[1, 4, 4, 4]), None, Memory::Fast).is_ok());
    assert!(block.forward(&x(&[1, 4, 4, 6]), None, Memory::Fast).is_err());
    for time in [&[1, 5][..], &[2, 4], &[4]] {
        assert!(block.forward(&x(&[3, 4, 4, 4]), Some(&x(time)), Memory::Fast).is_err(), "{time:?}");
    }
}

#[test]
fn a_picture_with_its_own_time_is_what_it_is_alone() {
    let (batch, [i, o]) = (3, [6, 4]);
    let weights = Weights::new([i, o], batch);
    // Winograd's two sizes of tile, and a convolution that is one product over the whole batch.
    let winograd = weights.block().unwrap();
    let conv1 = Conv2d::new(
        tensor(&normals(i * o, 21), &[o, i, 1, 1]),
        Some(&tensor(&normals(o, 22), &[o])),
        Conv2dConfig { stride: 1, padding: Padding::same(0) },
    );
    let pointwise = ResnetBlock { conv1: conv1.unwrap(), ..winograd.clone() };
    for (block, side) in [(&winograd, 5), (&winograd, 24), (&pointwise, 5)] {
        let x = tensor(&normals(batch * side * side * i, 23), &[batch, side, side, i]);
        let time = tensor(&weights.time, &[batch, o]);
        let run = |x: &Tensor, time: &Tensor| {
            let y = block.forward(x, Some(time), Memory::Fast).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let alone = |b| run(&x.narrow(0, b, 1).unwrap(), &time.narrow(0, b, 1).unwrap());
        Isa::for_each(|| {
            assert_eq!(run(&x, &time), (0..batch).flat_map(&alone).collect::<Vec<_>>(), "{side}");
        });
    }
}

#[test]
fn matches_the_definition_on_a_card() {
    for (channels, [b, h, w], times) in
        [([16, 16], [1, 5, 4], 1), ([24, 16], [2, 3, 3], 2), ([6, 4], [2, 3, 3], 1)]
    {
        for (dtype, memory) in CARD_DTYPES.into_iter().flat_map(|d| [(d, Memory::Fast), (d, Memory::Lean)]) {
            let weights = Weights::new(channels, times).rounded(dtype);
            let (block, time) = on_host(|| {
                let time = tensor(&weights.time, &[times, channels[1]]).to_dtype(dtype).unwrap();
                (weights.block_of(dtype).unwrap(), time)
            });
            check_on_card(
                dtype,
                &[&[b, h, w, channels[0]]],
                |x| block.forward(&x[0], Some(&time), memory),
                |x| weights.definition(&x[0], [b, h, w]),
            );
        }
    }
}

/// Through a block, and through another with what came around it.
fn with_skip(blocks: &[ResnetBlock; 2], time: &Tensor, x: &Tensor, memory: Memory) -> Result<Tensor> {
    let mut tape = Tape::default();
    let x = tape.input(x);
    let h = blocks[0].on(&mut tape, (&x, None), Some(time), memory)?;
    let y = blocks[1].on(&mut tape, (&h, Some(&x)), Some(time), memory)?;
    tape.end(&y)
}

#[test]
fn a_skip_connection_ends_beside_the_input() {
    let (times, [b, h, w]) = (1, [2, 3, 4]);
    for ([i, o], dtype) in [([4, 6], DType::F32), ([8, 16], DType::F16), ([8, 16], DType::BF16)] {
        let weights = [[i, o], [o + i, o]].map(|channels| Weights::new(channels, times).rounded(dtype));
        let definition = |x: &[Vec<f64>]| {
            let hidden = weights[0].definition(&x[0], [b, h, w]);
            let rows = hidden.chunks(o).zip(x[0].chunks(i));
            let both: Vec<f64> = rows.flat_map(|(hidden, x)| [hidden, x].concat()).collect();
            weights[1].definition(&both, [b, h, w])
        };
        let given = || {
            let time = tensor(&weights[0].time, &[times, o]).to_dtype(dtype).unwrap();
            (weights.each_ref().map(|weights| weights.block_of(dtype).unwrap()), time)
        };
        for memory in [Memory::Fast, Memory::Lean] {
            let shapes: &[&[usize]] = &[&[b, h, w, i]];
            let (blocks, time) = on_host(given);
            check_on_card(dtype, shapes, |x| with_skip(&blocks, &time, &x[0], memory), definition);
            if dtype == DType::F32 {
                let (blocks, time) = given();
                check(shapes, |x| with_skip(&blocks, &time, &x[0], memory), definition);
            }
        }
    }
}
