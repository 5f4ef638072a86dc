//! A tail on disk: the finished file, checkpoints, and the paper authors' own format.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::{Adam, AdamConfig, Error, GeneratorState, HiperEmbedding, Result, TorchGenerator};

/// What the metadata field `format` says.
const FORMAT: &str = "hiper-1";
/// The largest file read: a tail is some kilobytes, a `.pt` not much more.
const MAX_BYTES: u64 = 64 << 20;

/// Where a tail comes from; every field is optional, so that tails of other tools can be read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HiperMetadata {
    /// The checkpoint it was learned with: a path or a name.
    pub base_model: Option<String>,
    /// That checkpoint's fingerprint.
    pub base_model_hash: Option<String>,
    /// SHA-256 of the picture's file.
    pub image_hash: Option<String>,
    /// The source text.
    pub source_text: Option<String>,
    /// Steps taken.
    pub train_steps: Option<usize>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Seed of the random numbers.
    pub seed: Option<u64>,
    /// Loss of the last step.
    pub final_loss: Option<f64>,
}

/// A tail and where it comes from: `hiper.safetensors`, tensor `hiper` of `[N, D]` in f32.
#[derive(Debug, Clone)]
pub struct HiperFile {
    /// The tail.
    pub tail: HiperEmbedding,
    /// Where it comes from.
    pub metadata: HiperMetadata,
}

/// Everything that the next step depends on.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The tail.
    pub tail: HiperEmbedding,
    /// The optimiser.
    pub adam: Adam,
    /// The random numbers.
    pub generator: TorchGenerator,
    /// The loss of the last step.
    pub last_loss: Option<f64>,
}

impl HiperFile {
    /// Writes the file beside its place, then renames it.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full; an older file of the same name then stays.
    pub fn save(&self, path: &Path) -> Result<()> {
        let value = serde_json::to_value(&self.metadata).map_err(|e| invalid(path, "metadata", e))?;
        let mut metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("n_hiper".to_owned(), self.tail.n_hiper().to_string()),
            ("width".to_owned(), self.tail.width().to_string()),
        ]);
        for (key, value) in value.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            metadata.insert(key.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        write_tensors(path, &[("hiper", self.tail.tensor())], metadata)
    }

    /// Reads a tail: our own file, a checkpoint of ours, or the paper authors' `hiper_embeddings_step*.pt` (a tensor
    /// `[1, N, D]` or `[N, D]` saved by torch).
    ///
    /// # Errors
    /// When it is not one; the error says what is wrong with which field.
    pub fn load(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "pt" || e == "bin" || e == "pth") {
            return load_pt(path);
        }
        let bytes = read(path)?;
        let (tensors, text) = parse(path, &bytes)?;
        let tail =
            HiperEmbedding::new(tensor(path, &tensors, "hiper")?).map_err(|e| invalid(path, "hiper", e))?;
        // Numbers are stored as text, as safetensors metadata must be.
        let fields: serde_json::Map<String, serde_json::Value> = text
            .into_iter()
            .map(|(key, value)| {
                let number = matches!(key.as_str(), "train_steps" | "learning_rate" | "seed" | "final_loss");
                let json = if number { serde_json::from_str(&value).ok() } else { None };
                (key, json.unwrap_or(serde_json::Value::String(value)))
            })
            .collect();
        let metadata = serde_json::from_value(fields.into()).map_err(|e| invalid(path, "metadata", e))?;
        Ok(Self { tail, metadata })
    }
}

#[derive(Serialize, Deserialize)]
struct CheckpointState {
    adam: AdamConfig,
    steps: usize,
    generator: GeneratorState,
    /// Bits of the loss: text would round it.
    last_loss: Option<u64>,
}

impl Checkpoint {
    /// Writes the file beside its place, then renames it. It holds the tail as `hiper`, so that every tool that reads a
    /// tail reads a checkpoint.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full.
    pub fn save(&self, path: &Path) -> Result<()> {
        let state = CheckpointState {
            adam: self.adam.config,
            steps: self.adam.steps,
            generator: self.generator.state(),
            last_loss: self.last_loss.map(f64::to_bits),
        };
        let state = serde_json::to_string(&state).map_err(|e| invalid(path, "state", e))?;
        let shape = (self.tail.n_hiper(), self.tail.width());
        let moment = |values: &[f32]| Tensor::from_slice(values, shape, &Device::Cpu);
        let tensors = [
            ("adam.first_moment", &moment(&self.adam.first_moment)?),
            ("adam.second_moment", &moment(&self.adam.second_moment)?),
            ("hiper", self.tail.tensor()),
        ];
        write_tensors(
            path,
            &tensors,
            HashMap::from([("format".to_owned(), FORMAT.to_owned()), ("state".to_owned(), state)]),
        )
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// When it is not one, or is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let (tensors, metadata) = parse(path, &bytes)?;
        let Some(state) = metadata.get("state") else {
            return Err(invalid(path, "state", "missing: this is a finished tail, not a checkpoint"));
        };
        let state: CheckpointState = serde_json::from_str(state).map_err(|e| invalid(path, "state", e))?;
        let tail =
            HiperEmbedding::new(tensor(path, &tensors, "hiper")?).map_err(|e| invalid(path, "hiper", e))?;
        let moment = |name: &str| -> Result<Vec<f32>> {
            let moment = tensor(path, &tensors, name)?;
            if moment.dims() != tail.tensor().dims() {
                return Err(invalid(
                    path,
                    name,
                    format!("shape {:?}, the tail's is {:?}", moment.dims(), tail.tensor().dims()),
                ));
            }
            Ok(moment.flatten_all()?.to_vec1()?)
        };
        let (first_moment, second_moment) = (moment("adam.first_moment")?, moment("adam.second_moment")?);
        let adam = Adam { config: state.adam, first_moment, second_moment, steps: state.steps };
        let generator = TorchGenerator::from_state(state.generator)
            .ok_or_else(|| invalid(path, "state", "generator is malformed"))?;
        Ok(Self { tail, adam, generator, last_loss: state.last_loss.map(f64::from_bits) })
    }
}

