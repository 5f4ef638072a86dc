//! Checkpoint folders as users have them, and as an attacker would make them.
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use candle_core::Device;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use sd_models::{Error, ModelFiles, Result, Weights};

use common::{empty_checkpoint, write};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn load(dir: &tempfile::TempDir, component: &str) -> Result<Weights> {
    Weights::load(&ModelFiles::from_dir(dir.path())?, component, &Device::Cpu)
}

/// A safetensors file of `f32` vectors of one element.
fn tensors(values: &[(&str, f32)]) -> Vec<u8> {
    let bytes: Vec<_> = values.iter().map(|(name, value)| (*name, value.to_le_bytes())).collect();
    let views =
        bytes.iter().map(|(name, bytes)| (*name, TensorView::new(Dtype::F32, vec![1], bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A safetensors file with this header, and `data` bytes of zeros.
fn raw(header: &str, data: usize) -> Vec<u8> {
    [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes(), &vec![0; data]].concat()
}

fn value(weights: &Weights, name: &str) -> f32 {
    weights.get(name, &[1]).unwrap().to_vec1::<f32>().unwrap()[0]
}

#[test]
fn full_precision_precedes_fp16() {
    let dir = empty_checkpoint();
    write(&dir, "text_encoder/model.fp16.safetensors", &tensors(&[("a", 16.0)]));
    assert_eq!(value(&load(&dir, "text_encoder").unwrap(), "a"), 16.0);
    write(&dir, "text_encoder/model.safetensors", &tensors(&[("a", 32.0)]));
    assert_eq!(value(&load(&dir, "text_encoder").unwrap(), "a"), 32.0);
}

#[test]
fn shards_are_read_as_their_index_says() {
    for variant in ["", ".fp16"] {
        let dir = empty_checkpoint();
        let index = format!("unet/diffusion_pytorch_model.safetensors.index{variant}.json");
        write(
            &dir,
            &index,
            br#"{"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        );
        write(&dir, "unet/1.safetensors", &tensors(&[("a", 1.0)]));
        let error = load(&dir, "unet").err().unwrap();
        assert!(
            matches!(&error, Error::MissingFile { file, .. } if file.ends_with("unet/2.safetensors")),
            "{error}"
        );
        write(&dir, "unet/2.safetensors", &tensors(&[("b", 2.0)]));
        let weights = load(&dir, "unet").unwrap();
        assert_eq!((value(&weights, "a"), value(&weights, "b")), (1.0, 2.0));
        assert_eq!(weights.tensors().len(), 2);
    }
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    for map in ["{}", r#"{"a": "../secret"}"#, r#"{"a": "/etc/passwd"}"#, r#"{"a": ".."}"#, r#"{"a": "c:x"}"#]
    {
        let dir = empty_checkpoint();
        let index = format!(r#"{{"weight_map": {map}}}"#);
        write(&dir, "unet/diffusion_pytorch_model.safetensors.index.json", index.as_bytes());
        let error = load(&dir, "unet").err().unwrap();
        assert!(
            matches!(&error, Error::Malformed { reason, .. } if reason.contains("weight_map")),
            "{error}"
        );
    }
}

#[test]
fn other_formats_are_named() {
    let dir = empty_checkpoint();
    write(&dir, "unet/diffusion_pytorch_model.bin", b"PK");
    let error = load(&dir, "unet").err().unwrap().to_string();
    assert!(error.contains(UNET) && error.contains("safetensors only"), "{error}");
}

#[test]
fn hostile_headers_are_refused() {
    let one = r#""dtype":"F32","shape":[1]"#;
    let max = u64::MAX;
    let cases = [
        (
            "overlap",
            raw(&format!(r#"{{"a":{{{one},"data_offsets":[0,4]}},"b":{{{one},"data_offsets":[0,4]}}}}"#), 4),
        ),
        ("gap", raw(&format!(r#"{{"a":{{{one},"data_offsets":[4,8]}}}}"#), 8)),
        ("backwards", raw(&format!(r#"{{"a":{{{one},"data_offsets":[4,0]}}}}"#), 4)),
        ("beyond the end", raw(&format!(r#"{{"a":{{{one},"data_offsets":[0,4]}}}}"#), 3)),
        ("left over", raw(&format!(r#"{{"a":{{{one},"data_offsets":[0,4]}}}}"#), 5)),
        (
            "overflow",
            raw(&format!(r#"{{"a":{{"dtype":"F32","shape":[{max},{max}],"data_offsets":[0,4]}}}}"#), 4),
        ),
        ("too small", raw(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4)),
        ("huge offsets", raw(&format!(r#"{{"a":{{{one},"data_offsets":[0,{max}]}}}}"#), 4)),
        ("not JSON", raw("{", 0)),
        ("not an object", raw("[]", 0)),
        ("deep", raw(&"[".repeat(100_000), 0)),
        ("unknown type", raw(r#"{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}"#, 4)),
        ("huge header", [max.to_le_bytes().as_slice(), b"{}"].concat()),
        ("larger header than file", [1000u64.to_le_bytes().as_slice(), b"{}"].concat()),
        ("a page of HTML", b"<!DOCTYPE html><html><body>404</body></html>".to_vec()),
        (
            "a Git LFS pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n".to_vec(),
        ),
    ];
    for (what, bytes) in cases {
        let dir = empty_checkpoint();
        write(&dir, UNET, &bytes);
        let error = load(&dir, "unet").err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(matches!(&error, Error::Malformed { file, .. } if file.ends_with(UNET)), "{what}: {error}");
    }
}

#[test]
fn configs_name_field_and_line() {
    #[derive(serde::Deserialize, Debug)]
    struct Config {
        #[serde(rename = "block_out_channels")]
        _block_out_channels: Vec<usize>,
    }
    for (json, says) in [
        (r#"{"block_out_channels": [1, "x"]}"#, "field block_out_channels[1]: invalid type: string \"x\""),
        (r#"{"block_out_channels": [-1]}"#, "field block_out_channels[0]: invalid value"),
        ("{}", "missing field `block_out_channels` at line 1"),
        (r#"{"block_out_channels": []} x"#, "trailing characters at line 1"),
        ("", "EOF while parsing a value at line 1"),
    ] {
        let dir = empty_checkpoint();
        write(&dir, "unet/config.json", json.as_bytes());
        let files = ModelFiles::from_dir(dir.path()).unwrap();
        let error = files.read_config::<Config>("unet/config.json").unwrap_err().to_string();
        assert!(error.contains("unet/config.json") && error.contains(says), "{error}");
    }
}

#[test]
fn a_model_is_found_in_the_hub_cache() {
    let cache = tempfile::tempdir().unwrap();
    let model = cache.path().join("models--org--name");
    let add = |revision: &str| {
        let snapshots = model.join("snapshots");
        std::fs::create_dir_all(&snapshots).unwrap();
        std::fs::rename(empty_checkpoint().keep(), snapshots.join(revision)).unwrap();
    };
    let open = || ModelFiles::from_hub_cache(cache.path(), "org/name");
    assert!(open().err().unwrap().to_string().contains("hf download org/name"));
    add("aaaa");
    assert!(open().unwrap().name().ends_with("snapshots/aaaa"), "the only revision");
    add("bbbb");
    assert!(open().err().unwrap().to_string().contains("2 revisions"), "which one?");
    std::fs::create_dir(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), "bbbb\n").unwrap();
    assert!(open().unwrap().name().ends_with("snapshots/bbbb"), "main");
    std::fs::write(model.join("refs/main"), "cccc").unwrap();
    assert!(matches!(open(), Err(Error::MissingFile { .. })));
}

#[test]
fn the_hash_tells_checkpoints_apart() {
    let dir = empty_checkpoint();
    let big = |first: u8, middle: u8, last: u8| {
        let mut data = vec![0; 400_000];
        (data[0], data[200_000], data[399_999]) = (first, middle, last);
        let view = TensorView::new(Dtype::F32, vec![100_000], &data).unwrap();
        safetensors::serialize([("a", view)], None).unwrap()
    };
    write(&dir, "vae/diffusion_pytorch_model.safetensors", &tensors(&[("a", 1.0)]));
    write(&dir, "text_encoder/model.safetensors", &tensors(&[("a", 1.0)]));
    let hash = |unet: &[u8]| {
        write(&dir, UNET, unet);
        ModelFiles::from_dir(dir.path()).unwrap().hash().unwrap()
    };
    let base = hash(&big(0, 0, 0));
    assert_eq!(base.len(), 64);
    assert_eq!(base, hash(&big(0, 0, 0)));
    assert_eq!(base, hash(&big(0, 1, 0)), "the documented blind spot");
    assert_ne!(base, hash(&big(1, 0, 0)));
    assert_ne!(base, hash(&big(0, 0, 1)));
    assert_ne!(base, hash(&tensors(&[("a", 0.0)])));
    assert_ne!(hash(&tensors(&[("a", 0.0)])), hash(&tensors(&[("b", 0.0)])), "names are in the header");
    for damaged in [&b""[..], b"\xff\xff\xff\xff\xff\xff\xff\xffab", b"short"] {
        assert_eq!(hash(damaged).len(), 64, "never a panic");
    }
}

proptest! {
    /// Whatever happens to a file, its weights are read or refused, never a panic.
    #[test]
    fn damaged_weights_are_read_or_refused(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        length in any::<proptest::sample::Index>(), cut in any::<bool>(),
    ) {
        let mut bytes = tensors(&[("a", 1.0), ("b.weight", 2.0)]);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(length.index(bytes.len()));
        }
        let dir = empty_checkpoint();
        write(&dir, UNET, &bytes);
        match load(&dir, "unet") {
            Err(error) => prop_assert!(matches!(error, Error::Malformed { .. }), "{}", error),
            Ok(weights) => {
                for (name, _, shape) in weights.tensors() {
                    match weights.get(&name, &shape) {
                        Err(error) => prop_assert!(
                            matches!(error, Error::NotFinite { .. } | Error::TensorDType { .. }), "{}", error),
                        Ok(tensor) => prop_assert_eq!(tensor.dims(), &shape[..]),
                    }
                }
            }
        }
    }
}
