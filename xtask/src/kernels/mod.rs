//! `cargo xtask kernels`: compiles every CUDA kernel, without a card, and checks what it takes of a multiprocessor.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a table is what was asked for")]

mod compile;
mod ptx;
mod ptxas;
pub mod toolkit;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use crate::bench::table::aligned;
use crate::folders;
use compile::{Compiled, Compiler};
use ptx::Bounds;
use ptxas::Usage;

#[derive(clap::Args)]
pub struct Args {
    /// Fail where there is no nvcc, instead of fetching one from PyPI
    #[arg(long)]
    offline: bool,
}

/// Compiles what has changed to `target/kernels/*.fatbin`, and prints each kernel's registers.
///
/// # Errors
/// When there is no compiler, a file does not compile, or a kernel spills registers or does not fit its launch bounds.
pub fn run(args: &Args) -> Result<()> {
    let (root, target) = (folders::workspace(), folders::target());
    let compiler = Compiler {
        nvcc: toolkit::nvcc(&target.join("nvcc"), args.offline)?,
        out: target.join("kernels"),
        headers: files(&root.join("kernels"), "cuh")?,
    };
    std::fs::create_dir_all(&compiler.out).with_context(|| compiler.out.display().to_string())?;
    let compiled: Vec<Compiled> = files(&root.join("kernels"), "cu")?
        .par_iter()
        .map(|source| compiler.compile(source))
        .collect::<Result<_>>()?;

    let mut rows = Vec::new();
    let mut faults = Vec::new();
    for file in &compiled {
        let usages = ptxas::usages(&file.messages);
        let bounds = ptx::bounds(&file.ptx);
        faults.extend(faults_of(&usages, &bounds));
        faults.extend(ptxas::warnings(&file.messages).map(|line| format!("{}: {line}", file.name)));
        rows.extend(bounds.iter().map(|bounds| row(&file.name, bounds, &usages)));
    }
    println!("{}", aligned(&HEADING.map(String::from), &rows));
    let fresh = compiled.iter().filter(|file| file.fresh).count();
    eprintln!(
        "{} kernels in {}; {fresh} of {} files compiled by {}",
        rows.len(),
        compiler.out.display(),
        compiled.len(),
        compiler.nvcc.display()
    );
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

const HEADING: [&str; 6] =
    ["file", "kernel", "threads, blocks", "registers (8.0 / 9.0)", "static shared", "spilled"];

fn row(file: &str, bounds: &Bounds, usages: &[Usage]) -> Vec<String> {
    let of = |number: fn(&Usage) -> u32| {
        let numbers = usages.iter().filter(|usage| usage.kernel == bounds.kernel).map(number);
        numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" / ")
    };
    vec![
        file.into(),
        bounds.kernel.clone(),
        format!("{}, {}", bounds.threads, bounds.blocks),
        of(|usage| usage.registers),
        of(|usage| usage.shared_bytes),
        of(|usage| usage.spilled_bytes),
    ]
}

/// What is wrong with a file's kernels.
fn faults_of(usages: &[Usage], bounds: &[Bounds]) -> Vec<String> {
    let mut faults = Vec::new();
    for Bounds { kernel, threads, .. } in bounds.iter().filter(|bounds| bounds.registers().is_none()) {
        faults.push(format!("{kernel}: {threads} threads to a block are more than a card takes"));
    }
    for Usage { kernel, architecture, registers, spilled_bytes, .. } in usages {
        if *spilled_bytes > 0 {
            faults.push(format!("{kernel} spills {spilled_bytes} bytes of registers for {architecture}"));
        }
        match bounds.iter().find(|bounds| bounds.kernel == *kernel) {
            None => faults.push(format!("{kernel}: no launch bounds; define it with KERNEL")),
            Some(bounds) => match bounds.registers() {
                Some(allowed) if *registers > allowed => faults.push(format!(
                    "{kernel} takes {registers} registers for {architecture}; {} blocks of {} threads leave {allowed}",
                    bounds.blocks, bounds.threads
                )),
                _ => {}
            },
        }
    }
    faults
}

/// A folder's files with an extension, in order.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|own| own == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(registers: u32, spilled_bytes: u32) -> Usage {
        Usage { kernel: "k".into(), architecture: "sm_80".into(), registers, shared_bytes: 0, spilled_bytes }
    }

    #[test]
    fn spills_and_too_many_registers_are_faults() {
        let bounds = [Bounds { kernel: "k".into(), threads: 256, blocks: 4 }];
        assert!(faults_of(&[usage(64, 0)], &bounds).is_empty());
        let faults = |usage| faults_of(&[usage], &bounds).join("");
        assert_eq!(faults(usage(64, 8)), "k spills 8 bytes of registers for sm_80");
        assert_eq!(faults(usage(65, 0)), "k takes 65 registers for sm_80; 4 blocks of 256 threads leave 64");
        assert!(faults_of(&[usage(64, 0)], &[]).join("").contains("no launch bounds"));
        let wide = [Bounds { kernel: "k".into(), threads: 2048, blocks: 1 }];
        assert!(faults_of(&[usage(8, 0)], &wide).join("").contains("2048 threads"));
    }

    #[test]
    fn a_row_has_both_architectures() {
        let bounds = Bounds { kernel: "k".into(), threads: 128, blocks: 2 };
        let usages = [usage(40, 0), Usage { architecture: "sm_90".into(), ..usage(48, 0) }];
        assert_eq!(row("file", &bounds, &usages), ["file", "k", "128, 2", "40 / 48", "0 / 0", "0 / 0"]);
    }
}
