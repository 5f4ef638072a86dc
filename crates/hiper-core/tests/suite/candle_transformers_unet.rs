//! The example's network: the same predictions as candle-transformers', and a gradient that is theirs.

#[path = "../../examples/candle_transformers_unet/differentiable.rs"]
mod differentiable;
#[path = "../../examples/candle_transformers_unet/random_weights.rs"]
mod random_weights;

use candle_core::{Device, Tensor};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use hiper_core::{
    GradientCheckConfig, LossAndGradient, NoisePredictor, Result, TailLoss, TorchGenerator, check_gradient,
};

use crate::toy::{relative_l2, values};
use differentiable::DifferentiableUNet;
use random_weights::random_weights;

/// Sums in another order, through some fifty layers of `f32`.
const FORWARD: f64 = 1e-5;
/// Differences of `f32` predictions.
const SLOPE: f64 = 1e-2;

/// candle-transformers' predictions, with the twin's gradient where there is one.
struct Network {
    unet: UNet2DConditionModel,
    twin: DifferentiableUNet,
}

impl NoisePredictor for Network {
    fn predict_noise(&self, latents: &Tensor, t: &[f64], text: &Tensor) -> candle_core::Result<Tensor> {
        (|x: &Tensor, t: f64, text: &Tensor| self.unet.forward(x, t, text)).predict_noise(latents, t, text)
    }

    fn losses_and_gradients(&self, steps: &[TailLoss<'_>]) -> Result<Vec<LossAndGradient>> {
        (|x: &Tensor, t: f64, text: &Tensor| self.twin.forward(x, t, text)).losses_and_gradients(steps)
    }
}

/// SD 1.x's arrangement (convolutions around the transformers) and SD 2.x's (linear layers, several heads).
fn configs() -> [UNet2DConditionModelConfig; 2] {
    let block = |out_channels, use_cross_attn, heads| BlockConfig {
        out_channels,
        use_cross_attn,
        attention_head_dim: heads,
    };
    let first = UNet2DConditionModelConfig {
        blocks: vec![block(32, Some(1), 2), block(64, Some(1), 2), block(64, None, 2)],
        cross_attention_dim: 24,
        ..Default::default()
    };
    let second = UNet2DConditionModelConfig {
        blocks: vec![block(32, None, 4), block(32, Some(2), 4)],
        layers_per_block: 1,
        use_linear_projection: true,
        ..first.clone()
    };
    [first, second]
}

#[test]
fn the_twin_predicts_the_same_and_has_the_slope_that_candle_transformers_loses() {
    for config in configs() {
        let weights = random_weights(&Device::Cpu);
        let network = Network {
            unet: UNet2DConditionModel::new(weights.clone(), 4, 4, false, config.clone()).unwrap(),
            twin: DifferentiableUNet::new(weights, 4, 4, &config).unwrap(),
        };
        let mut generator = TorchGenerator::new(0);
        let mut draw = |shape: &[usize]| generator.randn_tensor(shape, &Device::Cpu).unwrap();
        let (latents, target) = (draw(&[1, 4, 8, 8]), draw(&[1, 4, 8, 8]));
        let (head, tail) = (draw(&[1, 7, 24]), draw(&[5, 24]));
        let step =
            TailLoss { noisy_latents: &latents, timestep: 321.0, head: &head, tail: &tail, target: &target };

        let text = step.encoder_hidden_states(&tail).unwrap();
        let want = values(&network.unet.forward(&latents, 321.0, &text).unwrap());
        let got = values(&network.twin.forward(&latents, 321.0, &text).unwrap());
        let error = relative_l2(&got, &want);
        assert!(error < FORWARD, "prediction off by {error}");

        let config = GradientCheckConfig::default();
        let check = check_gradient(&network, &step, &mut generator, config).unwrap();
        assert!(check.ensure(SLOPE).is_ok(), "gradient off by {}", check.relative_error());
        let own = |x: &Tensor, t: f64, text: &Tensor| network.unet.forward(x, t, text);
        let check = check_gradient(&own, &step, &mut generator, config).unwrap();
        assert!(
            check.relative_error() > 0.1,
            "candle-transformers' gradient became right: simplify the example"
        );
    }
}
