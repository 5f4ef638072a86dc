//! The tensors of one component, checked as they are handed out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use hiper_kernels::{Memory, is_card};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};

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
    memory: Memory,
    dtype: DType,
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
            return shards(files, component, &index);
        }
    }
    Err(Error::MissingFile {
        file: files.path_of(&format!("{component}/{stem}.safetensors")),
        remedy: "weights are read from safetensors only: fetch them in that format, or save the model anew"
            .into(),
    })
}

/// The files that an index names.
fn shards(files: &ModelFiles, component: &str, index: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = files.read_config(index)?;
    let shards: BTreeSet<String> = weight_map.into_values().collect();
    let wrong = |reason: String| Err(Error::Malformed { file: files.path_of(index), reason });
    if shards.is_empty() {
        return wrong("weight_map names no file".into());
    }
    if let Some(shard) =
        shards.iter().find(|shard| shard.contains(['/', '\\', ':']) || shard.as_str() == "..")
    {
        return wrong(format!("weight_map names {shard:?}, which is not a file beside it"));
    }
    Ok(shards.into_iter().map(|shard| format!("{component}/{shard}")).collect())
}

/// Where the data of a safetensors file begins, as its first eight bytes say.
pub(super) fn data_start(bytes: &[u8]) -> usize {
    let length = bytes.first_chunk().map_or(0, |&length| u64::from_le_bytes(length));
    usize::try_from(length).unwrap_or(usize::MAX).saturating_add(8)
}

impl Weights {
    /// Maps the weights of `component`. Tensors will be created on `device`.
    ///
    /// # Errors
    /// When a file is missing, truncated, or not safetensors.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// let files = sd_models::ModelFiles::from_dir("stable-diffusion-v1-5")?;
    /// let weights = sd_models::Weights::load(&files, "unet", &candle_core::Device::Cpu)?;
    /// let conv_in = weights.pp("conv_in").get("weight", &[320, 4, 3, 3])?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn load(files: &ModelFiles, component: &str, device: &Device) -> Result<Self> {
        let mut loaded = Vec::new();
        let mut index = HashMap::new();
        for path in weight_files(files, component)? {
            let (name, bytes) = (files.path_of(&path), files.read(&path)?);
            let (_, metadata) = SafeTensors::read_metadata(&bytes)
                .map_err(|e| Error::Malformed { file: name.clone(), reason: describe(&e) })?;
            let start = data_start(&bytes);
            index.extend(metadata.tensors().into_keys().map(|tensor| (tensor, loaded.len())));
            loaded.push(File { name, bytes, metadata, start });
        }
        Ok(Self {
            files: Arc::new(loaded),
            index: Arc::new(index),
            device: device.clone(),
            memory: files.memory(),
            dtype: if is_card(device) { files.dtype() } else { DType::F32 },
            prefix: String::new(),
        })
    }

    /// What the network should save: see [`ModelFiles::with_memory`].
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// What the network computes in: see [`ModelFiles::with_dtype`].
    pub fn dtype(&self) -> DType {
        self.dtype
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
        self.read(name, shape, Memory::Fast)
    }

    /// A layer's matrix or kernels: as [`Weights::get`], but under [`Memory::Lean`] in the type that the file has, and on a card
    /// in the type that the network computes in.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn get_matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if !is_card(&self.device) {
            return self.read(name, shape, self.memory);
        }
        // As the file has it, half as large to send; the card converts it.
        Ok(self.read(name, shape, Memory::Lean)?.to_dtype(self.dtype)?)
    }

    /// Says that all has been read. What was around a tensor's pages may have come into this process's memory with them.
    pub(crate) fn release(&self) {
        self.files.iter().for_each(|file| file.bytes.release(0..file.bytes.len()));
    }

    fn read(&self, name: &str, shape: &[usize], memory: Memory) -> Result<Tensor> {
        let field = format!("{}{name}", self.prefix);
        let Some((file, info)) = self.find(&field) else {
            let file = self.files.first().map_or_else(String::new, |file| file.name.clone());
            return Err(Error::MissingTensor { file, field });
        };
        let name = file.name.clone();
        if info.shape != shape {
            let (expected, got) = (shape.to_vec(), info.shape.clone());
            return Err(Error::TensorShape { file: name, field, expected, got });
        }
        let range = file.start + info.data_offsets.0..file.start + info.data_offsets.1;
        let data = &file.bytes[range.clone()];
        let device = &self.device;
        let tensor = match (info.dtype, memory) {
            (Dtype::F16, Memory::Lean) => decode(data, f16::from_le_bytes, f16::is_finite)
                .map(|values| Tensor::from_vec(values, shape, device)),
            (Dtype::BF16, Memory::Lean) => decode(data, bf16::from_le_bytes, bf16::is_finite)
                .map(|values| Tensor::from_vec(values, shape, device)),
            (Dtype::F32, _) => widen(data, f32::from_le_bytes, |from, to| to.copy_from_slice(from))
                .map(|values| Tensor::from_vec(values, shape, device)),
            (Dtype::F16, _) => widen(data, f16::from_le_bytes, |from, to| from.convert_to_f32_slice(to))
                .map(|values| Tensor::from_vec(values, shape, device)),
            (Dtype::BF16, _) => widen(data, bf16::from_le_bytes, |from, to| from.convert_to_f32_slice(to))
                .map(|values| Tensor::from_vec(values, shape, device)),
            (other, _) => return Err(Error::TensorDType { file: name, field, got: format!("{other:?}") }),
        };
        file.bytes.release(range);
        Ok(tensor.ok_or(Error::NotFinite { file: name, field })??)
    }

    fn find(&self, field: &str) -> Option<(&File, &TensorInfo)> {
        let file = self.files.get(*self.index.get(field)?)?;
        Some((file, file.metadata.info(field)?))
    }
}

