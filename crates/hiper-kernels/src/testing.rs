//! What the operators' tests share: random data, error norms, and the one check that every operator passes.

use candle_core::{Device, Tensor, Var};

use crate::cpu::isa::Isa;

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
