//! What the operators' tests share: random data, error norms, and the one check that every operator passes.

use candle_core::{DType, Device, Tensor, Var};

use crate::cpu::isa::Isa;
use crate::gpu::host::on_chip;
use crate::gpu::{Chip, TestCard, test_device};

/// The card that runs the tests' kernels, if one was named; without it the CPU does.
pub(crate) fn card() -> Option<TestCard> {
    test_device().map(|device| TestCard::new(device).unwrap())
}

/// Relative L2 error allowed against an `f64` definition: f32 rounding over sums of a few thousand terms.
pub(crate) const F32_TOLERANCE: f64 = 5e-6;

/// Relative L2 error allowed between an f32 gradient and central differences of an `f64` definition.
pub(crate) const GRADIENT_TOLERANCE: f64 = 1e-5;

/// `n` standard normal values (splitmix64 and Box–Muller), the same for the same seed.
pub(crate) fn normals(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}

/// `‖a − b‖ / ‖b‖`.
pub(crate) fn relative_l2(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let diff: f64 = a.iter().zip(b).map(|(&x, &y)| (x as f64 - y).powi(2)).sum();
    let norm: f64 = b.iter().map(|y| y * y).sum();
    (diff / norm.max(1e-300)).sqrt()
}

/// Checks `op` against its definition on every instruction set of this processor: values, and the gradient of `Σ w·op(x)` to every input against
/// central differences of the definition in `f64`, element by element.
pub(crate) fn check(
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    Isa::for_each(|| check_here(shapes, &op, &definition));
}

/// Checks `op` on kernels that run on the CPU or on [`card`], in one of a card's types, against its definition at the inputs as they are
/// rounded to it: values, and the gradient to every input along some directions. What a launch can get wrong (a grid, a stride,
/// an argument) errs by orders of magnitude more than rounding; what rounding may do is `kernels/host/tests`' matter.
pub(crate) fn check_on_card(
    dtype: DType,
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    check_on_chip(Chip::H100, dtype, shapes, op, definition);
}

/// The same, with the kernels that a `chip` chooses.
pub(crate) fn check_on_chip(
    chip: Chip,
    dtype: DType,
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let tolerance = card_tolerance(dtype);
    let vars: Vec<Var> = shapes
        .iter()
        .zip(1..)
        .map(|(shape, seed)| {
            let x = Tensor::from_vec(normals(shape.iter().product(), seed), *shape, &Device::Cpu).unwrap();
            Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()
        })
        .collect();
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let mut exact: Vec<Vec<f64>> =
        inputs.iter().map(|x| widened(x).iter().map(|&v| v as f64).collect()).collect();

    on_chip(chip, || {
        let y = op(&inputs).unwrap();
        assert_eq!(y.dtype(), dtype);
        let values = widened(&y);
        let error = relative_l2(&values, &definition(&exact));
        assert!(error < tolerance, "forward {dtype:?} {shapes:?}: {error:e}");

        let w = Tensor::from_vec(normals(values.len(), 99), y.shape(), &Device::Cpu).unwrap();
        let w = w.to_dtype(dtype).unwrap();
        let weights = widened(&w);
        let y = (y * w).unwrap().to_dtype(DType::F32).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        for (i, var) in vars.iter().enumerate() {
            let got = widened(grads.get(var).expect("a gradient"));
            assert!(got.iter().all(|g| g.is_finite()), "gradient {i} of {dtype:?} {shapes:?}");
            let directions: Vec<Vec<f32>> = (0..DIRECTIONS).map(|d| normals(got.len(), 200 + d)).collect();
            let along =
                |v: &Vec<f32>| got.iter().zip(v).map(|(&g, &v)| g as f64 * v as f64).sum::<f64>() as f32;
            let numeric: Vec<f64> = directions
                .iter()
                .map(|v| directional_derivative(&definition, &mut exact, &weights, i, v))
                .collect();
            let error = relative_l2(&directions.iter().map(along).collect::<Vec<_>>(), &numeric);
            assert!(error < tolerance, "gradient {i} of {dtype:?} {shapes:?}: {error:e}");
        }
    });
}

/// What a card computes in.
pub(crate) const CARD_DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Relative L2 error that a chain of a few kernels may have: some roundings of half an epsilon each.
pub(crate) fn card_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 3e-3,
        DType::BF16 => 2.4e-2,
        _ => 2e-5,
    }
}

/// Values as a type has them.
pub(crate) fn rounded(dtype: DType, values: &[f32]) -> Vec<f32> {
    widened(&Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
}

/// A tensor's values as `f32`.
pub(crate) fn widened(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Directions in which a gradient is compared: an error in some of its elements shows in most.
const DIRECTIONS: u64 = 6;

/// Central differences of `Σ weights · definition` in `f64`, to input `i` in a direction.
fn directional_derivative(
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    exact: &mut [Vec<f64>],
    weights: &[f32],
    i: usize,
    direction: &[f32],
) -> f64 {
    let norm = direction.iter().map(|&v| v as f64 * v as f64).sum::<f64>().sqrt();
    let step = 1e-4 / norm;
    let centre = exact[i].clone();
    let mut at = |step: f64| -> f64 {
        exact[i] = centre.iter().zip(direction).map(|(x, &v)| x + step * v as f64).collect();
        definition(exact).iter().zip(weights).map(|(&y, &w)| y * w as f64).sum()
    };
    let difference = at(step) - at(-step);
    exact[i] = centre;
    difference / (2.0 * step)
}

fn check_here(
    shapes: &[&[usize]],
    op: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    const STEP: f64 = 1e-5;
    let data: Vec<Vec<f32>> =
        shapes.iter().zip(1..).map(|(s, seed)| normals(s.iter().product(), seed)).collect();
    let vars: Vec<Var> =
        data.iter().zip(shapes).map(|(d, s)| Var::from_vec(d.clone(), *s, &Device::Cpu).unwrap()).collect();
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let mut exact: Vec<Vec<f64>> = data.iter().map(|d| d.iter().map(|&v| v as f64).collect()).collect();

    let y = op(&inputs).unwrap();
    let values = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let error = relative_l2(&values, &definition(&exact));
    assert!(error < F32_TOLERANCE, "forward {shapes:?}: {error:e}");

    let weights = normals(values.len(), 99);
    let w = Tensor::from_vec(weights.clone(), y.shape(), &Device::Cpu).unwrap();
    let grads = (y * w).unwrap().sum_all().unwrap().backward().unwrap();
    let objective =
        |x: &[Vec<f64>]| -> f64 { definition(x).iter().zip(&weights).map(|(&y, &w)| y * w as f64).sum() };
    for (i, var) in vars.iter().enumerate() {
        let got = grads.get(var).expect("a gradient").flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let numeric: Vec<f64> = (0..exact[i].len())
            .map(|j| {
                let x = exact[i][j];
                exact[i][j] = x + STEP;
                let above = objective(&exact);
                exact[i][j] = x - STEP;
                let below = objective(&exact);
                exact[i][j] = x;
                (above - below) / (2.0 * STEP)
            })
            .collect();
        let error = relative_l2(&got, &numeric);
        assert!(error < GRADIENT_TOLERANCE, "gradient {i} of {shapes:?}: {error:e}");
    }
}
