//! A personalisation on disk: its settings, its log, its checkpoints, and the loop that writes them.

mod checkpoints;
mod network;
mod settings;
mod step_log;
mod train;

pub use checkpoints::Checkpoints;
pub use settings::Settings;
pub use train::{Run, Training};
