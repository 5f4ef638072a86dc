//! The kernels of a step's draws and of its loss.

mod common;

use common::{Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Buffer, Launch, LaunchError};

fn launch(name: &str, grid: [usize; 2], threads: u32) -> Launch<'_> {
    let shared_bytes = if name.starts_with("squared_error") { 128 } else { 0 };
    Launch { name, grid: [grid[0] as u32, grid[1] as u32, 1], block: [threads, 1, 1], shared_bytes }
}

/// Philox4x32-10, word by word from the paper.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [a, b] = [0xD251_1F53u64 * u64::from(counter[0]), 0xCD9E_8D57u64 * u64::from(counter[2])];
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

fn draw(seed: u64, draws: u32, purpose: u32, place: u32) -> [u32; 4] {
    philox([place, draws, purpose, 0], [seed as u32, (seed >> 32) as u32])
}

#[test]
fn the_definition_has_the_known_answers() {
    // Random123 1.14, tests/kat_vectors
    let max = u32::MAX;
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([max; 4], [max; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    assert_eq!(
        philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

/// Number `i` of a subject's draw. The radius's and the angle's uniform numbers are rounded to f32, as the kernel has them.
fn normal(seed: u64, draws: u32, i: usize) -> f64 {
    let bits = draw(seed, draws, 0, (i / 4) as u32);
    let pair = &bits[i % 4 / 2 * 2..];
    let unit = 2f64.powi(-32);
    let radius = (-2.0 * f64::from((f64::from(pair[0] as f32) * unit + unit) as f32).ln()).sqrt();
    let angle = 2.0 * std::f64::consts::PI * f64::from(pair[1] as f32) * unit;
    radius * if i.is_multiple_of(2) { angle.cos() } else { angle.sin() }
}

const SEEDS: [u64; 3] = [0, 42, 0x0123_4567_89ab_cdef];
const DRAWS: [u32; 3] = [0, 1, 999];

fn draw_normals<T: Storage>(seeds: &[u64], draws: &[u32], count: usize) -> Result<Vec<f64>, LaunchError> {
    let numbers = Buffer::<T>::unwritten(seeds.len() * count);
    let (seeds_given, draws_given) = (Buffer::from_slice(seeds), Buffer::from_slice(draws));
    launch(&format!("normal_{}", T::NAME), [count.div_ceil(4 * 256), seeds.len()], 256).run(&[
        (&numbers).into(),
        (&seeds_given).into(),
        (&draws_given).into(),
        (count as i32).into(),
    ])?;
    Ok(values(&numbers.to_vec()))
}

fn normals_are_as_defined<T: Storage>() -> Result<(), LaunchError> {
    for count in [1, 255, 1023, 1024, 1025, 1283] {
        let got = draw_normals::<T>(&SEEDS, &DRAWS, count)?;
        let defined = |subject: usize| (0..count).map(move |i| normal(SEEDS[subject], DRAWS[subject], i));
        let expected: Vec<f64> = (0..SEEDS.len()).flat_map(defined).collect();
        // Rounded once to T; logarithm, root, sine and product in f32 before.
        let relative = T::EPSILON / 2.0 + 4.0 * f64::from(f32::EPSILON);
        assert_close(&format!("{count} {}", T::NAME), &got, &expected, |_| 7.0 * relative);
    }
    Ok(())
}

#[test]
fn normals_are_those_of_box_and_muller() -> Result<(), LaunchError> {
    normals_are_as_defined::<f32>()?;
    normals_are_as_defined::<f16>()?;
    normals_are_as_defined::<bf16>()
}

#[test]
fn normals_are_normal_and_a_subject_has_its_own() -> Result<(), LaunchError> {
    const COUNT: usize = 16384;
    let batch = draw_normals::<f32>(&SEEDS, &[0, 0, 0], COUNT)?;
    for (subject, numbers) in batch.chunks(COUNT).enumerate() {
        assert_eq!(numbers, draw_normals::<f32>(&SEEDS[subject..=subject], &[0], COUNT)?);
        let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / COUNT as f64;
        let neighbours = numbers.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / COUNT as f64;
        // Four standard deviations of each estimate: √(1, 2, 15, 96, 1) / √COUNT.
        let sigma = 4.0 / (COUNT as f64).sqrt();
        for (what, got, expected, deviation) in [
            ("mean", moment(1), 0.0, 1.0),
            ("variance", moment(2), 1.0, 2f64.sqrt()),
            ("third moment", moment(3), 0.0, 15f64.sqrt()),
            ("fourth moment", moment(4), 3.0, 96f64.sqrt()),
            ("correlation", neighbours, 0.0, 1.0),
        ] {
            assert!((got - expected).abs() < sigma * deviation, "{what} {got}");
        }
    }
    Ok(())
}

#[test]
fn timesteps_are_even_and_the_counter_advances() -> Result<(), LaunchError> {
    const SUBJECTS: usize = 5000;
    let seeds: Vec<u64> = (0..SUBJECTS as u64).map(|i| i << 20 | 7).collect();
    let (seeds_given, draws) = (Buffer::from_slice(&seeds), Buffer::from_slice(&vec![3u32; SUBJECTS]));
    let timesteps = Buffer::<f32>::unwritten(SUBJECTS);
    launch("draw_timesteps", [SUBJECTS, 1], 1).run(&[
        (&timesteps).into(),
        (&seeds_given).into(),
        (&draws).into(),
        1000i32.into(),
    ])?;
    assert!(draws.to_vec().iter().all(|&draws| draws == 4));
    let mut tenths = [0f64; 10];
    for (&seed, timestep) in seeds.iter().zip(timesteps.to_vec()) {
        assert_eq!(timestep, ((u64::from(draw(seed, 3, 1, 0)[0]) * 1000) >> 32) as f32);
        tenths[timestep as usize / 100] += 1.0;
    }
    // Five standard deviations of a binomial count.
    let (expected, deviation) = (SUBJECTS as f64 / 10.0, (SUBJECTS as f64 * 0.1 * 0.9).sqrt());
    assert!(tenths.iter().all(|count| (count - expected).abs() < 5.0 * deviation), "{tenths:?}");
    Ok(())
}

fn noise_is_mixed<T: Storage>() -> Result<(), LaunchError> {
    let alphas: Vec<f32> = (0..1000).map(|t| (-0.005 * t as f32).exp()).collect();
    let timesteps = [0f32, 500.0, 999.0];
    for count in [1, 255, 257, 1283] {
        let mut random = Uniform(11);
        let [latents, noise]: [Vec<f32>; 2] = [(); 2].map(|()| random.numbers(timesteps.len() * count));
        let (noisy, target) =
            (Buffer::<T>::unwritten(latents.len()), Buffer::<f32>::unwritten(latents.len()));
        let given =
            [&latents, &noise, &timesteps.to_vec(), &alphas].map(|numbers| Buffer::from_slice(numbers));
        let [latents_given, noise_given, timesteps_given, alphas_given] = &given;
        let grid = [count.div_ceil(256), timesteps.len()];
        let inputs = [latents_given, noise_given, timesteps_given, alphas_given].map(Into::into);
        let tail = [(count as i32).into()];
        launch(&format!("add_noise_{}", T::NAME), grid, 256)
            .run(&[&[(&noisy).into()], &inputs[..], &tail].concat())?;
        launch("velocity_f32", grid, 256).run(&[&[(&target).into()], &inputs[..], &tail].concat())?;
        let mix = |of: &dyn Fn(f64, f64, f64, f64) -> f64| -> Vec<f64> {
            (0..latents.len())
                .map(|i| {
                    let alpha = f64::from(alphas[timesteps[i / count] as usize]);
                    of(alpha.sqrt(), (1.0 - alpha).sqrt(), latents[i].into(), noise[i].into())
                })
                .collect()
        };
        // Numbers up to 2: one rounding to T, a handful in f32.
        let f32_part = 8.0 * f64::from(f32::EPSILON);
        let expected = mix(&|signal, sigma, x, e| signal * x + sigma * e);
        assert_close(T::NAME, &values(&noisy.to_vec()), &expected, |_| T::EPSILON + f32_part);
        let expected = mix(&|signal, sigma, x, e| signal * e - sigma * x);
        assert_close("velocity", &values(&target.to_vec()), &expected, |_| f32_part);
    }
    Ok(())
}

#[test]
fn noise_is_added_by_the_schedule() -> Result<(), LaunchError> {
    noise_is_mixed::<f32>()?;
    noise_is_mixed::<f16>()?;
    noise_is_mixed::<bf16>()
}

fn loss_is_the_mean_square<T: Storage>() -> Result<(), LaunchError> {
    const SUBJECTS: usize = 2;
    const CAPACITY: usize = 3;
    const LOSS_SCALE: f32 = 128.0;
    for count in [1, 31, 1023, 1024, 1025, 4099] {
        let mut random = Uniform(count as u64);
        let prediction: Vec<T> = random.numbers(SUBJECTS * count);
        let target: Vec<f32> = random.numbers(SUBJECTS * count);
        let gradient = Buffer::<T>::unwritten(prediction.len());
        let losses = Buffer::<f32>::unwritten(SUBJECTS * CAPACITY);
        let (prediction_given, target_given) = (Buffer::from_slice(&prediction), Buffer::from_slice(&target));
        let draws = Buffer::from_slice(&[1u32, 6]);
        launch(&format!("squared_error_{}", T::NAME), [SUBJECTS, 1], 1024).run(&[
            (&losses).into(),
            (&gradient).into(),
            (&prediction_given).into(),
            (&target_given).into(),
            (&draws).into(),
            (count as i32).into(),
            (CAPACITY as i32).into(),
            LOSS_SCALE.into(),
        ])?;
        let differences: Vec<f64> =
            prediction.iter().zip(&target).map(|(p, &t)| p.value() - f64::from(t)).collect();
        let factor = 2.0 * f64::from(LOSS_SCALE) / count as f64;
        let expected: Vec<f64> = differences.iter().map(|d| d * factor).collect();
        let relative = T::EPSILON / 2.0 + 4.0 * f64::from(f32::EPSILON);
        let tolerance = |i: usize| relative * expected[i].abs().max(T::SMALLEST);
        assert_close(
            &format!("gradient of {count} {}", T::NAME),
            &values(&gradient.to_vec()),
            &expected,
            tolerance,
        );
        let losses = losses.to_vec();
        for (subject, place) in [(0, 0), (1, 2)] {
            let differences = &differences[subject * count..][..count];
            let loss = differences.iter().map(|d| d * d).sum::<f64>() / count as f64;
            let got = f64::from(losses[subject * CAPACITY + place]);
            assert!((got - loss).abs() < 1e-6 * loss, "loss {got}, expected {loss}");
        }
        assert_eq!(losses.iter().filter(|loss| loss.is_nan()).count(), SUBJECTS * (CAPACITY - 1));
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_of_the_mean_square() -> Result<(), LaunchError> {
    loss_is_the_mean_square::<f32>()?;
    loss_is_the_mean_square::<f16>()?;
    loss_is_the_mean_square::<bf16>()
}
