//! Scaled dot-product attention that never stores the score matrix; a card does so for one head at a time, where no kernel has
//! the heads' size or type.

pub(crate) mod backward;
pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;
mod stored;

use std::sync::OnceLock;

use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use crate::error::{Error, check_shape};
use crate::frozen::{cpu_slice, with_cpu_slices};
use crate::gpu::product::Rows;
use crate::gpu::{
    Array, Card, Cuda, Gpu, Kept, View, check_dtype, check_same_dtype, dense, on_card, with_views,
};

/// Which keys a query may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionMask {
    /// All of them.
    #[default]
    None,
    /// Those at its own position and before: query `i` sees keys `0..=i`.
    Causal,
}

/// How [`attention`] reads its arguments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Number of heads `H`; head `h` is channels `h·D..(h + 1)·D`.
    pub num_heads: usize,
    /// What scores are multiplied by before the softmax, usually `1/√D`.
    pub softmax_scale: f64,
    /// Which keys a query may see.
    pub mask: AttentionMask,
}

/// Multi-head attention, `y_h = softmax(q_h k_hᵀ · softmax_scale) v_h` for each head.
///
/// Scores are computed block by block and never stored: the forward pass keeps one number a query and head (the
/// log-sum-exp), from which the backward pass recomputes them (FlashAttention, arXiv 2205.14135, algorithms 1 and 4).
///
/// # Shapes
/// `q [B, Sq, H·D]`, `k` and `v [B, Sk, H·D]`, `y [B, Sq, H·D]`: heads stay interleaved, nothing is transposed.
///
/// # Gradient
/// To `q`, `k` and `v`.
///
/// # Errors
/// When shapes disagree, `num_heads` does not divide the width, or a tensor is not `f32`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use hiper_kernels::{AttentionConfig, AttentionMask, attention};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::ones((1, 4, 16), DType::F32, &Device::Cpu)?;
/// let config = AttentionConfig { num_heads: 2, softmax_scale: 8f64.powf(-0.5), mask: AttentionMask::None };
/// assert_eq!(attention(&x, &x, &x, &config)?.dims(), [1, 4, 16]);
/// # Ok(())
/// # }
/// ```
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
    for tensor in [q, k, v] {
        check_dtype(tensor, AttentionOp::NAME)?;
        check_same_dtype(tensor, q, AttentionOp::NAME)?;
    }
    let shape = AttentionShape::new(q.dims(), k.dims(), v.dims(), config)?;
    let keep = [q, k, v].iter().any(|tensor| tensor.track_op());
    let op = AttentionOp { shape, keep, log_sum_exp: OnceLock::new(), kept: OnceLock::new() };
    dense(q)?.apply_op3(&dense(k)?, &dense(v)?, op)
}

/// The sizes of one call, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) num_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) softmax_scale: f32,
    pub(crate) mask: AttentionMask,
}

impl AttentionShape {
    pub(crate) fn new(q: &[usize], k: &[usize], v: &[usize], config: &AttentionConfig) -> Result<Self> {
        const NAME: &str = AttentionOp::NAME;
        check_shape(q.len() == 3 && !q.contains(&0), NAME, "q", || "[B, Sq, H·D]".into(), q)?;
        let (batch, queries, width) = (q[0], q[1], q[2]);
        let ok = k.len() == 3 && k[0] == batch && k[1] > 0 && k[2] == width;
        check_shape(ok, NAME, "k", || format!("[{batch}, Sk, {width}]"), k)?;
        check_shape(v == k, NAME, "v", || format!("{k:?}"), v)?;
        if config.num_heads == 0 || !width.is_multiple_of(config.num_heads) {
            let (expected, got) = (format!("a divisor of the width {width}"), config.num_heads.to_string());
            return Err(Error::Setting { op: NAME, field: "num_heads", expected, got }.into());
        }
        Ok(Self {
            batch,
            queries,
            keys: k[1],
            num_heads: config.num_heads,
            head_dim: width / config.num_heads,
            softmax_scale: config.softmax_scale as f32,
            mask: config.mask,
        })
    }

