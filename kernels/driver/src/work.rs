//! What a stream is given to do.

use crate::candle;
use crate::memory::Memory;

/// Dynamic shared memory that a kernel has without asking.
const SHARED_BYTES: u32 = 48 << 10;

/// A kernel, by name.
pub struct Function {
    pub name: String,
    /// Of candle's modules, not of this project's.
    pub candles: bool,
    /// A letter for each parameter: those of `host_kernels::signature`, `h` and `b` for two bytes and one.
    pub signature: String,
    /// What it may have of dynamic shared memory.
    pub shared_bytes: u32,
}

impl Function {
    pub fn named(name: &str, candles: bool) -> Option<Self> {
        let signature =
            if candles { candle::signature(name) } else { host_kernels::signature(name).map(str::to_owned) };
        Some(Self { name: name.to_owned(), candles, signature: signature?, shared_bytes: SHARED_BYTES })
    }
}

/// Bytes of a parameter.
pub fn bytes(letter: char) -> usize {
    match letter {
        'b' => 1,
        'h' => 2,
        'i' | 'u' | 'f' => 4,
        _ => 8,
    }
}

/// A kernel's launch.
#[derive(Clone)]
pub struct Launch {
    pub function: &'static Function,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    /// Blocks in x that run together.
    pub cluster: u32,
    /// Whether its blocks may come to the card before the launch before it has ended.
    pub early: bool,
    /// Each argument's bytes, zeros behind them.
    pub arguments: Vec<u64>,
}

/// One thing to do. Addresses are the card's, but for where `Read` puts numbers.
#[derive(Clone)]
pub enum Work {
    Launch(Launch),
    Copy { to: u64, from: u64, bytes: usize },
    Upload { to: u64, data: Vec<u8> },
    Read { to: usize, from: u64, bytes: usize },
    Fill { to: u64, byte: u8, bytes: usize },
    Allocate(u64),
    Free(u64),
}

impl Work {
    /// Does it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn run(&self, memory: &mut Memory) -> Result<(), String> {
        match self {
            Self::Launch(launch) => launch.run(memory),
            Self::Copy { to, from, bytes } => {
                memory.check(*to, *bytes)?;
                memory.check(*from, *bytes)?;
                // SAFETY: both are memory of as many bytes, as just seen.
                unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) };
                Ok(())
            }
            Self::Upload { to, data } => {
                memory.check(*to, data.len())?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), *to as *mut u8, data.len()) };
                Ok(())
            }
            Self::Read { to, from, bytes } => {
                memory.check(*from, *bytes)?;
                // SAFETY: there are as many bytes, as just seen; and whoever reads has room for them until it has waited.
                unsafe { std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes) };
                Ok(())
            }
            Self::Fill { to, byte, bytes } => {
                memory.check(*to, *bytes)?;
                // SAFETY: as above.
                unsafe { (*to as *mut u8).write_bytes(*byte, *bytes) };
                Ok(())
            }
            Self::Allocate(address) => {
                memory.revive(*address);
                Ok(())
            }
            Self::Free(address) => memory.free(*address),
        }
    }
}

/// Kernels that run when others are counted: what an optimiser keeps track of stays true.
const RUN_DRY: [&str; 3] = ["adam", "draw", "copy2d"];

impl Launch {
    fn run(&self, memory: &Memory) -> Result<(), String> {
        for (argument, letter) in self.arguments.iter().zip(self.function.signature.chars()) {
            if letter == 'p' && *argument != 0 {
                memory.check(*argument, 0).map_err(|error| format!("{}: {error}", self.function.name))?;
            }
        }
        if memory.dry && !RUN_DRY.iter().any(|name| self.function.name.starts_with(name)) {
            return Ok(());
        }
        if self.function.candles {
            // SAFETY: the arguments are of the kernel's types, and its pointers to memory, as just seen.
            return unsafe { candle::run(&self.function.name, &self.arguments) };
        }
        let mut arguments = self.arguments.clone();
        let mut addresses: Vec<_> =
            arguments.iter_mut().map(|argument| (&raw mut *argument).cast()).collect();
        let launch = host_kernels::Launch {
            name: &self.function.name,
            grid: self.grid,
            block: self.block,
            shared_bytes: self.shared_bytes,
            cluster: self.cluster,
        };
        // SAFETY: an argument for each parameter, and pointers to memory that was not freed, as just seen.
        unsafe { launch.run_raw(addresses.as_mut_ptr()) }.map_err(|error| error.to_string())
    }
}
