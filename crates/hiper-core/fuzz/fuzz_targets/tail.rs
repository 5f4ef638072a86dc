//! Any bytes are a tail of finite numbers, or a file that is refused with its field.
#![no_main]

use std::path::Path;

use hiper_core::{Error, HiperFile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match HiperFile::from_bytes(bytes, Path::new("tail")) {
        Ok(file) => {
            let values = file.tail.tensor().flatten_all().and_then(|tail| tail.to_vec1::<f32>());
            assert!(values.is_ok_and(|values| values.iter().all(|v| v.is_finite())));
        }
        Err(error) => assert!(matches!(error, Error::File { .. }), "{error}"),
    }
});
