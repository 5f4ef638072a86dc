//! Gradients against torch's, against central differences, and the ones candle loses.

use candle_core::{DType, Tensor};
use hiper_core::{
    Error, GradientCheckConfig, NoisePredictor, NoiseSchedule, TailLoss, TextEmbedding, TorchGenerator,
    check_gradient,
};

use crate::toy::{Golden, KINDS, Toy, epsilon_run, relative_l2};

/// Two libraries' sums of some hundred `f32` products.
const F32: f64 = 1e-5;
/// The gradient is computed in `f64` and handed out in `f32`.
const F64_AS_F32: f64 = 1e-7;

/// The script's first step: what torch took the gradient of.
fn first_step<T>(
    golden: &Golden,
    schedule: &NoiseSchedule,
    dtype: DType,
    look: impl FnOnce(&TailLoss<'_>) -> T,
) -> T {
    let mut generator = TorchGenerator::new(4);
    let latents = golden.get("latents");
    let noise = generator.randn_tensor(latents.dims(), latents.device()).unwrap();
    let timestep = generator.randint(1000) as usize;
    let (head, tail) = TextEmbedding::new(golden.get("source").clone()).unwrap().split(3).unwrap();
    let convert = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
    look(&TailLoss {
        noisy_latents: &convert(&schedule.add_noise(latents, &noise, timestep).unwrap()),
        timestep: timestep as f64,
        head: &convert(&head),
        tail: &convert(tail.tensor()),
        target: &convert(&schedule.target(latents, &noise, timestep).unwrap()),
    })
}

#[test]
fn gradients_are_torchs() {
    for (name, prediction_type) in KINDS {
        let golden = Golden::load(name);
        let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, prediction_type);
        for (dtype, key, tolerance) in
            [(DType::F32, "first_gradient", F32), (DType::F64, "first_gradient_f64", F64_AS_F32)]
        {
            let toy = Toy::new(&golden, dtype);
            let network = |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text);
            let got = first_step(&golden, &schedule, dtype, |step| {
                network.losses_and_gradients(&[*step]).unwrap().remove(0)
            });
            let error = relative_l2(&got.tail_gradient, &golden.f32(key));
            assert!(error < tolerance, "{name} {key}: {error}");
        }
    }
}

#[test]
fn gradients_are_slopes() {
    // In f64 a move of 1e-4 leaves a curvature of about 1e-8; in f32 rounding leaves some thousandths.
    for (dtype, step_size, tolerance) in [(DType::F64, 1e-4, 1e-6), (DType::F32, 0.02, 1e-2)] {
        for (name, prediction_type) in KINDS {
            let golden = Golden::load(name);
            let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, prediction_type);
            let toy = Toy::new(&golden, dtype);
            let network = |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text);
            let config = GradientCheckConfig { step_size, ..Default::default() };
            let check = first_step(&golden, &schedule, dtype, |step| {
                check_gradient(&network, step, &mut TorchGenerator::new(1), config).unwrap()
            });
            assert!(check.ensure(tolerance).is_ok(), "{name} {dtype:?}: {}", check.relative_error());
        }
    }
}

#[test]
fn a_network_may_compute_in_another_type() {
    let golden = Golden::load(KINDS[0].0);
    let (run, in_f32) = epsilon_run(1);
    for dtype in [DType::F64, DType::BF16] {
        let toy = Toy::new(&golden, dtype);
        let network = |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text);
        let (mut a, mut b) = (run.clone(), run.clone());
        let (a, b) = (a.step(&network).unwrap().unwrap(), b.step(&in_f32).unwrap().unwrap());
        // bf16 has eight bits.
        assert!((a.loss / b.loss - 1.0).abs() < 0.02, "{dtype:?}: {a:?} {b:?}");
    }
}

#[test]
fn a_gradient_that_is_cut_is_found_out() {
    let (mut run, network) = epsilon_run(1);
    let cut = |x: &Tensor, t: f64, text: &Tensor| network(x, t, &text.detach());
    assert!(matches!(run.step(&cut), Err(Error::NoGradient)));
    assert_eq!(run.steps_taken(), 0);

    // What candle-nn's fused normalisation does to a residual: no error, and the other part of the gradient.
    let partly = |x: &Tensor, t: f64, text: &Tensor| network(x, t, &(text + text.sqr()?.detach())?);
    assert!(run.clone().step(&partly).is_ok());
    let error = run.check_gradient(&partly).unwrap().ensure(1e-2).unwrap_err();
    assert!(matches!(error, Error::WrongGradient { relative_error, .. } if relative_error > 0.1), "{error}");
    run.check_gradient(&network).unwrap().ensure(1e-2).unwrap();
    assert_eq!(run.check_gradient(&network).unwrap(), run.check_gradient(&network).unwrap());
}

#[test]
fn a_prediction_of_another_shape_is_refused() {
    let (mut run, network) = epsilon_run(1);
    let other = |x: &Tensor, t: f64, text: &Tensor| network(x, t, text)?.narrow(1, 0, 1);
    let error = run.step(&other).unwrap_err().to_string();
    assert_eq!(error, "the network's prediction: expected [1, 4, 6, 6], got [1, 1, 6, 6]");
}