/// Values a task of [`widen`] takes: enough to be worth one, few enough that small models use all cores.
const TASK: usize = 64 * 1024;

/// Little-endian numbers of `N` bytes as they are; none when one is NaN or infinite.
fn decode<T: Copy, const N: usize>(
    data: &[u8],
    decode: impl Fn([u8; N]) -> T,
    is_finite: impl Fn(T) -> bool,
) -> Option<Vec<T>> {
    let values: Vec<T> = data.as_chunks().0.iter().map(|&bytes| decode(bytes)).collect();
    // Not `all`: without an early end, the loop vectorises.
    values.iter().fold(true, |finite, &value| finite & is_finite(value)).then_some(values)
}

/// Little-endian numbers of `N` bytes as `f32`, on all cores; none when one is NaN or infinite.
fn widen<T: Copy + Default, const N: usize>(
    data: &[u8],
    decode: impl Fn([u8; N]) -> T + Sync,
    convert: impl Fn(&[T], &mut [f32]) + Sync,
) -> Option<Vec<f32>> {
    let numbers: &[[u8; N]] = data.as_chunks().0;
    // Zeroed by the system when first touched, which each task does for its own part.
    let mut values = vec![0.0; numbers.len()];
    let finite = values
        .par_chunks_mut(TASK)
        .zip(numbers.par_chunks(TASK))
        .all(|(values, numbers)| widen_part(numbers, values, &decode, &convert));
    finite.then_some(values)
}

/// One task of [`widen`]: whether all values are finite.
fn widen_part<T: Copy + Default, const N: usize>(
    numbers: &[[u8; N]],
    values: &mut [f32],
    decode: impl Fn([u8; N]) -> T,
    convert: impl Fn(&[T], &mut [f32]),
) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    // Blocks that stay in the first-level cache from decoding (the file need not be aligned) to the check.
    let mut decoded = [T::default(); 2048];
    for (numbers, values) in numbers.chunks(decoded.len()).zip(values.chunks_mut(decoded.len())) {
        let decoded = &mut decoded[..numbers.len()];
        for (value, &bytes) in decoded.iter_mut().zip(numbers) {
            *value = decode(bytes);
        }
        convert(decoded, values);
        // Branchless, so that it vectorises: all bits of the exponent are set in NaN and infinity alone.
        let special = |value: &f32| u32::from(value.to_bits() & EXPONENT == EXPONENT);
        if values.iter().fold(0, |any, value| any | special(value)) != 0 {
            return false;
        }
    }
    true
}

fn describe(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "truncated: too short for a safetensors file".into(),
        SafeTensorError::InvalidHeaderLength => "truncated: ends within its header".into(),
        SafeTensorError::MetadataIncompleteBuffer => {
            "truncated, or longer than it should be: its size is not what its header says".into()
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
    fn every_value_of_a_large_tensor_is_read_and_checked() {
        for count in [TASK - 1, TASK, TASK + 1, 2 * TASK + 2049] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 - 7.5).collect();
            let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
            let read = |values: &[f32]| {
                let (_dir, weights) = weights(&file(Dtype::F32, vec![count], &bytes(values)));
                weights.unwrap().get("a.weight", &[count]).map(|t| t.to_vec1::<f32>().unwrap())
            };
            assert!(read(&values).unwrap() == values, "{count}");
            for at in [0, count / 2, count - 1] {
                let mut values = values.clone();
                values[at] = f32::NAN;
                assert!(matches!(read(&values), Err(Error::NotFinite { .. })), "{at} of {count}");
            }
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
