//! With the feature `cuda`: compiles `kernels/*.cu` to fatbins and lists them in a Rust file, and makes programs link without
//! CUDA's libraries.

mod nvcc;

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

/// Ampere (and Ada) and Hopper as they are; what comes after compiles Hopper's text when the program starts.
const CODE: &[&str] =
    &["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"];

/// What `*_sm90a.cu` is: Hopper's alone.
const HOPPER: &[&str] = &["arch=compute_90a,code=sm_90a"];

/// What candle asks the linker for. Their functions are in `src/gpu/cuda_driver.rs`.
const LIBRARIES: [&str; 6] = ["cuda", "cublas", "cublasLt", "cudart", "curand", "nvrtc"];

fn main() -> Result<(), Box<dyn Error>> {
    for source in ["build.rs", "nvcc.rs"] {
        println!("cargo:rerun-if-changed={source}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let nvcc = find_nvcc()?;
    let nvcc::Release([major, minor, _]) = nvcc::release(&nvcc)?;
    let folder = |name| std::env::var_os(name).map(PathBuf::from).ok_or(format!("{name} is not set"));
    let (kernels, out) = (folder("CARGO_MANIFEST_DIR")?.join("../../kernels"), folder("OUT_DIR")?);
    let mut list = format!(
        "pub(super) const TOOLKIT: i32 = {major}{minor:02}0;\npub(super) const FATBINS: &[(&str, &[u8])] = &[\n"
    );
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(&kernels)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            println!("cargo:rerun-if-changed={}", path.display());
        }
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    for source in sources {
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let fatbin = out.join(format!("{name}.fatbin"));
        let codes = if name.ends_with("_sm90a") { HOPPER } else { CODE };
        let codes = codes.iter().flat_map(|code| ["-gencode", code]);
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3"]).args(codes).arg("-o").arg(&fatbin).arg(&source);
        if !command.status().map_err(|error| format!("{}: {error}", nvcc.display()))?.success() {
            return Err(format!("{}: not compiled: {command:?}", source.display()).into());
        }
        list += &format!("    ({name:?}, include_bytes!({fatbin:?})),\n");
    }
    std::fs::write(out.join("fatbins.rs"), list + "];\n")?;
    for library in LIBRARIES {
        std::fs::write(out.join(format!("lib{library}.a")), "!<arch>\n")?;
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    Ok(())
}

/// `$NVCC`, or `nvcc` on the path, or of `$CUDA_HOME`.
fn find_nvcc() -> Result<PathBuf, Box<dyn Error>> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(nvcc) = variable("NVCC") {
        return Ok(nvcc.into());
    }
    let on_path = variable("PATH").unwrap_or_else(OsString::new);
    let folders = std::env::split_paths(&on_path)
        .chain(variable("CUDA_HOME").map(|home| PathBuf::from(home).join("bin")));
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        "the feature cuda needs nvcc: set NVCC or CUDA_HOME; `cargo xtask kernels` fetches one and says where it is".into()
    })
}
