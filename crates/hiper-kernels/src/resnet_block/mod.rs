//! A frozen residual block, as one operator.

mod cuda;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::conv2d::ConvFunction;
use crate::elementwise::{concatenate, sum};
use crate::error::check_shape;
use crate::frozen::{FrozenFunction, check_device, cpu_slice, with_cpu_slices};
use crate::gpu::{
    Array, Card, Cuda, Gpu, Kept, check_dtype, check_same_dtype, dense, on_card, with_optional_view,
    with_views,
};
use crate::linear::to_vec;
use crate::tape::{Tape, Value};
use crate::{Conv2d, GroupNorm, Linear, Memory, conv2d, group_norm, linear};

/// diffusers' `ResnetBlock2D`:
/// `y = (shortcut(x) + conv2(norm2(conv1(norm1(x)) + time))) / output_scale_factor`, each normalisation with its activation.
///
/// Biases, the time embedding and the sum ride on the convolutions' last pass over their results.
///
/// # Shapes
/// `x [B, H, W, I]`, `time [B, O]` or `[1, O]` for all of the batch, `y [B, H, W, O]`; the convolutions keep the picture's size.
///
/// # Gradient
/// To `x` alone. `time` is a constant: it depends on the timestep, never on what is learned.
#[derive(Clone)]
pub struct ResnetBlock {
    /// Normalises the input.
    pub norm1: GroupNorm,
    /// `I` to `O` channels.
    pub conv1: Conv2d,
    /// Normalises what the time embedding was added to.
    pub norm2: GroupNorm,
    /// `O` to `O` channels.
    pub conv2: Conv2d,
    /// `I` to `O` channels, where they differ.
    pub conv_shortcut: Option<Linear>,
    /// Divides the sum; 1 in every Stable Diffusion.
    pub output_scale_factor: f64,
}

impl ResnetBlock {
    /// Applies the block.
    ///
    /// # Errors
    /// When a shape disagrees or a tensor is not `f32`.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>, memory: Memory) -> Result<Tensor> {
        let y = dense(x)?.apply_op1(self.op(x, x.track_op(), time, memory)?)?;
        if self.output_scale_factor == 1.0 { Ok(y) } else { y / self.output_scale_factor }
    }

    /// The same on a tape. `x` are channels of one value, or of two side by side, as behind a skip connection.
    ///
    /// # Errors
    /// As [`ResnetBlock::forward`].
    pub fn on(
        &self,
        tape: &mut Tape,
        (x, skip): (&Value, Option<&Value>),
        time: Option<&Tensor>,
        memory: Memory,
    ) -> Result<Value> {
        let input = match skip {
            Some(skip) => concatenate([x.tensor(), skip.tensor()], 3)?,
            None => dense(x.tensor())?,
        };
        let arguments: Vec<&Value> = [x].into_iter().chain(skip).collect();
        let tracked = arguments.iter().any(|value| value.is_tracked());
        let op = self.op(&input, tracked, time, memory)?;
        let y = input.apply_op1_no_bwd(&op)?;
        let own = skip.map(|_| x.tensor().dim(3)).transpose()?;
        let y = tape.adding_step(&arguments, y, move |d, known| {
            let known_of_all = known[0].as_ref().filter(|_| own.is_none());
            let (dx, dskip) = op.gradients([&input, d], known_of_all, own)?;
            let Some(dskip) = dskip else { return Ok(vec![Some(dx)]) };
            Ok(vec![Some(sum(known[0].as_ref(), dx)?), Some(sum(known[1].as_ref(), dskip)?)])
        });
        if self.output_scale_factor == 1.0 { Ok(y) } else { tape.divide(&y, self.output_scale_factor) }
    }

    /// To be applied to a tensor that fits, and which a gradient may go through.
    fn op(&self, x: &Tensor, tracked: bool, time: Option<&Tensor>, memory: Memory) -> Result<Op> {
        check_dtype(x, Op::NAME)?;
        self.check_devices(x)?;
        let on_card = Card::of(x.device())?.is_some();
        let channels = self.conv1.0.channels_out;
        let mut bias = self.conv1.0.bias.clone();
        if let Some(time) = time {
            let batch = x.dims().first().copied().unwrap_or_default();
            let fits = matches!(time.dims(), &[b, c] if (b == 1 || b == batch) && c == channels);
            let expected = || format!("[{batch}, {channels}] or [1, {channels}]");
            check_shape(fits, Op::NAME, "time", expected, time.dims())?;
            if on_card {
                check_same_dtype(time, x, Op::NAME)?;
            } else {
                let time = to_vec(time)?;
                bias = Some(match bias {
                    Some(bias) => bias.iter().cycle().zip(&time).map(|(b, t)| b + t).collect(),
                    None => time,
                });
            }
        }
        // What the convolutions and normalisations check, before anything is computed.
        let hidden = self.conv1.0.output_shape(&self.norm1.0.output_shape(x.dims())?)?;
        let output = self.conv2.0.output_shape(&self.norm2.0.output_shape(&hidden)?)?;
        let shortcut = match &self.conv_shortcut {
            Some(shortcut) => shortcut.0.output_shape(x.dims())?,
            None => x.dims().to_vec(),
        };
        check_shape(
            shortcut == output,
            Op::NAME,
            "the shortcut's result",
            || format!("{output:?}"),
            &shortcut,
        )?;
        let keep = tracked && memory == Memory::Fast;
        let time = time.filter(|_| on_card).cloned();
        let block = self.clone();
        Ok(Op { block, bias, time, keep, hidden: OnceLock::new(), kept: OnceLock::new() })
    }
}

