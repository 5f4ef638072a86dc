//! Where to compute, and whether to save time or memory.

use candle_core::Device;
use sd_models::{Memory, ModelFiles, Weights};

use crate::Result;
use crate::args::Memory as Choice;

/// What the common flags say of computing.
pub struct Compute {
    /// `--device`.
    pub device: Device,
    /// `--memory`.
    pub memory: Choice,
}

impl Compute {
    /// What networks loaded from these files should save: as asked, or by what is free.
    ///
    /// # Errors
    /// When the checkpoint is damaged.
    pub fn memory_for(&self, files: &ModelFiles) -> Result<Memory> {
        Ok(match self.memory {
            Choice::Fast => Memory::Fast,
            Choice::Lean => Memory::Lean,
            Choice::Auto => match available() {
                Some(available) if available < self.needed(files)? => Memory::Lean,
                _ => Memory::Fast,
            },
        })
    }

    /// Bytes that saving time takes: every weight as f32, and what a step keeps.
    fn needed(&self, files: &ModelFiles) -> Result<u64> {
        /// A step of Stable Diffusion 1.5 at 512², measured.
        const STEP: u64 = 2 << 30;
        let mut needed = STEP;
        for component in ["unet", "vae", "text_encoder"] {
            let tensors = Weights::load(files, component, &self.device)?.tensors();
            let values: usize = tensors.iter().map(|(_, _, shape)| shape.iter().product::<usize>()).sum();
            needed += 4 * values as u64;
        }
        Ok(needed)
    }
}

/// Bytes that programs can still have, where the system says so.
fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    parse_available(&meminfo)
}

/// The `MemAvailable` line of Linux's `/proc/meminfo`, in bytes.
fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read() {
        let text = "MemTotal:  100 kB\nMemFree: 3 kB\nMemAvailable:       42 kB\n";
        assert_eq!(parse_available(text), Some(42 * 1024));
        assert_eq!(parse_available("MemTotal: 1 kB"), None);
    }

    #[test]
    fn a_choice_is_a_choice() {
        let files = crate::demo_model::files().unwrap();
        let compute = |memory| Compute { device: Device::Cpu, memory }.memory_for(&files).unwrap();
        assert_eq!(compute(Choice::Lean), Memory::Lean);
        assert_eq!(compute(Choice::Fast), Memory::Fast);
    }
}
