//! What the user sees. The log (progress, notes, warnings, errors) goes to standard error, as text or as one JSON object a
//! line; standard output carries only what `inspect` reports.

mod event;
mod progress;

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use event::{Event, Loss, Losses, SubjectLoss};
use progress::Pace;

use crate::Error;
use crate::args::LogFormat;

/// Where messages go.
pub struct Console {
    format: LogFormat,
    quiet: bool,
    bar: ProgressBar,
    pace: Pace,
}

impl Console {
    /// `quiet` leaves warnings and errors only.
    pub fn new(format: LogFormat, quiet: bool) -> Self {
        let bar = ProgressBar::hidden();
        Self { format, quiet, bar, pace: Pace::default() }
    }

    /// Says what happened.
    pub fn event(&self, event: &Event<'_>) {
        if self.quiet && !event.is_warning() {
            return;
        }
        match self.format {
            LogFormat::Json => self.line(&event.json()),
            LogFormat::Text => match event.text() {
                Some(text) => self.line(&text),
                None => self.show_progress(event),
            },
        }
    }

    /// A thing that the user should know, though the work goes on.
    pub fn warn(&self, message: impl Into<String>) {
        self.event(&Event::Warning { message: message.into() });
    }

    /// Starts a progress bar over `total` steps, of which `done` are done.
    pub fn start(&self, total: usize, done: usize, what: &str) {
        if self.quiet || self.format == LogFormat::Json {
            return;
        }
        self.pace.restart();
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg}");
            self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.reset();
            self.bar.set_length(total as u64);
            self.bar.set_position(done as u64);
            self.bar.set_prefix(what.to_owned());
            self.bar.set_message("");
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// Ends the progress bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
    }

    fn show_progress(&self, event: &Event<'_>) {
        let Some((position, total, message)) = event.progress() else { return };
        if self.bar.is_hidden() {
            // No terminal: a line now and then, and the last one.
            if position == total || self.pace.is_due() {
                self.line(&format!("{position}/{total} {message}"));
            }
        } else {
            self.bar.set_position(position as u64);
            self.bar.set_message(message);
        }
    }

    /// One line on standard error; a closed pipe is no reason to stop working.
    fn line(&self, line: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        });
    }

    /// A command's report, on standard output.
    pub fn report(&self, text: &str, json: &serde_json::Value) {
        let _ = match self.format {
            LogFormat::Text => writeln!(std::io::stdout().lock(), "{}", text.trim_end()),
            LogFormat::Json => writeln!(std::io::stdout().lock(), "{json}"),
        };
    }

    /// Says why a command ends.
    pub fn error(&self, error: &Error) {
        self.finish();
        let (message, hint) = (error.line(), error.hint());
        match self.format {
            LogFormat::Json => {
                let exit_code = error.exit_code();
                self.line(&Event::Error { message: &message, hint: hint.as_deref(), exit_code }.json());
            }
            LogFormat::Text => {
                self.line(&format!("error: {message}"));
                if let Some(hint) = hint {
                    self.line(&format!("hint: {hint}"));
                }
            }
        }
    }
}
