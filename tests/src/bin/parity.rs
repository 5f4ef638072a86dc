//! A checkpoint against PyTorch's values, part by part:
//! `cargo run --release -p hiper-tests --bin parity -- CHECKPOINT GOLDEN.safetensors`.

#![allow(clippy::print_stdout)]

use std::path::Path;

use anyhow::{Result, bail, ensure};
use hiper_tests::{Golden, parity, tolerance};
use sd_models::ModelFiles;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [checkpoint, golden] = args.as_slice() else {
        bail!("usage: parity CHECKPOINT GOLDEN.safetensors (made by tools/fixtures/models.py)");
    };
    let mut too_large = Vec::new();
    for (part, error) in parity(&ModelFiles::from_dir(checkpoint)?, &Golden::load(Path::new(golden))?)? {
        println!("{part:32} {error:.2e}");
        if error.is_nan() || error > tolerance(part) {
            too_large.push(part);
        }
    }
    ensure!(too_large.is_empty(), "above the tolerance: {}", too_large.join(", "));
    Ok(())
}
