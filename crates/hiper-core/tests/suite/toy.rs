//! A toy network, and the runs of it that torch made.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{D, DType, Device, Tensor};
use hiper_core::{
    NoisePredictor, NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType, TextEmbedding,
    TorchGenerator,
};

/// `tests/fixtures/hiper_core/{name}`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/hiper_core")).join(name)
}

/// Tensors by name.
pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn load(name: &str) -> Self {
        Self(candle_core::safetensors::load(fixture(name), &Device::Cpu).unwrap())
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the fixture has no {name}"))
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        values(self.get(name))
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(&a, &b)| f64::from(a) - f64::from(b)))
        / norm(&mut want.iter().map(|&b| f64::from(b)))
}

/// The script's `Toy`: one cross-attention and a time embedding, in any float type.
pub struct Toy(HashMap<&'static str, Tensor>);

impl Toy {
    pub fn new(golden: &Golden, dtype: DType) -> Self {
        let weights = ["time", "in", "q", "k", "v", "out"];
        let get = |name| golden.get(&format!("weights.{name}")).to_dtype(dtype).unwrap();
        Self(weights.map(|name| (name, get(name))).into())
    }

    /// One picture.
    pub fn forward(&self, latents: &Tensor, timestep: f64, text: &Tensor) -> candle_core::Result<Tensor> {
        self.predict_noise(latents, &[timestep], text)
    }
}

/// A batch in one pass.
impl NoisePredictor for Toy {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        text: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let w = |name: &str| &self.0[name];
        let (latents, text) = (latents.to_dtype(w("in").dtype())?, text.to_dtype(w("in").dtype())?);
        let (batch, _, height, width) = latents.dims4()?;
        let pixels = latents.flatten_from(2)?.transpose(1, 2)?;
        let phases: Vec<f64> = timesteps.iter().map(|timestep| (timestep / 100.0).sin()).collect();
        let phases = Tensor::from_vec(phases, (batch, 1, 1), &Device::Cpu)?.to_dtype(w("time").dtype())?;
        let time = phases.broadcast_mul(w("time"))?;
        let hidden = pixels.broadcast_matmul(w("in"))?.broadcast_add(&time)?.tanh()?;
        let keys = text.broadcast_matmul(w("k"))?.transpose(1, 2)?;
        let scores = hidden.broadcast_matmul(w("q"))?.matmul(&keys)?;
        let weights = softmax(&(scores / (w("q").dim(0)? as f64).sqrt())?)?;
        let hidden = (hidden + weights.matmul(&text.broadcast_matmul(w("v"))?)?)?;
        let out = hidden.tanh()?.broadcast_matmul(w("out"))?.transpose(1, 2)?;
        out.reshape((batch, w("out").dim(1)?, height, width))
    }
}

fn softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// The kinds of loop that torch made.
pub const KINDS: [(&str, PredictionType); 2] = [
    ("loop_epsilon.safetensors", PredictionType::Epsilon),
    ("loop_v_prediction.safetensors", PredictionType::VPrediction),
];

/// The script's loop, about to begin.
pub fn start(golden: &Golden, prediction_type: PredictionType, train_steps: usize) -> Personalisation {
    let source = TextEmbedding::new(golden.get("source").clone()).unwrap();
    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, prediction_type);
    let config = PersonalisationConfig { n_hiper: 3, train_steps, ..Default::default() };
    Personalisation::new(config, golden.get("latents"), &source, schedule, TorchGenerator::new(4)).unwrap()
}

/// A run of `train_steps` on the toy network, and the network.
pub fn epsilon_run(
    train_steps: usize,
) -> (Personalisation, impl Fn(&Tensor, f64, &Tensor) -> candle_core::Result<Tensor>) {
    let golden = Golden::load(KINDS[0].0);
    let toy = Toy::new(&golden, DType::F32);
    let run = start(&golden, PredictionType::Epsilon, train_steps);
    (run, move |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text))
}
