//! Sums of tensors without a history, and tensors behind each other: what is between a network's operators on the way there and
//! back. On a CPU candle does it; on a card `kernels/elementwise.cu`, whose kernels come before their turn.

use candle_core::{DType, Result, Tensor};

use crate::gpu::{Argument, Card, Gpu, Launch, on_card, type_name, with_views};

/// `a + b`.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let Some(card) = card_of([a, b], a.dims() == b.dims())? else { return a + b };
    on_card!(card, gpu => with_views(&gpu, [a, b], |[left, right]| {
        let sum = gpu.alloc(a.dtype(), left.len)?;
        let launch = Launch::over_numbers(format!("add_{}", type_name(a.dtype())), left.len);
        gpu.launch(&launch, &[(&sum).into(), left.into(), right.into(), Argument::Count(left.len)])?;
        sum.into_tensor(&gpu, a.dims())
    }))
}

/// `known + new`, if anything is known.
pub(crate) fn sum(known: Option<&Tensor>, new: Tensor) -> Result<Tensor> {
    match known {
        Some(known) => add(known, &new),
        None => Ok(new),
    }
}

/// `a` and behind it `b`, along dimension `dim`.
pub(crate) fn concatenate([a, b]: [&Tensor; 2], dim: usize) -> Result<Tensor> {
    let alike = |of: fn(&[usize], usize) -> &[usize]| of(a.dims(), dim) == of(b.dims(), dim);
    let fit = dim < a.rank().min(b.rank())
        && alike(|dims, dim| &dims[..dim])
        && alike(|dims, dim| &dims[dim + 1..]);
    let Some(card) = card_of([a, b], fit)? else { return Tensor::cat(&[a, b], dim) };
    let rows: usize = a.dims()[..dim].iter().product();
    let widths = [a, b].map(|part| part.elem_count() / rows.max(1));
    let mut dims = a.dims().to_vec();
    dims[dim] += b.dims()[dim];
    on_card!(card, gpu => {
        let whole = gpu.alloc(a.dtype(), rows * (widths[0] + widths[1]))?;
        let launch = Launch::over_rows(format!("concatenate_{}", type_name(a.dtype())), rows, &widths);
        with_views(&gpu, [a, b], |[a, b]| {
            let sizes = [rows, widths[0], widths[1]].map(Argument::from);
            gpu.launch(&launch, &[&[(&whole).into(), a.into(), b.into()], &sizes[..]].concat())
        })?;
        whole.into_tensor(&gpu, &dims)
    })
}

/// The card whose kernels take two tensors that fit each other; otherwise candle takes them, or says why not.
fn card_of([a, b]: [&Tensor; 2], fit: bool) -> Result<Option<Card>> {
    let known = matches!(a.dtype(), DType::F32 | DType::F16 | DType::BF16) && a.dtype() == b.dtype();
    let here = a.device().same_device(b.device()) && a.elem_count() > 0 && b.elem_count() > 0;
    if fit && known && here { Card::of(a.device()) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::gpu::host::on_host;
    use crate::testing::{CARD_DTYPES, normals, widened};

    fn tensor(shape: [usize; 3], dtype: DType) -> Tensor {
        let count = shape.iter().product();
        let numbers = Tensor::from_vec(normals(count, count as u64), &shape, &Device::Cpu);
        numbers.unwrap().to_dtype(dtype).unwrap()
    }

    #[test]
    fn a_card_says_what_candle_says() {
        for dtype in CARD_DTYPES {
            for (a, b, dim) in [
                ([2, 3, 8], [2, 3, 16], 2),
                ([2, 3, 5], [2, 3, 8], 2),
                ([3, 2, 4], [3, 1, 4], 1),
                ([1, 2, 2], [3, 2, 2], 0),
            ] {
                let (a, b) = (tensor(a, dtype), tensor(b, dtype));
                let whole = on_host(|| concatenate([&a, &b], dim)).unwrap();
                assert_eq!(whole.dims(), Tensor::cat(&[&a, &b], dim).unwrap().dims());
                assert_eq!(widened(&whole), widened(&Tensor::cat(&[&a, &b], dim).unwrap()));
                let sum = on_host(|| add(&whole, &whole)).unwrap();
                assert_eq!(widened(&sum), widened(&(&whole + &whole).unwrap()));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_on_a_card_too() {
        let (a, b) = (tensor([2, 3, 8], DType::F32), tensor([2, 4, 8], DType::F32));
        for dim in [0, 2, 3] {
            assert!(on_host(|| concatenate([&a, &b], dim)).is_err());
        }
        assert!(on_host(|| add(&a, &b)).is_err());
        assert!(on_host(|| add(&a, &a.to_dtype(DType::F16)?)).is_err());
    }
}
