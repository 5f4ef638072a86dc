//! Operators one after the other, and the way back through them.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor};

use crate::gpu::dense;
use crate::{Error, elementwise};

/// A network's operators in the order in which they were applied, as one operator of candle's graph.
///
/// candle adds every gradient to zeros that it makes first. Here the first gradient of a value is taken as it is, which saves an
/// addition and an allocation for each operator.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use hiper_kernels::{Activation, GroupNorm, Tape};
///
/// # fn main() -> candle_core::Result<()> {
/// let ones = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let norm = GroupNorm::new(&ones, &ones, 4, 1e-5, Some(Activation::Silu))?;
/// let x = Var::zeros((1, 2, 2, 8), DType::F32, &Device::Cpu)?;
/// let mut tape = Tape::default();
/// let input = tape.input(x.as_tensor());
/// let once = norm.on(&mut tape, &input)?;
/// let twice = norm.on(&mut tape, &once)?;
/// let y = tape.end(&twice)?;
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Tape {
    /// Of candle's graph, with their numbers.
    inputs: Vec<(Tensor, usize)>,
    steps: Vec<Step>,
    /// How many values have a number.
    values: usize,
}

/// A tensor between operators of a [`Tape`], cut from candle's graph.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    /// By which its gradient is known, if it needs one.
    number: Option<usize>,
}

