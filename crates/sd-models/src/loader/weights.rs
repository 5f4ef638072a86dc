//! The tensors of one component, checked as they are handed out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};

use super::ModelFiles;
use super::model_files::Bytes;
use crate::{Error, Result};

/// The weights of one component (`unet`, `vae`, `text_encoder`): safetensors files, mapped, in f32, f16 or bf16.
///
/// A tensor is checked when it is asked for: its shape against what the configuration says, and its values for NaN and
/// infinity. It is handed out as `f32`.
#[derive(Clone)]
pub struct Weights {
    files: Arc<Vec<File>>,
    /// Which file holds each tensor.
    index: Arc<HashMap<String, usize>>,
    device: Device,
    prefix: String,
}

struct File {
    name: String,
    bytes: Bytes,
    metadata: Metadata,
    /// Where the data begins.
    start: usize,
}

/// Paths of the component's weight files, in the order of preference of diffusers: full precision, then `fp16`.
pub(super) fn weight_files(files: &ModelFiles, component: &str) -> Result<Vec<String>> {
    let stem = if component == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    for variant in ["", ".fp16"] {
        let single = format!("{component}/{stem}{variant}.safetensors");
        if files.exists(&single) {
            return Ok(vec![single]);
        }
        let index = format!("{component}/{stem}.safetensors.index{variant}.json");
        if files.exists(&index) {
            #[derive(serde::Deserialize)]
            struct Index {
                weight_map: BTreeMap<String, String>,
            }
            let Index { weight_map } = files.read_config(&index)?;
            let mut shards: Vec<String> = weight_map.into_values().collect();
            shards.sort();
            shards.dedup();
            return Ok(shards.into_iter().map(|shard| format!("{component}/{shard}")).collect());
        }
    }
    Err(Error::MissingFile {
        file: files.path_of(&format!("{component}/{stem}.safetensors")),
        remedy: "only safetensors weights are read; save the model with safe_serialization=True".into(),
    })
}

impl Weights {
    /// Maps the weights of `component`. Tensors will be created on `device`.
    ///
    /// # Errors
    /// When a file is missing, truncated, or not safetensors.
    pub fn load(files: &ModelFiles, component: &str, device: &Device) -> Result<Self> {
        let mut loaded = Vec::new();
        let mut index = HashMap::new();
        for path in weight_files(files, component)? {
            let (name, bytes) = (files.path_of(&path), files.read(&path)?);
            let malformed = |e: safetensors::SafeTensorError| Error::Malformed {
                file: name.clone(),
                reason: describe(&e),
            };
            let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).map_err(malformed)?;
            let start = header + 8;
            let end = metadata.tensors().values().map(|t| t.data_offsets.1).max().unwrap_or(0);
            if start + end != bytes.len() {
                let reason = format!("holds {} bytes where its header says {}", bytes.len(), start + end);
                return Err(Error::Malformed { file: name, reason });
            }
            index.extend(metadata.tensors().into_keys().map(|tensor| (tensor, loaded.len())));
            loaded.push(File { name, bytes, metadata, start });
        }
        Ok(Self {
            files: Arc::new(loaded),
            index: Arc::new(index),
            device: device.clone(),
            prefix: String::new(),
        })
    }

    /// The tensors below `name`: `weights.pp("conv1").get("weight", ..)` is `conv1.weight`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// The device of the tensors handed out.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(&format!("{}{name}", self.prefix))
    }

    /// Names, types and shapes of all tensors, sorted by name.
    pub fn tensors(&self) -> Vec<(String, String, Vec<usize>)> {
        let all = self.files.iter().flat_map(|file| file.metadata.tensors());
        let mut list: Vec<_> =
            all.map(|(name, info)| (name, format!("{:?}", info.dtype), info.shape.clone())).collect();
        list.sort();
        list
    }

    /// The tensor `name` as `f32`, of exactly this shape.
    ///
    /// # Errors
    /// When it is missing, has another shape or type, or holds NaN or infinity.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let field = format!("{}{name}", self.prefix);
        let Some(&file) = self.index.get(&field) else {
            let file = self.files.first().map_or_else(String::new, |f| f.name.clone());
            return Err(Error::MissingTensor { file, field });
        };
        let file = &self.files[file];
        let Some(info) = file.metadata.info(&field) else {
            return Err(Error::MissingTensor { file: file.name.clone(), field });
        };
        if info.shape != shape {
            let (expected, got) = (shape.to_vec(), info.shape.clone());
            return Err(Error::TensorShape { file: file.name.clone(), field, expected, got });
        }
        let data = &file.bytes[file.start + info.data_offsets.0..file.start + info.data_offsets.1];
        let values: Vec<f32> = match info.dtype {
            Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => {
                return Err(Error::TensorDType { file: file.name.clone(), field, got: format!("{other:?}") });
            }
        };
        // 0 · x is NaN exactly for NaN and infinity, and this sum vectorises where a search would not.
        if values.chunks(64).any(|chunk| chunk.iter().fold(0f32, |sum, x| sum + x * 0.0) != 0.0) {
            return Err(Error::NotFinite { file: file.name.clone(), field });
        }
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }
}

