//! Adam's kernel against torch's formulas in f64.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError};

const LEARNING_RATE: f64 = 5e-3;
const BETAS: [f64; 2] = [0.9, 0.999];
const EPS: f64 = 1e-8;
/// What the loss was multiplied by.
const LOSS_SCALE: f64 = 1024.0;
const SUBJECTS: usize = 2;
const STEPS: usize = 12;

/// `torch.optim.Adam.step` of one subject.
struct Definition {
    parameters: Vec<f64>,
    moments: [Vec<f64>; 2],
    steps: i32,
}

impl Definition {
    fn step(&mut self, gradient: &[f64]) {
        self.steps += 1;
        let [correction1, correction2] = BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        for (i, g) in gradient.iter().enumerate() {
            let [m, v] = &mut self.moments;
            m[i] = BETAS[0] * m[i] + (1.0 - BETAS[0]) * g;
            v[i] = BETAS[1] * v[i] + (1.0 - BETAS[1]) * g * g;
            let denominator = (v[i] / correction2).sqrt() + EPS;
            self.parameters[i] -= LEARNING_RATE / correction1 * m[i] / denominator;
        }
    }
}

/// Each step rounds the parameter once, and its own size in a handful of operations.
fn tolerance(parameter: f64) -> f64 {
    STEPS as f64 * f64::from(f32::EPSILON) * (parameter.abs() + 8.0 * LEARNING_RATE)
}

fn adam<T: Storage>() -> Result<(), LaunchError> {
    for count in [1, 768, 1023, 1024, 1025, 3840] {
        let mut random = Uniform(count as u64);
        let start: Vec<f32> = random.numbers(SUBJECTS * count);
        // Parameters, moments, counts.
        let zeros = vec![0f32; SUBJECTS * count];
        let mut state = [&start[..], &zeros, &zeros, &[0.0; 2 * SUBJECTS]].map(Buffer::from_slice);
        let new = |parameters: &[f32]| Definition {
            parameters: values(parameters),
            moments: [vec![0.0; count], vec![0.0; count]],
            steps: 0,
        };
        let mut expected: Vec<Definition> = start.chunks(count).map(new).collect();
        for step in 0..STEPS {
            let mut scaled: Vec<T> = random.numbers(SUBJECTS * count);
            let mut losses = [0.5f32; SUBJECTS];
            // The second subject's gradient or loss breaks once, late or early; both are whole again in the next step.
            let breaks = [3, 8][count % 2];
            for (subject, scaled) in scaled.chunks(count).enumerate() {
                if subject == 0 || step < breaks {
                    let gradient: Vec<f64> = values(scaled).iter().map(|g| g / LOSS_SCALE).collect();
                    expected[subject].step(&gradient);
                }
            }
            match count % 3 {
                _ if step != breaks => (),
                0 => losses[1] = f32::NAN,
                1 => scaled[count + count / 2] = T::round(f64::INFINITY),
                _ => scaled[count + count / 2] = T::round(f64::NAN),
            }
            let gradient = Buffer::from_slice(&scaled);
            let losses = Buffer::from_slice(&losses);
            let after = state.each_ref().map(|before| Buffer::<f32>::unwritten(before.to_vec().len()));
            let states = [&after, &state].map(|state| state.each_ref().map(Argument::from)).concat();
            let places = [(&gradient).into(), (&losses).into(), (count as i32).into()];
            let constants = [LEARNING_RATE, BETAS[0], BETAS[1], EPS].map(Argument::from);
            let arguments = [&states, places.as_slice(), &constants, &[(LOSS_SCALE as f32).into()]];
            let name = &format!("adam_{}", T::NAME);
            Launch { name, grid: [SUBJECTS as u32, 1, 1], block: [1024, 1, 1], shared_bytes: 16, cluster: 1 }
                .run(&arguments.concat())?;
            state = after;
        }
        let [parameters, .., counts] = state;
        let all: Vec<f64> = expected.iter().flat_map(|subject| subject.parameters.clone()).collect();
        assert_close(&format!("{count} parameters"), &values(&parameters.to_vec()), &all, |i| {
            tolerance(all[i])
        });
        assert_eq!(counts.to_vec(), [12.0, 0.0, [3.0, 8.0][count % 2], 1.0]);
    }
    Ok(())
}

#[test]
fn moves_as_torch_does_until_a_loss_or_a_gradient_is_not_finite() -> Result<(), LaunchError> {
    adam::<f32>()?;
    adam::<f16>()?;
    adam::<bf16>()
}
