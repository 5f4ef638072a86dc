//! The kernels of a step's draws.

mod common;

use common::{Uniform, assert_close, values};
use host_kernels::{Buffer, Launch, LaunchError};

fn launch(name: &str, grid: [usize; 2], threads: u32, shared_bytes: u32) -> Launch<'_> {
    let [across, down] = grid.map(|blocks| blocks as u32);
    Launch { name, grid: [across, down, 1], block: [threads, 1, 1], shared_bytes, cluster: 1 }
}

const WORDS: usize = 624;
/// Words, and how many of them are used.
type State = [u32; WORDS + 1];

/// mt19937 as its authors seed it: nothing is made yet.
fn seeded(seed: u32) -> State {
    let mut state = [seed; WORDS + 1];
    for i in 1..WORDS {
        let previous = state[i - 1];
        state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
    }
    state[WORDS] = WORDS as u32;
    state
}

/// The next 32 bits, word by word from the paper.
fn bits(state: &mut State) -> u32 {
    if state[WORDS] as usize == WORDS {
        for i in 0..WORDS {
            let y = (state[i] & 0x8000_0000) | (state[(i + 1) % WORDS] & 0x7fff_ffff);
            state[i] = state[(i + 397) % WORDS] ^ (y >> 1) ^ if y & 1 == 1 { 0x9908_b0df } else { 0 };
        }
        state[WORDS] = 0;
    }
    let mut y = state[state[WORDS] as usize];
    state[WORDS] += 1;
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c_5680;
    y ^= (y << 15) & 0xefc6_0000;
    y ^ (y >> 18)
}

#[test]
fn the_definition_has_the_known_answer() {
    // C++ [rand.predef]: the 10,000th draw of the default seed.
    let mut state = seeded(5489);
    assert_eq!((0..10_000).map(|_| bits(&mut state)).last(), Some(4_123_659_995));
}

/// `torch.randn(count)`.
fn normals(state: &mut State, count: usize) -> Vec<f64> {
    let unit = 2f64.powi(-24);
    let mut uniform = |_| f64::from(bits(state) & 0xff_ffff) * unit;
    let mut numbers: Vec<f64> = (0..count).map(&mut uniform).collect();
    let box_muller = |sixteen: &mut [f64]| {
        let (radii, angles) = sixteen.split_at_mut(8);
        for (a, b) in radii.iter_mut().zip(angles) {
            let (radius, angle) = ((-2.0 * (1.0 - *a).ln()).sqrt(), 2.0 * std::f64::consts::PI * *b);
            (*a, *b) = (radius * angle.cos(), radius * angle.sin());
        }
    };
    numbers.chunks_exact_mut(16).for_each(box_muller);
    if !count.is_multiple_of(16) {
        let mut last: Vec<f64> = (0..16).map(&mut uniform).collect();
        box_muller(&mut last);
        numbers[count - 16..].copy_from_slice(&last);
    }
    numbers
}

#[test]
fn draws_are_torchs() -> Result<(), LaunchError> {
    const TIMESTEPS: u32 = 1000;
    const SEEDS: [u32; 3] = [0, 42, 0x89ab_cdef];
    for count in [16, 17, 31, 256, 623, 624, 640, 1280, 4099] {
        let mut expected = SEEDS.map(seeded);
        // Somewhere in between, and with nothing left.
        bits(&mut expected[1]);
        let mut generators = Buffer::from_slice(&expected.concat());
        let timesteps = Buffer::<f32>::unwritten(SEEDS.len());
        for _ in 0..3 {
            let noise = Buffer::<f32>::unwritten(SEEDS.len() * count);
            let after = Buffer::<u32>::unwritten(SEEDS.len() * (WORDS + 1));
            launch("draw_f32", [SEEDS.len(), 1], 1024, 2 * 4 * WORDS as u32).run(&[
                (&noise).into(),
                (&timesteps).into(),
                (&after).into(),
                (&generators).into(),
                (count as i32).into(),
                (TIMESTEPS as i32).into(),
            ])?;
            let numbers: Vec<f64> = expected.iter_mut().flat_map(|state| normals(state, count)).collect();
            // Radii up to 6, and polynomials that are right to 1.5e-7.
            assert_close(&format!("{count}"), &values(&noise.to_vec()), &numbers, |_| 2e-6);
            let drawn = expected.each_mut().map(|state| (bits(state) % TIMESTEPS) as f32);
            assert_eq!(timesteps.to_vec(), drawn);
            // What is kept goes on as the definition does, though refilled at another moment.
            generators = after;
            let kept = generators.to_vec();
            for (got, expected) in kept.chunks(WORDS + 1).zip(&expected) {
                let (mut got, mut expected): (State, State) = (got.try_into().unwrap(), *expected);
                assert!((0..2 * WORDS).all(|_| bits(&mut got) == bits(&mut expected)));
            }
        }
    }
    Ok(())
}

#[test]
fn noise_is_added_by_the_schedule() -> Result<(), LaunchError> {
    let alphas: Vec<f32> = (0..1000).map(|t| (-0.005 * t as f32).exp()).collect();
    let timesteps = [0f32, 500.0, 999.0];
    for count in [1, 255, 257, 1283] {
        let mut random = Uniform(11);
        let [latents, noise]: [Vec<f32>; 2] = [(); 2].map(|()| random.numbers(timesteps.len() * count));
        let given =
            [&latents, &noise, &timesteps.to_vec(), &alphas].map(|numbers| Buffer::from_slice(numbers));
        let mixed = |name: &str| {
            let result = Buffer::<f32>::unwritten(latents.len());
            let inputs = given.each_ref().map(Into::into);
            launch(name, [count.div_ceil(256), timesteps.len()], 256, 0)
                .run(&[&[(&result).into()], &inputs[..], &[(count as i32).into()]].concat())?;
            Ok::<_, LaunchError>(values(&result.to_vec()))
        };
        let mix = |of: &dyn Fn(f64, f64, f64, f64) -> f64| -> Vec<f64> {
            let at = |i: usize| {
                let alpha = f64::from(alphas[timesteps[i / count] as usize]);
                of(alpha.sqrt(), (1.0 - alpha).sqrt(), latents[i].into(), noise[i].into())
            };
            (0..latents.len()).map(at).collect()
        };
        // Numbers up to 2, a handful of roundings.
        let rounding = |_| 8.0 * f64::from(f32::EPSILON);
        let expected = mix(&|signal, sigma, x, e| signal * x + sigma * e);
        assert_close("noisy latents", &mixed("add_noise_f32")?, &expected, rounding);
        let expected = mix(&|signal, sigma, x, e| signal * e - sigma * x);
        assert_close("velocity", &mixed("velocity_f32")?, &expected, rounding);
    }
    Ok(())
}
