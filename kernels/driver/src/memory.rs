//! A card's memory, which is the host's: each allocation lies between guards, and holds NaN until it is written.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::BTreeMap;

/// Bytes on either side that nobody may write.
const GUARD: usize = 4096;
const UNWRITTEN: u8 = 0xff;

/// Whose memory it is: an allocation of a recording lives from its place in the recording to its release there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    Pool,
    Recording(u64),
}

struct Allocation {
    bytes: usize,
    owner: Owner,
    alive: bool,
}

/// Every allocation by its address.
pub struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    /// Kernels do not run: memory that nobody has written holds zeros, and takes none until it is written.
    pub dry: bool,
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(2 * GUARD)?, GUARD).ok()
}

impl Memory {
    pub fn new(dry: bool) -> Self {
        Self { allocations: BTreeMap::new(), dry }
    }

    /// An address of `bytes` bytes that nobody has written, if there are as many.
    pub fn allocate(&mut self, bytes: usize, owner: Owner) -> Option<u64> {
        let layout = layout(bytes)?;
        // SAFETY: the layout is not empty.
        let start = unsafe { if self.dry { alloc_zeroed(layout) } else { alloc(layout) } };
        if start.is_null() {
            return None;
        }
        let address = start as u64 + GUARD as u64;
        self.allocations.insert(address, Allocation { bytes, owner, alive: true });
        if !self.dry {
            // SAFETY: the block is as long as its layout.
            unsafe { start.write_bytes(UNWRITTEN, layout.size()) };
        }
        Some(address)
    }

    /// Whose memory begins at this address.
    pub fn owner(&self, address: u64) -> Option<Owner> {
        self.allocations.get(&address).map(|allocation| allocation.owner)
    }

    /// Bytes of the memory that begins at this address.
    pub fn bytes(&self, address: u64) -> usize {
        self.allocations.get(&address).map_or(0, |allocation| allocation.bytes)
    }

    /// Whether `bytes` from here on are memory that was allocated and not yet freed.
    ///
    /// # Errors
    /// What they are instead.
    pub fn check(&self, address: u64, bytes: usize) -> Result<(), String> {
        let before = self.allocations.range(..=address).next_back();
        let Some((start, allocation)) = before.filter(|(start, a)| address - **start <= a.bytes as u64)
        else {
            return Err(format!("{address:#x} is no memory of the card"));
        };
        if !allocation.alive {
            return Err(format!("{address:#x} was freed"));
        }
        if address - start + bytes as u64 > allocation.bytes as u64 {
            return Err(format!("{bytes} bytes from {address:#x} go beyond the {} there", allocation.bytes));
        }
        Ok(())
    }

    /// The recording reaches an allocation of its own: it holds what nobody has written.
    pub fn revive(&mut self, address: u64) {
        if let Some(allocation) = self.allocations.get_mut(&address) {
            allocation.alive = true;
            if !self.dry {
                // SAFETY: an allocation has as many bytes.
                unsafe { (address as *mut u8).write_bytes(UNWRITTEN, allocation.bytes) };
            }
        }
    }

    /// Frees; a recording's memory stays for the next time that it is replayed.
    ///
    /// # Errors
    /// Something was written outside of it, or it was freed before.
    pub fn free(&mut self, address: u64) -> Result<(), String> {
        self.check(address, 0)?;
        self.check_guards(address)?;
        let Some(allocation) = self.allocations.get_mut(&address) else {
            return Err(format!("{address:#x} is inside of an allocation"));
        };
        allocation.alive = false;
        if allocation.owner == Owner::Pool {
            self.release(address);
        }
        Ok(())
    }

    /// A recording is gone, and its memory with it.
    pub fn forget(&mut self, recording: u64) {
        let owner = Owner::Recording(recording);
        let gone: Vec<u64> =
            self.allocations.iter().filter(|(_, a)| a.owner == owner).map(|(address, _)| *address).collect();
        for address in gone {
            self.release(address);
        }
    }

    fn release(&mut self, address: u64) {
        let Some(allocation) = self.allocations.remove(&address) else { return };
        if let Some(layout) = layout(allocation.bytes) {
            // SAFETY: the block was allocated with this layout, and its address is known no more.
            unsafe { dealloc((address as *mut u8).sub(GUARD), layout) };
        }
    }

    fn check_guards(&self, address: u64) -> Result<(), String> {
        if self.dry {
            return Ok(());
        }
        let bytes = self.bytes(address);
        // SAFETY: an allocation has guards on both sides.
        let whole = [address as usize - GUARD, address as usize + bytes].into_iter().all(|start| {
            unsafe { std::slice::from_raw_parts(start as *const u8, GUARD) }.iter().all(|b| *b == UNWRITTEN)
        });
        if whole {
            Ok(())
        } else {
            Err(format!("something was written outside of {bytes} bytes at {address:#x}"))
        }
    }
}
