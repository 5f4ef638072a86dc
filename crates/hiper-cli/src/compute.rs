//! Where to compute, and whether to save time or memory.

use candle_core::{DType, Device};
use sd_models::{Memory, ModelFiles, StableDiffusion, Weights, free_memory};

use crate::Result;
use crate::args::Memory as Choice;

/// What the common flags say of computing.
pub struct Compute {
    /// `--device`.
    pub device: Device,
    /// `--dtype`.
    pub dtype: DType,
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
            // Weights are as large either way, and there is room for a step wherever there is for them.
            Choice::Auto if !self.device.is_cpu() => Memory::Fast,
            Choice::Auto => match available() {
                Some(available) if available < self.needed(files)? => Memory::Lean,
                _ => Memory::Fast,
            },
        })
    }

    /// Bytes that saving time takes: the weights, which stay in their files' memory, and what a step keeps.
    fn needed(&self, files: &ModelFiles) -> Result<u64> {
        let mut needed = STEP;
        for component in ["unet", "vae", "text_encoder"] {
            needed += Weights::load(files, component, &self.device)?.bytes();
        }
        Ok(needed)
    }
}

/// A step of Stable Diffusion 1.5 at 512², measured: bytes that it keeps for the backward pass when it saves time.
const STEP: u64 = 2 << 30;

/// More than these when they are asked for: on a CPU they save little more (docs/speed.md), and room is estimated.
const MAX_SUBJECTS: u64 = 8;

/// How many subjects to learn at once, with pictures of `width` × `height`: as many as what is free has room for.
pub fn subjects_at_once(model: &StableDiffusion, device: &Device, (width, height): (u32, u32)) -> usize {
    let pixels = u64::from(width) * u64::from(height);
    let channels = model.unet.config().block_out_channels[0] as u64;
    let free = if device.is_cpu() { available() } else { free_memory(device) };
    free.map_or(MAX_SUBJECTS, |bytes| room(bytes, pixels, channels)) as usize
}

/// How many steps fit into so many bytes: what a step keeps grows with the pixels, and with the width of the UNet's first level.
fn room(bytes: u64, pixels: u64, channels: u64) -> u64 {
    let step = (STEP / (512 * 512)).saturating_mul(pixels).saturating_mul(channels) / 320;
    (bytes / step.max(1)).clamp(1, MAX_SUBJECTS)
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
    fn a_batch_has_room() {
        let (pixels, channels) = (512 * 512, 320);
        assert_eq!(room(7 << 30, pixels, channels), 3);
        assert_eq!(room(7 << 30, 4 * pixels, channels), 1);
        assert_eq!(room(7 << 30, pixels, channels / 2), 7);
        assert_eq!(room(0, pixels, channels), 1);
        assert_eq!(room(u64::MAX, 0, 0), MAX_SUBJECTS);
    }

    #[test]
    fn a_choice_is_a_choice() {
        let files = crate::demo_model::files().unwrap();
        let compute =
            |memory| Compute { device: Device::Cpu, dtype: DType::F32, memory }.memory_for(&files).unwrap();
        assert_eq!(compute(Choice::Lean), Memory::Lean);
        assert_eq!(compute(Choice::Fast), Memory::Fast);
    }
}
