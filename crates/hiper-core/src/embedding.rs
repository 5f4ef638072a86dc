//! Decomposition of a text embedding, and composition for editing.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// Tokens in the tail: the paper's choice, N = 5.
pub const DEFAULT_N_HIPER: usize = 5;

/// What a tail is multiplied by when it edits: the authors' choice.
pub const DEFAULT_TAIL_SCALE: f64 = 0.8;

/// A prompt's embedding, `[1, T, D]`, `f32`: what the UNet calls `encoder_hidden_states`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use hiper_core::{DEFAULT_N_HIPER, TextEmbedding};
///
/// // What the text encoder gives for a prompt; here, zeros.
/// let text = TextEmbedding::new(Tensor::zeros((1, 77, 768), DType::F32, &Device::Cpu)?)?;
/// let (head, tail) = text.split(DEFAULT_N_HIPER)?;
/// assert_eq!((head.dims(), tail.tensor().dims()), ([1, 72, 768].as_slice(), [5, 768].as_slice()));
/// # Ok::<(), hiper_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TextEmbedding(Tensor);

/// A HiPer tail, `[N, D]`, `f32`: what one picture's subject was learned into.
///
/// This is not a Textual Inversion embedding: it lives behind the text encoder, not before it.
#[derive(Debug, Clone)]
pub struct HiperEmbedding(Tensor);

impl TextEmbedding {
    /// Takes an embedding `[1, T, D]`.
    ///
    /// # Errors
    /// When the shape or type is another one.
    pub fn new(embedding: Tensor) -> Result<Self> {
        match embedding.dims() {
            &[1, t, d] if t >= 2 && d > 0 && embedding.dtype() == DType::F32 => Ok(Self(embedding.detach())),
            dims => {
                let got = format!("{dims:?} of {}", embedding.dtype().as_str());
                Err(Error::argument("text embedding", "[1, T, D] of f32, T at least 2", got))
            }
        }
    }

    /// The embedding, `[1, T, D]`.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }

    /// Number of tokens `T`.
    pub fn num_tokens(&self) -> usize {
        self.0.dims()[1]
    }

    /// Width `D`.
    pub fn width(&self) -> usize {
        self.0.dims()[2]
    }

    /// The semantic head `[1, T − N, D]` and the tail `[N, D]`.
    ///
    /// # Errors
    /// When `n_hiper` is 0 or leaves no head.
    pub fn split(&self, n_hiper: usize) -> Result<(Tensor, HiperEmbedding)> {
        let head = self.num_tokens().checked_sub(n_hiper).filter(|&head| head > 0 && n_hiper > 0);
        let Some(head) = head else {
            let (most, all) = (self.num_tokens() - 1, self.num_tokens());
            let expected = format!("1 to {most}, so that some of the {all} tokens stay");
            return Err(Error::argument("n_hiper", expected, n_hiper));
        };
        let tail = self.0.narrow(1, head, n_hiper)?.squeeze(0)?.contiguous()?;
        Ok((self.0.narrow(1, 0, head)?.contiguous()?, HiperEmbedding(tail)))
    }
}

impl HiperEmbedding {
    /// Takes a tail `[N, D]`.
    ///
    /// # Errors
    /// When the shape or type is another one.
    pub fn new(tail: Tensor) -> Result<Self> {
        match tail.dims() {
            &[n, d] if n > 0 && d > 0 && tail.dtype() == DType::F32 => Ok(Self(tail.detach())),
            dims => {
                let got = format!("{dims:?} of {}", tail.dtype().as_str());
                Err(Error::argument("HiPer tail", "[N, D] of f32", got))
            }
        }
    }

    /// The tail, `[N, D]`.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }

    /// Number of tokens `N`.
    pub fn n_hiper(&self) -> usize {
        self.0.dims()[0]
    }

    /// Width `D`.
    pub fn width(&self) -> usize {
        self.0.dims()[1]
    }
}