    pub(crate) fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

struct AttentionOp {
    shape: AttentionShape,
    /// Whether there may be a backward pass.
    keep: bool,
    /// `[B, Sq, H]`, left by the forward pass for the backward pass.
    log_sum_exp: OnceLock<Vec<f32>>,
    /// The same on a card, `[B, H, Sq]`, where its kernels read it.
    kept: OnceLock<Kept>,
}

impl AttentionOp {
    const NAME: &'static str = "attention";

    fn forward_on<G: Gpu>(
        &self,
        gpu: &G,
        inputs: [(&G::Storage, &Layout); 3],
    ) -> Result<(G::Storage, Shape)> {
        let [q, k, v] = inputs.map(|(storage, layout)| gpu.given(storage, layout));
        let (q, k, v) = (q?, k?, v?);
        let qkv = [&q, &k, &v].map(|given| Rows::new(given.view(), self.shape.width()));
        let (y, log_sum_exp) = cuda::forward(gpu, &self.shape, qkv, self.keep)?;
        if let Some(log_sum_exp) = log_sum_exp {
            self.kept.get_or_init(|| Kept::new(log_sum_exp));
        }
        Ok((gpu.storage(y)?, inputs[0].1.shape().clone()))
    }

    fn backward_on<G: Gpu>(&self, gpu: &G, tensors: [&Tensor; 5]) -> Result<[Tensor; 3]> {
        let log_sum_exp = self.kept.get().map(Kept::get::<Array<G>>).transpose()?.map(Array::view);
        let [dq, dk, dv] = with_views(gpu, tensors, |[q, k, v, y, dy]| {
            let inputs = [q, k, v];
            let rows = |view| Rows::new(view, self.shape.width());
            let saved = cuda::Saved { qkv: inputs.map(rows), y, log_sum_exp };
            let alloc = |view: View<'_, G>| gpu.alloc(view.dtype, view.len);
            let gradients = [alloc(q)?, alloc(k)?, alloc(v)?];
            cuda::input_gradients(
                gpu,
                &self.shape,
                &saved,
                dy,
                gradients.each_ref().map(|d| rows(d.view())),
            )?;
            Ok(gradients)
        })?;
        let [q, k, v] = [tensors[0].dims(), tensors[1].dims(), tensors[2].dims()];
        Ok([dq.into_tensor(gpu, q)?, dk.into_tensor(gpu, k)?, dv.into_tensor(gpu, v)?])
    }
}

fn too_early() -> candle_core::Error {
    candle_core::Error::Msg("attention: backward before forward".into())
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "host-kernels"))]
        if let Some(host) = crate::gpu::host::Host::current() {
            return self.forward_on(&host, [(q, q_layout), (k, k_layout), (v, v_layout)]);
        }
        let (q, k, v) = (cpu_slice(q, q_layout)?, cpu_slice(k, k_layout)?, cpu_slice(v, v_layout)?);
        let (y, log_sum_exp) = cpu::forward(&self.shape, q, k, v);
        self.log_sum_exp.get_or_init(|| log_sum_exp);
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward_on(&Cuda::of(q)?, [(q, q_layout), (k, k_layout), (v, v_layout)])
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        if let Some(card) = Card::of(q.device())? {
            let gradients = on_card!(card, gpu => self.backward_on(&gpu, [q, k, v, y, grad_output]))?;
            let [dq, dk, dv] = gradients.map(Some);
            return Ok((dq, dk, dv));
        }
        let log_sum_exp = self.log_sum_exp.get().ok_or_else(too_early)?;
        let [dq, dk, dv] = with_cpu_slices([q, k, v, y, grad_output], |[q, k, v, y, dy]| {
            let saved = backward::Saved { q, k, v, y, log_sum_exp };
            backward::input_gradients(&self.shape, &saved, dy, 0..self.shape.keys)
        })?;
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Chip, host::on_host};
    use crate::testing::{CARD_DTYPES, check, check_on_card, check_on_chip};
    use candle_core::{DType, Device};

    #[test]
    fn matches_the_definition() {
        for (b, queries, keys, heads, d) in [
            (1, 1, 1, 1, 1),
            (2, 5, 7, 2, 3),
            (1, 33, 5, 3, 8),
            (1, 4, 31, 1, 40),
            (1, 130, 2, 1, 2),
            (1, 2, 600, 1, 2),
        ] {
            for mask in [AttentionMask::None, AttentionMask::Causal] {
                if mask == AttentionMask::Causal && queries != keys && keys < queries {
                    continue;
                }
                let config = AttentionConfig { num_heads: heads, softmax_scale: (d as f64).powf(-0.5), mask };
                let width = heads * d;
                check(
                    &[&[b, queries, width], &[b, keys, width], &[b, keys, width]],
                    |x| attention(&x[0], &x[1], &x[2], &config),
                    |x| reference::attention(x, [b, queries, keys], &config),
                );
            }
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        // Queries and keys around the kernels' blocks, and keys few enough to be shared out by queries.
        for (b, queries, keys, heads, d) in [
            (1, 1, 2, 2, 32),
            (2, 129, 77, 1, 40),
            (1, 65, 70, 2, 64),
            (1, 40, 300, 1, 80),
            (2, 9, 33, 1, 160),
        ] {
            for (chip, dtype) in Chip::SINGLE.into_iter().flat_map(|c| [(c, DType::F16), (c, DType::BF16)]) {
                let (softmax_scale, mask) = ((d as f64).powf(-0.5), AttentionMask::None);
                let config = AttentionConfig { num_heads: heads, softmax_scale, mask };
                let width = heads * d;
                check_on_chip(
                    chip,
                    dtype,
                    &[&[b, queries, width], &[b, keys, width], &[b, keys, width]],
                    |x| attention(&x[0], &x[1], &x[2], &config),
                    |x| reference::attention(x, [b, queries, keys], &config),
                );
            }
        }
    }

    #[test]
    fn a_card_stores_the_scores_where_no_kernel_does_without() {
        // Heads that no kernel has, eights and others; those of 32 in `f32`, and under a mask. Keys before, at and behind the
        // queries' end.
        for (b, queries, keys, heads, d) in
            [(2, 5, 16, 2, 24), (1, 77, 77, 2, 48), (1, 70, 9, 1, 3), (1, 3, 8, 1, 512), (2, 33, 40, 2, 32)]
        {
            for mask in [AttentionMask::None, AttentionMask::Causal] {
                for dtype in CARD_DTYPES {
                    let config =
                        AttentionConfig { num_heads: heads, softmax_scale: (d as f64).powf(-0.5), mask };
                    let width = heads * d;
                    check_on_card(
                        dtype,
                        &[&[b, queries, width], &[b, keys, width], &[b, keys, width]],
                        |x| attention(&x[0], &x[1], &x[2], &config),
                        |x| reference::attention(x, [b, queries, keys], &config),
                    );
                }
            }
        }
    }

    #[test]
    fn types_that_do_not_fit_are_errors() {
        let x = |dtype| Tensor::zeros(&[1, 2, 32], dtype, &Device::Cpu).unwrap();
        let config = AttentionConfig { num_heads: 1, softmax_scale: 1.0, mask: AttentionMask::None };
        let (f16, bf16) = (x(DType::F16), x(DType::BF16));
        assert!(on_host(|| attention(&f16, &bf16, &bf16, &config)).is_err());
        assert!(attention(&f16, &f16, &f16, &config).is_err(), "a CPU computes in f32");
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = Tensor::full(100f32, (1, 3, 4), &Device::Cpu).unwrap();
        let v = Tensor::ones((1, 3, 4), DType::F32, &Device::Cpu).unwrap();
        let config = AttentionConfig { num_heads: 1, softmax_scale: 1.0, mask: AttentionMask::None };
        let y = attention(&q, &q, &v, &config).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(y.iter().all(|v| (v - 1.0).abs() < 1e-6), "{y:?}");
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let x = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let config = |num_heads| AttentionConfig { num_heads, softmax_scale: 1.0, mask: AttentionMask::None };
        assert!(attention(&x(&[1, 2, 6]), &x(&[1, 2, 6]), &x(&[1, 2, 6]), &config(4)).is_err());
        assert!(attention(&x(&[1, 2, 6]), &x(&[2, 2, 6]), &x(&[2, 2, 6]), &config(2)).is_err());
        assert!(attention(&x(&[1, 2, 6]), &x(&[1, 2, 6]), &x(&[1, 3, 6]), &config(2)).is_err());
        assert!(attention(&x(&[2, 6]), &x(&[2, 6]), &x(&[2, 6]), &config(2)).is_err());
    }
}
