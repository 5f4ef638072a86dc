//! A frozen transformer over the pixels of a picture, with a text as its context, as one operator.

mod context;
mod cpu;
mod cuda;
mod keys_and_values;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use crate::elementwise::sum;
use crate::error::{Error, check_shape};
use crate::frozen::{FrozenFunction, check_device, cpu_slice, with_cpu_slices};
use crate::gpu::{
    Array, Card, Cuda, Gpu, Kept, View, check_dtype, check_same_dtype, dense, on_card, with_optional_view,
    with_views,
};
use crate::tape::{Tape, Value};
use crate::{GroupNorm, LayerNorm, Linear, Memory};

pub use context::Context;
use cuda::Wanted;
use keys_and_values::KeysAndValues;

/// diffusers' `Transformer2DModel`: `y = x + proj_out(blocks(proj_in(norm(x)), context))`.
///
/// # Shapes
/// `x [B, H, W, C]`, `context [B, T, D]`, `y [B, H, W, C]`.
///
/// # Gradient
/// To `x` and the context's tail. Where `x` needs none, as before the first cross-attention, none is computed for it.
#[derive(Clone)]
pub struct Transformer {
    /// Normalises the input.
    pub norm: GroupNorm,
    /// Before the blocks.
    pub proj_in: Linear,
    /// One after the other.
    pub blocks: Vec<Arc<TransformerBlock>>,
    /// After the blocks.
    pub proj_out: Linear,
}

/// diffusers' `BasicTransformerBlock`: self-attention, cross-attention, feed-forward; each normalised before and added after.
pub struct TransformerBlock {
    /// Before self-attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attn1: TransformerAttention,
    /// Before cross-attention.
    pub norm2: LayerNorm,
    /// Cross-attention.
    pub attn2: TransformerAttention,
    /// Before the feed-forward layers.
    pub norm3: LayerNorm,
    /// `C` to `8C`, the two halves of a GEGLU.
    pub ff_in: Linear,
    /// `4C` to `C`.
    pub ff_out: Linear,
}

/// The projections of an attention.
pub struct TransformerAttention {
    /// Of what attends.
    pub to_q: Linear,
    /// Of what is attended to.
    pub to_k: Linear,
    /// Of what is attended to.
    pub to_v: Linear,
    /// Of the result.
    pub to_out: Linear,
    /// Number of heads.
    pub num_heads: usize,
}

impl Transformer {
    /// Applies the transformer.
    ///
    /// # Errors
    /// When a shape disagrees or a tensor is not `f32`.
    pub fn forward(&self, x: &Tensor, context: &Context, memory: Memory) -> Result<Tensor> {
        let Context { tokens, tail, .. } = context;
        let op = self.op([x, tokens], [x.track_op(), tail.track_op()], memory)?;
        dense(x)?.apply_op3(&dense(tokens)?, tail, op)
    }

    /// The same on a tape, which has the context [as an input](Context::on).
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn on(
        &self,
        tape: &mut Tape,
        x: &Value,
        (context, text): (&Context, &Value),
        memory: Memory,
    ) -> Result<Value> {
        let tracked = [x.is_tracked(), text.is_tracked()];
        let op = self.op([x.tensor(), &context.tokens], tracked, memory)?;
        let op = Op { keys_and_values: context.keys_and_values.clone(), ..op };
        let (input, tokens, tail) = (dense(x.tensor())?, dense(&context.tokens)?, dense(text.tensor())?);
        let y = input.apply_op3_no_bwd(&tokens, &tail, &op)?;
        Ok(tape.adding_step(&[x, text], y, move |d, known| {
            let known = [known[0].as_ref(), known[1].as_ref()];
            Ok(op.gradients([&input, &tokens, &tail], d, known)?.into())
        }))
    }

    /// To be applied to `[x, context]` that fit, of which the first and the second's tail may have a gradient.
    fn op(&self, [x, tokens]: [&Tensor; 2], track: [bool; 2], memory: Memory) -> Result<Op> {
        self.check(x, tokens)?;
        let keep = (track[0] || track[1]).then_some(memory);
        let transformer = self.clone();
        let (saved, kept) = (OnceLock::new(), OnceLock::new());
        Ok(Op { transformer, track, keep, keys_and_values: None, saved, kept })
    }

