//! `cargo xtask test`: the tests of operators and networks on a card instead of on kernels that the CPU runs; or on the CPU, with
//! a sanitizer that watches the kernels.

use anyhow::{Result, bail};

use super::{Cargo, device, stand_in};
use crate::folders;

#[derive(clap::Args)]
pub struct Args {
    /// On this machine's first NVIDIA card; `cargo test` tests the rest
    #[arg(long, required_unless_present = "sanitize")]
    gpu: bool,
    /// Fail where there is no card, instead of saying that the tests are skipped
    #[arg(long)]
    require_gpu: bool,
    /// On no card: with a driver that runs the kernels on the CPU and refuses what NVIDIA's refuses (kernels/driver)
    #[arg(long, conflicts_with = "require_gpu")]
    stand_in: bool,
    /// On the CPU, with the C++ compiler's sanitizer in the kernels
    #[arg(long, conflicts_with_all = ["gpu", "require_gpu", "stand_in"], value_name = "FOR")]
    sanitize: Option<Sanitizer>,
    /// With --sanitize the operators' tests too, whose launching code says what kernels are given: some minutes more, with thread
    /// twenty
    #[arg(long, requires = "sanitize")]
    operators: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Sanitizer {
    /// Memory that is not the kernel's, undefined arithmetic: what compute-sanitizer's memcheck finds
    Address,
    /// Races: what its racecheck finds
    Thread,
}

/// What runs on a card: every operator's tests, the demo model's, and those of the program, a recorded step among them.
pub const TESTS: [&str; 8] = [
    "--package=hiper-kernels",
    "--package=hiper-tests",
    "--package=hiper-cli",
    "--features=hiper-kernels/cuda,hiper-tests/cuda,hiper-cli/cuda",
    "--lib",
    "--bin=hiper",
    "--test=card",
    "--test=cuda",
];

/// The variable that names the card to the tests.
pub const DEVICE: (&str, &str) = ("HIPER_TEST_DEVICE", "cuda:0");

/// Builds the tests and runs them.
///
/// # Errors
/// When a test fails, or what was required is not there.
pub fn run(args: &Args) -> Result<()> {
    match args.sanitize {
        Some(sanitizer) => sanitize(sanitizer, args.operators),
        None => on_card(args),
    }
}

fn sanitize(sanitizer: Sanitizer, operators: bool) -> Result<()> {
    let mut tests = folders::cargo("test");
    tests.env("CARGO_TARGET_DIR", folders::target().join("sanitized"));
    let name = match sanitizer {
        Sanitizer::Address => "address",
        Sanitizer::Thread => "thread",
    };
    tests.args(["--package=host-kernels", "--lib", "--tests", "--no-fail-fast"]);
    if operators {
        tests.arg("--package=hiper-kernels");
    }
    let status = tests.env("HOST_KERNELS_SANITIZER", name).status()?;
    if !status.success() {
        bail!("the tests with a sanitizer: {status}");
    }
    Ok(())
}

fn on_card(args: &Args) -> Result<()> {
    let mut tests = if args.stand_in {
        let cargo = Cargo::stand_in();
        let mut tests = cargo.command("test");
        tests.env("LD_LIBRARY_PATH", stand_in::driver(&cargo)?);
        tests
    } else if device(args.require_gpu)? {
        Cargo::new()?.command("test")
    } else {
        return Ok(());
    };
    let status = tests.args(TESTS).arg("--no-fail-fast").env(DEVICE.0, DEVICE.1).status()?;
    if !status.success() {
        bail!("the tests on the card: {status}");
    }
    Ok(())
}
