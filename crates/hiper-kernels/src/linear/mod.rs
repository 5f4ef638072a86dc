//! A frozen fully connected layer.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use crate::cpu::matrix::Matrix;
use crate::error::{check_shape, wrong_shape};
use crate::frozen::{self, FrozenFunction, check_device};
use crate::gpu::{Array, Card, Gpu, Kept, View, on_card, with_views};
use crate::weight::Weight;

/// A frozen fully connected layer, `y = x Wᵀ + b`.
///
/// # Shapes
/// `x [.., I]`, `W [O, I]`, `b [O]`, `y [.., O]`.
///
/// # Gradient
/// To `x` alone: `dx = dy W`.
#[derive(Clone)]
pub struct Linear(pub(crate) Arc<LinearFunction>);

pub(crate) struct LinearFunction {
    /// `[O, I]`, if it is on the CPU.
    weight: Matrix,
    bias: Option<Vec<f32>>,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    /// `weight` and `bias`, if they are on a card.
    card: Option<Kept>,
}

impl Linear {
    /// Takes the layer's weights, `[O, I]` and `[O]`; a tensor, or a [`Weight`] of a file.
    ///
    /// # Errors
    /// When a shape disagrees.
    pub fn new(weight: impl Into<Weight>, bias: Option<&Tensor>) -> Result<Self> {
        let weight = weight.into();
        Self::check(&weight, bias)?;
        let card = Kept::layer(&weight, bias)?;
        Self::kept(weight, bias, card)
    }

    fn check(weight: &Weight, bias: Option<&Tensor>) -> Result<()> {
        let &[out_features, _] = weight.dims() else {
            return Err(wrong_shape(LinearFunction::NAME, "weight", "[O, I]".into(), weight.dims()));
        };
        if let Some(bias) = bias {
            check_shape(
                bias.dims() == [out_features],
                LinearFunction::NAME,
                "bias",
                || format!("[{out_features}]"),
                bias.dims(),
            )?;
        }
        Ok(())
    }

    /// Of checked weights, which are on a card if they were kept there.
    fn kept(weight: Weight, bias: Option<&Tensor>, card: Option<Kept>) -> Result<Self> {
        let (out_features, in_features) = (weight.dims()[0], weight.dims()[1]);
        Ok(Self(Arc::new(LinearFunction {
            weight: if card.is_some() { Matrix::elsewhere() } else { Matrix::new(weight)? },
            bias: bias.map(to_vec).transpose()?,
            in_features,
            out_features,
            card,
        })))
    }

    /// Layers of one input, such as those of queries, keys and values: on a card their weights lie one behind the other, so that
    /// one product can do for all.
    ///
    /// # Errors
    /// As [`Linear::new`].
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use hiper_kernels::{Linear, Weight};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let weight = || Ok::<_, candle_core::Error>((Weight::from(Tensor::zeros((8, 4), DType::F32, &Device::Cpu)?), None));
    /// let [to_k, to_v] = Linear::side_by_side([weight()?, weight()?])?;
    /// assert_eq!(to_v.forward(&Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?)?.dims(), [3, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn side_by_side<const N: usize>(layers: [(Weight, Option<Tensor>); N]) -> Result<[Self; N]> {
        let layers = Self::all_side_by_side(layers.into())?;
        Ok(std::array::from_fn(|i| layers[i].clone()))
    }

    /// The same of any number.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub fn all_side_by_side(layers: Vec<(Weight, Option<Tensor>)>) -> Result<Vec<Self>> {
        let mut inputs = layers.iter().map(|(weight, _)| weight.dims().last());
        let same = inputs.next().is_none_or(|first| inputs.all(|other| other == first));
        for (weight, bias) in &layers {
            Self::check(weight, bias.as_ref())?;
        }
        let on_card = if same { Kept::layers(&layers)? } else { None };
        let mut on_card = on_card.into_iter().flatten();
        let layers = layers.into_iter().map(|(weight, bias)| match on_card.next() {
            Some(card) => Self::kept(weight, bias.as_ref(), Some(card)),
            None => Self::new(weight, bias.as_ref()),
        });
        layers.collect()
    }

    /// Applies the layer.
    ///
    /// # Errors
    /// When the last dimension of `x` is not `I`, or `x` is not `f32`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        frozen::apply(&self.0, x)
    }

    /// Applies each of some layers to one input, which gets no gradient. On a card that is one product if they lie
    /// [side by side](Self::all_side_by_side).
    ///
    /// # Errors
    /// As [`Linear::forward`].
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use hiper_kernels::{Linear, Weight};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let zeros = |shape| Ok::<_, candle_core::Error>(Weight::from(Tensor::zeros(shape, DType::F32, &Device::Cpu)?));
    /// let layers = Linear::all_side_by_side(vec![(zeros((8, 4))?, None), (zeros((2, 4))?, None)])?;
    /// let results = Linear::forward_each(&layers, &Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?)?;
    /// assert_eq!((results[0].dims(), results[1].dims()), (&[3, 8][..], &[3, 2][..]));
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward_each(layers: &[Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let x = x.detach();
        let (Some(first), Some(card)) = (layers.first(), Card::of(x.device())?) else {
            return layers.iter().map(|layer| layer.forward(&x)).collect();
        };
        let mut shape = first.0.output_shape(x.dims())?;
        check_device(first.0.as_ref(), &x)?;
        let functions: Vec<&LinearFunction> = layers.iter().map(|layer| layer.0.as_ref()).collect();
        on_card!(card, gpu => {
            let Some(joined) = cuda::Joined::of(&functions)? else {
                return layers.iter().map(|layer| layer.forward(&x)).collect();
            };
            let last = shape.len() - 1;
            shape[last] = functions.iter().map(|layer| layer.out_features).sum();
            let all = with_views(&gpu, [&x], |[x]| joined.forward(&gpu, x))?.into_tensor(&gpu, &shape)?;
            let mut from = 0;
            let of_each = functions.iter().map(|layer| {
                from += layer.out_features;
                all.narrow(last, from - layer.out_features, layer.out_features)
            });
            of_each.collect()
        })
    }
}

