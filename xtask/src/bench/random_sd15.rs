//! A checkpoint with the shapes of Stable Diffusion 1.5 and random weights in f16: its pictures are noise, its speed and memory
//! are the model's.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use hiper_core::TorchGenerator;
use serde_json::{Value, json};

use crate::folders;

const CHANNELS: [usize; 4] = [320, 640, 1280, 1280];
const TIME: usize = 1280;
const VAE_CHANNELS: [usize; 4] = [128, 256, 512, 512];
const TEXT: usize = 768;
const TOKENS: usize = 77;
const VOCABULARY: usize = 49408;

/// Writes it to `folder`, with the demo model's tokenizer.
///
/// # Errors
/// When the disk is full.
pub fn write(folder: &Path) -> Result<()> {
    let random = TorchGenerator::new(0).randn(1 << 20);
    for (component, file, shapes, config) in [
        ("unet", "diffusion_pytorch_model", unet(), unet_config()),
        ("vae", "diffusion_pytorch_model", vae(), vae_config()),
        ("text_encoder", "model", text_encoder(), text_config()),
    ] {
        write_json(&folder.join(component).join("config.json"), &config)?;
        let tensors: HashMap<String, Tensor> = shapes
            .0
            .iter()
            .map(|(name, shape)| Ok((name.clone(), weights(name, shape, &random)?)))
            .collect::<Result<_>>()?;
        let path = folder.join(component).join(format!("{file}.safetensors"));
        candle_core::safetensors::save(&tensors, &path).with_context(|| path.display().to_string())?;
    }
    write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler_config())?;
    write_json(&folder.join("model_index.json"), &json!({"_class_name": "StableDiffusionPipeline"}))?;
    let tokenizer = folders::workspace().join("crates/hiper-cli/assets/demo-model/tokenizer");
    std::fs::create_dir_all(folder.join("tokenizer"))?;
    for file in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        let from = tokenizer.join(file);
        std::fs::copy(&from, folder.join("tokenizer").join(file))
            .with_context(|| from.display().to_string())?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(path))?;
    std::fs::write(path, value.to_string()).with_context(|| path.display().to_string())
}

/// Numbers that keep the size of what passes through: normal, of variance 1 / inputs; norms as they begin.
fn weights(name: &str, shape: &[usize], random: &[f32]) -> Result<Tensor> {
    let constant = |value: f32| Ok(Tensor::full(value, shape, &Device::Cpu)?.to_dtype(DType::F16)?);
    match shape {
        [_] if name.ends_with("weight") => return constant(1.0),
        [_] => return constant(0.0),
        _ => {}
    }
    let scale = (shape[1..].iter().product::<usize>() as f32).powf(-0.5);
    let values: Vec<f32> =
        random.iter().cycle().take(shape.iter().product()).map(|value| value * scale).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F16)?)
}

/// Names and shapes of tensors.
#[derive(Default)]
struct Shapes(BTreeMap<String, Vec<usize>>);

impl Shapes {
    fn weight(&mut self, name: &str, shape: &[usize]) {
        self.0.insert(format!("{name}.weight"), shape.to_vec());
    }

    /// A layer with a bias, or a norm.
    fn layer(&mut self, name: &str, shape: &[usize]) {
        self.weight(name, shape);
        self.0.insert(format!("{name}.bias"), vec![shape[0]]);
    }

    fn conv3(&mut self, name: &str, [from, to]: [usize; 2]) {
        self.layer(name, &[to, from, 3, 3]);
    }

    fn resnet(&mut self, name: &str, [from, to]: [usize; 2], time: Option<usize>) {
        self.layer(&format!("{name}.norm1"), &[from]);
        self.conv3(&format!("{name}.conv1"), [from, to]);
        if let Some(time) = time {
            self.layer(&format!("{name}.time_emb_proj"), &[to, time]);
        }
        self.layer(&format!("{name}.norm2"), &[to]);
        self.conv3(&format!("{name}.conv2"), [to, to]);
        if from != to {
            self.layer(&format!("{name}.conv_shortcut"), &[to, from, 1, 1]);
        }
    }

    fn transformer(&mut self, name: &str, c: usize) {
        self.layer(&format!("{name}.norm"), &[c]);
        self.layer(&format!("{name}.proj_in"), &[c, c, 1, 1]);
        self.layer(&format!("{name}.proj_out"), &[c, c, 1, 1]);
        let block = format!("{name}.transformer_blocks.0");
        for (attention, context) in [("attn1", c), ("attn2", TEXT)] {
            self.weight(&format!("{block}.{attention}.to_q"), &[c, c]);
            self.weight(&format!("{block}.{attention}.to_k"), &[c, context]);
            self.weight(&format!("{block}.{attention}.to_v"), &[c, context]);
            self.layer(&format!("{block}.{attention}.to_out.0"), &[c, c]);
        }
        for norm in ["norm1", "norm2", "norm3"] {
            self.layer(&format!("{block}.{norm}"), &[c]);
        }
        self.layer(&format!("{block}.ff.net.0.proj"), &[8 * c, c]);
        self.layer(&format!("{block}.ff.net.2"), &[c, 4 * c]);
    }

    /// The middle of the encoder or the decoder.
    fn vae_mid(&mut self, name: &str, c: usize) {
        for resnet in 0..2 {
            self.resnet(&format!("{name}.resnets.{resnet}"), [c, c], None);
        }
        self.layer(&format!("{name}.attentions.0.group_norm"), &[c]);
        for part in ["to_q", "to_k", "to_v", "to_out.0"] {
            self.layer(&format!("{name}.attentions.0.{part}"), &[c, c]);
        }
    }
}

