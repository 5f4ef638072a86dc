//! One file a command.

mod demo;
mod generate;
mod inspect;
mod personalize;

use std::time::Instant;

use crate::Result;
use crate::args::Command;
use crate::compute::Compute;
use crate::console::{Console, Event};

/// Runs a command to its end.
pub fn run(command: &Command, compute: &Compute, console: &Console) -> Result<()> {
    let started = Instant::now();
    match command {
        Command::Inspect(args) => return inspect::run(args, compute, console),
        Command::Demo(args) => demo::run(args, compute, console)?,
        Command::Personalize(args) => personalize::run(args, compute, console)?,
        Command::Edit(args) => generate::edit(args, compute, console)?,
        Command::Generate(args) => generate::generate(args, compute, console)?,
    }
    console.event(&Event::Done { seconds: started.elapsed().as_secs_f64() });
    Ok(())
}