/// Writes a composed conditioning `[1, T, D]` for other tools, as tensor `encoder_hidden_states` in f32: what diffusers takes
/// as `prompt_embeds`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_conditioning(path: &Path, conditioning: &Tensor) -> Result<()> {
    write_tensors(path, &[("encoder_hidden_states", conditioning)], HashMap::new())
}

/// Writes `content` to a temporary file in the same folder, flushes it to the disk, and renames it into place: a reader sees
/// the old file or the new one, never a part.
///
/// # Errors
/// When the folder cannot be written or the disk is full; nothing is left behind.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let io = |action| move |source| Error::Io { file: path.display().to_string(), action, source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut beside = tempfile::Builder::new()
        .prefix(".hiper-")
        .tempfile_in(folder)
        .map_err(io("cannot create a file in its folder"))?;
    beside.write_all(content).map_err(io("cannot write"))?;
    beside.as_file().sync_all().map_err(io("cannot write"))?;
    beside.persist(path).map_err(|e| io("cannot rename into place")(e.error))?;
    Ok(())
}

fn invalid(path: &Path, field: &str, reason: impl std::fmt::Display) -> Error {
    Error::File { file: path.display().to_string(), field: field.into(), reason: reason.to_string() }
}

fn write_tensors(path: &Path, tensors: &[(&str, &Tensor)], metadata: HashMap<String, String>) -> Result<()> {
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let values: Vec<f32> =
            tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        data.push((*name, tensor.dims().to_vec(), bytes));
    }
    let views: Vec<(&str, TensorView<'_>)> = data
        .iter()
        .map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<std::result::Result<_, safetensors::SafeTensorError>>()
        .map_err(|e| invalid(path, "tensors", e))?;
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| invalid(path, "tensors", e))?;
    write_atomically(path, &bytes)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::Io { file: path.display().to_string(), action: "cannot read", source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_BYTES {
        return Err(invalid(
            path,
            "size",
            format!("{size} bytes; a tail has some kilobytes: is this a checkpoint of a model?"),
        ));
    }
    std::fs::read(path).map_err(io)
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(SafeTensors<'a>, HashMap<String, String>)> {
    let malformed = |e| invalid(path, "header", format!("not a complete safetensors file ({e})"));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    Ok((SafeTensors::deserialize(bytes).map_err(malformed)?, metadata.metadata().clone().unwrap_or_default()))
}

fn tensor(path: &Path, tensors: &SafeTensors<'_>, name: &str) -> Result<Tensor> {
    let view = tensors.tensor(name).map_err(|_| {
        let names = tensors.names().join(", ");
        invalid(
            path,
            name,
            format!("no such tensor; the file has: {names}. A tail of HiPer is a tensor named hiper"),
        )
    })?;
    if view.dtype() != Dtype::F32 {
        return Err(invalid(path, name, format!("stored as {:?}, must be F32", view.dtype())));
    }
    let values: Vec<f32> = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    finite(path, name, &values)?;
    Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
}

fn finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    if values.iter().all(|v| v.is_finite()) {
        Ok(())
    } else {
        Err(invalid(path, name, "holds NaN or infinity"))
    }
}

/// The paper authors' format: one tensor, saved by `torch.save`.
fn load_pt(path: &Path) -> Result<HiperFile> {
    read(path)?;
    let malformed = |e: &dyn std::fmt::Display| {
        invalid(path, "tensor", format!("not a tensor saved by torch.save ({e})"))
    };
    let tensor = read_pt_tensor(path).map_err(|e| malformed(&e))?;
    let tensor = tensor.to_dtype(DType::F32).map_err(|e| malformed(&e))?;
    let tail = match tensor.dims() {
        [1, _, _] => tensor.squeeze(0)?,
        _ => tensor,
    };
    finite(path, "tensor", &tail.flatten_all()?.to_vec1::<f32>()?)?;
    let tail = HiperEmbedding::new(tail.contiguous()?).map_err(|e| invalid(path, "tensor", e))?;
    Ok(HiperFile { tail, metadata: HiperMetadata::default() })
}

/// candle reads dictionaries of tensors; a file that is one bare tensor is a pickle whose top object is that tensor.
fn read_pt_tensor(path: &Path) -> candle_core::Result<Tensor> {
    let tensors = candle_core::pickle::read_all(path)?;
    match tensors.into_iter().next() {
        Some((_, tensor)) => Ok(tensor),
        None => candle_core::bail!("no tensor in it"),
    }
}
