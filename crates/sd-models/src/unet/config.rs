//! `unet/config.json`: which UNet this is.

use serde::Deserialize;

use crate::{Error, Result};

const FILE: &str = "unet/config.json";

/// The fields of diffusers' `UNet2DConditionModel` configuration that Stable Diffusion 1.x and 2.x use, with
/// diffusers' defaults. A field that asks for something else is an error, never ignored.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNet2DConditionConfig {
    /// Height and width of the latents that the model was trained on.
    pub sample_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// One entry a level, from fine to coarse: `CrossAttnDownBlock2D` or `DownBlock2D`.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2DCrossAttn`.
    pub mid_block_type: Option<String>,
    /// One entry a level, from coarse to fine: `CrossAttnUpBlock2D` or `UpBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from fine to coarse.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks a level (the up path has one more).
    pub layers_per_block: OneOrMany,
    /// Transformer blocks a `Transformer2DModel`.
    pub transformer_layers_per_block: OneOrMany,
    /// Width `D` of the text embedding.
    pub cross_attention_dim: OneOrMany,
    /// Despite its name, the *number* of heads a level (diffusers keeps the name for old checkpoints).
    pub attention_head_dim: OneOrMany,
    /// The number of heads a level, where a checkpoint says it outright.
    pub num_attention_heads: Option<OneOrMany>,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// Added to the variance in every group normalisation of residual blocks.
    pub norm_eps: f64,
    /// `silu` or `swish`.
    pub act_fn: String,
    /// Whether transformers project with a linear layer (SD 2.x) or a 1×1 convolution (SD 1.x).
    pub use_linear_projection: bool,
    /// Whether the timestep embedding is `[cos, sin]`.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the timestep embedding.
    pub freq_shift: f64,
    /// Whether the input is mapped from [0, 1] to [−1, 1].
    pub center_input_sample: bool,
    /// Zeros around the input of a downsampling convolution.
    pub downsample_padding: usize,
    /// Divides the sum in the middle block's residual blocks.
    pub mid_block_scale_factor: f64,
    /// Unsupported variations; each must keep its default.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        let types = |names: [&str; 4]| names.map(String::from).to_vec();
        Self {
            sample_size: 64,
            in_channels: 4,
            out_channels: 4,
            down_block_types: types([
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: types([
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
            ]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: OneOrMany::One(2),
            transformer_layers_per_block: OneOrMany::One(1),
            cross_attention_dim: OneOrMany::One(1280),
            attention_head_dim: OneOrMany::One(8),
            num_attention_heads: None,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            act_fn: "silu".into(),
            use_linear_projection: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            center_input_sample: false,
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            other: serde_json::Map::new(),
        }
    }
}

/// A number for all levels, or one a level.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// The same everywhere.
    One(usize),
    /// From fine to coarse.
    Many(Vec<usize>),
}

impl OneOrMany {
    /// The value at `level`.
    pub fn at(&self, level: usize) -> Option<usize> {
        match self {
            Self::One(value) => Some(*value),
            Self::Many(values) => values.get(level).copied(),
        }
    }
}

/// Fields whose presence with a value other than these changes the network into one that is not built here.
const MUST_BE: [(&str, &[&str]); 19] = [
    ("only_cross_attention", &["false"]),
    ("dual_cross_attention", &["false"]),
    ("class_embed_type", &["null"]),
    ("addition_embed_type", &["null"]),
    ("encoder_hid_dim", &["null"]),
    ("encoder_hid_dim_type", &["null"]),
    ("num_class_embeds", &["null"]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_out_scale_factor", &["1.0", "1"]),
    ("time_embedding_type", &["\"positional\""]),
    ("time_embedding_act_fn", &["null"]),
    ("timestep_post_act", &["null"]),
    ("time_cond_proj_dim", &["null"]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
    ("attention_type", &["\"default\""]),
    ("mid_block_only_cross_attention", &["null", "false"]),
    ("cross_attention_norm", &["null"]),
];

impl UNet2DConditionConfig {
    /// The number of blocks on the way down, which is the number of levels.
    pub fn num_levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// How many heads each attention of a level has.
    pub fn num_heads(&self, level: usize) -> usize {
        let heads = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim);
        heads.at(level).unwrap_or(1)
    }

    /// Checks what the network's construction relies on.
    ///
    /// # Errors
    /// Naming the field, its value and what is supported.
    pub fn validate(&self) -> Result<()> {
        let fail = |field: &str, got: String, expected: &str| {
            Err(Error::UnsupportedConfig {
                file: FILE.into(),
                field: field.into(),
                got,
                expected: expected.into(),
            })
        };
        let levels = self.num_levels();
        if levels == 0 || self.block_out_channels.contains(&0) {
            return fail(
                "block_out_channels",
                format!("{:?}", self.block_out_channels),
                "one positive number a level",
            );
        }
        for (field, types, supported) in [
            ("down_block_types", &self.down_block_types, ["CrossAttnDownBlock2D", "DownBlock2D"]),
            ("up_block_types", &self.up_block_types, ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ] {
            if types.len() != levels {
                return fail(
                    field,
                    format!("{} entries", types.len()),
                    &format!("{levels}, as block_out_channels has"),
                );
            }
            if let Some(unknown) = types.iter().find(|t| !supported.contains(&t.as_str())) {
                return fail(field, format!("{unknown:?}"), &supported.join(" or "));
            }
        }
        if self.mid_block_type.as_deref() != Some("UNetMidBlock2DCrossAttn") {
            return fail("mid_block_type", format!("{:?}", self.mid_block_type), "UNetMidBlock2DCrossAttn");
        }
        if !matches!(self.act_fn.as_str(), "silu" | "swish") {
            return fail("act_fn", self.act_fn.clone(), "silu");
        }
        for (field, value) in [
            ("layers_per_block", &self.layers_per_block),
            ("transformer_layers_per_block", &self.transformer_layers_per_block),
            ("cross_attention_dim", &self.cross_attention_dim),
            ("attention_head_dim", self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim)),
        ] {
            if (0..levels).any(|level| value.at(level).is_none_or(|v| v == 0)) {
                return fail(field, format!("{value:?}"), "a positive number, or one a level");
            }
        }
        if let Some(level) =
            (0..levels).find(|&l| !self.block_out_channels[l].is_multiple_of(self.num_heads(l)))
        {
            let got =
                format!("{} heads for {} channels", self.num_heads(level), self.block_out_channels[level]);
            return fail("attention_head_dim", got, "a divisor of the level's channels");
        }
        for (field, allowed) in MUST_BE {
            if let Some(value) = self.other.get(field).filter(|v| !allowed.contains(&v.to_string().as_str()))
            {
                return fail(field, value.to_string(), allowed[0]);
            }
        }
        Ok(())
    }
}
