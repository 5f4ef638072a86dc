//! `cargo xtask test --gpu`: the tests of operators and networks on a card instead of on kernels that the CPU runs.

use anyhow::{Result, bail};

use super::{Cargo, device, stand_in};

#[derive(clap::Args)]
pub struct Args {
    /// On this machine's first NVIDIA card; `cargo test` tests the rest
    #[arg(long, required = true)]
    gpu: bool,
    /// Fail where there is no card, instead of saying that the tests are skipped
    #[arg(long)]
    require_gpu: bool,
    /// On no card: with a driver that runs the kernels on the CPU and refuses what NVIDIA's refuses (kernels/driver)
    #[arg(long, conflicts_with = "require_gpu")]
    stand_in: bool,
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

/// Builds the tests and runs them on the card.
///
/// # Errors
/// When a test fails, or what was required is not there.
pub fn run(args: &Args) -> Result<()> {
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
