//! What a contributor does twice. `cargo xtask --help` lists it.

mod bench;
mod eval;
mod folders;
mod gpu;
mod kernels;
mod machine;
mod scenes;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: sd_models::AlignedAllocator = sd_models::AlignedAllocator;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What a contributor does twice")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure operators and whole steps; beside PyTorch and OpenVINO where $PEER_PYTHON has them
    Bench(bench::Args),
    /// Make a folder that tests and measures on a machine with a card and without Rust
    Bundle(gpu::bundle::Args),
    /// Measure the method on held-out subjects, against ground truth
    Eval(eval::Eval),
    /// Compile the CUDA kernels without a card, and check their registers
    Kernels(kernels::Args),
    /// Count what hiper would launch on a card and how much of its memory it would use, without one
    StandIn(gpu::stand_in::Args),
    /// Test operators and networks on a card
    Test(gpu::test::Args),
    /// Draw scenes for the demo model's training
    Scenes {
        /// Folder for images.u8, silhouettes.u8 and scenes.jsonl
        #[arg(long, required_unless_present = "sheet")]
        out: Option<PathBuf>,
        /// How many scenes
        #[arg(long, default_value_t = 1000)]
        count: u64,
        /// Width and height in pixels
        #[arg(long, default_value_t = 64)]
        size: u32,
        /// Scene i has the seed SEED + i
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Draw each subject in every pose on every background
        #[arg(long)]
        every_view: bool,
        /// Also draw the first 60 as one PNG
        #[arg(long)]
        sheet: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    match Args::parse().task {
        Task::Bench(args) => bench::run(&args),
        Task::Bundle(args) => gpu::bundle::run(&args),
        Task::Eval(args) => eval::run(&args),
        Task::Kernels(args) => kernels::run(&args),
        Task::StandIn(args) => gpu::stand_in::run(&args),
        Task::Test(args) => gpu::test::run(&args),
        Task::Scenes { out, count, size, seed, every_view, sheet } => {
            if let Some(path) = sheet {
                scenes::dataset::write_sheet(&path, 10, 6, size, seed)?;
            }
            match out {
                Some(dir) if every_view => scenes::dataset::write_every_view(&dir, count, size, seed),
                Some(dir) => scenes::dataset::write(&dir, count, size, seed),
                None => Ok(()),
            }
        }
    }
}
