//! Where the tensors of a recording lie: in one block of memory, each for as long as it lives.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// To which addresses are aligned.
const ALIGNMENT: usize = 512;

/// Tensors in a block, or in a block that is yet to be made: what does not fit lies elsewhere, and counts as if it did.
pub(crate) struct Arena {
    /// Addresses.
    block: Range<u64>,
    /// The lengths of what is in use, by where it begins in the block.
    used: BTreeMap<usize, usize>,
    /// Where in the block those would lie that are elsewhere, by their addresses.
    elsewhere: HashMap<u64, usize>,
    /// To where the block has been used.
    most: usize,
}

impl Arena {
    pub(crate) fn new(block: Range<u64>) -> Self {
        Self { block, used: BTreeMap::new(), elsewhere: HashMap::new(), most: 0 }
    }

    /// A place for so many bytes: the smallest gap that has them. Where the block is too small, `elsewhere` gives the address.
    ///
    /// # Errors
    /// Those of `elsewhere`.
    pub(crate) fn allocate<E>(
        &mut self,
        bytes: usize,
        elsewhere: impl FnOnce() -> Result<u64, E>,
    ) -> Result<u64, E> {
        let len = bytes.max(1).next_multiple_of(ALIGNMENT);
        let place = self.gap_for(len);
        let address = match self.block.start + place as u64 {
            address if address + len as u64 <= self.block.end => address,
            _ => {
                let address = elsewhere()?;
                self.elsewhere.insert(address, place);
                address
            }
        };
        self.used.insert(place, len);
        self.most = self.most.max(place + len);
        Ok(address)
    }

    fn gap_for(&self, len: usize) -> usize {
        let mut end = 0;
        let mut best: Option<(usize, usize)> = None;
        for (&place, &used) in &self.used {
            let gap = place - end;
            if gap >= len && best.is_none_or(|(smallest, _)| gap < smallest) {
                best = Some((gap, end));
            }
            end = place + used;
        }
        best.map_or(end, |(_, place)| place)
    }

    /// Whether it was in the block: if not, it is still to be freed where it is.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let inside = self.block.contains(&address);
        let place = if inside {
            Some((address - self.block.start) as usize)
        } else {
            self.elsewhere.remove(&address)
        };
        if let Some(place) = place {
            self.used.remove(&place);
        }
        inside
    }

    /// Bytes of a block that would take everything.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Bytes that are in use.
    pub(crate) fn in_use(&self) -> usize {
        self.used.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Allocations by their sizes, and which of those alive is freed after each.
    fn histories() -> impl Strategy<Value = Vec<(usize, Option<prop::sample::Index>)>> {
        prop::collection::vec((0..5000_usize, prop::option::of(any::<prop::sample::Index>())), 1..200)
    }

    /// The addresses of a history, and what is left of it.
    fn run(history: &[(usize, Option<prop::sample::Index>)], arena: &mut Arena) -> Vec<Range<u64>> {
        let (mut alive, mut all): (Vec<Range<u64>>, Vec<Range<u64>>) = (vec![], vec![]);
        let mut far = 1 << 40;
        for (bytes, freed) in history {
            let elsewhere = || {
                far += 1 << 20;
                Ok::<u64, ()>(far)
            };
            let start = arena.allocate(*bytes, elsewhere).expect("never fails");
            let new = start..start + *bytes as u64;
            assert!(
                alive.iter().all(|old| new.end <= old.start || old.end <= new.start),
                "{new:?} of {alive:?}"
            );
            assert_eq!(start % ALIGNMENT as u64, 0);
            alive.push(new.clone());
            all.push(new);
            if let Some(freed) = freed {
                let old = alive.swap_remove(freed.index(alive.len()));
                assert_eq!(arena.free(old.start), arena.block.contains(&old.start));
            }
        }
        let least: u64 = alive.iter().map(|range| range.end - range.start).sum();
        assert!(arena.in_use() as u64 >= least && arena.in_use() <= arena.most());
        all
    }

    proptest! {
        #[test]
        fn what_was_measured_is_enough(history in histories()) {
            let mut measured = Arena::new(0..0);
            run(&history, &mut measured);
            let block = 1 << 20..(1 << 20) + measured.most() as u64;
            let mut arena = Arena::new(block.clone());
            let addresses = run(&history, &mut arena);
            prop_assert!(addresses.iter().all(|range| block.contains(&range.start) && range.end <= block.end));
            prop_assert_eq!(arena.most(), measured.most());
            // One byte less, and something lies elsewhere.
            let mut arena = Arena::new(block.start..block.end - 1);
            let addresses = run(&history, &mut arena);
            prop_assert!(addresses.iter().any(|range| !block.contains(&range.start)));
        }
    }

    #[test]
    fn the_smallest_gap_that_is_enough_is_taken() {
        let mut arena = Arena::new(0..1 << 20);
        let mut allocate = |bytes| arena.allocate(bytes, || Err(())).expect("fits");
        let [a, b, c, d, e] = [2048, 512, 1024, 512, 512].map(&mut allocate);
        assert_eq!([a, b, c, d, e], [0, 2048, 2560, 3584, 4096]);
        assert!(arena.free(a) && arena.free(c));
        assert_eq!(arena.allocate(600, || Err(())), Ok(c));
        assert_eq!(arena.allocate(600, || Err(())), Ok(a));
        assert_eq!((arena.in_use(), arena.most()), (3 * 512 + 2 * 1024, 4608));
    }
}