impl ResnetBlock {
    fn check_devices(&self, x: &Tensor) -> Result<()> {
        let Self { norm1, conv1, norm2, conv2, conv_shortcut, .. } = self;
        [norm1, norm2].into_iter().try_for_each(|norm| check_device(norm.0.as_ref(), x))?;
        [conv1, conv2].into_iter().try_for_each(|conv| check_device(conv.0.as_ref(), x))?;
        conv_shortcut.iter().try_for_each(|layer| check_device(layer.0.as_ref(), x))
    }
}

struct Op {
    block: ResnetBlock,
    /// The first convolution's bias with the time embedding, `[O]` or `[B, O]`.
    bias: Option<Vec<f32>>,
    /// On a card, the time embedding, `[B, O]` or `[1, O]`.
    time: Option<Tensor>,
    keep: bool,
    /// The first convolution's result, if it is kept for the backward pass.
    hidden: OnceLock<Vec<f32>>,
    /// The same on a card, and the normalisations' statistics.
    kept: OnceLock<Kept>,
}

impl Op {
    const NAME: &'static str = "resnet_block";

    /// The first convolution's result.
    fn hidden(&self, x: &[f32], shape: &[usize]) -> Vec<f32> {
        let normed = group_norm::cpu::forward(&self.block.norm1.0, x, shape[0]);
        conv2d::cpu::forward(&self.block.conv1.0, &normed, shape, self.bias.as_deref(), None)
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: &G::Storage, layout: &Layout) -> Result<(G::Storage, Shape)> {
        let (x, shape) = (gpu.given(x, layout)?, layout.dims());
        let (y, saved) = with_optional_view(gpu, self.time.as_ref(), |time| {
            cuda::Pass { gpu, block: &self.block, shape, time }.forward(x.view())
        })?;
        if self.keep {
            self.kept.get_or_init(|| Kept::new(saved));
        }
        Ok((gpu.storage(y)?, hidden_shape(&self.block.conv1.0, shape).to_vec().into()))
    }

