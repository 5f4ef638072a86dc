//! A computation that is done again and again: recorded once where the device can.

use candle_core::{Device, Result};

use super::cuda;

/// A computation on tensors that stay where they are: it reads some of them and writes others with
/// [`candle_core::Tensor::slice_set`]. On an NVIDIA card its launches are recorded as a graph, and replayed without the host's
/// taking part; elsewhere it is done anew each time.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use hiper_kernels::Replay;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
/// let y = x.ones_like()?;
/// let replay = Replay::new(&Device::Cpu, || y.slice_set(&(&x + 1.0)?, 0, 0))?;
/// x.slice_set(&Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu)?, 0, 0)?;
/// replay.run()?;
/// assert_eq!(y.to_vec1::<f32>()?, [2.0, 3.0, 4.0]);
/// # Ok(())
/// # }
/// ```
pub struct Replay<'a> {
    /// Holds on to what a recording reads.
    computation: Box<dyn Fn() -> Result<()> + 'a>,
    recorded: Option<cuda::Recorded>,
}

impl<'a> Replay<'a> {
    /// Does the computation, and records it if the device can. What it allocates it must free; it must not wait for the card
    /// (read a value), nor send it data.
    ///
    /// # Errors
    /// What the computation gives, and what the driver says of the recording.
    pub fn new(device: &Device, computation: impl Fn() -> Result<()> + 'a) -> Result<Self> {
        let computation: Box<dyn Fn() -> Result<()> + 'a> = Box::new(computation);
        let recorded = match device {
            Device::Cuda(device) => Some(cuda::Recorded::new(device, &computation)?),
            _ => None,
        };
        if recorded.is_none() {
            computation()?;
        }
        Ok(Self { computation, recorded })
    }

    /// Does it again, with what the tensors hold now.
    ///
    /// # Errors
    /// As [`Replay::new`].
    pub fn run(&self) -> Result<()> {
        match &self.recorded {
            Some(recorded) => recorded.run(),
            None => (self.computation)(),
        }
    }
}
