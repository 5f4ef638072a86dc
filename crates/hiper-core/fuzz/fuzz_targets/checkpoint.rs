//! Any bytes are a checkpoint that a run can continue from, or a file that is refused with its field.
#![no_main]

use std::path::Path;

use hiper_core::{Checkpoint, Error};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Checkpoint::from_bytes(bytes, Path::new("checkpoint")) {
        Ok(mut checkpoint) => {
            let n = checkpoint.tail.tensor().elem_count();
            checkpoint.generator.randn(17);
            checkpoint.generator.randn(3);
            assert!(checkpoint.adam.step(&mut vec![0.0; n], &vec![1.0; n]).is_ok());
        }
        Err(error) => assert!(matches!(error, Error::File { .. }), "{error}"),
    }
});
