//! Attention on a card where no kernel has the heads' size (the VAE's only head is 512 wide) or type: a head's scores are
//! stored, between two products. Forward only.

use candle_core::Result;

use super::AttentionShape;
use crate::gpu::product::{self, Rows};
use crate::gpu::{Argument, Array, Gpu, Launch, View, type_name};

/// Shared memory of `kernels/softmax.cu`.
const SHARED_BYTES: usize = 128;

/// `y [B, Sq, H·D]`, without a mask.
pub(super) fn forward<G: Gpu>(
    gpu: &G,
    shape: &AttentionShape,
    [q, k, v]: [View<'_, G>; 3],
) -> Result<Array<G>> {
    let AttentionShape { batch, queries, keys, num_heads, head_dim, softmax_scale, .. } = *shape;
    let width = shape.width();
    let y = gpu.alloc(q.dtype, q.len)?;
    let scores = gpu.alloc(q.dtype, queries * keys)?;
    let weights = Rows::new(scores.view(), keys);
    for (image, head) in (0..batch).flat_map(|image| (0..num_heads).map(move |head| (image, head))) {
        let [from, to] = [queries, keys].map(|rows| image * rows * width + head * head_dim);
        let rows = [Rows::new(q.from(from), width), Rows::new(k.from(to), width)];
        product::by_rows(gpu, weights, rows, [queries, keys, head_dim], softmax_scale)?;
        softmax(gpu, &scores, keys)?;
        let (results, values) = (Rows::new(y.view().from(from), width), Rows::new(v.from(to), width));
        product::by_columns(gpu, results, [weights, values], [queries, head_dim, keys])?;
    }
    Ok(y)
}

/// Rows of scores become weights, in place.
fn softmax<G: Gpu>(gpu: &G, scores: &Array<G>, keys: usize) -> Result<()> {
    let launch = Launch::new(format!("softmax_{}", type_name(scores.dtype)), [scores.len / keys, 1, 1]);
    let scale = Argument::F32(1.0);
    gpu.launch(&Launch { shared_bytes: SHARED_BYTES, ..launch }, &[scores.into(), keys.into(), scale])
}
