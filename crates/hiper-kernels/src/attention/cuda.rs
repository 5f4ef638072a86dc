//! Attention on a card: `kernels/attention.cu` and `kernels/attention_backward.cu`.

use candle_core::{DType, Result};

use super::{AttentionMask, AttentionOp, AttentionShape, stored};
use crate::Error;
use crate::gpu::{Argument, Array, Gpu, Launch, View, type_name};

/// How the kernels of a head size are launched; the tables at the top of their sources.
struct Head {
    dim: usize,
    forward: Plan,
    queries: Plan,
    keys: Plan,
    tail: Plan,
}

/// Rows of a block, its threads and its shared memory.
#[derive(Clone, Copy)]
struct Plan {
    rows: usize,
    threads: usize,
    shared_bytes: usize,
}

const fn plan(rows: usize, threads: usize, shared_bytes: usize) -> Plan {
    Plan { rows, threads, shared_bytes }
}

const HEADS: [Head; 5] = [
    Head {
        dim: 32,
        forward: plan(128, 128, 20480),
        queries: plan(128, 128, 20480),
        keys: plan(128, 128, 20480),
        tail: plan(16, 32, 10752),
    },
    Head {
        dim: 40,
        forward: plan(128, 128, 20480),
        queries: plan(128, 128, 20480),
        keys: plan(128, 128, 20480),
        tail: plan(16, 32, 10752),
    },
    Head {
        dim: 64,
        forward: plan(128, 128, 36864),
        queries: plan(64, 128, 36864),
        keys: plan(64, 128, 37888),
        tail: plan(16, 32, 37888),
    },
    Head {
        dim: 80,
        forward: plan(64, 128, 45056),
        queries: plan(64, 128, 22528),
        keys: plan(64, 128, 23040),
        tail: plan(16, 32, 23040),
    },
    Head {
        dim: 160,
        forward: plan(64, 128, 43008),
        queries: plan(64, 128, 43008),
        keys: plan(64, 128, 64768),
        tail: plan(16, 32, 32512),
    },
];

/// Queries of a part, when the gradients of few keys are summed over parts of the queries: enough parts to fill a card.
const QUERIES_PER_SPLIT: usize = 128;

/// A part is a block in z, of which a grid has this many.
const MAX_BLOCKS_IN_Z: usize = 65535;

/// What the backward pass needs of the forward pass.
pub(crate) struct Saved<'a, G: Gpu> {
    pub q: View<'a, G>,
    pub k: View<'a, G>,
    pub v: View<'a, G>,
    pub y: View<'a, G>,
    /// `[B, H, Sq]`, `f32`.
    pub log_sum_exp: View<'a, G>,
}

/// `y [B, Sq, H·D]` and, if it is to be kept, the log-sum-exp `[B, H, Sq]` of every row of scores.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    [q, k, v]: [View<'_, G>; 3],
    keep: bool,
) -> Result<(Array<G>, Option<Array<G>>)> {
    let Some(call) = Call::new(shape, q.dtype) else {
        if shape.mask != AttentionMask::None {
            return Err(unsupported(shape, q.dtype));
        }
        return Ok((stored::forward(gpu, shape, [q, k, v])?, None));
    };
    let y = gpu.alloc(q.dtype, q.len)?;
    let rows = shape.batch * shape.num_heads * shape.queries;
    let log_sum_exp = keep.then(|| gpu.alloc(DType::F32, rows)).transpose()?;
    let width = shape.width();
    let [causal, scale]: [Argument<'_, G>; 2] =
        [(shape.mask == AttentionMask::Causal).into(), shape.softmax_scale.into()];
    let pointers = [(&y).into(), log_sum_exp.as_ref().into(), q.into(), k.into(), v.into()];
    let lengths = [shape.queries, shape.keys].map(Argument::from);
    let strides = [width; 4].map(Argument::from);
    let launch = call.launch("forward", call.head.forward, shape.queries, 1);
    gpu.launch(&launch, &[&pointers, lengths.as_slice(), &strides, &[scale, causal]].concat())?;
    Ok((y, log_sum_exp))
}

/// `[dq, dk, dv]`.
pub(crate) fn input_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
) -> Result<[Array<G>; 3]> {
    let (dq, delta) = query_gradient(gpu, shape, saved, grad_output)?;
    let [dk, dv] = key_gradients(gpu, shape, saved, grad_output, delta.view())?;
    Ok([dq, dk, dv])
}

/// `dq`, and what the gradients of keys and values need: δ `[B, H, Sq]`.
pub(crate) fn query_gradient<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
) -> Result<(Array<G>, Array<G>)> {
    let Saved { q, k, v, y, log_sum_exp } = *saved;
    let call = Call::of_gradient(shape, q.dtype)?;
    let dq = gpu.alloc(q.dtype, q.len)?;
    let delta = gpu.alloc(DType::F32, log_sum_exp.len)?;
    let pointers = [(&dq).into(), (&delta).into()];
    let inputs = [grad_output, y, log_sum_exp, q, k, v].map(Argument::from);
    let lengths = [shape.queries, shape.keys].map(Argument::from);
    let strides = [shape.width(); 6].map(Argument::from);
    let launch = call.launch("backward_queries", call.head.queries, shape.queries, 1);
    let arguments =
        [&pointers, inputs.as_slice(), &lengths, &strides, &[shape.softmax_scale.into()]].concat();
    gpu.launch(&launch, &arguments)?;
    Ok((dq, delta))
}

