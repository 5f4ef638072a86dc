//! What a layer is made of: a tensor, or values of a file that stay where they lie.

use std::ops::{Deref, Range};
use std::sync::Arc;

use bytemuck::Pod;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use half::{bf16, f16};

use crate::error::{Error, wrong_shape};

/// The weight of a [`Linear`](crate::Linear) or a [`Conv2d`](crate::Conv2d): a tensor, which a layer on the CPU copies, or a part
/// of some bytes, such as a mapped file, which it reads where they are.
///
/// ```
/// use std::sync::Arc;
///
/// use candle_core::{DType, Device, Tensor};
/// use hiper_kernels::{Linear, Weight};
///
/// # fn main() -> candle_core::Result<()> {
/// let file: Arc<Vec<u8>> = Arc::new([1f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect());
/// let weight = Weight::in_place(file, 0..8, DType::F32, &[1, 2])?;
/// let y = Linear::new(weight, None)?.forward(&Tensor::ones((1, 2), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3.0]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Weight(Source);

#[derive(Clone)]
enum Source {
    Tensor(Tensor),
    InPlace { dims: Vec<usize>, values: Values },
}

impl From<&Tensor> for Weight {
    fn from(tensor: &Tensor) -> Self {
        Self(Source::Tensor(tensor.clone()))
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self(Source::Tensor(tensor))
    }
}

impl Weight {
    /// Bytes `range` of `bytes`, numbers of type `dtype` (f32, f16 or bf16, as this machine has them in memory), row-major of shape
    /// `dims`. They must not change as long as the layer lives.
    ///
    /// # Errors
    /// When there are not as many, they are of another type, or do not lie where such numbers can be read (a multiple of
    /// their size).
    pub fn in_place(
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
        dtype: DType,
        dims: &[usize],
    ) -> Result<Self> {
        let values = match dtype {
            DType::F32 => Stored::lent(bytes, range).map(Values::F32),
            DType::F16 => Stored::lent(bytes, range).map(Values::F16),
            DType::BF16 => Stored::lent(bytes, range).map(Values::BF16),
            other => return Err(candle_core::Error::UnsupportedDTypeForOp(other, "weight").bt()),
        };
        match values.filter(|values| values.len() == dims.iter().product::<usize>()) {
            Some(values) => Ok(Self(Source::InPlace { dims: dims.to_vec(), values })),
            None => {
                let expected = format!("of as many aligned {} as there are bytes for", dtype.as_str());
                Err(wrong_shape("weight", "dims", expected, dims))
            }
        }
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        match &self.0 {
            Source::Tensor(tensor) => tensor.dims(),
            Source::InPlace { dims, .. } => dims,
        }
    }

    /// The same numbers in another shape.
    ///
    /// # Errors
    /// When that has another count.
    pub fn reshape(self, dims: &[usize]) -> Result<Self> {
        Ok(Self(match self.0 {
            Source::Tensor(tensor) => Source::Tensor(tensor.reshape(dims)?),
            Source::InPlace { values, .. } if values.len() == dims.iter().product::<usize>() => {
                Source::InPlace { dims: dims.to_vec(), values }
            }
            Source::InPlace { dims: before, .. } => {
                return Err(wrong_shape("weight", "dims", format!("of as many numbers as {before:?}"), dims));
            }
        }))
    }

    /// The tensor that it was made from.
    pub(crate) fn tensor(&self) -> Option<&Tensor> {
        match &self.0 {
            Source::Tensor(tensor) => Some(tensor),
            Source::InPlace { .. } => None,
        }
    }

    /// The numbers, for a layer on the CPU; other types than f16 and bf16 become f32.
    pub(crate) fn values(self) -> Result<Values> {
        let tensor = match self.0 {
            Source::InPlace { values, .. } => return Ok(values),
            Source::Tensor(tensor) => match tensor.dtype() {
                DType::F16 | DType::BF16 => tensor,
                _ => tensor.to_dtype(DType::F32)?,
            },
        };
        let tensor = tensor.flatten_all()?.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let (start, end) = layout.contiguous_offsets().unwrap_or_default();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(Values::F32(Stored::Own(values[start..end].into()))),
            Storage::Cpu(CpuStorage::F16(values)) => Ok(Values::F16(Stored::Own(values[start..end].into()))),
            Storage::Cpu(CpuStorage::BF16(values)) => {
                Ok(Values::BF16(Stored::Own(values[start..end].into())))
            }
            _ => Err(Error::Device.into()),
        }
    }
}

/// Numbers in the type in which the checkpoint stores them.
#[derive(Clone)]
pub(crate) enum Values {
    F32(Stored<f32>),
    F16(Stored<f16>),
    BF16(Stored<bf16>),
}

impl Values {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }
}

/// Numbers in memory of their own, or in someone else's.
#[derive(Clone)]
pub(crate) enum Stored<T> {
    Own(Arc<[T]>),
    Lent { bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize> },
}

impl<T: Pod> Stored<T> {
    /// None if the bytes are not there, or not whole and aligned numbers.
    fn lent(bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        let part = (*bytes).as_ref().get(range.clone())?;
        bytemuck::try_cast_slice::<u8, T>(part).is_ok().then_some(Self::Lent { bytes, range })
    }
}

impl<T: Pod> Deref for Stored<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Own(values) => values,
            // As `lent` saw; should the owner show other bytes now, it panics.
            Self::Lent { bytes, range } => bytemuck::cast_slice(&(**bytes).as_ref()[range.clone()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_such_weight_is_refused() {
        let bytes = || Arc::new(vec![0u8; 64]);
        let weight = |range, dtype, dims: &[usize]| Weight::in_place(bytes(), range, dtype, dims);
        assert!(weight(0..24, DType::F32, &[2, 3]).is_ok());
        assert!(weight(0..12, DType::BF16, &[2, 3]).is_ok());
        assert!(weight(0..28, DType::F32, &[2, 3]).is_err());
        assert!(weight(0..25, DType::F32, &[2, 3]).is_err());
        assert!(weight(48..72, DType::F32, &[2, 3]).is_err());
        assert!(weight(0..48, DType::F64, &[2, 3]).is_err());
        // One of four neighbouring places at most is where an f32 can be.
        let aligned = (0..4).filter(|&first| weight(first..first + 4, DType::F32, &[1]).is_ok());
        assert_eq!(aligned.count(), 1);
    }

    #[test]
    fn a_shape_changes_its_count_does_not() {
        let weight = Weight::in_place(Arc::new(vec![0u8; 24]), 0..24, DType::F32, &[2, 3, 1, 1]).unwrap();
        assert_eq!(weight.clone().reshape(&[2, 3]).unwrap().dims(), [2, 3]);
        assert!(weight.reshape(&[2, 2]).is_err());
    }
}
