//! Attention on a card: `kernels/attention.cu`, `attention_backward.cu` and `attention_sm90a.cu`, and `stored.rs` where those have
//! no kernel.

use candle_core::{DType, Result};

use super::{AttentionMask, AttentionShape, stored};
use crate::gpu::product::Rows;
use crate::gpu::{Argument, Array, Chip, Gpu, Launch, View, type_name};

/// How the kernels of a head size are launched; the tables at the top of their sources.
struct Head {
    dim: usize,
    warps: Kernels,
    /// Those that Hopper alone has.
    sm90a: Option<Kernels>,
    tail: Plan,
}

/// Those that there are twice.
struct Kernels {
    prefix: &'static str,
    forward: Plan,
    queries: Plan,
    keys: Plan,
}

/// Rows of a block, its threads and its shared memory.
#[derive(Clone, Copy)]
struct Plan {
    rows: usize,
    threads: usize,
    shared_bytes: usize,
}

const fn plan(rows: usize, shared_bytes: usize) -> Plan {
    Plan { rows, threads: 128, shared_bytes }
}

const fn warps(forward: Plan, queries: Plan, keys: Plan) -> Kernels {
    Kernels { prefix: "attention", forward, queries, keys }
}

/// Of so many warpgroups, with 64 rows each, and so much shared memory: forward, and for the gradients of queries and keys.
const fn sm90a(warpgroups: usize, [forward, queries, keys]: [usize; 3]) -> Option<Kernels> {
    let (rows, threads) = (64 * warpgroups, 128 * warpgroups);
    let [forward, queries, keys] = [
        Plan { rows, threads, shared_bytes: forward },
        Plan { rows, threads, shared_bytes: queries },
        Plan { rows, threads, shared_bytes: keys },
    ];
    Some(Kernels { prefix: "attention_sm90a", forward, queries, keys })
}

const fn tail(shared_bytes: usize) -> Plan {
    Plan { rows: 16, threads: 32, shared_bytes }
}

const HEADS: [Head; 5] = [
    Head {
        dim: 32,
        warps: warps(plan(128, 20480), plan(128, 20480), plan(128, 20480)),
        sm90a: None,
        tail: tail(10752),
    },
    Head {
        dim: 40,
        warps: warps(plan(128, 20480), plan(128, 20480), plan(128, 20480)),
        sm90a: sm90a(2, [24576, 20480, 20480]),
        tail: tail(10752),
    },
    Head {
        dim: 64,
        warps: warps(plan(128, 36864), plan(64, 36864), plan(64, 37888)),
        sm90a: sm90a(1, [32768, 32768, 33792]),
        tail: tail(37888),
    },
    Head {
        dim: 80,
        warps: warps(plan(64, 45056), plan(64, 22528), plan(64, 23040)),
        sm90a: sm90a(1, [40960, 40960, 41984]),
        tail: tail(23040),
    },
    Head {
        dim: 160,
        warps: warps(plan(64, 43008), plan(64, 43008), plan(64, 64768)),
        sm90a: None,
        tail: tail(32512),
    },
];

impl Head {
    /// None if no kernel has the size or the type.
    fn of(dim: usize, dtype: DType) -> Option<&'static Self> {
        HEADS.iter().find(|head| head.dim == dim && matches!(dtype, DType::F16 | DType::BF16))
    }
}

/// Queries of a part, when the gradients of few keys are summed over parts of the queries: enough parts to fill a card.
const QUERIES_PER_SPLIT: usize = 128;

/// A part is a block in z, of which a grid has this many.
const MAX_BLOCKS_IN_Z: usize = 65535;

/// Where the gradients of a tail's keys and values go before their parts are [summed](sum_parts): columns of `[splits, B, N, O]`
/// in `f32`.
pub(crate) struct TailParts<'a, G: Gpu> {
    pub parts: View<'a, G>,
    pub splits: usize,
    /// `O`.
    pub width: usize,
    /// Of keys and of values.
    pub first_columns: [usize; 2],
}