    /// Checks every layer's shape, so that the computation itself cannot fail.
    fn check(&self, x: &Tensor, context: &Tensor) -> Result<()> {
        check_shape(x.rank() == 4, Op::NAME, "x", || "[B, H, W, C]".into(), x.dims())?;
        let batch = x.dim(0)?;
        let ok = context.rank() == 3 && context.dims()[0] == batch && context.dims()[1] > 0;
        check_shape(ok, Op::NAME, "context", || format!("[{batch}, T, D]"), context.dims())?;
        for tensor in [x, context] {
            check_dtype(tensor, Op::NAME)?;
            check_same_dtype(tensor, x, Op::NAME)?;
        }
        self.check_devices(x)?;
        let same = |what: &'static str, got: Vec<usize>, expected: &[usize]| {
            check_shape(got == expected, Op::NAME, what, || format!("{expected:?}"), &got)
        };
        let tokens = self.proj_in.0.output_shape(&self.norm.0.output_shape(x.dims())?)?;
        for block in &self.blocks {
            for (attention, to) in [(&block.attn1, &tokens[..]), (&block.attn2, context.dims())] {
                let q = attention.to_q.0.output_shape(&tokens)?;
                let (k, v) = (attention.to_k.0.output_shape(to)?, attention.to_v.0.output_shape(to)?);
                let width = q[q.len() - 1];
                same("the width of k", vec![k[k.len() - 1]], &[width])?;
                same("the width of v", vec![v[v.len() - 1]], &[width])?;
                if attention.num_heads == 0 || !width.is_multiple_of(attention.num_heads) {
                    let (expected, got) = (format!("a divisor of {width}"), attention.num_heads.to_string());
                    return Err(Error::Setting { op: Op::NAME, field: "num_heads", expected, got }.into());
                }
                same("the attention's result", attention.to_out.0.output_shape(&q)?, &tokens)?;
            }
            for norm in [&block.norm1, &block.norm2, &block.norm3] {
                norm.0.output_shape(&tokens)?;
            }
            let mut wide = block.ff_in.0.output_shape(&tokens)?;
            if let Some(last) = wide.last_mut() {
                *last /= 2;
            }
            same("the feed-forward's result", block.ff_out.0.output_shape(&wide)?, &tokens)?;
        }
        same("the result", self.proj_out.0.output_shape(&tokens)?, x.dims())
    }

    fn check_devices(&self, x: &Tensor) -> Result<()> {
        check_device(self.norm.0.as_ref(), x)?;
        let mut layers = vec![&self.proj_in, &self.proj_out];
        for block in &self.blocks {
            for TransformerAttention { to_q, to_k, to_v, to_out, .. } in [&block.attn1, &block.attn2] {
                layers.extend([to_q, to_k, to_v, to_out]);
            }
            layers.extend([&block.ff_in, &block.ff_out]);
            let norms = [&block.norm1, &block.norm2, &block.norm3];
            norms.into_iter().try_for_each(|norm| check_device(norm.0.as_ref(), x))?;
        }
        layers.into_iter().try_for_each(|layer| check_device(layer.0.as_ref(), x))
    }
}

/// Of the input, the context's tokens, and its tail, whose numbers are the last of the tokens': it is there for its gradient.
struct Op {
    transformer: Transformer,
    /// Whether `x` and the tail need a gradient.
    track: [bool; 2],
    /// How much the forward pass keeps, if there may be a backward pass.
    keep: Option<Memory>,
    /// On a card, if they are known: then they have the tail's gradient, too.
    keys_and_values: Option<Arc<KeysAndValues>>,
    saved: OnceLock<cpu::Kept>,
    /// The same on a card.
    kept: OnceLock<Kept>,
}

impl Op {
    const NAME: &'static str = "transformer";

    fn forward_on<G: Gpu>(
        &self,
        gpu: &G,
        [(x, x_layout), (context, context_layout)]: [(&G::Storage, &Layout); 2],
    ) -> Result<(G::Storage, Shape)> {
        let (x, context) = (gpu.given(x, x_layout)?, gpu.given(context, context_layout)?);
        let pass = self.pass(gpu, x_layout.dims(), context.view(), context_layout.dims());
        let (y, saved) = pass.forward(x.view(), self.keep == Some(Memory::Fast))?;
        if let Some(saved) = saved {
            self.kept.get_or_init(|| Kept::new(saved));
        }
        Ok((gpu.storage(y)?, x_layout.shape().clone()))
    }

