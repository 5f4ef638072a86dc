//! The UNet's operators at Stable Diffusion 1.5's shapes, forward and input gradient:
//! `cargo bench -p hiper-benches`. Throughput is in floating-point operations.

#![allow(missing_docs)]

use std::time::Duration;

use candle_core::{Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hiper_benches::filled;
use hiper_kernels::{AttentionConfig, AttentionMask, Conv2d, Conv2dConfig, Linear, Padding, attention};

/// Times `op` on `input`, then `op` and its gradient.
fn time(c: &mut Criterion, name: &str, flops: u64, input: &Tensor, op: impl Fn(&Tensor) -> Result<Tensor>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    group.throughput(Throughput::Elements(flops));
    group.bench_function("forward", |b| b.iter(|| op(input)));
    let var = Var::from_tensor(input).expect("a variable");
    group.bench_function("forward and gradient", |b| b.iter(|| op(&var)?.sum_all()?.backward()));
    group.finish();
}

fn convolutions(c: &mut Criterion) {
    for (channels_in, channels_out, size) in
        [(320, 320, 64), (960, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8)]
    {
        let weight = filled(&[channels_out, channels_in, 3, 3]).expect("a weight");
        let config = Conv2dConfig { stride: 1, padding: Padding::same(1) };
        let conv = Conv2d::new(&weight, None, config).expect("a convolution");
        let x = filled(&[1, size, size, channels_in]).expect("an input");
        let flops = 2 * 9 * channels_in * channels_out * size * size;
        time(c, &format!("conv2d {channels_in}->{channels_out} @{size}"), flops as u64, &x, |x| {
            conv.forward(x)
        });
    }
}

fn linears(c: &mut Criterion) {
    for (rows, inputs, outputs) in
        [(4096, 320, 320), (4096, 320, 2560), (1024, 640, 5120), (256, 1280, 10240)]
    {
        let linear = Linear::new(&filled(&[outputs, inputs]).expect("a weight"), None).expect("a layer");
        let x = filled(&[1, rows, inputs]).expect("an input");
        time(
            c,
            &format!("linear {rows}x{inputs}->{outputs}"),
            (2 * rows * inputs * outputs) as u64,
            &x,
            |x| linear.forward(x),
        );
    }
}

fn attentions(c: &mut Criterion) {
    for (queries, keys, head_dim) in [(4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40)] {
        let config = AttentionConfig {
            num_heads: 8,
            softmax_scale: (head_dim as f64).powf(-0.5),
            mask: AttentionMask::None,
        };
        let (q, k) =
            (filled(&[1, queries, 8 * head_dim]).expect("q"), filled(&[1, keys, 8 * head_dim]).expect("k"));
        let flops = 4 * queries * keys * 8 * head_dim;
        time(c, &format!("attention {queries}x{keys} d{head_dim}"), flops as u64, &q, |q| {
            attention(q, &k, &k, &config)
        });
    }
}

criterion_group!(operators, convolutions, linears, attentions);
criterion_main!(operators);