/// What the backward pass needs of the forward pass.
pub(crate) struct Saved<'a, G: Gpu> {
    /// `q`, `k` and `v`, each perhaps some columns of a wider matrix.
    pub qkv: [Rows<'a, G>; 3],
    pub y: View<'a, G>,
    /// What [`forward`] returned of it.
    pub log_sum_exp: Option<View<'a, G>>,
}

/// `y [B, Sq, H·D]` and, if it is to be kept and the gradient has kernels that read it, the log-sum-exp `[B, H, Sq]` of every row
/// of scores.
pub(crate) fn forward<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    qkv: [Rows<'_, G>; 3],
    keep: bool,
) -> Result<(Array<G>, Option<Array<G>>)> {
    let dtype = qkv[0].view.dtype;
    let Some(call) = Call::new(gpu.chip(), shape, dtype) else {
        return Ok((stored::forward(gpu, shape, qkv)?, None));
    };
    let width = shape.width();
    let y = gpu.alloc(dtype, shape.batch * shape.queries * width)?;
    let rows = shape.batch * shape.num_heads * shape.queries;
    let keep = keep && Call::of_gradient(gpu.chip(), shape, dtype).is_some();
    let log_sum_exp = keep.then(|| gpu.alloc(DType::F32, rows)).transpose()?;
    let [causal, scale]: [Argument<'_, G>; 2] =
        [(shape.mask == AttentionMask::Causal).into(), shape.softmax_scale.into()];
    let results = [(&y).into(), log_sum_exp.as_ref().into()];
    let inputs = qkv.map(|rows| rows.view.into());
    let lengths = [shape.queries, shape.keys, width].map(Argument::from);
    let strides = qkv.map(|rows| rows.stride.into());
    let launch = call.launch("forward", call.kernels.forward, shape.queries);
    gpu.launch(&launch, &[&results, inputs.as_slice(), &lengths, &strides, &[scale, causal]].concat())?;
    Ok((y, log_sum_exp))
}

/// Writes `dq`, `dk` and `dv`.
pub(crate) fn input_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
    [dq, dk, dv]: [Rows<'_, G>; 3],
) -> Result<()> {
    if let Some(gradient) = Gradient::new(gpu, shape, saved, grad_output)? {
        let delta = gradient.of_queries(dq)?;
        return gradient.of_keys(delta.view(), [dk, dv]);
    }
    stored::input_gradients(gpu, shape, saved.qkv, grad_output, [dq, dk, dv], shape.keys)
}

/// `dq` and the gradient of the last `tail` keys and their values, if it is any: `[B, tail, 2·H·D]`, a row of `dk` beside one of `dv`.
pub(crate) fn cross_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
    tail: usize,
) -> Result<(Array<G>, Option<Array<G>>)> {
    let (dtype, width) = (grad_output.dtype, shape.width());
    let dq = gpu.alloc(dtype, shape.batch * shape.queries * width)?;
    let dq_rows = Rows::new(dq.view(), width);
    if let Some(gradient) = Gradient::new(gpu, shape, saved, grad_output)? {
        let delta = gradient.of_queries(dq_rows)?;
        if tail == 0 {
            return Ok((dq, None));
        }
        let most = MAX_BLOCKS_IN_Z / shape.batch;
        let splits = shape.queries.div_ceil(QUERIES_PER_SPLIT).min(most).max(1);
        let parts = gpu.alloc(DType::F32, splits * 2 * shape.batch * tail * width)?;
        let to = TailParts { parts: parts.view(), splits, width: 2 * width, first_columns: [0, width] };
        gradient.of_tail(delta.view(), tail, &to)?;
        return Ok((dq, Some(sum_parts(gpu, parts.view(), splits, dtype)?)));
    }
    let both = gpu.alloc(dtype, 2 * shape.batch * tail.max(1) * width)?;
    let [dk, dv] = [0, width].map(|first| Rows::new(both.view().from(first), 2 * width));
    stored::input_gradients(gpu, shape, saved.qkv, grad_output, [dq_rows, dk, dv], tail)?;
    Ok((dq, (tail > 0).then_some(both)))
}

