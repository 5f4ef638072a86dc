//! `hiper`: learn the subject of one photo, then edit the photo with a sentence.
//!
//! The binary is glue: it reads the command line and pictures, drives `sd-models` and `hiper-core`, and writes files.
//! Mathematics is in the libraries.

mod album;
mod args;
mod commands;
mod compute;
mod console;
mod demo_model;
mod error;
mod interrupt;
mod kernel_times;
mod manifest;
mod model;
mod output;
mod picture;
mod recipe;
mod render;
mod run;
mod subject;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, LogFormat};
use console::Console;
pub use error::{Error, Result};
use kernel_times::KernelTimes;

#[global_allocator]
static ALLOCATOR: sd_models::AlignedAllocator = sd_models::AlignedAllocator;

fn main() -> ExitCode {
    sd_models::keep_freed_memory();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let console = Console::new(cli.common.log_format, cli.common.quiet);
    let kernel_times = KernelTimes::from_environment();
    let done = interrupt::listen()
        .and_then(|()| args::check(&cli.common))
        // On one of the pool's own threads, so that no operator has to wake one and be woken by it.
        .and_then(|compute| rayon::scope(|_| commands::run(&cli.command, &compute, &console)))
        .and_then(|()| kernel_times.write());
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Help and version as clap prints them; what is wrong with the command line in one line, as every other error.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => error.exit(),
        _ => {
            let text = error.render().to_string();
            let message = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            let error = Error::Usage(message.into());
            // The flag could not be read, so it is looked for.
            let json = std::env::args_os().any(|arg| arg == "json" || arg == "--log-format=json");
            let format = if json { LogFormat::Json } else { LogFormat::Text };
            Console::new(format, false).error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