/// The conditioning of an edit, `[target head; tail_scale · tail]` of shape `[1, T, D]` (the paper's `[e_tgt′; e_hper]`; the
/// factor is the authors' code's).
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use hiper_core::TextEmbedding;
/// use hiper_core::{DEFAULT_TAIL_SCALE, compose};
/// # let text = |value: f32| TextEmbedding::new(Tensor::full(value, (1, 77, 8), &Device::Cpu)?);
/// let (source, target) = (text(1.0)?, text(2.0)?);
/// let (_, tail) = source.split(5)?;
/// let edit = compose(&target, &tail, DEFAULT_TAIL_SCALE)?.to_vec3::<f32>()?;
/// assert_eq!((edit[0][71][0], edit[0][72][0]), (2.0, 0.8)); // the target's head, the source's tail
/// # Ok::<(), hiper_core::Error>(())
/// ```
///
/// # Errors
/// When the widths differ, the tail leaves no head, or the scale is not a finite number.
pub fn compose(target: &TextEmbedding, tail: &HiperEmbedding, tail_scale: f64) -> Result<Tensor> {
    if tail.width() != target.width() {
        let expected = format!("width {}, as the model's text embeddings", target.width());
        let got = format!("width {}: the tail was learned with another model", tail.width());
        return Err(Error::argument("HiPer tail", expected, got));
    }
    if !tail_scale.is_finite() {
        return Err(Error::argument("tail_scale", "a finite number", tail_scale));
    }
    let (head, _) = target.split(tail.n_hiper())?;
    let tail = (tail.tensor() * tail_scale)?.unsqueeze(0)?.to_device(head.device())?;
    Ok(Tensor::cat(&[&head, &tail], 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    fn embedding(t: usize, d: usize) -> TextEmbedding {
        let values: Vec<f32> = (0..t * d).map(|v| v as f32 * 0.25 - 3.0).collect();
        TextEmbedding::new(Tensor::from_vec(values, (1, t, d), &Device::Cpu).unwrap()).unwrap()
    }

    proptest! {
        #[test]
        fn splitting_and_composing_is_the_identity(t in 2usize..90, d in 1usize..20, n in 1usize..89) {
            let text = embedding(t, d);
            if n >= t {
                prop_assert!(text.split(n).is_err());
            } else {
                let (_, tail) = text.split(n).unwrap();
                let again = compose(&text, &tail, 1.0).unwrap();
                prop_assert_eq!(again.to_vec3::<f32>().unwrap(), text.tensor().to_vec3::<f32>().unwrap());
            }
        }
    }

    #[test]
    fn only_the_tail_is_scaled() {
        let text = embedding(7, 3);
        let (head, tail) = text.split(2).unwrap();
        let edit = compose(&text, &tail, 0.5).unwrap();
        assert_eq!(edit.narrow(1, 0, 5).unwrap().to_vec3::<f32>().unwrap(), head.to_vec3::<f32>().unwrap());
        let scaled = (tail.tensor() * 0.5).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(edit.narrow(1, 5, 2).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap(), scaled);
    }

    #[test]
    fn a_tail_of_another_width_is_refused() {
        let (_, tail) = embedding(7, 4).split(2).unwrap();
        let error = compose(&embedding(7, 3), &tail, 1.0).unwrap_err().to_string();
        assert!(error.contains("learned with another model"), "{error}");
    }

    #[test]
    fn other_shapes_types_and_scales_are_refused() {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        for shape in [&[77, 8][..], &[2, 77, 8], &[1, 1, 8], &[1, 77, 0], &[1, 77, 8, 1]] {
            assert!(TextEmbedding::new(zeros(shape, DType::F32)).is_err(), "{shape:?}");
        }
        for shape in [&[8][..], &[0, 8], &[5, 0], &[1, 5, 8]] {
            assert!(HiperEmbedding::new(zeros(shape, DType::F32)).is_err(), "{shape:?}");
        }
        assert!(TextEmbedding::new(zeros(&[1, 77, 8], DType::F16)).is_err());
        assert!(HiperEmbedding::new(zeros(&[5, 8], DType::F64)).is_err());
        let text = embedding(7, 3);
        assert!(text.split(0).is_err() && text.split(7).is_err() && text.split(usize::MAX).is_err());
        let (_, tail) = text.split(2).unwrap();
        assert!(compose(&text, &tail, f64::NAN).is_err() && compose(&text, &tail, -0.5).is_ok());
    }
}
