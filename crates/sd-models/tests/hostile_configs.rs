//! Configurations with any field replaced: refused with an error, or asking for weights that the empty file lacks.
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use candle_core::Device;
use proptest::prelude::*;
use sd_models::schedulers::{SchedulerConfig, SchedulerKind};
use sd_models::{AutoencoderKl, ClipTextModel, ClipTokenizer, ModelFiles, UNet2DConditionModel};
use serde_json::{Value, json};

macro_rules! seeds {
    ($($name:literal),*) => { [$(include_str!(concat!("../fuzz/seeds/configs/", $name, ".json"))),*] };
}

const CONFIGS: [&str; 7] = seeds![
    "text_encoder",
    "unet_tiny",
    "unet_tiny2",
    "vae_tiny",
    "vae_tiny2",
    "scheduler_tiny",
    "scheduler_tiny2"
];

/// Values that a field may not expect.
fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!(0)),
        Just(json!(1)),
        Just(json!(-1)),
        Just(json!(u64::MAX)),
        Just(json!(1e308)),
        Just(json!(-0.5)),
        Just(json!("")),
        Just(json!("trailing")),
        Just(json!([])),
        Just(json!([0])),
        Just(json!([1, 2, 3, 4])),
        Just(json!([u64::MAX, u64::MAX, u64::MAX, u64::MAX])),
        Just(json!(["x"])),
        Just(json!({})),
        Just(json!({"content": 1})),
        any::<bool>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
    ]
}

proptest! {
    #[test]
    fn no_configuration_panics(
        config in proptest::sample::select(&CONFIGS[..]),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), hostile()), 1..4),
    ) {
        let mut config: Value = serde_json::from_str(config).unwrap();
        let fields: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (field, value) in changes {
            config[field.get(&fields).as_str()] = value;
        }
        let dir = common::empty_checkpoint();
        let empty = [2u64.to_le_bytes().as_slice(), b"{}"].concat();
        for (component, stem) in
            [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]
        {
            common::write(&dir, &format!("{component}/{stem}.safetensors"), &empty);
            common::write(&dir, &format!("{component}/config.json"), config.to_string().as_bytes());
        }
        common::write(&dir, "scheduler/scheduler_config.json", config.to_string().as_bytes());
        let files = ModelFiles::from_dir(dir.path()).unwrap();
        prop_assert!(UNet2DConditionModel::load(&files, &Device::Cpu).is_err());
        prop_assert!(AutoencoderKl::load(&files, &Device::Cpu).is_err());
        prop_assert!(ClipTextModel::load(&files, &Device::Cpu).is_err());
        // A huge num_train_timesteps is refused before anything of its size is allocated.
        if let Ok(config) = SchedulerConfig::load(&files) {
            for name in ["ddpm", "ddim", "pndm", "euler", "euler-a", "dpm++", "unipc"] {
                let _ = name.parse::<SchedulerKind>().unwrap().build(&config, 7);
            }
        }
    }

    #[test]
    fn no_tokenizer_panics(
        field in proptest::sample::select(
            &["bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "added_tokens_decoder", "padding_side"][..]),
        value in hostile(), in_map in any::<bool>(), text in any::<String>(),
        merges in "(a b</w>\n|a b\n|ab c</w>\n|#version\n| \n|[a-c </w>]{0,6}\n){0,4}",
    ) {
        let dir = common::empty_checkpoint();
        let tokens = ["a", "b", "c", "ab", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"];
        let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(id, t)| (t.to_string(), id.into())).collect();
        common::write(&dir, "tokenizer/vocab.json", Value::from(vocab).to_string().as_bytes());
        common::write(&dir, "tokenizer/merges.txt", merges.as_bytes());
        let file = if in_map { "special_tokens_map" } else { "tokenizer_config" };
        common::write(&dir, &format!("tokenizer/{file}.json"), json!({field: value}).to_string().as_bytes());
        if let Ok(tokenizer) = ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap()) {
            prop_assert_eq!(tokenizer.encode(&text).unwrap().ids.len(), tokenizer.max_length());
        }
    }
}