fn unet() -> Shapes {
    let mut shapes = Shapes::default();
    let mut c = CHANNELS[0];
    shapes.conv3("conv_in", [4, c]);
    shapes.layer("time_embedding.linear_1", &[TIME, c]);
    shapes.layer("time_embedding.linear_2", &[TIME, TIME]);
    let mut skipped = vec![c];
    for (level, to) in CHANNELS.into_iter().enumerate() {
        let block = format!("down_blocks.{level}");
        for i in 0..2 {
            shapes.resnet(&format!("{block}.resnets.{i}"), [c, to], Some(TIME));
            c = to;
            skipped.push(c);
            if level < 3 {
                shapes.transformer(&format!("{block}.attentions.{i}"), c);
            }
        }
        if level < 3 {
            shapes.conv3(&format!("{block}.downsamplers.0.conv"), [c, c]);
            skipped.push(c);
        }
    }
    for i in 0..2 {
        shapes.resnet(&format!("mid_block.resnets.{i}"), [c, c], Some(TIME));
    }
    shapes.transformer("mid_block.attentions.0", c);
    for (level, to) in CHANNELS.into_iter().rev().enumerate() {
        let block = format!("up_blocks.{level}");
        for i in 0..3 {
            let skip = skipped.pop().unwrap_or(0);
            shapes.resnet(&format!("{block}.resnets.{i}"), [c + skip, to], Some(TIME));
            c = to;
            if level > 0 {
                shapes.transformer(&format!("{block}.attentions.{i}"), c);
            }
        }
        if level < 3 {
            shapes.conv3(&format!("{block}.upsamplers.0.conv"), [c, c]);
        }
    }
    shapes.layer("conv_norm_out", &[c]);
    shapes.conv3("conv_out", [c, 4]);
    shapes
}

fn vae() -> Shapes {
    let mut shapes = Shapes::default();
    for (name, [from, to], levels, resnets, sampler) in
        [("encoder", [3, 8], VAE_CHANNELS, 2, "down"), ("decoder", [4, 3], [512, 512, 256, 128], 3, "up")]
    {
        let (begin, end) = (levels[0], levels[3]);
        shapes.conv3(&format!("{name}.conv_in"), [from, begin]);
        let mut c = begin;
        for (level, to) in levels.into_iter().enumerate() {
            let block = format!("{name}.{sampler}_blocks.{level}");
            for i in 0..resnets {
                shapes.resnet(&format!("{block}.resnets.{i}"), [c, to], None);
                c = to;
            }
            if level < 3 {
                shapes.conv3(&format!("{block}.{sampler}samplers.0.conv"), [c, c]);
            }
        }
        shapes.vae_mid(&format!("{name}.mid_block"), VAE_CHANNELS[3]);
        shapes.layer(&format!("{name}.conv_norm_out"), &[end]);
        shapes.conv3(&format!("{name}.conv_out"), [end, to]);
    }
    shapes.layer("quant_conv", &[8, 8, 1, 1]);
    shapes.layer("post_quant_conv", &[4, 4, 1, 1]);
    shapes
}

fn text_encoder() -> Shapes {
    let mut shapes = Shapes::default();
    shapes.weight("text_model.embeddings.token_embedding", &[VOCABULARY, TEXT]);
    shapes.weight("text_model.embeddings.position_embedding", &[TOKENS, TEXT]);
    for layer in 0..12 {
        let name = format!("text_model.encoder.layers.{layer}");
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            shapes.layer(&format!("{name}.self_attn.{part}"), &[TEXT, TEXT]);
        }
        shapes.layer(&format!("{name}.layer_norm1"), &[TEXT]);
        shapes.layer(&format!("{name}.layer_norm2"), &[TEXT]);
        shapes.layer(&format!("{name}.mlp.fc1"), &[4 * TEXT, TEXT]);
        shapes.layer(&format!("{name}.mlp.fc2"), &[TEXT, 4 * TEXT]);
    }
    shapes.layer("text_model.final_layer_norm", &[TEXT]);
    shapes
}

fn unet_config() -> Value {
    json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
        "center_input_sample": false, "flip_sin_to_cos": true, "freq_shift": 0, "act_fn": "silu",
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": CHANNELS, "layers_per_block": 2, "cross_attention_dim": TEXT, "attention_head_dim": 8,
        "norm_num_groups": 32, "norm_eps": 1e-5, "use_linear_projection": false, "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    })
}

fn vae_config() -> Value {
    json!({
        "_class_name": "AutoencoderKL", "sample_size": 512, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "down_block_types": (["DownEncoderBlock2D"; 4]), "up_block_types": (["UpDecoderBlock2D"; 4]),
        "block_out_channels": VAE_CHANNELS, "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
        "scaling_factor": 0.18215,
    })
}

fn text_config() -> Value {
    json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": VOCABULARY, "hidden_size": TEXT,
        "intermediate_size": 4 * TEXT, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": TEXT,
        "max_position_embeddings": TOKENS, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    })
}

fn scheduler_config() -> Value {
    json!({
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1,
        "prediction_type": "epsilon",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors and parameters of runwayml/stable-diffusion-v1-5's networks, as diffusers and transformers count them.
    #[test]
    fn tensors_and_parameters_are_those_of_the_model() {
        let count = |shapes: Shapes| {
            let parameters: usize = shapes.0.values().map(|shape| shape.iter().product::<usize>()).sum();
            (shapes.0.len(), parameters)
        };
        assert_eq!(count(unet()), (686, 859_520_964));
        assert_eq!(count(vae()), (248, 83_653_863));
        assert_eq!(count(text_encoder()), (196, 123_060_480));
    }
}
