//! What operators err in `f16`, values and gradients, beside what PyTorch errs: `tools/fixtures/operators.py` has the same inputs and
//! operators, and wrote PyTorch's own errors and the values in `f64`.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use hiper_core::TorchGenerator;
use hiper_kernels::{
    Activation, AttentionConfig, AttentionMask, Context, Conv2d, Conv2dConfig, GroupNorm, LayerNorm, Linear,
    Memory, Padding, ResnetBlock, Transformer, TransformerAttention, TransformerBlock, activation, attention,
    geglu, on_test_device, upsample_nearest2d,
};
use hiper_tests::{Golden, relative_l2};

use super::package;

/// How many times PyTorch's error ours may be.
const MOST: f64 = 2.0;
/// As many values of each tensor are compared, or a few more.
const SAMPLES: usize = 1500;

/// Its inputs, which have gradients; its weights, and the powers of two that they are scaled by.
struct Case {
    name: &'static str,
    inputs: &'static [&'static [usize]],
    weights: &'static [(&'static [usize], i32)],
    operator: fn(&[Tensor], &[Tensor]) -> Result<Tensor>,
}

const fn of_two_heads(name: &'static str, inputs: &'static [&'static [usize]]) -> Case {
    Case { name, inputs, weights: &[], operator: two_heads }
}

const CASES: [Case; 16] = [
    Case {
        name: "linear",
        inputs: &[&[1, 64, 320]],
        weights: &[(&[320, 320], -4), (&[320], 0)],
        operator: |x, w| Linear::new(w[0].clone(), Some(&w[1]))?.forward(&x[0]),
    },
    Case {
        name: "convolution",
        inputs: &[&[1, 8, 8, 320]],
        weights: &[(&[64, 320, 3, 3], -6), (&[64], 0)],
        operator: |x, w| conv2d(w, 1)?.forward(&x[0]),
    },
    Case {
        name: "convolution of stride 2",
        inputs: &[&[1, 8, 8, 64]],
        weights: &[(&[64, 64, 3, 3], -5), (&[64], 0)],
        operator: |x, w| conv2d(w, 2)?.forward(&x[0]),
    },
    of_two_heads("self-attention, heads of 40", &[&[1, 128, 80], &[1, 128, 80], &[1, 128, 80]]),
    of_two_heads("self-attention, heads of 64", &[&[1, 128, 128], &[1, 128, 128], &[1, 128, 128]]),
    of_two_heads("self-attention, heads of 80", &[&[1, 128, 160], &[1, 128, 160], &[1, 128, 160]]),
    of_two_heads("self-attention, heads of 160", &[&[1, 64, 320], &[1, 64, 320], &[1, 64, 320]]),
    of_two_heads("attention over a text", &[&[1, 128, 80], &[1, 77, 80], &[1, 77, 80]]),
    Case {
        name: "group norm",
        inputs: &[&[1, 8, 8, 320]],
        weights: &[(&[320], 0), (&[320], 0)],
        operator: |x, w| GroupNorm::new(&w[0], &w[1], 32, 1e-5, None)?.forward(&x[0]),
    },
    Case {
        name: "group norm and SiLU",
        inputs: &[&[1, 8, 8, 320]],
        weights: &[(&[320], 0), (&[320], 0)],
        operator: |x, w| norm_and_silu(w)?.forward(&x[0]),
    },
    Case {
        name: "layer norm",
        inputs: &[&[1, 64, 320]],
        weights: &[(&[320], 0), (&[320], 0)],
        operator: |x, w| LayerNorm::new(&w[0], &w[1], 1e-5)?.forward(&x[0]),
    },
    Case { name: "GEGLU", inputs: &[&[1, 64, 640]], weights: &[], operator: |x, _| geglu(&x[0]) },
    Case {
        name: "SiLU",
        inputs: &[&[1, 64, 320]],
        weights: &[],
        operator: |x, _| activation(&x[0], Activation::Silu),
    },
    Case {
        name: "upsampling",
        inputs: &[&[1, 8, 8, 64]],
        weights: &[],
        operator: |x, _| upsample_nearest2d(&x[0], 16, 16),
    },
    Case {
        name: "transformer",
        inputs: &[&[1, 8, 8, 160], &[1, 77, 96]],
        weights: &[
            (&[160], 0),
            (&[160], 0),
            (&[160, 160], -4),
            (&[160], 0),
            (&[160], 0),
            (&[160], 0),
            (&[160, 160], -4),
            (&[160, 160], -4),
            (&[160, 160], -4),
            (&[160, 160], -4),
            (&[160], 0),
            (&[160], 0),
            (&[160], 0),
            (&[160, 160], -4),
            (&[160, 96], -4),
            (&[160, 96], -4),
            (&[160, 160], -4),
            (&[160], 0),
            (&[160], 0),
            (&[160], 0),
            (&[1280, 160], -4),
            (&[1280], 0),
            (&[160, 640], -5),
            (&[160], 0),
            (&[160, 160], -4),
            (&[160], 0),
        ],
        operator: transformer,
    },
    Case {
        name: "residual block",
        inputs: &[&[1, 8, 8, 64]],
        weights: &[
            (&[64], 0),
            (&[64], 0),
            (&[64, 64, 3, 3], -5),
            (&[64], 0),
            (&[64], 0),
            (&[64], 0),
            (&[64, 64, 3, 3], -5),
            (&[64], 0),
        ],
        operator: residual_block,
    },
];

fn conv2d(w: &[Tensor], stride: usize) -> Result<Conv2d> {
    Conv2d::new(w[0].clone(), Some(&w[1]), Conv2dConfig { stride, padding: Padding::same(1) })
}

fn norm_and_silu(w: &[Tensor]) -> Result<GroupNorm> {
    GroupNorm::new(&w[0], &w[1], 32, 1e-5, Some(Activation::Silu))
}

fn two_heads(x: &[Tensor], _: &[Tensor]) -> Result<Tensor> {
    let softmax_scale = (x[0].dim(2)? as f64 / 2.0).powf(-0.5);
    attention(
        &x[0],
        &x[1],
        &x[2],
        &AttentionConfig { num_heads: 2, softmax_scale, mask: AttentionMask::None },
    )
}

fn residual_block(x: &[Tensor], w: &[Tensor]) -> Result<Tensor> {
    let block = ResnetBlock {
        norm1: norm_and_silu(&w[..2])?,
        conv1: conv2d(&w[2..4], 1)?,
        norm2: norm_and_silu(&w[4..6])?,
        conv2: conv2d(&w[6..], 1)?,
        conv_shortcut: None,
        output_scale_factor: 1.0,
    };
    block.forward(&x[0], None, Memory::Fast)
}

fn transformer(x: &[Tensor], w: &[Tensor]) -> Result<Tensor> {
    let layer = |w: &[Tensor]| Linear::new(w[0].clone(), w.get(1));
    let norm = |w: &[Tensor]| LayerNorm::new(&w[0], &w[1], 1e-5);
    let attention = |w: &[Tensor]| {
        let [to_q, to_k, to_v] = [0, 1, 2].map(|i| layer(&w[i..=i]));
        let (to_q, to_k, to_v, to_out) = (to_q?, to_k?, to_v?, layer(&w[3..])?);
        Ok::<_, candle_core::Error>(TransformerAttention { to_q, to_k, to_v, to_out, num_heads: 4 })
    };
    let block = TransformerBlock {
        norm1: norm(&w[4..6])?,
        attn1: attention(&w[6..11])?,
        norm2: norm(&w[11..13])?,
        attn2: attention(&w[13..18])?,
        norm3: norm(&w[18..20])?,
        ff_in: layer(&w[20..22])?,
        ff_out: layer(&w[22..24])?,
    };
    let transformer = Transformer {
        norm: GroupNorm::new(&w[0], &w[1], 32, 1e-5, None)?,
        proj_in: layer(&w[2..4])?,
        blocks: vec![Arc::new(block)],
        proj_out: layer(&w[24..26])?,
    };
    transformer.forward(&x[0], &Context::whole(&x[1]), Memory::Fast)
}

/// The result, and the gradient to each input.
fn values_and_gradients(case: &Case, seed: u64, device: &Device) -> Result<Vec<Tensor>> {
    let mut generator = TorchGenerator::new(seed);
    let mut draw = |shape: &[usize], scale: i32| {
        let numbers = generator.randn_tensor(shape, &Device::Cpu)?;
        (numbers * 2f64.powi(scale))?.to_dtype(DType::F16)?.to_device(device)
    };
    let inputs: Vec<Var> =
        case.inputs.iter().map(|shape| Var::from_tensor(&draw(shape, 0)?)).collect::<Result<_>>()?;
    let weights: Vec<Tensor> =
        case.weights.iter().map(|(shape, scale)| draw(shape, *scale)).collect::<Result<_>>()?;
    let x: Vec<Tensor> = inputs.iter().map(|input| input.as_tensor().clone()).collect();
    let y = (case.operator)(&x, &weights)?;
    let upstream = draw(y.dims(), 0)?;
    let gradients = (&y * upstream)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
    let mut results = vec![y];
    for input in &inputs {
        results.push(gradients.get(input).unwrap().clone());
    }
    Ok(results)
}

fn samples(tensor: &Tensor) -> Result<Tensor> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let step = (values.len() / SAMPLES) | 1;
    let samples: Vec<f32> = values.into_iter().step_by(step).collect();
    Tensor::new(samples, &Device::Cpu)
}

#[test]
fn operators_err_at_most_twice_as_much_as_pytorchs() {
    let golden = Golden::load(&package().join("../tests/fixtures/operators.safetensors")).unwrap();
    // Judged behind the last, so that every figure is said.
    let mut worse = Vec::new();
    on_test_device(|device| {
        for (case, seed) in CASES.iter().zip(0..) {
            let results = values_and_gradients(case, seed, device).unwrap();
            let gradients = (0..case.inputs.len()).map(|i| format!("gradient {i}"));
            for (got, what) in results.iter().zip(["values".to_owned()].into_iter().chain(gradients)) {
                let key = format!("{}: {what}", case.name);
                let error = relative_l2(&samples(got).unwrap(), golden.get(&key).unwrap()).unwrap();
                let own: f64 = golden.text(&key).unwrap().parse().unwrap();
                println!("{error:.2e}  PyTorch {own:.2e}  {key}");
                if error.is_nan() || error > MOST * own {
                    worse.push(key);
                }
            }
        }
    });
    assert!(worse.is_empty(), "{worse:?}");
}
