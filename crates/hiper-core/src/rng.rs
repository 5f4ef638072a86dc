//! torch's random numbers on a CPU, draw for draw, so that a seed gives the same picture here and there.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

const N: usize = 624;
const M: usize = 397;

/// torch's CPU generator: mt19937 (Matsumoto & Nishimura, 1998), `randn` and `randint` as `torch.randn(…, dtype=float32)` and
/// `torch.randint` draw them. Integers are equal; normals within 2.4e-7, since logarithm, sine and cosine may round
/// differently.
///
/// ```
/// let mut generator = hiper_core::TorchGenerator::new(0);
/// let x = generator.randn(16);
/// assert!((x[0] - (-1.1258398)).abs() < 1e-6); // torch.manual_seed(0); torch.randn(16)[0]
/// ```
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    state: Vec<u32>,
    index: usize,
    /// The second value of the last pair of normals drawn one at a time.
    cached_normal: Option<f64>,
}

/// A generator's state, to continue exactly where a run stopped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GeneratorState {
    /// The 624 words of mt19937.
    pub words: Vec<u32>,
    /// How many of them are used.
    pub index: usize,
    /// Bits of the cached normal value, if there is one.
    pub cached_normal: Option<u64>,
}

impl TorchGenerator {
    /// `torch.manual_seed(seed)`: the low 32 bits seed mt19937.
    pub fn new(seed: u64) -> Self {
        let mut state = vec![seed as u32; N];
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, index: N, cached_normal: None }
    }

    /// The state, to be stored.
    pub fn state(&self) -> GeneratorState {
        GeneratorState {
            words: self.state.clone(),
            index: self.index,
            cached_normal: self.cached_normal.map(f64::to_bits),
        }
    }

    /// A generator that continues from a stored state; `None` when the state is malformed.
    pub fn from_state(state: GeneratorState) -> Option<Self> {
        let valid = state.words.len() == N && state.index <= N;
        valid.then(|| Self {
            state: state.words,
            index: state.index,
            cached_normal: state.cached_normal.map(f64::from_bits),
        })
    }

    /// The next 32 bits.
    fn bits(&mut self) -> u32 {
        if self.index == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.index = 0;
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.bits() & ((1 << 24) - 1)) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1) with 53 bits of two draws, the first one high.
    fn uniform_double(&mut self) -> f64 {
        let (high, low) = (u64::from(self.bits()), u64::from(self.bits()));
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// `torch.randint(0, high, ())`; `high` at most 2³².
    pub fn randint(&mut self, high: u32) -> u32 {
        self.bits() % high.max(1)
    }

    /// `torch.randn(n)` in `f32`.
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut out: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        let whole = n / 16 * 16;
        out[..whole].chunks_exact_mut(16).for_each(box_muller);
        if whole < n {
            // The last sixteen are drawn again, overlapping what is there.
            let last = &mut out[n - 16..];
            last.iter_mut().for_each(|v| *v = self.uniform());
            box_muller(last);
        }
        out
    }

    /// [`randn`](Self::randn) as a tensor.
    ///
    /// # Errors
    /// When the tensor cannot be created on the device.
    pub fn randn_tensor(&mut self, shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
        Tensor::from_vec(self.randn(shape.iter().product()), shape, &Device::Cpu)?.to_device(device)
    }

    /// One normal value in double precision; they come in pairs.
    fn normal(&mut self) -> f64 {
        if let Some(value) = self.cached_normal.take() {
            return value;
        }
        let (angle, radius) = (self.uniform_double(), self.uniform_double());
        let radius = (-2.0 * (-radius).ln_1p()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * angle).sin_cos();
        self.cached_normal = Some(radius * sin);
        radius * cos
    }
}

/// Eight pairs of uniforms to eight cosines and eight sines.
fn box_muller(block: &mut [f32]) {
    for i in 0..8 {
        let (u1, u2) = (1.0 - block[i], block[i + 8]);
        let radius = (-2.0 * u1.ln()).sqrt();
        let theta = 2.0 * std::f32::consts::PI * u2;
        block[i] = radius * theta.cos();
        block[i + 8] = radius * theta.sin();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_sequence_of_mt19937() {
        // The 10,000th draw of the standard's default seed (C++ [rand.predef]).
        let mut generator = TorchGenerator::new(5489);
        let last = (0..10_000).map(|_| generator.bits()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn only_the_low_half_of_the_seed_counts() {
        let (mut a, mut b) = (TorchGenerator::new(5), TorchGenerator::new((1 << 40) + 5));
        assert_eq!(a.randn(20), b.randn(20));
    }

    #[test]
    fn a_stored_state_continues() {
        let mut a = TorchGenerator::new(1);
        a.randn(37);
        a.randn(3);
        let json = serde_json::to_string(&a.state()).unwrap();
        let mut b = TorchGenerator::from_state(serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(a.randn(3), b.randn(3));
        assert_eq!(a.randn(100), b.randn(100));
        let short = GeneratorState { words: vec![0; 3], index: 0, cached_normal: None };
        assert!(TorchGenerator::from_state(short).is_none());
    }
}
