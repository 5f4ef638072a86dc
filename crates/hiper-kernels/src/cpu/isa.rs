//! Which instruction set the kernels written by hand use: chosen when the program runs.

use std::sync::OnceLock;

use super::microkernel::COLS;
#[cfg(target_arch = "x86_64")]
use super::microkernel::WIDE;

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
    /// Rows into which a product's left-hand side is cut: a tile of as many fills the registers, whole blocks of them on AVX2 (6) and
    /// in plain loops (4).
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 14,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 12,
            Self::Portable => 12,
        }
    }

    /// Columns of a tile are a multiple of so many.
    pub(crate) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 16,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 8,
            Self::Portable => 8,
        }
    }

    /// Most columns of a tile.
    pub(crate) fn widest(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => WIDE,
            _ => COLS,
        }
    }

    /// Those that this processor can run, the best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let f16c = is_x86_feature_detected!("f16c");
            if f16c && is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
            if f16c && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }

    /// The best one (in tests, the one under test).
    pub(crate) fn current() -> Self {
        #[cfg(test)]
        if let Some(isa) = *UNDER_TEST.lock().unwrap() {
            return isa;
        }
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::available()[0])
    }

    /// Runs `f` on each of those that this processor has, one test at a time.
    #[cfg(test)]
    pub(crate) fn for_each(f: impl Fn()) {
        static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
        // A test that failed leaves the lock poisoned, not the others broken.
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for isa in Self::available() {
            *UNDER_TEST.lock().unwrap() = Some(isa);
            f();
        }
        *UNDER_TEST.lock().unwrap() = None;
    }
}

#[cfg(test)]
static UNDER_TEST: std::sync::Mutex<Option<Isa>> = std::sync::Mutex::new(None);