/// The gradients of an operator's arguments, of its result's and what is known of the arguments'.
type Back = Box<dyn Fn(&Tensor, &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

struct Step {
    arguments: Vec<Option<usize>>,
    result: usize,
    /// Whether what is known of the arguments' gradients is in what `back` returns.
    adds: bool,
    back: Back,
}

impl Value {
    /// Numbers that need no gradient.
    pub fn constant(tensor: &Tensor) -> Self {
        Self { tensor: tensor.detach(), number: None }
    }

    /// The numbers.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient goes through it.
    pub(crate) fn is_tracked(&self) -> bool {
        self.number.is_some()
    }
}

impl Tape {
    /// An argument of the network: it gets a gradient if it is part of candle's graph. There may be three of these.
    pub fn input(&mut self, tensor: &Tensor) -> Value {
        let mut value = Value::constant(tensor);
        if tensor.track_op() {
            value.number = Some(self.number());
            self.inputs.push((tensor.clone(), self.values - 1));
        }
        value
    }

    /// A tensor divided by a number.
    ///
    /// # Errors
    /// What the device says.
    pub(crate) fn divide(&mut self, x: &Value, by: f64) -> Result<Value> {
        let quotient = (&x.tensor / by)?;
        Ok(self.step(&[x], quotient, move |d| Ok(vec![Some((d / by)?)])))
    }

    pub(crate) fn apply1(&mut self, x: &Value, op: impl CustomOp1 + Send + Sync + 'static) -> Result<Value> {
        let op: Arc<Box<dyn CustomOp1 + Send + Sync>> = Arc::new(Box::new(op));
        let input = dense(&x.tensor)?;
        let y = input.apply_op1_arc(op.clone())?;
        let result = y.clone();
        Ok(self.step(&[x], y, move |d| Ok(vec![op.bwd(&input, &result, d)?])))
    }

    /// An operator that adds what is known of its arguments' gradients to its own: cheaper than adding it afterwards.
    pub(crate) fn adding_step(
        &mut self,
        arguments: &[&Value],
        tensor: Tensor,
        back: impl Fn(&Tensor, &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
    ) -> Value {
        self.record(arguments, tensor, true, Box::new(back))
    }

    fn number(&mut self) -> usize {
        self.values += 1;
        self.values - 1
    }

    /// An operator whose arguments' gradients are made of its result's alone.
    pub(crate) fn step(
        &mut self,
        arguments: &[&Value],
        tensor: Tensor,
        back: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
    ) -> Value {
        self.record(arguments, tensor, false, Box::new(move |d, _| back(d)))
    }

    fn record(&mut self, arguments: &[&Value], tensor: Tensor, adds: bool, back: Back) -> Value {
        if !arguments.iter().any(|argument| argument.is_tracked()) {
            return Value { tensor, number: None };
        }
        let result = self.number();
        let arguments = arguments.iter().map(|argument| argument.number).collect();
        self.steps.push(Step { arguments, result, adds, back });
        Value { tensor, number: Some(result) }
    }

    /// The network's result, in candle's graph if an input is.
    ///
    /// # Errors
    /// When there are more than three inputs that need a gradient.
    pub fn end(self, result: &Value) -> Result<Tensor> {
        if !result.is_tracked() {
            return Ok(result.tensor.clone());
        }
        let tensors: Vec<Tensor> = self.inputs.iter().map(|(tensor, _)| tensor.clone()).collect();
        let whole = Whole { tape: self, result: result.clone() };
        match tensors.as_slice() {
            [a] => a.apply_op3(a, a, whole),
            [a, b] => a.apply_op3(b, b, whole),
            [a, b, c] => a.apply_op3(b, c, whole),
            more => {
                let what = format!("{} inputs that need a gradient", more.len());
                Err(Error::Unsupported { op: Whole::NAME, what }.into())
            }
        }
    }

    /// The gradients of the inputs that need one, in their order, from that of a value: without candle's graph.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use hiper_kernels::{GroupNorm, Tape};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let ones = Tensor::ones(8, DType::F32, &Device::Cpu)?;
    /// let norm = GroupNorm::new(&ones, &ones, 4, 1e-5, None)?;
    /// let x = Var::zeros((1, 2, 2, 8), DType::F32, &Device::Cpu)?;
    /// let mut tape = Tape::default();
    /// let input = tape.input(x.as_tensor());
    /// let y = norm.on(&mut tape, &input)?;
    /// let gradients = tape.gradients(&y, y.tensor().ones_like()?)?;
    /// assert_eq!(gradients[0].as_ref().map(Tensor::dims), Some(x.dims()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn gradients(&self, of: &Value, gradient: Tensor) -> Result<Vec<Option<Tensor>>> {
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.values];
        if let Some(number) = of.number {
            gradients[number] = Some(gradient);
        }
        for step in self.steps.iter().rev() {
            // Nothing needs a result that has no gradient.
            let Some(gradient) = gradients[step.result].take() else { continue };
            let mut known = |argument: &Option<usize>| argument.and_then(|number| gradients[number].take());
            let known: Vec<Option<Tensor>> =
                if step.adds { step.arguments.iter().map(&mut known).collect() } else { Vec::new() };
            let parts = (step.back)(&gradient, &known)?.into_iter();
            for (i, (argument, part)) in step.arguments.iter().zip(parts).enumerate() {
                // What is known and was not added to stands.
                let part = part.or_else(|| known.get(i).cloned().flatten());
                let (Some(argument), Some(part)) = (argument, part) else { continue };
                let sum = &mut gradients[*argument];
                *sum = Some(elementwise::sum(sum.take().as_ref(), part)?);
            }
        }
        Ok(self.inputs.iter().map(|(_, number)| gradients[*number].take()).collect())
    }
}

/// A network that was computed, as an operator of its inputs: its forward pass has its result.
struct Whole {
    tape: Tape,
    result: Value,
}

impl Whole {
    const NAME: &'static str = "network";
}

impl CustomOp3 for Whole {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let result = self.result.tensor.force_contiguous()?;
        match &*result.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), result.shape().clone())),
            _ => Err(Error::Device.into()),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let result = self.result.tensor.force_contiguous()?;
        match &*result.storage_and_layout().0 {
            Storage::Cuda(storage) => Ok((storage.try_clone(result.layout())?, result.shape().clone())),
            _ => Err(Error::Device.into()),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.tape.gradients(&self.result, gradient.clone())?.into_iter();
        let mut next = || gradients.next().flatten();
        Ok((next(), next(), next()))
    }
}

#[cfg(test)]
mod tests;
