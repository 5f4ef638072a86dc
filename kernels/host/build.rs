//! Compiles every `kernels/*.cu` as C++, behind the shim.

use std::error::Error;
use std::path::{Path, PathBuf};

const SANITIZER: &str = "HOST_KERNELS_SANITIZER";

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
    let sanitizer = Sanitizer::chosen()?;
    // The shim itself is no kernel: a sanitizer is told what it does, and does not watch it.
    build(&host, &sanitizer)
        .files(["shim.cpp", "warpgroup.cpp", "cluster.cpp"].map(|file| host.join(file)))
        .try_compile("host_shim")?;
    build(&host, &sanitizer)
        .flags(sanitizer.flags)
        .files(sources)
        .file(host.join("probes.cu"))
        // Nothing refers to a kernel by symbol: they register themselves.
        .link_lib_modifier("+whole-archive")
        .try_compile("host_kernels")?;
    sanitizer.link()?;
    Ok(())
}

fn build(host: &Path, sanitizer: &Sanitizer) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-xc++")
        .flag("-Wno-unknown-pragmas")
        // Registers are compared as numbers: no fused or reordered sums that a card would not make.
        .flag("-ffp-contract=off")
        // A fiber leaves by longjmp to a stack above its own, which the fortified longjmp takes for an error.
        .flag("-U_FORTIFY_SOURCE")
        .include(host.join(".."));
    if let Some(name) = sanitizer.name {
        build.define(name, None);
    }
    build
}

/// What watches kernels: sanitizers.hpp says what each finds.
struct Sanitizer {
    name: Option<&'static str>,
    flags: &'static [&'static str],
    libraries: &'static [&'static str],
}

impl Sanitizer {
    fn chosen() -> Result<Self, String> {
        println!("cargo:rerun-if-env-changed={SANITIZER}");
        let name = std::env::var(SANITIZER).unwrap_or_default();
        println!("cargo:rustc-env={SANITIZER}={name}");
        Ok(match name.as_str() {
            "" => Self { name: None, flags: &[], libraries: &[] },
            "address" => Self {
                name: Some("SANITIZE_ADDRESS"),
                flags: &["-g", "-fsanitize=address,undefined", "-fsanitize-recover=address"],
                libraries: &["asan", "ubsan"],
            },
            "thread" => Self {
                name: Some("SANITIZE_THREAD"),
                flags: &["-g", "-fsanitize=thread"],
                libraries: &["tsan"],
            },
            other => return Err(format!("{SANITIZER}={other}: address or thread")),
        })
    }

    /// Cargo links without what the compiler would add.
    fn link(&self) -> Result<(), Box<dyn Error>> {
        let compiler = cc::Build::new().cpp(true).try_get_compiler()?;
        for library in self.libraries {
            let asked = format!("-print-file-name=lib{library}.so");
            let said = String::from_utf8(compiler.to_command().arg(asked).output()?.stdout)?;
            let folder = Path::new(said.trim()).parent().ok_or("the compiler has no such library")?;
            println!("cargo:rustc-link-search=native={}", folder.display());
            println!("cargo:rustc-link-lib=dylib={library}");
        }
        Ok(())
    }
}
