//! Compiles every `kernels/*.cu` as C++, behind the shim.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    // Asked for when it runs: a target directory may have moved since this was compiled.
    let host = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let kernels = host.join("..");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let mut sources: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(&kernels)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-xc++")
        .flag("-Wno-unknown-pragmas")
        // Registers are compared as numbers: no fused or reordered sums that a card would not make.
        .flag("-ffp-contract=off")
        // A fiber leaves by longjmp to a stack above its own, which the fortified longjmp takes for an error.
        .flag("-U_FORTIFY_SOURCE")
        .include(&kernels)
        .files(sources)
        .files(["shim.cpp", "probes.cu"].map(|name| host.join(name)))
        // Nothing refers to a kernel by symbol: they register themselves.
        .link_lib_modifier("+whole-archive")
        .try_compile("host_kernels")?;
    Ok(())
}
