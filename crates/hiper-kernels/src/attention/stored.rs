//! Attention on a card where no kernel has the heads' size (the VAE's only head is 512 wide) or type, and the gradient under a
//! mask: the scores of one head at a time are stored, between products. The backward pass computes them again.

use candle_core::Result;

use super::{AttentionMask, AttentionShape};
use crate::gpu::product::{self, Rows};
use crate::gpu::{Argument, Array, Gpu, Launch, View, type_name};

/// `y [B, Sq, H·D]`.
pub(super) fn forward<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    [q, k, v]: [Rows<'_, G>; 3],
) -> Result<Array<G>> {
    let AttentionShape { batch, queries, keys, head_dim, .. } = *shape;
    let (dtype, width) = (q.view.dtype, shape.width());
    let (y, weights) = (gpu.alloc(dtype, batch * queries * width)?, gpu.alloc(dtype, queries * keys)?);
    let (p, y_rows) = (Rows::new(weights.view(), keys), Rows::new(y.view(), width));
    for head in Head::all(shape) {
        let ([q, y], [k, v]) = (head.of([q, y_rows], queries), head.of([k, v], keys));
        weigh(gpu, shape, p, [q, k])?;
        product::by_columns(gpu, y, [p, v], [queries, head_dim, keys])?;
    }
    Ok(y)
}

/// With the weights `p` and `dp = dy vᵀ`: `ds` by the softmax's gradient, then `dq = ds k`, `dk = dsᵀ q`, `dv = pᵀ dy`, these two of
/// the last `tail` keys.
pub(super) fn input_gradients<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    [q, k, v]: [Rows<'_, G>; 3],
    grad_output: View<'_, G>,
    [dq, dk, dv]: [Rows<'_, G>; 3],
    tail: usize,
) -> Result<()> {
    let AttentionShape { queries, keys, head_dim, softmax_scale, .. } = *shape;
    let scores = queries * keys;
    let dtype = grad_output.dtype;
    let (weights, gradients) = (gpu.alloc(dtype, scores)?, gpu.alloc(dtype, scores)?);
    let [p, ds] = [&weights, &gradients].map(|x| Rows::new(x.view(), keys));
    let dy = Rows::new(grad_output, shape.width());
    for head in Head::all(shape) {
        let ([q, dy, dq], [k, v]) = (head.of([q, dy, dq], queries), head.of([k, v], keys));
        weigh(gpu, shape, p, [q, k])?;
        product::by_rows(gpu, ds, [dy, v], [queries, keys, head_dim], 1.0)?;
        let arguments = [ds.view.into(), p.view.into(), keys.into(), softmax_scale.into()];
        over_rows(gpu, "softmax_gradient", queries, ds.view, &arguments)?;
        product::by_columns(gpu, dq, [ds, k], [queries, head_dim, keys])?;
        if tail == 0 {
            continue;
        }
        let [dk, dv] = head.of([dk, dv], tail);
        for (to, matrix, by) in [(dk, ds, q), (dv, p, dy)] {
            let transposed = transposed(gpu, matrix.view, [queries, keys])?;
            let left = Rows::new(transposed.view().from((keys - tail) * queries), queries);
            product::by_columns(gpu, to, [left, by], [tail, head_dim, queries])?;
        }
    }
    Ok(())
}

/// A head of an image.
struct Head {
    image: usize,
    first_column: usize,
}

impl Head {
    fn all(shape: &AttentionShape) -> impl Iterator<Item = Self> + use<> {
        let AttentionShape { batch, num_heads, head_dim, .. } = *shape;
        let of_image =
            move |image| (0..num_heads).map(move |head| Self { image, first_column: head * head_dim });
        (0..batch).flat_map(of_image)
    }

    /// Its part of matrices with so many rows an image.
    fn of<'a, G: Gpu, const N: usize>(&self, matrices: [Rows<'a, G>; N], rows: usize) -> [Rows<'a, G>; N] {
        matrices.map(|Rows { view, stride }| {
            Rows::new(view.from(self.image * rows * stride + self.first_column), stride)
        })
    }
}

/// A head's weights, `softmax(scale · q kᵀ)`.
fn weigh<G: Gpu>(gpu: &G, shape: &AttentionShape, p: Rows<'_, G>, [q, k]: [Rows<'_, G>; 2]) -> Result<()> {
    let AttentionShape { queries, keys, head_dim, softmax_scale, .. } = *shape;
    product::by_rows(gpu, p, [q, k], [queries, keys, head_dim], softmax_scale)?;
    let causal = shape.mask == AttentionMask::Causal;
    let arguments = [p.view.into(), keys.into(), Argument::F32(1.0), causal.into()];
    over_rows(gpu, "softmax", queries, p.view, &arguments)
}

/// A kernel of `kernels/softmax.cu`.
fn over_rows<G: Gpu>(
    gpu: &G,
    kernel: &str,
    rows: usize,
    scores: View<'_, G>,
    arguments: &[Argument<'_, G>],
) -> Result<()> {
    const SHARED_BYTES: usize = 128;
    let launch = Launch::new(format!("{kernel}_{}", type_name(scores.dtype)), [rows, 1, 1]);
    gpu.launch(&Launch { shared_bytes: SHARED_BYTES, ..launch }, arguments)
}

fn transposed<G: Gpu>(gpu: &G, matrix: View<'_, G>, [rows, columns]: [usize; 2]) -> Result<Array<G>> {
    let to = gpu.alloc(matrix.dtype, rows * columns)?;
    let name = format!("transpose_{}", type_name(matrix.dtype));
    let arguments = [(&to).into(), matrix.into(), rows.into(), columns.into()];
    gpu.launch(&Launch::over_rows(name, rows * columns, &[1]), &arguments)?;
    Ok(to)
}
