//! What tests of several parts need.
#![allow(clippy::unwrap_used)]

/// A checkpoint folder with every file that [`sd_models::ModelFiles::from_dir`] asks for, each an empty object.
pub fn empty_checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ] {
        write(&dir, file, b"{}");
    }
    dir
}

/// Writes a file of the checkpoint.
pub fn write(dir: &tempfile::TempDir, file: &str, content: &[u8]) {
    let path = dir.path().join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}
