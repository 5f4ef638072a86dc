//! Tensors and metadata in a safetensors file.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::{COPY_AGAIN, FileName, GIVE_A_TAIL};
use crate::{HiperEmbedding, Result};

/// A small safetensors file in memory. Writing is deterministic: tensors and metadata are sorted by name.
#[derive(Default)]
pub struct TensorFile {
    tensors: BTreeMap<String, Entry>,
    /// `__metadata__`: text by name.
    pub metadata: BTreeMap<String, String>,
}

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl TensorFile {
    /// Adds a tensor, as `f32`.
    pub fn push(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let values: Vec<f32> =
            tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.insert(name, Dtype::F32, tensor.dims(), data);
        Ok(())
    }

    /// Adds a list of words.
    pub fn push_words(&mut self, name: &str, words: &[u32]) {
        self.insert(name, Dtype::U32, &[words.len()], words.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    fn insert(&mut self, name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) {
        self.tensors.insert(name.to_owned(), Entry { dtype, shape: shape.to_vec(), data });
    }

    /// The file's bytes: the length of the header, the header in JSON, the tensors.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".into(), serde_json::json!(self.metadata));
        }
        let mut offset = 0;
        for (name, Entry { dtype, shape, data }) in &self.tensors {
            let offsets = [offset, offset + data.len()];
            header.insert(
                name.clone(),
                serde_json::json!({ "dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": offsets }),
            );
            offset += data.len();
        }
        let mut header = serde_json::Value::Object(header).to_string();
        // The tensors begin at a multiple of eight bytes.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        self.tensors.values().for_each(|entry| bytes.extend_from_slice(&entry.data));
        bytes
    }

    /// Reads a file.
    pub fn from_bytes(bytes: &[u8], file: FileName<'_>) -> Result<Self> {
        let malformed =
            |e| file.error("header", "a complete safetensors file", format!("“{e}”"), GIVE_A_TAIL);
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(malformed)?;
        let entry = |view: TensorView<'_>| Entry {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        };
        Ok(Self {
            tensors: tensors.iter().map(|(name, view)| (name.to_owned(), entry(view))).collect(),
            metadata: header.metadata().clone().unwrap_or_default().into_iter().collect(),
        })
    }

    /// The tensor `hiper`, `[N, D]`.
    pub fn tail(&self, file: FileName<'_>) -> Result<HiperEmbedding> {
        let tail = self.tensor("hiper", file)?;
        let got = format!("shape {:?}", tail.dims());
        HiperEmbedding::new(tail).map_err(|_| file.error("hiper", "shape [N, D]", got, GIVE_A_TAIL))
    }

    /// A tensor of finite `f32`.
    pub fn tensor(&self, name: &str, file: FileName<'_>) -> Result<Tensor> {
        let Entry { shape, data, .. } = self.get(name, Dtype::F32, file)?;
        let values: Vec<f32> = data.as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
        if values.iter().any(|v| !v.is_finite()) {
            return Err(file.error(name, "finite values", "NaN or infinity", COPY_AGAIN));
        }
        Ok(Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?)
    }

    /// A list of words.
    pub fn words(&self, name: &str, file: FileName<'_>) -> Result<Vec<u32>> {
        let data = &self.get(name, Dtype::U32, file)?.data;
        Ok(data.as_chunks().0.iter().map(|&v| u32::from_le_bytes(v)).collect())
    }

    fn get(&self, name: &str, dtype: Dtype, file: FileName<'_>) -> Result<&Entry> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(file.error(name, "a tensor of this name", self.names(), GIVE_A_TAIL));
        };
        if entry.dtype != dtype {
            let (expected, got) = (format!("type {dtype:?}"), format!("{:?}", entry.dtype));
            return Err(file.error(name, expected, got, "convert it, or make it again"));
        }
        Ok(entry)
    }

    /// The first few names, for an error.
    fn names(&self) -> String {
        let first: Vec<&str> = self.tensors.keys().take(3).map(String::as_str).collect();
        match self.tensors.len() {
            0 => "no tensors".into(),
            n if n > first.len() => format!("{} and {} more", first.join(", "), n - first.len()),
            _ => first.join(", "),
        }
    }
}
