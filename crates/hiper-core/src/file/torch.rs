//! A tail as the paper authors' code stores it: one tensor, `[1, N, D]` or `[N, D]`, written by `torch.save`.
//!
//! Such a file is a zip archive: `*/data.pkl` says which tensor it is, `*/data/0` holds its numbers. candle's reader knows
//! dictionaries of tensors only.

mod pickle;

use std::io::{Cursor, Read};

use candle_core::{DType, Device, Tensor};
use zip::ZipArchive;

use super::{COPY_AGAIN, FileName, GIVE_A_TAIL, MAX_BYTES};
use crate::{HiperEmbedding, Result};
use pickle::TensorRecord;

/// What a zip archive begins with.
const ZIP: &[u8] = b"PK\x03\x04";
/// What torch before 1.6 began its files with: a pickle of protocol 2.
const LEGACY: &[u8] = b"\x80\x02";

/// Whether a file's first bytes are those of a file of torch.
pub fn is_torch_file(bytes: &[u8]) -> bool {
    bytes.starts_with(ZIP) || bytes.starts_with(LEGACY)
}

/// Reads the tail.
pub fn read_tail(bytes: &[u8], file: FileName<'_>) -> Result<HiperEmbedding> {
    if bytes.starts_with(LEGACY) {
        let remedy = "load and save it again with a newer torch";
        return Err(file.error("format", "the zip format of torch 1.6 and later", "an older one", remedy));
    }
    let damaged = |e: String| file.error("archive", "a zip archive of torch.save", e, COPY_AGAIN);
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| damaged(format!("“{e}”")))?;
    let mut entry = |name: &str| -> Result<Vec<u8>> {
        let mut data = Vec::new();
        let entry = archive.by_name(name).map_err(|e| damaged(format!("“{e}” for {name}")))?;
        entry.take(MAX_BYTES).read_to_end(&mut data).map_err(|e| damaged(format!("“{e}” for {name}")))?;
        Ok(data)
    };
    let root = root_folder(bytes).ok_or_else(|| damaged("none with a data.pkl in it".into()))?;
    let record = pickle::parse(&entry(&format!("{root}/data.pkl"))?)
        .map_err(|got| file.error("data.pkl", "one tensor saved by torch.save", got, GIVE_A_TAIL))?;
    if entry(&format!("{root}/byteorder")).is_ok_and(|order| order != b"little") {
        return Err(file.error("byteorder", "little", "another", "save it again on another machine"));
    }
    let (shape, data) = gather(&record, &entry(&format!("{root}/data/{}", record.storage))?, file)?;
    let tail = Tensor::from_raw_buffer(&data, record.dtype, &shape, &Device::Cpu)?.to_dtype(DType::F32)?;
    if tail.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| !v.is_finite()) {
        return Err(file.error("tensor", "finite values", "NaN or infinity", GIVE_A_TAIL));
    }
    HiperEmbedding::new(tail)
}

/// The folder that everything in the archive lies in.
fn root_folder(bytes: &[u8]) -> Option<String> {
    let archive = ZipArchive::new(Cursor::new(bytes)).ok()?;
    archive.file_names().flatten().find_map(|name| Some(name.strip_suffix("/data.pkl")?.to_owned()))
}

/// The shape `[N, D]` and the numbers in their order; in the storage they may lie otherwise, among others.
fn gather(record: &TensorRecord, storage: &[u8], file: FileName<'_>) -> Result<([usize; 2], Vec<u8>)> {
    let (shape, strides) = match (&record.size[..], &record.strides[..]) {
        (&[1, n, d], &[_, by_row, by_column]) | (&[n, d], &[by_row, by_column]) if n > 0 && d > 0 => {
            ([n, d], [by_row, by_column])
        }
        (size, _) => {
            return Err(file.error("tensor", "shape [1, N, D] or [N, D]", format!("{size:?}"), GIVE_A_TAIL));
        }
    };
    let width = record.dtype.size_in_bytes();
    let cut = || {
        let got = format!("a storage of {} bytes", storage.len());
        file.error("data", format!("the {shape:?} numbers of the tensor"), got, COPY_AGAIN)
    };
    let wanted = shape[0].checked_mul(shape[1]).and_then(|n| n.checked_mul(width)).ok_or_else(cut)?;
    if wanted > storage.len() {
        return Err(cut());
    }
    let mut data = Vec::with_capacity(wanted);
    for row in 0..shape[0] {
        for column in 0..shape[1] {
            let index = [(row, strides[0]), (column, strides[1])]
                .iter()
                .try_fold(record.offset, |sum, &(i, stride)| sum.checked_add(i.checked_mul(stride)?));
            let start = index.and_then(|index| index.checked_mul(width)).ok_or_else(cut)?;
            let number = start.checked_add(width).and_then(|end| storage.get(start..end)).ok_or_else(cut)?;
            data.extend_from_slice(number);
        }
    }
    Ok((shape, data))
}