fn describe(error: &safetensors::SafeTensorError) -> String {
    match error {
        safetensors::SafeTensorError::HeaderTooSmall => "too short to be a safetensors file".into(),
        safetensors::SafeTensorError::InvalidHeaderLength => "truncated: shorter than its header".into(),
        safetensors::SafeTensorError::MetadataIncompleteBuffer => {
            "truncated: its data does not match its header".into()
        }
        other => format!("not a valid safetensors file ({other})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    /// A folder with `unet/diffusion_pytorch_model.safetensors` holding `bytes`.
    fn weights(bytes: &[u8]) -> (tempfile::TempDir, Result<Weights>) {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "tokenizer/vocab.json",
            "scheduler/scheduler_config.json",
        ] {
            std::fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(file), "{}").unwrap();
        }
        std::fs::write(dir.path().join("unet/diffusion_pytorch_model.safetensors"), bytes).unwrap();
        let files = ModelFiles::from_dir(dir.path()).unwrap();
        let weights = Weights::load(&files, "unet", &Device::Cpu);
        (dir, weights)
    }

    fn file(dtype: Dtype, shape: Vec<usize>, data: &[u8]) -> Vec<u8> {
        safetensors::serialize([("a.weight", TensorView::new(dtype, shape, data).unwrap())], None).unwrap()
    }

    #[test]
    fn every_float_type_is_widened() {
        let f32s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        for (dtype, data) in [(Dtype::F32, f32s), (Dtype::F16, f16s), (Dtype::BF16, bf16s)] {
            let (_dir, weights) = weights(&file(dtype, vec![2], &data));
            let tensor = weights.unwrap().pp("a").get("weight", &[2]).unwrap();
            assert_eq!(tensor.to_vec1::<f32>().unwrap(), [1.5, -2.0]);
        }
    }

    #[test]
    fn wrong_tensors_are_named() {
        let bytes = file(Dtype::F32, vec![2], &[0; 8]);
        let weights = weights(&bytes).1.unwrap();
        let error = weights.get("a.weight", &[3]).unwrap_err().to_string();
        assert!(error.contains("a.weight has shape [2], config.json asks for [3]"), "{error}");
        assert!(matches!(weights.get("b", &[2]), Err(Error::MissingTensor { .. })));
    }

    #[test]
    fn nan_infinity_and_foreign_types_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let data: Vec<u8> = [1.0, bad].iter().flat_map(|v| v.to_le_bytes()).collect();
            let weights = weights(&file(Dtype::F32, vec![2], &data)).1.unwrap();
            assert!(matches!(weights.get("a.weight", &[2]), Err(Error::NotFinite { .. })));
        }
        let weights = weights(&file(Dtype::I64, vec![1], &[0; 8])).1.unwrap();
        assert!(matches!(weights.get("a.weight", &[1]), Err(Error::TensorDType { .. })));
    }

    #[test]
    fn hostile_files_are_refused() {
        let good = file(Dtype::F32, vec![2], &[0; 8]);
        for end in [0, 4, 8, 20, good.len() - 1] {
            assert!(matches!(weights(&good[..end]).1, Err(Error::Malformed { .. })), "cut at {end}");
        }
        let mut huge_header = good.clone();
        huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(weights(&huge_header).1, Err(Error::Malformed { .. })));
        let mut trailing = good;
        trailing.push(0);
        assert!(matches!(weights(&trailing).1, Err(Error::Malformed { .. })));
    }
}
