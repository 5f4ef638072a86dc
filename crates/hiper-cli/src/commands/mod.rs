//! One file a command.

mod demo;
mod generate;
mod inspect;
mod personalize;

use std::time::Instant;

use candle_core::Device;

use crate::Result;
use crate::args::Command;
use crate::console::{Console, Event};

/// Runs a command to its end.
pub fn run(command: &Command, device: &Device, console: &Console) -> Result<()> {
    let started = Instant::now();
    match command {
        Command::Inspect(args) => return inspect::run(args, device, console),
        Command::Demo(args) => demo::run(args, device, console)?,
        Command::Personalize(args) => personalize::run(args, device, console)?,
        Command::Edit(args) => generate::edit(args, device, console)?,
        Command::Generate(args) => generate::generate(args, device, console)?,
    }
    console.event(&Event::Done { seconds: started.elapsed().as_secs_f64() });
    Ok(())
}
