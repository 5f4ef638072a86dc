//! The kinds of values that flags take.

use std::ffi::OsString;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser};
use sd_models::schedulers::SchedulerKind;

use super::ValueEnum;

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best there is in this build.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA card, by number.
    Cuda(usize),
    /// An Apple GPU.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "cuda" => Self::Cuda(0),
            "metal" => Self::Metal,
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Self::Cuda(number),
                _ => return Err("expected auto, cpu, cuda, cuda:N or metal".into()),
            },
        })
    }
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeChoice {
    /// The device's best.
    Auto,
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Half precision with the range of single.
    Bf16,
}

/// `--memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Memory {
    /// By what is free.
    Auto,
    /// Save time.
    Fast,
    /// Save memory.
    Lean,
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one object a line.
    Json,
}

/// `--crop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Crop {
    /// The middle square.
    Center,
    /// A square anywhere, by the seed.
    Random,
    /// The whole photo.
    None,
}

/// More threads than any machine has cores for: starting a hundred thousand of them can take minutes, and all memory.
const MAX_THREADS: usize = 1024;

/// A sentence: UTF-8, with at least one visible character.
pub fn prompt() -> impl TypedValueParser<Value = String> {
    text().try_map(|text| if text.trim().is_empty() { Err("a sentence must not be empty") } else { Ok(text) })
}

/// A sentence that may be empty.
pub fn text() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new()
        .try_map(|text: OsString| text.into_string().map_err(|_| "a sentence must be valid UTF-8"))
}

/// A whole number from 1.
pub fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number from 1".into())
}

/// A number of threads.
pub fn threads(text: &str) -> Result<usize, String> {
    positive(text).ok().filter(|n| *n <= MAX_THREADS).ok_or_else(|| format!("expected 1 to {MAX_THREADS}"))
}

/// A learning rate.
pub fn rate(text: &str) -> Result<f64, String> {
    finite(text).filter(|rate| *rate > 0.0).ok_or_else(|| "expected a number above 0, such as 5e-3".into())
}

/// A scale.
pub fn strength(text: &str) -> Result<f64, String> {
    finite(text).filter(|s| *s >= 0.0).ok_or_else(|| "expected a number from 0".into())
}

fn finite(text: &str) -> Option<f64> {
    text.parse().ok().filter(|n: &f64| n.is_finite())
}

/// A scheduler's name.
pub fn scheduler(text: &str) -> Result<SchedulerKind, String> {
    text.parse()
        .map_err(|_| format!("expected one of {}", SchedulerKind::ALL.map(SchedulerKind::name).join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_and_numbered() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in ["cuda:", "cuda:x", "gpu", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert!(positive("0").is_err() && positive("-1").is_err() && positive("5") == Ok(5));
        assert!(
            rate("0").is_err() && rate("nan").is_err() && rate("inf").is_err() && rate("5e-3") == Ok(5e-3)
        );
        assert!(threads("0").is_err() && threads("1025").is_err() && threads("2") == Ok(2));
        assert!(strength("-1").is_err() && strength("0") == Ok(0.0));
    }
}
