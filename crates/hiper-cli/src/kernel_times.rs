//! How long a card's kernels take: `HIPER_KERNEL_TIMES=FILE` asks for a table of what is recorded first, a step or a prediction.

use std::fmt::Write as _;
use std::path::PathBuf;

use sd_models::KernelTime;

use crate::Result;

/// Where the table goes, if it is wanted.
pub struct KernelTimes(Option<PathBuf>);

impl KernelTimes {
    /// As the environment has it.
    pub fn from_environment() -> Self {
        let file = std::env::var_os("HIPER_KERNEL_TIMES").map(PathBuf::from);
        if file.is_some() {
            sd_models::time_kernels();
        }
        Self(file)
    }

    /// Writes the table.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self) -> Result<()> {
        let Some(file) = &self.0 else { return Ok(()) };
        Ok(hiper_core::write_atomically(file, table(&sd_models::kernel_times()).as_bytes())?)
    }
}

/// A line for each kernel and grid.
fn table(times: &[KernelTime]) -> String {
    let mut text = String::from("microseconds\tlaunches\teach\tkernel\tblocks\n");
    for KernelTime { kernel, grid: [x, y, z], launches, microseconds } in times {
        let each = microseconds / *launches as f64;
        let _ = writeln!(text, "{microseconds:.1}\t{launches}\t{each:.2}\t{kernel}\t{x} {y} {z}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_all_launches_and_one() {
        let time = KernelTime { kernel: "silu_f16".into(), grid: [1, 2, 3], launches: 4, microseconds: 10.0 };
        let text = table(&[time]);
        assert_eq!(text.lines().nth(1), Some("10.0\t4\t2.50\tsilu_f16\t1 2 3"));
    }
}
