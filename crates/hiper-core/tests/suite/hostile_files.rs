//! Readers against files that are damaged, of another kind, or made to hurt.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hiper_core::{Checkpoint, Error, HiperFile};
use proptest::prelude::*;

use crate::files::{checkpoint, embedding, metadata};
use crate::toy::fixture;

fn tail_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hiper.safetensors");
    HiperFile { tail: embedding(3, 4), metadata: metadata() }.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

fn checkpoint_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hiper_step1.safetensors");
    checkpoint().save(&path).unwrap();
    std::fs::read(path).unwrap()
}

fn torch_bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture(&format!("torch/{name}.pt"))).unwrap()
}

fn tail_error(bytes: &[u8]) -> String {
    HiperFile::from_bytes(bytes, Path::new("a.file")).unwrap_err().to_string()
}

fn checkpoint_error(bytes: &[u8]) -> String {
    Checkpoint::from_bytes(bytes, Path::new("a.file")).unwrap_err().to_string()
}

/// A safetensors file of this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The file with a piece of its header exchanged for another of the same length, or none.
fn exchanged(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    assert!(header.contains(from), "{header}");
    file(&header.replacen(from, to, 1), &bytes[8 + length..])
}

/// What a tensor library writes.
fn saved(tensors: &[(&str, Tensor)]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let tensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    std::fs::read(path).unwrap()
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

#[test]
fn every_attack_on_a_tail_names_file_field_and_remedy() {
    let good = tail_bytes();
    let nan = (zeros(&[5, 8], DType::F32) / 0.0).unwrap();
    let many: Vec<String> = (0..700).map(|i| format!("layer{i:03}.weight")).collect();
    let model: Vec<(&str, Tensor)> =
        many.iter().map(|name| (name.as_str(), zeros(&[2], DType::F32))).collect();
    for (bytes, expected) in [
        (Vec::new(), "a.file: header: expected a complete safetensors file"),
        (vec![0; 8], "header"),
        (b"<!DOCTYPE html><html>Not found</html>".to_vec(), "header"),
        (b"\x89PNG\r\n\x1a\n0000000000000000".to_vec(), "header"),
        // Lengths far beyond the file.
        (u64::MAX.to_le_bytes().to_vec(), "header"),
        ([&99_999_999u64.to_le_bytes()[..], b"{}"].concat(), "header"),
        (good[..good.len() - 1].to_vec(), "header"),
        ([&good[..], b"more"].concat(), "header"),
        (file("{}", b""), "hiper: expected a tensor of this name, got no tensors"),
        (file("not json", b""), "header"),
        (file("[[[[[[[[", b""), "header"),
        (file(&"[".repeat(100_000), b""), "header"),
        // Offsets and shapes that do not fit.
        (file(r#"{"hiper":{"dtype":"F32","shape":[2,2],"data_offsets":[0,8]}}"#, &[0; 8]), "header"),
        (file(r#"{"hiper":{"dtype":"F32","shape":[2,1],"data_offsets":[8,0]}}"#, &[0; 8]), "header"),
        (
            file(
                r#"{"hiper":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
            "header",
        ),
        (file(r#"{"hiper":{"dtype":"F99","shape":[2,1],"data_offsets":[0,8]}}"#, &[0; 8]), "header"),
        (
            saved(&[("emb_params", zeros(&[5, 8], DType::F32))]),
            "hiper: expected a tensor of this name, got emb_params",
        ),
        (saved(&model), "got layer000.weight, layer001.weight, layer002.weight and 697 more"),
        (saved(&[("hiper", zeros(&[5, 8], DType::F16))]), "hiper: expected type F32, got F16"),
        (
            saved(&[("hiper", zeros(&[1, 5, 8], DType::F32))]),
            "hiper: expected shape [N, D], got shape [1, 5, 8]",
        ),
        (saved(&[("hiper", zeros(&[8], DType::F32))]), "got shape [8]"),
        (saved(&[("hiper", zeros(&[0, 8], DType::F32))]), "got shape [0, 8]"),
        (saved(&[("hiper", nan)]), "hiper: expected finite values, got NaN"),
        (exchanged(&good, "hiper-1", "hiper-9"), r#"format: expected hiper-1, got "hiper-9"; read it with"#),
        (
            exchanged(&good, r#""n_hiper":"3""#, r#""n_hiper":"4""#),
            "n_hiper: expected 3, as the tensor has, got 4",
        ),
        (
            exchanged(&good, r#""seed":"18446744073709551615""#, r#""seed":"-1""#),
            r#"seed: expected a number, got "-1""#,
        ),
    ] {
        let error = tail_error(&bytes);
        assert!(error.starts_with("a.file: ") && error.contains(expected), "{error}\nnot: {expected}");
        assert!(error.contains("; "), "no remedy: {error}");
        assert!(error.len() < 500, "too long: {error}");
    }
}

#[test]
fn every_attack_on_a_checkpoint_names_the_field() {
    let good = checkpoint_bytes();
    assert!(Checkpoint::from_bytes(&good, Path::new("a.file")).is_ok());
    let metadata = |key: &str| {
        let header = String::from_utf8_lossy(&good);
        let start = header.find(&format!("\"{key}\":\"")).unwrap();
        let end = start + header[start..].find([',', '}']).unwrap();
        header[start..end].to_owned()
    };
    let with = |key: &str, value: &str| exchanged(&good, &metadata(key), &format!("\"{key}\":\"{value}\""));
    for (bytes, expected) in [
        (tail_bytes(), "adam.learning_rate: expected a metadata field of this name, got none"),
        (torch_bytes("official"), "header"),
        (with("adam.steps", "-1"), "adam.steps: expected a number"),
        (with("adam.steps", "1e3"), "adam.steps"),
        (with("adam.beta1", "1.5"), "adam: expected constants of Adam, got “beta1"),
        (with("adam.learning_rate", "NaN"), "adam"),
        (with("adam.eps", ""), "adam.eps"),
        (with("generator.index", "625"), "generator.words: expected a state of mt19937"),
        (with("generator.cached_normal", "18446744073709551615"), "generator.words"),
        (exchanged(&good, "adam.first_moment", "adam.other_moment"), "adam.first_moment: expected a tensor"),
        (exchanged(&good, "generator.words", "generator.wordz"), "generator.words"),
        (
            exchanged(&good, r#""dtype":"U32""#, r#""dtype":"I32""#),
            "generator.words: expected type U32, got I32",
        ),
        (
            exchanged(&good, r#""shape":[3,4]"#, r#""shape":[4,3]"#),
            "adam.first_moment: expected shape [3, 4], as the tail",
        ),
    ] {
        let error = checkpoint_error(&bytes);
        assert!(error.starts_with("a.file: ") && error.contains(expected), "{error}\nnot: {expected}");
    }
    let mut negative = checkpoint();
    negative.adam.second_moment[3] = -1.0;
    let folder = tempfile::tempdir().unwrap();
    negative.save(&folder.path().join("x")).unwrap();
    let error = Checkpoint::load(&folder.path().join("x")).unwrap_err().to_string();
    assert!(error.contains("adam.second_moment: expected means of squares, got -1"), "{error}");
}

#[test]
fn every_other_file_of_torch_is_refused_with_what_it_is() {
    for (name, expected) in [
        (
            "integers",
            r#"data.pkl: expected one tensor saved by torch.save, got a tensor of "torch LongStorage""#,
        ),
        ("nan", "tensor: expected finite values"),
        ("rank4", "tensor: expected shape [1, N, D] or [N, D], got [1, 1, 3, 4]"),
        ("dictionary", "data.pkl: expected one tensor saved by torch.save, got a dictionary"),
        ("number", "got a number"),
        (
            "legacy",
            "format: expected the zip format of torch 1.6 and later, got an older one; load and save it",
        ),
    ] {
        let error = tail_error(&torch_bytes(name));
        assert!(error.contains(expected), "{name}: {error}");
    }
    let good = torch_bytes("official");
    for length in 0..good.len() {
        tail_error(&good[..length]);
    }
    // A number changed in the storage does not match the archive's checksum.
    let mut damaged = good.clone();
    let at = good.windows(8).position(|w| w == [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat()).unwrap();
    damaged[at] ^= 1;
    let error = tail_error(&damaged);
    assert!(error.contains("archive") && error.contains("hecksum"), "{error}");
}

#[test]
fn files_that_are_not_there_or_too_large_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let missing = HiperFile::load(&folder.path().join("missing")).unwrap_err();
    assert!(matches!(missing, Error::Io { action: "cannot read", .. }), "{missing}");
    assert!(HiperFile::load(folder.path()).is_err());
    // A file of 8 GiB that takes no space.
    let path = folder.path().join("model.safetensors");
    std::fs::File::create(&path).unwrap().set_len(8 << 30).unwrap();
    let error = HiperFile::load(&path).unwrap_err().to_string();
    assert!(
        error.contains("size: expected at most") && error.contains("a checkpoint of a model?"),
        "{error}"
    );
}

/// Reads as everything; any answer will do, but it must be an answer.
fn read_as_everything(bytes: &[u8]) {
    let path = Path::new("a.file");
    let (tail, checkpoint) = (HiperFile::from_bytes(bytes, path), Checkpoint::from_bytes(bytes, path));
    for error in [tail.err(), checkpoint.err()].into_iter().flatten() {
        assert!(matches!(error, Error::File { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn noise_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..3) {
        let magic: &[u8] = [&b""[..], b"PK\x03\x04", b"\x80\x02"][kind as usize];
        read_as_everything(&[magic, &bytes].concat());
    }

    #[test]
    fn damage_is_answered(kind in 0..4, at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let mut bytes = match kind {
            0 => tail_bytes(),
            1 => checkpoint_bytes(),
            2 => torch_bytes("official"),
            _ => torch_bytes("view"),
        };
        let at = at.index(bytes.len());
        bytes[at] = byte;
        read_as_everything(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        read_as_everything(&bytes);
    }
}