/// Whether [`cross_gradients_in_parts`] takes such heads, of so many images.
pub(crate) fn takes_parts(head_dim: usize, dtype: DType, batch: usize, splits: usize) -> bool {
    Head::of(head_dim, dtype).is_some() && splits * batch <= MAX_BLOCKS_IN_Z
}

/// `dq`; the gradients of the last `tail` keys and their values are left in parts.
pub(crate) fn cross_gradients_in_parts<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    saved: &Saved<'_, G>,
    grad_output: View<'_, G>,
    (tail, to): (usize, &TailParts<'_, G>),
) -> Result<Array<G>> {
    let Some(gradient) = Gradient::new(gpu, shape, saved, grad_output)? else {
        candle_core::bail!("attention: no kernel leaves the gradients of such heads in parts")
    };
    let dq = gpu.alloc(grad_output.dtype, shape.batch * shape.queries * shape.width())?;
    let delta = gradient.of_queries(Rows::new(dq.view(), shape.width()))?;
    gradient.of_tail(delta.view(), tail, to)?;
    Ok(dq)
}

/// The sum of `[splits, …]`, first to last.
pub(crate) fn sum_parts<G: Gpu>(
    gpu: &G,
    parts: View<'_, G>,
    splits: usize,
    dtype: DType,
) -> Result<Array<G>> {
    let len = parts.len / splits;
    let sums = gpu.alloc(dtype, len)?;
    let (name, threads) = (format!("sum_splits_{}", type_name(dtype)), 256);
    let launch = Launch { threads, ..Launch::new(name, [len.div_ceil(threads), 1, 1]) };
    gpu.launch(&launch, &[(&sums).into(), parts.into(), len.into(), splits.into()])?;
    Ok(sums)
}

/// The gradient's kernels, for a call that they take.
struct Gradient<'a, G: Gpu> {
    gpu: &'a G,
    call: Call<'a>,
    saved: &'a Saved<'a, G>,
    log_sum_exp: View<'a, G>,
    grad_output: View<'a, G>,
}

impl<'a, G: Gpu> Gradient<'a, G> {
    /// None if they do not take it.
    fn new(
        gpu: &'a G,
        shape: &'a AttentionShape,
        saved: &'a Saved<'a, G>,
        grad_output: View<'a, G>,
    ) -> Result<Option<Self>> {
        let Some(call) = Call::of_gradient(gpu.chip(), shape, grad_output.dtype) else { return Ok(None) };
        let Some(log_sum_exp) = saved.log_sum_exp else {
            candle_core::bail!("attention: backward of a pass that kept nothing")
        };
        Ok(Some(Self { gpu, call, saved, log_sum_exp, grad_output }))
    }

    /// Writes `dq`; what the gradients of keys and values need: δ `[B, H, Sq]`.
    fn of_queries(&self, dq: Rows<'_, G>) -> Result<Array<G>> {
        let Self { gpu, ref call, saved: &Saved { qkv: [q, k, v], y, .. }, log_sum_exp, grad_output } = *self;
        let (shape, width) = (call.shape, call.shape.width());
        let delta = gpu.alloc(DType::F32, log_sum_exp.len)?;
        let pointers = [dq.view.into(), (&delta).into()];
        let inputs = [grad_output, y, log_sum_exp, q.view, k.view, v.view].map(Argument::from);
        let lengths = [shape.queries, shape.keys].map(Argument::from);
        let strides = [dq.stride, width, width, q.stride, k.stride, v.stride].map(Argument::from);
        let launch = call.launch("backward_queries", call.kernels.queries, shape.queries);
        let arguments =
            [&pointers, inputs.as_slice(), &lengths, &strides, &[shape.softmax_scale.into()]].concat();
        gpu.launch(&launch, &arguments)?;
        Ok(delta)
    }

