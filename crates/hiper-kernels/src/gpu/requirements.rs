//! Which cards run the kernels of a build: asked before anything is loaded, where a driver would say less.

use crate::Error;

/// Ampere, for which the kernels are compiled: `CODE` in `build.rs`.
const OLDEST: [i32; 2] = [8, 0];

/// A card and its driver.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub ordinal: usize,
    /// Compute capability.
    pub capability: [i32; 2],
    /// The newest CUDA that the driver knows: 13000 is 13.0.
    pub driver: i32,
    /// Whether memory can be had in the order of a stream.
    pub has_pools: bool,
}

/// What kernels were compiled with, and for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Build<'a> {
    /// CUDA's release, as [`Found::driver`] is one.
    pub toolkit: i32,
    /// A file of candle's, in PTX.
    pub candles: &'a str,
}

/// That the kernels run there.
///
/// # Errors
/// When they do not, with what to do.
pub(super) fn check(found: &Found, build: &Build<'_>) -> Result<(), Error> {
    let unfit = |reason, remedy| Err(Error::Unfit { ordinal: found.ordinal, reason, remedy });
    let [major, minor] = found.capability;
    if found.driver < build.toolkit {
        let [knows, wanted] =
            [found.driver, build.toolkit].map(|n| format!("{}.{}", n / 1000, n % 1000 / 10));
        return unfit(
            format!("NVIDIA's driver knows CUDA {knows}, and kernels were compiled by CUDA {wanted}"),
            "install a newer driver: 580 is the first that knows CUDA 13.0",
        );
    }
    if found.capability < OLDEST {
        let [least, and] = OLDEST;
        return unfit(
            format!("its compute capability is {major}.{minor}, and kernels need {least}.{and}"),
            "take a card of Ampere's generation or a later one, or the CPU",
        );
    }
    match Target::of(build.candles) {
        Some(target) if !target.runs_on(found.capability) => unfit(
            format!(
                "its compute capability is {major}.{minor}, and candle's kernels were compiled for {}",
                target.name
            ),
            "build with CUDA_COMPUTE_CAP=80, which every card of 8.0 or later runs",
        ),
        _ if !found.has_pools => unfit(
            "its driver has no memory pools (CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)".into(),
            "take a card that is not shared out between virtual machines, or the CPU",
        ),
        _ => Ok(()),
    }
}

/// What PTX is for: `sm_80`, and later ones too; `sm_90a`, and no other; `sm_120f`, and later ones of 12.
#[derive(Debug, PartialEq)]
struct Target<'a> {
    name: &'a str,
    capability: [i32; 2],
}

impl<'a> Target<'a> {
    /// None of what is no PTX: the compiler that stands in for nvcc leaves names.
    fn of(ptx: &'a str) -> Option<Self> {
        let name = ptx.lines().find_map(|line| line.trim().strip_prefix(".target "))?;
        let name = name.split(',').next()?.trim();
        let number = name.strip_prefix("sm_")?.trim_end_matches(['a', 'f']).parse::<i32>().ok()?;
        Some(Self { name, capability: [number / 10, number % 10] })
    }

    fn runs_on(&self, capability: [i32; 2]) -> bool {
        match self.name.chars().last() {
            Some('a') => capability == self.capability,
            Some('f') => capability[0] == self.capability[0] && capability >= self.capability,
            _ => capability >= self.capability,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUND: Found = Found { ordinal: 1, capability: [9, 0], driver: 13000, has_pools: true };

    fn said(found: Found, target: &str) -> String {
        let candles = format!("//\n// words\n\n.version 9.0\n.target {target}\n.address_size 64\n");
        let build = Build { toolkit: 13000, candles: &candles };
        check(&found, &build).map_or_else(|error| error.to_string(), |()| "fit".into())
    }

    #[test]
    fn an_unfit_card_is_told_with_both_numbers_and_a_remedy() {
        assert_eq!(
            said(Found { driver: 12040, ..FOUND }, "sm_80"),
            "card 1: NVIDIA's driver knows CUDA 12.4, and kernels were compiled by CUDA 13.0; install a newer driver: \
             580 is the first that knows CUDA 13.0"
        );
        assert_eq!(
            said(Found { capability: [7, 5], ..FOUND }, "sm_75"),
            "card 1: its compute capability is 7.5, and kernels need 8.0; take a card of Ampere's generation or a later \
             one, or the CPU"
        );
        assert_eq!(
            said(Found { capability: [12, 0], ..FOUND }, "sm_90a"),
            "card 1: its compute capability is 12.0, and candle's kernels were compiled for sm_90a; build with \
             CUDA_COMPUTE_CAP=80, which every card of 8.0 or later runs"
        );
        assert!(said(Found { has_pools: false, ..FOUND }, "sm_80").contains("no memory pools"));
        assert_eq!(said(Found { driver: 13010, ..FOUND }, "sm_90a"), "fit");
    }

    #[test]
    fn candles_kernels_run_where_their_target_says() {
        let fit = |capability, target| said(Found { capability, ..FOUND }, target) == "fit";
        assert!(
            fit([8, 0], "sm_80") && fit([8, 9], "sm_80") && fit([9, 0], "sm_80") && fit([12, 0], "sm_80")
        );
        assert!(!fit([8, 0], "sm_86") && !fit([8, 9], "sm_90a") && !fit([10, 0], "sm_90a"));
        assert!(fit([12, 1], "sm_120f") && !fit([13, 0], "sm_120f") && fit([12, 0], "sm_120a"));
        assert_eq!(Target::of("affine"), None);
    }
}
