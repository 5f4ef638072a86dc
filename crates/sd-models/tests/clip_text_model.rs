//! The text encoder against transformers' CLIPTextModel. Fixture: `tools/fixtures/clip.py`.
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use candle_core::{Device, Tensor};
use sd_models::{ClipTextModel, Error, ModelFiles, Result};

/// Three layers in f32 on either side; sums in another order move the last digits.
const RELATIVE_L2: f64 = 1e-5;

macro_rules! fixture {
    ($act:literal, $file:literal) => {
        include_bytes!(concat!("../../../tests/fixtures/clip/", $act, "/", $file)).as_slice()
    };
}

struct Fixture {
    act: &'static str,
    files: [(&'static str, &'static [u8]); 2],
    golden: &'static [u8],
}

macro_rules! fixtures {
    ($($act:literal),*) => {
        [$(Fixture {
            act: $act,
            files: [
                ("text_encoder/config.json", fixture!($act, "config.json")),
                ("text_encoder/model.safetensors", fixture!($act, "model.safetensors")),
            ],
            golden: fixture!($act, "golden.safetensors"),
        }),*]
    };
}

/// SD 1.x's tensor names with OpenAI's activation; transformers 5's names with OpenCLIP's.
static FIXTURES: [Fixture; 2] = fixtures!["quick_gelu", "gelu"];

fn model(fixture: &'static Fixture) -> ClipTextModel {
    ClipTextModel::load(&ModelFiles::from_embedded(fixture.act, &fixture.files), &Device::Cpu).unwrap()
}

fn relative_l2(got: &Tensor, expected: &Tensor) -> f64 {
    let norm = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(got - expected).unwrap()) / norm(expected)
}

#[test]
fn the_last_hidden_state_equals_that_of_transformers() {
    for fixture in &FIXTURES {
        let golden = candle_core::safetensors::load_buffer(fixture.golden, &Device::Cpu).unwrap();
        let model = model(fixture);
        for length in [77, 5] {
            let ids: Vec<u32> = golden[&format!("ids.{length}")]
                .to_dtype(candle_core::DType::U32)
                .unwrap()
                .to_vec1()
                .unwrap();
            let expected = &golden[&format!("last_hidden_state.{length}")];
            let got = model.forward(&ids).unwrap();
            assert_eq!(got.dims(), [1, length, 32]);
            let error = relative_l2(&got, expected);
            assert!(error < RELATIVE_L2, "{} at {length} tokens: {error:e}", fixture.act);
        }
    }
}

#[test]
fn a_token_sees_none_after_it() {
    let model = model(&FIXTURES[0]);
    let long = model.forward(&[1, 2, 3, 4, 5]).unwrap();
    let short = model.forward(&[1, 2, 3]).unwrap();
    assert!(relative_l2(&long.narrow(1, 0, 3).unwrap(), &short) < RELATIVE_L2);
    let other = model.forward(&[1, 9, 3]).unwrap();
    assert!(
        relative_l2(&other.narrow(1, 2, 1).unwrap(), &short.narrow(1, 2, 1).unwrap()) > 1e-3,
        "but those before"
    );
}

#[test]
fn wrong_ids_are_refused() {
    let model = model(&FIXTURES[0]);
    for ids in [&[][..], &[97], &[u32::MAX], &[0; 78]] {
        assert!(matches!(model.forward(ids), Err(Error::Argument { argument: "ids", .. })), "{ids:?}");
    }
}

/// Loads the first fixture with `field` of its configuration changed.
fn load_with(field: &str, value: &str) -> Result<ClipTextModel> {
    let dir = common::empty_checkpoint();
    let [(config_file, config), (weights_file, weights)] = FIXTURES[0].files;
    let mut config: serde_json::Value = serde_json::from_slice(config).unwrap();
    config[field] = serde_json::from_str(value).unwrap();
    common::write(&dir, config_file, config.to_string().as_bytes());
    common::write(&dir, weights_file, weights);
    ClipTextModel::load(&ModelFiles::from_dir(dir.path()).unwrap(), &Device::Cpu)
}

#[test]
fn a_configuration_that_does_not_fit_is_named() {
    for (field, value, says) in [
        ("hidden_act", "\"gelu_new\"", "hidden_act is \"gelu_new\"; supported: quick_gelu or gelu"),
        ("num_attention_heads", "5", "num_attention_heads is 5 for hidden_size 32"),
        ("num_attention_heads", "0", "num_attention_heads is 0"),
        ("num_attention_heads", "-1", "field num_attention_heads: invalid value"),
        ("hidden_size", "0", "hidden_size is 0"),
        ("hidden_size", "64", "config.json asks for [97, 64]"),
        ("vocab_size", "98", "token_embedding.weight has shape [97, 32], config.json asks for [98, 32]"),
        ("max_position_embeddings", "78", "position_embedding.weight has shape [77, 32]"),
        ("intermediate_size", "18446744073709551615", "mlp.fc1.weight has shape [64, 32]"),
        ("num_hidden_layers", "18446744073709551615", "no tensor text_model.encoder.layers.3."),
    ] {
        let error = load_with(field, value).err().unwrap_or_else(|| panic!("{field} = {value}")).to_string();
        assert!(error.contains(says) && error.contains("text_encoder/"), "{error}");
    }
    assert!(
        load_with("num_hidden_layers", "2").is_ok(),
        "fewer layers than the file has, as Stable Diffusion 2 does"
    );
}
