//! The card that is stood for.

use std::ffi::c_int;

pub struct Card {
    /// Compute capability.
    pub capability: [c_int; 2],
    /// Dynamic shared memory that a kernel may ask for.
    pub shared_bytes: u32,
    /// The newest CUDA that the driver knows.
    pub driver: c_int,
}

impl Card {
    /// An H100, but for what the environment says.
    pub fn new() -> Self {
        let said = std::env::var("STAND_IN_DRIVER_CAPABILITY").ok();
        let capability = said.and_then(|said| {
            let (major, minor) = said.split_once('.')?;
            Some([major.parse().ok()?, minor.parse().ok()?])
        });
        let capability = capability.unwrap_or([9, 0]);
        let driver = std::env::var("STAND_IN_DRIVER_CUDA").ok().and_then(|said| said.parse().ok());
        Self { capability, shared_bytes: shared_bytes(capability), driver: driver.unwrap_or(13000) }
    }
}

/// As CUDA's programming guide lists them by compute capability.
fn shared_bytes([major, minor]: [c_int; 2]) -> u32 {
    let kibibytes = match (major, minor) {
        (..8, _) => 64,
        (8, 0 | 7) => 163,
        (8 | 12, _) => 99,
        _ => 227,
    };
    kibibytes << 10
}
