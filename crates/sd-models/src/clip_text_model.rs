//! transformers' `CLIPTextModel`.

use candle_core::{Device, Tensor};
use hiper_kernels::{Activation, AttentionConfig, AttentionMask, LayerNorm, Linear, activation, attention};
use serde::Deserialize;

use crate::blocks::{Precision, layer_norm, linear};
use crate::{Error, ModelFiles, Result, Weights};

const FILE: &str = "text_encoder/config.json";

/// The fields of transformers' `CLIPTextConfig`, with its defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width `D`.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers. Stable Diffusion 2.x stops one layer early, and its file says so: 23 of 24.
    pub num_hidden_layers: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Length of a prompt in tokens: 77.
    pub max_position_embeddings: usize,
    /// `quick_gelu` (OpenAI) or `gelu` (OpenCLIP).
    pub hidden_act: String,
    /// Added to the variance in layer normalisation.
    pub layer_norm_eps: f64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

/// The text encoder: token ids to one embedding a token. Frozen.
///
/// # Source
/// transformers' `CLIPTextModel`, as `StableDiffusionPipeline` calls it: without an attention mask, so that padding is
/// encoded like any other token.
pub struct ClipTextModel {
    config: ClipTextConfig,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    precision: Precision,
}

impl ClipTextModel {
    /// Loads `text_encoder/`.
    ///
    /// # Errors
    /// When the configuration asks for what is not built here, or the weights do not fit it.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// use sd_models::{ClipTextModel, ClipTokenizer, ModelFiles};
    ///
    /// let files = ModelFiles::from_dir("stable-diffusion-v1-5")?;
    /// let tokens = ClipTokenizer::load(&files)?.encode("a photo of a dog")?;
    /// let embedding = ClipTextModel::load(&files, &candle_core::Device::Cpu)?.forward(&tokens.ids)?;
    /// assert_eq!(embedding.dims(), [1, 77, 768]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let config: ClipTextConfig = files.read_config(FILE)?;
        let fail = |field: &str, got: String, expected: &str| {
            Err(Error::UnsupportedConfig {
                file: files.path_of(FILE),
                field: field.into(),
                got,
                expected: expected.into(),
            })
        };
        let act = match config.hidden_act.as_str() {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => return fail("hidden_act", format!("{other:?}"), "quick_gelu or gelu"),
        };
        if config.hidden_size == 0 {
            return fail("hidden_size", "0".into(), "a positive number");
        }
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let got = format!("{} for hidden_size {}", config.num_attention_heads, config.hidden_size);
            return fail("num_attention_heads", got, "a divisor of hidden_size");
        }
        let weights = Weights::load(files, "text_encoder", device)?;
        // Files of transformers 4 and before have this prefix.
        let weights = if weights.contains("text_model.final_layer_norm.weight") {
            weights.pp("text_model")
        } else {
            weights
        };
        let d = config.hidden_size;
        let layer = |i| EncoderLayer::load(&weights.pp(format!("encoder.layers.{i}")), &config, act);
        Ok(Self {
            token_embedding: weights.get("embeddings.token_embedding.weight", &[config.vocab_size, d])?,
            position_embedding: weights
                .get("embeddings.position_embedding.weight", &[config.max_position_embeddings, d])?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: layer_norm(&weights.pp("final_layer_norm"), d, config.layer_norm_eps)?,
            precision: Precision(weights.dtype()),
            config,
        })
    }

    /// What `text_encoder/config.json` says.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// The last hidden state, after the final normalisation.
    ///
    /// # Shapes
    /// `T` token ids to `[1, T, D]`, `f32`.
    ///
    /// # Errors
    /// When there are more ids than positions, none, or an id outside the vocabulary.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let limit = self.config.max_position_embeddings;
        if ids.is_empty() || ids.len() > limit {
            let (expected, got) = (format!("1 to {limit} tokens"), ids.len().to_string());
            return Err(Error::Argument { argument: "ids", expected, got });
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            let expected = format!(
                "ids below vocab_size {}: tokenizer and text encoder must come from the same model",
                self.config.vocab_size
            );
            return Err(Error::Argument { argument: "ids", expected, got: id.to_string() });
        }
        let index = Tensor::new(ids, self.token_embedding.device())?;
        let positions = self.position_embedding.narrow(0, 0, ids.len())?;
        let mut h = (self.token_embedding.index_select(&index, 0)? + positions)?.unsqueeze(0)?;
        h = self.precision.enter(&h)?;
        for layer in &self.layers {
            h = layer.forward(&h)?;
        }
        Ok(self.precision.leave(&self.final_layer_norm.forward(&h)?)?)
    }
}

/// `CLIPEncoderLayer`: causal self-attention and feed-forward, each normalised before and added after.
struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    act: Activation,
    attention: AttentionConfig,
}

impl EncoderLayer {
    fn load(weights: &Weights, config: &ClipTextConfig, act: Activation) -> Result<Self> {
        let (d, wide) = (config.hidden_size, config.intermediate_size);
        let project = |name| linear(&weights.pp("self_attn").pp(name), d, d);
        let head_dim = d / config.num_attention_heads;
        Ok(Self {
            layer_norm1: layer_norm(&weights.pp("layer_norm1"), d, config.layer_norm_eps)?,
            q_proj: project("q_proj")?,
            k_proj: project("k_proj")?,
            v_proj: project("v_proj")?,
            out_proj: project("out_proj")?,
            layer_norm2: layer_norm(&weights.pp("layer_norm2"), d, config.layer_norm_eps)?,
            fc1: linear(&weights.pp("mlp.fc1"), d, wide)?,
            fc2: linear(&weights.pp("mlp.fc2"), wide, d)?,
            act,
            attention: AttentionConfig {
                num_heads: config.num_attention_heads,
                softmax_scale: (head_dim as f64).powf(-0.5),
                mask: AttentionMask::Causal,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.layer_norm1.forward(x)?;
        let (q, k, v) = (self.q_proj.forward(&h)?, self.k_proj.forward(&h)?, self.v_proj.forward(&h)?);
        let x = (self.out_proj.forward(&attention(&q, &k, &v, &self.attention)?)? + x)?;
        let h = activation(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?, self.act)?;
        Ok((self.fc2.forward(&h)? + x)?)
    }
}
