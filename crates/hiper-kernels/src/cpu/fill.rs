//! New results, filled by all threads.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// `images` times `size` new values. `fill(image, first, values)` gets stretches of `share` values of an image (the last
/// may be shorter), all zero: cleared by the thread that fills them, in its cache, where `vec![0.0; …]` would send the
/// whole result through memory on one thread.
pub(crate) fn fill<T: Copy + Default + Send>(
    [images, size]: [usize; 2],
    share: usize,
    fill: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut values = Vec::with_capacity(images * size);
    if images * size == 0 {
        return values;
    }
    let room = &mut values.spare_capacity_mut()[..images * size];
    room.par_chunks_exact_mut(size).enumerate().for_each(|(image, room)| {
        room.par_chunks_mut(share).enumerate().for_each(|(i, room)| {
            room.fill(MaybeUninit::new(T::default()));
            // SAFETY: every element was just initialised.
            #[allow(unsafe_code)]
            let values = unsafe { &mut *(std::ptr::from_mut(room) as *mut [T]) };
            fill(image, i * share, values);
        });
    });
    // SAFETY: the stretches cover the first `images · size` elements, all initialised above.
    #[allow(unsafe_code)]
    unsafe {
        values.set_len(images * size);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn every_value_is_visited_once() {
        for (images, size, share) in [(1, 1, 1), (2, 7, 3), (3, 8, 4), (1, 5, 9), (0, 4, 2), (2, 0, 1)] {
            let values = fill([images, size], share, |image, first, values: &mut [f32]| {
                assert!(values.len() <= share);
                for (i, v) in values.iter_mut().enumerate() {
                    *v += (image * size + first + i) as f32;
                }
            });
            let expected: Vec<f32> = (0..images * size).map(|i| i as f32).collect();
            assert_eq!(values, expected);
        }
    }
}
