//! Lists the embedded demo model's files, so that `src/demo_model.rs` can include them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=assets");
    let model = Path::new("assets/demo-model");
    let mut files = Vec::new();
    if std::env::var_os("CARGO_FEATURE_DEMO_MODEL").is_some() && model.is_dir() {
        list(model, &mut files)?;
    }
    files.sort();
    let mut table = String::new();
    if !files.is_empty() {
        // So that weights can be read where they are.
        table.push_str("#[repr(align(64))]\nstruct Aligned<T>(T);\n");
    }
    table.push_str("pub static FILES: &[(&str, &[u8])] = &[\n");
    for file in &files {
        let relative = file.strip_prefix(model)?.to_string_lossy().replace('\\', "/");
        writeln!(table, "    ({relative:?}, &Aligned(*{}).0),", included(file))?;
    }
    table.push_str("];\n");
    for (name, file) in [("PHOTO", "assets/demo-photo.png"), ("TEXTS", "assets/demo.json")] {
        let path = Path::new(file);
        let content = if files.is_empty() || !path.is_file() { "&[]".to_owned() } else { included(path) };
        writeln!(table, "pub static {name}: &[u8] = {content};")?;
    }
    std::fs::write(PathBuf::from(std::env::var("OUT_DIR")?).join("demo_model.rs"), table)?;
    Ok(())
}

/// A file of this crate, found where the crate is when it is compiled: its folder may have been moved since this ran.
fn included(file: &Path) -> String {
    let file = format!("/{}", file.display());
    format!("include_bytes!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {file:?}))")
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if path.extension().is_none_or(|extension| extension != "md") {
            files.push(path);
        }
    }
    Ok(())
}