/// A weight's values, row-major.
pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

impl FrozenFunction for LinearFunction {
    const NAME: &'static str = "linear";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let expected = || format!("[.., {}]", self.in_features);
        check_shape(input.last() == Some(&self.in_features), Self::NAME, "x", expected, input)?;
        let mut shape = input.to_vec();
        shape[input.len() - 1] = self.out_features;
        Ok(shape)
    }

    fn forward(&self, x: &[f32], _shape: &[usize]) -> Vec<f32> {
        cpu::forward(self, x, None)
    }

    fn input_gradient(&self, _x: &[f32], _shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(self, grad_output, None)
    }

    fn weights_on_card(&self) -> Option<bool> {
        Some(self.card.is_some())
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, _shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, self, x, None)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        _x: View<'_, G>,
        _shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, self, grad_output, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Chip;
    use crate::gpu::host::on_host;
    use crate::testing::{CARD_DTYPES, check, check_on_card, check_on_chip, normals, rounded};
    use candle_core::Device;

    #[test]
    fn matches_the_definition() {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 7, 3), (33, 16, 17)] {
            for with_bias in [false, true] {
                let (w, b) = (normals(inputs * outputs, 8), normals(outputs, 9));
                let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
                let bias = Tensor::from_slice(&b, outputs, &Device::Cpu).unwrap();
                let linear = Linear::new(&weight, with_bias.then_some(&bias)).unwrap();
                check(
                    &[&[1, rows, inputs]],
                    |x| linear.forward(&x[0]),
                    |x| reference::linear(&x[0], &w, with_bias.then_some(&b), inputs),
                );
            }
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        // On tensor cores, split and not, and one by one where channels are no eights.
        for (rows, inputs, outputs) in [(5, 7, 3), (65, 40, 72), (130, 24, 8), (3, 1024, 16)] {
            for (dtype, with_bias) in CARD_DTYPES.into_iter().flat_map(|d| [(d, false), (d, true)]) {
                let (w, b) =
                    (rounded(dtype, &normals(inputs * outputs, 8)), rounded(dtype, &normals(outputs, 9)));
                let linear = on_host(|| {
                    let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
                    let bias = Tensor::from_slice(&b, outputs, &Device::Cpu).unwrap();
                    Linear::new(weight.to_dtype(dtype).unwrap(), with_bias.then_some(&bias)).unwrap()
                });
                check_on_card(
                    dtype,
                    &[&[1, rows, inputs]],
                    |x| linear.forward(&x[0]),
                    |x| reference::linear(&x[0], &w, with_bias.then_some(&b), inputs),
                );
            }
        }
    }

    #[test]
    fn layers_of_one_input_are_each_its_own_on_a_card() {
        let weight = |outputs: usize, seed| {
            let w = Tensor::from_vec(normals(outputs * 16, seed), (outputs, 16), &Device::Cpu).unwrap();
            let bias = Tensor::from_vec(normals(outputs, seed + 1), outputs, &Device::Cpu).unwrap();
            (w, bias)
        };
        let weights = [weight(8, 1), weight(24, 3), weight(40, 5)];
        let given = || weights.iter().map(|(w, bias)| (w.clone().into(), Some(bias.clone()))).collect();
        let x = Tensor::from_vec(normals(3 * 16, 9), (3, 16), &Device::Cpu).unwrap();
        let results = |layers: &[Linear]| {
            let all = Linear::forward_each(layers, &x).unwrap();
            all.iter().map(|y| y.contiguous().unwrap().to_vec2::<f32>().unwrap()).collect::<Vec<_>>()
        };
        let expected = results(&Linear::all_side_by_side(given()).unwrap());
        let apart = |layers: Vec<(Weight, Option<Tensor>)>| {
            layers.into_iter().map(|(w, bias)| Linear::new(w, bias.as_ref()).unwrap()).collect::<Vec<_>>()
        };
        for together in [true, false] {
            let got = on_host(|| match together {
                true => results(&Linear::all_side_by_side(given()).unwrap()),
                false => results(&apart(given())),
            });
            let pairs = got.iter().flatten().flatten().zip(expected.iter().flatten().flatten());
            assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs())), "{together}");
        }
    }

    #[test]
    fn large_blocks_match_the_definition_on_a_card() {
        for (chip, (rows, size)) in Chip::SINGLE.into_iter().flat_map(|c| [(c, (33, 168)), (c, (65, 320))]) {
            let w = rounded(DType::F16, &normals(size * size, 8));
            let linear = on_host(|| {
                let weight = Tensor::from_slice(&w, (size, size), &Device::Cpu).unwrap();
                Linear::new(weight.to_dtype(DType::F16).unwrap(), None).unwrap()
            });
            let definition = |x: &[Vec<f64>]| reference::linear(&x[0], &w, None, size);
            check_on_chip(chip, DType::F16, &[&[1, rows, size]], |x| linear.forward(&x[0]), definition);
        }
    }

    #[test]
    fn a_wrong_width_is_an_error() {
        let linear = Linear::new(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(), None).unwrap();
        let error = linear.forward(&Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap()).unwrap_err();
        assert!(error.to_string().contains("x must be [.., 3], got [1, 4]"), "{error}");
    }
}