    /// That to `x`, with what is `known` of it; or those to its first `own` channels and to the others, of which nothing is.
    fn gradients(
        &self,
        [x, grad_output]: [&Tensor; 2],
        known: Option<&Tensor>,
        own: Option<usize>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if let Some(card) = Card::of(x.device())? {
            return on_card!(card, gpu => self.gradients_on(&gpu, [x, grad_output], known, own));
        }
        let dx = sum(known, self.input_gradient_on_cpu(x, grad_output)?)?;
        let Some(own) = own else { return Ok((dx, None)) };
        Ok((dx.narrow(3, 0, own)?, Some(dx.narrow(3, own, x.dim(3)? - own)?)))
    }

    fn gradients_on<G: Gpu>(
        &self,
        gpu: &G,
        [x, grad_output]: [&Tensor; 2],
        known: Option<&Tensor>,
        own: Option<usize>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let saved = self.kept.get().map(Kept::get).transpose()?;
        let (block, shape) = (&self.block, x.dims());
        let (first, second) = with_views(gpu, [x, grad_output], |[x, dy]| {
            with_optional_view(gpu, known, |known| {
                with_optional_view(gpu, self.time.as_ref(), |time| {
                    cuda::Pass { gpu, block, shape, time }.input_gradient(x, saved, dy, (known, own))
                })
            })
        })?;
        let tensor = |array: Array<G>, channels| array.into_tensor(gpu, &[&shape[..3], &[channels]].concat());
        let own = own.unwrap_or(shape[3]);
        Ok((tensor(first, own)?, second.map(|second| tensor(second, shape[3] - own)).transpose()?))
    }

    fn input_gradient_on_cpu(&self, x: &Tensor, grad_output: &Tensor) -> Result<Tensor> {
        let shape = x.dims();
        let dx = with_cpu_slices([x, grad_output], |[x, dy]| {
            let ResnetBlock { norm1, conv1, norm2, conv2, conv_shortcut, .. } = &self.block;
            let recomputed = if self.hidden.get().is_none() { Some(self.hidden(x, shape)) } else { None };
            let hidden = recomputed.as_deref().or(self.hidden.get().map(Vec::as_slice)).unwrap_or_default();
            let hidden_shape = hidden_shape(&conv1.0, shape);
            let d = conv2d::cpu::input_gradient(&conv2.0, &hidden_shape, dy);
            let d = group_norm::cpu::input_gradient(&norm2.0, hidden, shape[0], &d, None);
            drop(recomputed);
            let d = conv2d::cpu::input_gradient(&conv1.0, shape, &d);
            let shortcut =
                conv_shortcut.as_ref().map(|layer| linear::cpu::input_gradient(&layer.0, dy, None));
            let around = Some(shortcut.as_deref().unwrap_or(dy));
            group_norm::cpu::input_gradient(&norm1.0, x, shape[0], &d, around)
        })?;
        Tensor::from_vec(dx, shape, x.device())
    }
}

/// `shape` with `conv`'s output channels.
fn hidden_shape(conv: &ConvFunction, shape: &[usize]) -> [usize; 4] {
    [shape[0], shape[1], shape[2], conv.channels_out]
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "host-kernels"))]
        if let Some(host) = crate::gpu::host::Host::current() {
            return self.forward_on(&host, storage, layout);
        }
        let (x, shape) = (cpu_slice(storage, layout)?, layout.dims());
        let ResnetBlock { norm2, conv1, conv2, conv_shortcut, .. } = &self.block;
        let hidden = self.hidden(x, shape);
        let hidden_shape = hidden_shape(&conv1.0, shape);
        let normed = group_norm::cpu::forward(&norm2.0, &hidden, shape[0]);
        let shortcut = conv_shortcut.as_ref().map(|layer| linear::cpu::forward(&layer.0, x, None));
        let residual = shortcut.as_deref().unwrap_or(x);
        let bias = conv2.0.bias.as_deref();
        let y = conv2d::cpu::forward(&conv2.0, &normed, &hidden_shape, bias, Some(residual));
        if self.keep {
            self.hidden.get_or_init(|| hidden);
        }
        Ok((CpuStorage::F32(y), hidden_shape.to_vec().into()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward_on(&Cuda::of(storage)?, storage, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad_output: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradients([x, grad_output], None, None)?.0))
    }
}
