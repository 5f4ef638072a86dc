//! Every network of two small checkpoints (the structures of SD 1.x and 2.x) against PyTorch.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use hiper_tests::{Golden, parity, tolerance};
use sd_models::ModelFiles;

fn check(name: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models");
    let files = ModelFiles::from_dir(fixtures.join(name)).unwrap();
    let golden = Golden::load(&fixtures.join(format!("{name}.golden.safetensors"))).unwrap();
    let errors = parity(&files, &golden).unwrap();
    assert_eq!(errors.len(), 8);
    for (part, error) in errors {
        assert!(error <= tolerance(part), "{name}, {part}: {error:e}");
    }
}

#[test]
fn sd1_structure_equals_pytorch() {
    check("sd1");
}

#[test]
fn sd2_structure_equals_pytorch() {
    check("sd2");
}