    /// Writes `dk` and `dv`: a block for some keys goes through all queries.
    fn of_keys(&self, delta: View<'_, G>, [dk, dv]: [Rows<'_, G>; 2]) -> Result<()> {
        let Self { gpu, ref call, saved: &Saved { qkv: [q, k, v], .. }, log_sum_exp, grad_output } = *self;
        let shape = call.shape;
        let pointers = [dk.view.into(), dv.view.into()];
        let inputs = [grad_output, log_sum_exp, delta, q.view, k.view, v.view].map(Argument::from);
        let lengths = [shape.queries, shape.keys].map(Argument::from);
        let strides = [dk.stride, dv.stride, shape.width(), q.stride, k.stride, v.stride].map(Argument::from);
        let launch = call.launch("backward_keys", call.kernels.keys, shape.keys);
        let arguments =
            [&pointers, inputs.as_slice(), &lengths, &strides, &[shape.softmax_scale.into()]].concat();
        gpu.launch(&launch, &arguments)
    }

    /// The same of the last `tail` keys, few for many queries: blocks go through parts of the queries.
    fn of_tail(&self, delta: View<'_, G>, tail: usize, to: &TailParts<'_, G>) -> Result<()> {
        let Self { gpu, ref call, saved: &Saved { qkv: [q, k, v], .. }, log_sum_exp, grad_output } = *self;
        let shape = call.shape;
        let pointers = to.first_columns.map(|first| to.parts.from(first).into());
        let inputs = [grad_output, log_sum_exp, delta, q.view, k.view, v.view].map(Argument::from);
        let lengths = [shape.queries, shape.keys, tail, to.splits].map(Argument::from);
        let strides = [to.width, to.width, shape.width(), q.stride, k.stride, v.stride].map(Argument::from);
        let launch = call.launch_in("attention", "backward_tail", call.head.tail, tail, to.splits);
        let arguments =
            [&pointers, inputs.as_slice(), &lengths, &strides, &[shape.softmax_scale.into()]].concat();
        gpu.launch(&launch, &arguments)
    }
}

/// What the launches of a call have in common.
struct Call<'a> {
    shape: &'a AttentionShape,
    head: &'static Head,
    kernels: &'static Kernels,
    dtype: DType,
}

impl<'a> Call<'a> {
    /// None if no kernel has the heads' size or type.
    fn new(chip: Chip, shape: &'a AttentionShape, dtype: DType) -> Option<Self> {
        let head = Head::of(shape.head_dim, dtype)?;
        let kernels = head.sm90a.as_ref().filter(|_| chip.sm90a).unwrap_or(&head.warps);
        Some(Self { shape, head, kernels, dtype })
    }

    /// The same of the gradient, whose kernels know no mask.
    fn of_gradient(chip: Chip, shape: &'a AttentionShape, dtype: DType) -> Option<Self> {
        Self::new(chip, shape, dtype).filter(|_| shape.mask == AttentionMask::None)
    }

    fn launch(&self, kernel: &str, plan: Plan, rows: usize) -> Launch {
        self.launch_in(self.kernels.prefix, kernel, plan, rows, 1)
    }

    /// In so many splits.
    fn launch_in(&self, prefix: &str, kernel: &str, plan: Plan, rows: usize, splits: usize) -> Launch {
        let name = format!("{prefix}_{kernel}_{}_d{}", type_name(self.dtype), self.head.dim);
        let grid = [rows.div_ceil(plan.rows), self.shape.num_heads, self.shape.batch * splits];
        Launch { threads: plan.threads, shared_bytes: plan.shared_bytes, ..Launch::new(name, grid) }
    }
}
