//! The crate against torch and diffusers (fixtures of `tools/fixtures/hiper_core.py`), and against hostile input.

#![allow(clippy::unwrap_used)]

mod arithmetic;
mod batch;
mod candle_transformers_unet;
mod files;
mod gradients;
mod hostile_files;
mod runs;
mod toy;
