//! The tensors of one component, checked as they are handed out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use hiper_kernels::{Memory, Weight, is_card};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors};

use super::ModelFiles;
use super::model_files::Bytes;
use crate::{Error, Result};

/// The weights of one component (`unet`, `vae`, `text_encoder`): safetensors files, mapped, in f32, f16 or bf16.
///
/// A tensor is checked when it is asked for: its shape against what the configuration says, and its values for NaN and
/// infinity. Small ones are handed out as `f32`; layers' matrices stay in the map where they can.
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

    /// Size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }

    /// The tensor `name` as `f32`, of exactly this shape.
    ///
    /// # Errors
    /// When it is missing, has another shape or type, or holds NaN or infinity.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.find(name, shape)?;
        let values = match found.dtype {
            DType::F16 => widen(found.data(), f16::from_le_bytes, |from, to| from.convert_to_f32_slice(to)),
            DType::BF16 => widen(found.data(), bf16::from_le_bytes, |from, to| from.convert_to_f32_slice(to)),
            _ => widen(found.data(), f32::from_le_bytes, |from, to| to.copy_from_slice(from)),
        };
        found.file.bytes.release(found.range);
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    /// A layer's matrix or kernels, in the type that the file has: a part of the mapped file. On a card, a copy in the type that
    /// the network computes in.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn get_matrix(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let found = self.find(name, shape)?;
        if is_card(&self.device) {
            // As the file has it, half as large to send; the card converts it.
            let tensor = Tensor::from_raw_buffer(found.data(), found.dtype, shape, &self.device)?;
            found.file.bytes.release(found.range);
            return Ok(tensor.to_dtype(self.dtype)?.into());
        }
        match Weight::in_place(found.file.bytes.shared(), found.range, found.dtype, shape) {
            Ok(weight) => Ok(weight),
            // Rare: a file whose numbers lie where the processor cannot read them.
            Err(_) => self.get(name, shape).map(Weight::from),
        }
    }

    /// A tensor of this shape, whose values have been checked.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let field = format!("{}{name}", self.prefix);
        let place = self.index.get(&field).and_then(|&file| self.files.get(file));
        let Some((file, info)) = place.and_then(|file| Some((file, file.metadata.info(&field)?))) else {
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
        // In NaN and infinity, and in them alone, all bits of the exponent are set.
        let (dtype, finite) = match info.dtype {
            Dtype::F32 => (DType::F32, no_bits_set(data, 0x7F80_0000, u32::from_le_bytes)),
            Dtype::F16 => (DType::F16, no_bits_set(data, 0x7C00, u16::from_le_bytes)),
            Dtype::BF16 => (DType::BF16, no_bits_set(data, 0x7F80, u16::from_le_bytes)),
            other => return Err(Error::TensorDType { file: name, field, got: format!("{other:?}") }),
        };
        if !finite {
            return Err(Error::NotFinite { file: name, field });
        }
        Ok(Found { file, range, dtype })
    }
}

/// Where a tensor is.
struct Found<'a> {
    file: &'a File,
    range: Range<usize>,
    dtype: DType,
}

impl Found<'_> {
    fn data(&self) -> &[u8] {
        &self.file.bytes[self.range.clone()]
    }
}

/// Values a task takes: enough to be worth one, few enough that small models use all cores.
const TASK: usize = 64 * 1024;

/// Whether no number of `N` bytes has all bits of `mask`.
fn no_bits_set<T, const N: usize>(data: &[u8], mask: T, decode: impl Fn([u8; N]) -> T + Sync) -> bool
where
    T: Copy + Sync + PartialEq + std::ops::BitAnd<Output = T>,
{
    data.as_chunks().0.par_chunks(TASK).all(|numbers| {
        // Not `any`: without an early end, the loop vectorises.
        !numbers.iter().fold(false, |any, &number| any | (decode(number) & mask == mask))
    })
}

/// Little-endian numbers of `N` bytes as `f32`, on all cores.
fn widen<T: Copy + Default, const N: usize>(
    data: &[u8],
    decode: impl Fn([u8; N]) -> T + Sync,
    convert: impl Fn(&[T], &mut [f32]) + Sync,
) -> Vec<f32> {
    let numbers: &[[u8; N]] = data.as_chunks().0;
    // Zeroed by the system when first touched, which each task does for its own part.
    let mut values = vec![0.0; numbers.len()];
    values.par_chunks_mut(TASK).zip(numbers.par_chunks(TASK)).for_each(|(values, numbers)| {
        // Blocks that stay in the first-level cache: the file need not be aligned.
        let mut decoded = [T::default(); 2048];
        for (numbers, values) in numbers.chunks(decoded.len()).zip(values.chunks_mut(decoded.len())) {
            let decoded = &mut decoded[..numbers.len()];
            for (value, &bytes) in decoded.iter_mut().zip(numbers) {
                *value = decode(bytes);
            }
            convert(decoded, values);
        }
    });
    values
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
    fn a_matrix_is_read_where_it_lies_or_copied_where_numbers_cannot_be() {
        let values = [1.5f32, -2.0, 0.25, 8.0];
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let aligned = file(Dtype::F32, vec![2, 2], &data);
        // One more space in the header, and no number is where an f32 can be.
        let mut shifted = aligned.clone();
        let end = data_start(&shifted);
        shifted.insert(end, b' ');
        shifted[..8].copy_from_slice(&(end as u64 - 7).to_le_bytes());
        for bytes in [aligned, shifted] {
            let (_dir, weights) = weights(&bytes);
            let matrix = weights.unwrap().pp("a").get_matrix("weight", &[2, 2]).unwrap();
            let x = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
            let y = hiper_kernels::Linear::new(matrix, None).unwrap().forward(&x).unwrap();
            assert_eq!(y.to_vec2::<f32>().unwrap(), [[1.5, 0.25], [-2.0, 8.0]]);
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
