//! What is written reads back, and the paper authors' files read.

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    Adam, AdamConfig, Checkpoint, HiperEmbedding, HiperFile, HiperMetadata, TorchGenerator,
    write_conditioning,
};
use proptest::prelude::*;

use crate::toy::{fixture, values};

pub fn embedding(n: usize, d: usize) -> HiperEmbedding {
    let values: Vec<f32> = (0..n * d).map(|v| v as f32 * 0.37 - 5.0).collect();
    HiperEmbedding::new(Tensor::from_vec(values, (n, d), &Device::Cpu).unwrap()).unwrap()
}

pub fn metadata() -> HiperMetadata {
    HiperMetadata {
        base_model: Some("CompVis/stable-diffusion-v1-4".into()),
        base_model_hash: Some("abc".into()),
        image_hash: Some("def".into()),
        source_text: Some("a “standing” dog 🐕\n\u{1}".into()),
        train_steps: Some(1000),
        learning_rate: Some(5e-3),
        seed: Some(u64::MAX),
        final_loss: Some(0.1 + 0.2),
    }
}

/// A checkpoint in the middle of things: odd numbers everywhere.
pub fn checkpoint() -> Checkpoint {
    let mut generator = TorchGenerator::new(5);
    generator.randn(37);
    generator.randn(3);
    let config = AdamConfig { learning_rate: 0.1 + 0.2, ..Default::default() };
    let mut adam = Adam::new(config, 12);
    adam.step(&mut [0.0; 12], &generator.randn(12)).unwrap();
    Checkpoint { tail: embedding(3, 4), adam, generator, last_loss: Some(1.0 / 3.0), metadata: metadata() }
}

#[test]
fn a_tail_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hiper.safetensors");
    let (tail, metadata) = (embedding(5, 16), metadata());
    HiperFile { tail: tail.clone(), metadata: metadata.clone() }.save(&path).unwrap();
    let file = HiperFile::load(&path).unwrap();
    assert_eq!(values(file.tail.tensor()), values(tail.tensor()));
    assert_eq!(file.metadata, metadata);
    // As any reader of safetensors sees it.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["hiper"]);
    assert_eq!((tensors["hiper"].dims(), tensors["hiper"].dtype()), ([5, 16].as_slice(), DType::F32));
}

#[test]
fn a_tail_without_metadata_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tail.safetensors");
    let tensors = [("hiper".to_owned(), embedding(2, 3).tensor().clone())].into();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let file = HiperFile::load(&path).unwrap();
    assert_eq!((file.tail.n_hiper(), file.metadata), (2, HiperMetadata::default()));
}

#[test]
fn a_checkpoint_reads_back_and_reads_as_a_tail() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hiper_step7.safetensors");
    let saved = checkpoint();
    saved.save(&path).unwrap();
    let loaded = Checkpoint::load(&path).unwrap();
    assert_eq!(values(loaded.tail.tensor()), values(saved.tail.tensor()));
    assert_eq!((&loaded.adam, &loaded.generator), (&saved.adam, &saved.generator));
    assert_eq!((loaded.last_loss, &loaded.metadata), (saved.last_loss, &saved.metadata));
    let tail = HiperFile::load(&path).unwrap();
    assert_eq!((values(tail.tail.tensor()), tail.metadata), (values(saved.tail.tensor()), saved.metadata));
}

#[test]
fn equal_content_gives_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<Vec<u8>> = ["a", "b"]
        .map(|name| {
            let path = folder.path().join(name);
            checkpoint().save(&path).unwrap();
            std::fs::read(path).unwrap()
        })
        .into();
    assert_eq!(bytes[0], bytes[1]);
}

#[test]
fn a_conditioning_is_what_other_tools_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("conditioning.safetensors");
    let text = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((1, 6, 4)).unwrap();
    write_conditioning(&path, &text).unwrap();
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    assert_eq!(tensors["encoder_hidden_states"].dims(), [1, 6, 4]);
    assert_eq!(values(&tensors["encoder_hidden_states"]), values(&text));
    assert!(write_conditioning(&path, &text.squeeze(0).unwrap()).is_err());
}

#[test]
fn the_authors_files_read() {
    let want: Vec<f32> = (0..12).map(|v| v as f32).collect();
    for name in ["official", "rank2", "view", "transposed", "parameter", "half", "bfloat16", "double"] {
        let file = HiperFile::load(&fixture(&format!("torch/{name}.pt"))).unwrap();
        assert_eq!(file.tail.tensor().dims(), [3, 4], "{name}");
        assert_eq!(values(file.tail.tensor()), want, "{name}");
    }
}

#[test]
fn the_content_decides_what_a_file_is() {
    let folder = tempfile::tempdir().unwrap();
    let (renamed, tail) = (folder.path().join("tail.safetensors"), folder.path().join("tail.pt"));
    std::fs::copy(fixture("torch/official.pt"), &renamed).unwrap();
    assert_eq!(HiperFile::load(&renamed).unwrap().tail.n_hiper(), 3);
    HiperFile { tail: embedding(2, 3), metadata: HiperMetadata::default() }.save(&tail).unwrap();
    assert_eq!(HiperFile::load(&tail).unwrap().tail.n_hiper(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tail_and_metadata_read_back(
        (n, d, bits) in (1usize..6, 1usize..9).prop_flat_map(|(n, d)| {
            (Just(n), Just(d), proptest::collection::vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), n * d))
        }),
        source_text: Option<String>,
        seed: Option<u64>,
        learning_rate: Option<f64>,
        final_loss in proptest::option::of(proptest::num::f64::NORMAL),
    ) {
        prop_assume!(learning_rate.is_none_or(|rate| !rate.is_nan()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hiper.safetensors");
        let tail = HiperEmbedding::new(Tensor::from_vec(bits.clone(), (n, d), &Device::Cpu).unwrap()).unwrap();
        let metadata = HiperMetadata { source_text, seed, learning_rate, final_loss, ..Default::default() };
        HiperFile { tail, metadata: metadata.clone() }.save(&path).unwrap();
        let file = HiperFile::load(&path).unwrap();
        prop_assert_eq!(file.metadata, metadata);
        prop_assert_eq!(values(file.tail.tensor()), bits);
    }
}
