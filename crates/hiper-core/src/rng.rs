//! torch's random numbers on a CPU, draw for draw, so that a seed gives the same picture here and there.

mod box_muller;

use candle_core::{Device, Tensor};

use box_muller::box_muller;

/// Words of mt19937's state.
const N: usize = 624;
const M: usize = 397;

/// torch's CPU generator: mt19937 (Matsumoto & Nishimura, 1998), with `randn` and `randint` as `torch.randn(…,
/// dtype=float32)` and `torch.randint` draw them.
///
/// Integers and uniform draws are equal everywhere. Sixteen or more normals at once are equal bit for bit to those of torch on
/// an x86-64 CPU with AVX2 (elsewhere torch itself differs by up to 2.4e-7); fewer than sixteen are drawn one at a time in
/// double precision with the machine's `ln_1p`, `sin` and `cos`.
///
/// ```
/// let mut generator = hiper_core::TorchGenerator::new(0);
/// let x = generator.randn(16);
/// assert_eq!(x[0], -1.1258398); // torch.manual_seed(0); torch.randn(16)[0]
/// ```
///
/// # Source
/// torch 2.15: `MT19937RNGEngine.h`, `DistributionsHelper.h`, `cpu/DistributionTemplates.h`.
#[derive(Debug, Clone, PartialEq)]
pub struct TorchGenerator {
    state: Vec<u32>,
    index: usize,
    /// The second value of the last pair of normals drawn one at a time.
    cached_normal: Option<f64>,
}

/// A generator's state, to continue exactly where a run stopped.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GeneratorState {
    /// The 624 words of mt19937.
    pub words: Vec<u32>,
    /// How many of them are used, 0 to 624.
    pub index: usize,
    /// Bits of the cached normal value (`f64::to_bits`), if there is one.
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
        let cached_normal = state.cached_normal.map(f64::from_bits);
        let valid = state.words.len() == N && state.index <= N && cached_normal.is_none_or(f64::is_finite);
        valid.then_some(Self { state: state.words, index: state.index, cached_normal })
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

    /// The next 64 bits: two draws, the first one high.
    fn bits64(&mut self) -> u64 {
        let high = u64::from(self.bits());
        (high << 32) | u64::from(self.bits())
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.bits() & ((1 << 24) - 1)) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1) with 53 bits.
    fn uniform_double(&mut self) -> f64 {
        (self.bits64() & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// `torch.randint(0, high, ())`, the next draw modulo `high`. torch refuses `high` = 0; here it gives 0.
    pub fn randint(&mut self, high: u32) -> u32 {
        let high = high.max(1);
        if high >= 1 << 28 {
            // With 32 bits the remainder would be skewed.
            return (self.bits64() % u64::from(high)) as u32;
        }
        self.bits() % high
    }

    /// `torch.randn(n)` in `f32`.
    pub fn randn(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        values.as_chunks_mut().0.iter_mut().for_each(box_muller);
        if !n.is_multiple_of(16) {
            // The last sixteen are drawn again, overlapping what is there.
            let mut last = std::array::from_fn(|_| self.uniform());
            box_muller(&mut last);
            values[n - 16..].copy_from_slice(&last);
        }
        values
    }

    /// Goes on as after [`randn`](Self::randn), without the numbers.
    pub fn skip_randn(&mut self, n: usize) {
        if n < 16 {
            self.randn(n);
            return;
        }
        let redrawn = if n.is_multiple_of(16) { 0 } else { 16 };
        (0..n + redrawn).for_each(|_| _ = self.bits());
    }

    /// [`randn`](Self::randn) as a tensor of `f32`.
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
        let mut b = TorchGenerator::from_state(a.state()).unwrap();
        assert_eq!(a.randn(3), b.randn(3));
        assert_eq!(a.randn(100), b.randn(100));
    }

    #[test]
    fn skipping_is_drawing() {
        for n in [0, 1, 3, 15, 16, 17, 32, 1000] {
            let (mut a, mut b) = (TorchGenerator::new(7), TorchGenerator::new(7));
            a.randn(n);
            b.skip_randn(n);
            assert_eq!(a, b, "{n}");
        }
    }

    #[test]
    fn a_malformed_state_is_refused() {
        let good = TorchGenerator::new(1).state();
        let short = GeneratorState { words: vec![0; 3], ..good.clone() };
        let beyond = GeneratorState { index: N + 1, ..good.clone() };
        let not_a_number = GeneratorState { cached_normal: Some(f64::NAN.to_bits()), ..good };
        for state in [short, beyond, not_a_number] {
            assert!(TorchGenerator::from_state(state).is_none());
        }
    }
}