/// `[dk, dv]`: a block for some keys goes through all queries.
pub(crate) fn key_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
    delta: View<'_, G>,
) -> Result<[Array<G>; 2]> {
    let Saved { q, k, v, log_sum_exp, .. } = *saved;
    let call = Call::of_gradient(shape, q.dtype)?;
    let (dk, dv) = (gpu.alloc(k.dtype, k.len)?, gpu.alloc(k.dtype, k.len)?);
    let pointers = [(&dk).into(), (&dv).into()];
    let inputs = [grad_output, log_sum_exp, delta, q, k, v].map(Argument::from);
    let lengths = [shape.queries, shape.keys].map(Argument::from);
    let strides = [shape.width(); 6].map(Argument::from);
    let launch = call.launch("backward_keys", call.head.keys, shape.keys, 1);
    let arguments =
        [&pointers, inputs.as_slice(), &lengths, &strides, &[shape.softmax_scale.into()]].concat();
    gpu.launch(&launch, &arguments)?;
    Ok([dk, dv])
}

/// The same of few keys, the last `n` of them, for many queries: blocks go through parts of the queries, and the parts' sums are
/// added in a fixed order. `[B, n, 2·H·D]` in `f32`: a row of `dk` beside one of `dv`.
pub(crate) fn tail_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
    delta: View<'_, G>,
    n: usize,
) -> Result<Array<G>> {
    let Saved { q, k, v, log_sum_exp, .. } = *saved;
    let call = Call::of_gradient(shape, q.dtype)?;
    let (width, scale) = (shape.width(), shape.softmax_scale);
    let splits = shape.queries.div_ceil(QUERIES_PER_SPLIT).min(MAX_BLOCKS_IN_Z / shape.batch).max(1);
    let len = shape.batch * n * 2 * width;
    let parts = gpu.alloc(DType::F32, splits * len)?;
    let pointers = [parts.view(), parts.view().from(width)].map(Argument::from);
    let inputs = [grad_output, log_sum_exp, delta, q, k, v].map(Argument::from);
    let lengths = [shape.queries, shape.keys, n, splits].map(Argument::from);
    let strides = [2 * width, 2 * width, width, width, width, width].map(Argument::from);
    let launch = call.launch("backward_tail", call.head.tail, n, splits);
    gpu.launch(&launch, &[&pointers, inputs.as_slice(), &lengths, &strides, &[scale.into()]].concat())?;
    if splits == 1 {
        return Ok(parts);
    }
    let sums = gpu.alloc(DType::F32, len)?;
    let (name, threads) = ("sum_splits_f32".into(), 256);
    let launch = Launch { name, grid: [len.div_ceil(threads), 1, 1], threads, shared_bytes: 0 };
    gpu.launch(&launch, &[(&sums).into(), (&parts).into(), len.into(), splits.into()])?;
    Ok(sums)
}

/// What the launches of a call have in common.
struct Call<'a> {
    shape: &'a AttentionShape,
    head: &'static Head,
    dtype: DType,
}

/// Refuses what has no gradient on a card.
pub(super) fn check_gradient(shape: &AttentionShape, dtype: DType) -> Result<()> {
    Call::of_gradient(shape, dtype).map(|_| ())
}

fn unsupported(shape: &AttentionShape, dtype: DType) -> candle_core::Error {
    let gradient_or_mask = match shape.mask {
        AttentionMask::None => "the gradient of",
        AttentionMask::Causal => "a causal mask over",
    };
    let heads = HEADS.each_ref().map(|head| head.dim);
    let what = format!(
        "{gradient_or_mask} heads of {} in {}; in f16 and bf16 there are {heads:?}",
        shape.head_dim,
        type_name(dtype)
    );
    Error::Unsupported { op: AttentionOp::NAME, what }.into()
}

impl<'a> Call<'a> {
    /// None if no kernel has the heads' size or type.
    fn new(shape: &'a AttentionShape, dtype: DType) -> Option<Self> {
        let head = HEADS.iter().find(|head| head.dim == shape.head_dim)?;
        matches!(dtype, DType::F16 | DType::BF16).then_some(Self { shape, head, dtype })
    }

    fn of_gradient(shape: &'a AttentionShape, dtype: DType) -> Result<Self> {
        if shape.mask != AttentionMask::None {
            let what = "the gradient under a causal mask".into();
            return Err(Error::Unsupported { op: AttentionOp::NAME, what }.into());
        }
        Self::new(shape, dtype).ok_or_else(|| unsupported(shape, dtype))
    }

    fn launch(&self, kernel: &str, plan: Plan, rows: usize, splits: usize) -> Launch {
        Launch {
            name: format!("attention_{kernel}_{}_d{}", type_name(self.dtype), self.head.dim),
            grid: [rows.div_ceil(plan.rows), self.shape.num_heads, self.shape.batch * splits],
            threads: plan.threads,
            shared_bytes: plan.shared_bytes,
        }
    }
}
