//! What recordings and memory are to a card; a CPU has neither.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Tensor};
use hiper_kernels::{Replay, free_memory, on_test_device};

#[test]
fn a_recording_that_fails_leaves_the_card_to_others() {
    on_test_device(|device| {
        let x = Tensor::zeros(3, DType::F32, device).unwrap();
        let y = x.zeros_like().unwrap();
        let add_one = || y.slice_set(&(&x + 1.0)?, 0, 0);
        for panics in [false, true] {
            let passes = Cell::new(0);
            let fails = || {
                add_one()?;
                passes.set(passes.get() + 1);
                // The first pass is not recorded.
                if passes.get() > 1 {
                    assert!(!panics, "this panic is meant");
                    candle_core::bail!("this error is meant");
                }
                Ok(())
            };
            let made = catch_unwind(AssertUnwindSafe(|| Replay::new(device, fails)));
            assert_eq!(made.is_ok_and(|replay| replay.is_ok()), device.is_cpu());
            assert_eq!(y.to_vec1::<f32>().unwrap(), [1.0; 3]);
            Replay::new(device, add_one).unwrap().run().unwrap();
            assert_eq!(x.to_vec1::<f32>().unwrap(), [0.0; 3]);
        }
    });
}

#[test]
fn what_was_freed_counts_as_free() {
    const BYTES: usize = 1 << 28;
    on_test_device(|device| {
        let tensor = Tensor::zeros(BYTES, DType::U8, device).unwrap();
        let Some(held) = free_memory(device) else { return };
        drop(tensor);
        let free = free_memory(device).unwrap();
        assert!(free >= held + BYTES as u64 / 2, "{free} after {held}");
    });
}