    fn backward_on<G: Gpu>(
        &self,
        gpu: &G,
        [x, context, grad_output]: [&Tensor; 3],
        tail: &Tensor,
        [known_dx, known]: [Option<&Tensor>; 2],
    ) -> Result<[Option<Tensor>; 2]> {
        let saved = self.kept.get().map(Kept::get).transpose()?;
        let tail_tokens = if self.track[1] { tail.dim(1)? } else { 0 };
        let (dx, dtail) = with_views(gpu, [x, context, grad_output], |[x_view, c_view, dy]| {
            with_optional_view(gpu, known_dx, |known_dx| {
                with_optional_view(gpu, known, |known| {
                    let wanted = Wanted { dx: self.track[0], known_dx, tail: tail_tokens, known };
                    self.pass(gpu, x.dims(), c_view, context.dims()).backward(x_view, saved, dy, wanted)
                })
            })
        })?;
        let tensor =
            |d: Option<Array<G>>, like: &Tensor| d.map(|d| d.into_tensor(gpu, like.dims())).transpose();
        Ok([tensor(dx, x)?, tensor(dtail, tail)?])
    }

    fn pass<'a, G: Gpu>(
        &'a self,
        gpu: &'a G,
        shape: &[usize],
        context: View<'a, G>,
        context_shape: &[usize],
    ) -> cuda::Pass<'a, G> {
        let (batch, queries, keys) = (shape[0], shape[1] * shape[2], context_shape[1]);
        let (transformer, keys_and_values) = (&self.transformer, self.keys_and_values.as_ref());
        cuda::Pass { gpu, transformer, batch, queries, context, keys, keys_and_values }
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        context: &CpuStorage,
        context_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "host-kernels"))]
        if let Some(host) = crate::gpu::host::Host::current() {
            return self.forward_on(&host, [(x, x_layout), (context, context_layout)]);
        }
        let (x, context) = (cpu_slice(x, x_layout)?, cpu_slice(context, context_layout)?);
        let pass = cpu::Pass::new(&self.transformer, x_layout.dims(), context, context_layout.dims());
        let (y, kept) = pass.forward(x, self.keep);
        if let Some(kept) = kept {
            self.saved.get_or_init(|| kept);
        }
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        context: &CudaStorage,
        context_layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward_on(&Cuda::of(x)?, [(x, x_layout), (context, context_layout)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        context: &Tensor,
        tail: &Tensor,
        _y: &Tensor,
        grad_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dtail] = self.gradients([x, context, tail], grad_output, [None; 2])?;
        Ok((dx, None, dtail))
    }
}

impl Op {
    /// Of `x` and of the tail, with what is known of them.
    fn gradients(
        &self,
        [x, context, tail]: [&Tensor; 3],
        grad_output: &Tensor,
        known: [Option<&Tensor>; 2],
    ) -> Result<[Option<Tensor>; 2]> {
        let tensors = [x, context, grad_output];
        if let Some(card) = Card::of(x.device())? {
            let [dx, dtail] = on_card!(card, gpu => self.backward_on(&gpu, tensors, tail, known))?;
            // What is left with the keys and values is no tensor; any other says that there is a gradient.
            let left = self.keys_and_values.as_ref().filter(|_| self.track[1]).map(|_| tail.clone());
            return Ok([dx, dtail.or(left)]);
        }
        let wanted = (self.track[0], tail.dim(1)?);
        let (dx, dtail) = with_cpu_slices(tensors, |[x_data, c_data, dy]| {
            let pass = cpu::Pass::new(&self.transformer, x.dims(), c_data, context.dims());
            pass.backward(x_data, self.saved.get(), dy, wanted)
        })?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let dtail = Tensor::from_vec(dtail, tail.shape(), tail.device())?;
        let [known_dx, known] = known;
        let dx = dx.map(|dx| sum(known_dx, dx)).transpose()?;
        Ok([dx, self.track[1].then(|| sum(known, dtail)).transpose()?])
    }
}
