//! Which instruction set the kernels written by hand use: chosen when the program runs.

use std::sync::OnceLock;

/// An instruction set with a [`tile`](super::microkernel::tile) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// 512-bit registers, 32 of them.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 256-bit registers, 16 of them, with fused multiply–add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the compiler makes of plain loops for the build's target (NEON on 64-bit ARM).
    Portable,
}

impl Isa {
    /// Those that this processor can run, the best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }

    /// The best one, or the one that `HIPER_ISA` names (`avx512`, `avx2`, `portable`) where this processor has it.
    pub(crate) fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let available = Self::available();
            let wished = std::env::var("HIPER_ISA").unwrap_or_default();
            let named = available.iter().find(|isa| format!("{isa:?}").eq_ignore_ascii_case(&wished));
            *named.unwrap_or(&available[0])
        })
    }
}
