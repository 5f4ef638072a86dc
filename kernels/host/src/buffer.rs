//! Memory that stands for a card's.

use std::cell::UnsafeCell;
use std::marker::PhantomData;

use crate::Argument;

/// What a buffer holds: numbers without padding, for which any bits are a value.
pub trait Number: Copy {}
impl Number for f32 {}
impl Number for half::f16 {}
impl Number for half::bf16 {}
impl Number for i32 {}
impl Number for u32 {}
impl Number for u64 {}

const GUARD_WORDS: usize = 64;
const GUARD: u128 = u128::MAX; // a NaN in every float type

/// Numbers that kernels read and write, 16-byte aligned, between guards that are NaN.
pub struct Buffer<T> {
    words: UnsafeCell<Vec<u128>>,
    len: usize,
    number: PhantomData<T>,
}

impl<T: Number> Buffer<T> {
    /// `len` numbers whose bits are all ones: NaN, or −1.
    pub fn unwritten(len: usize) -> Self {
        let words = (len * size_of::<T>()).div_ceil(size_of::<u128>()) + 2 * GUARD_WORDS;
        let buffer = Self { words: UnsafeCell::new(vec![GUARD; words]), len, number: PhantomData };
        buffer.forbid_guards(true);
        buffer
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let buffer = Self::unwritten(values.len());
        // SAFETY: the buffer has room for as many numbers; nobody else knows it yet.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.as_ptr(), values.len()) };
        buffer
    }

    /// The first number.
    pub fn as_ptr(&self) -> *mut T {
        // SAFETY: no reference to the words lives longer than a call; the guard is in front of the numbers.
        unsafe { (*self.words.get()).as_mut_ptr().add(GUARD_WORDS).cast() }
    }

    /// An argument that points to number `index`.
    ///
    /// # Panics
    /// There is no such number.
    pub fn at(&self, index: usize) -> Argument<'_> {
        assert!(index < self.len, "number {index} of {}", self.len);
        Argument::pointer(self.as_ptr().wrapping_add(index))
    }

    /// The numbers now.
    ///
    /// # Panics
    /// A kernel wrote outside of the buffer.
    pub fn to_vec(&self) -> Vec<T> {
        self.forbid_guards(false);
        let whole = self.guards().into_iter().flatten().all(|&byte| byte == 0xff);
        assert!(whole, "a kernel wrote outside of a buffer of {} numbers", self.len);
        self.forbid_guards(true);
        // SAFETY: as in as_ptr; the words are initialised, and any bits are numbers.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }.to_vec()
    }

    /// The bytes before and behind the numbers.
    fn guards(&self) -> [&[u8]; 2] {
        // SAFETY: as in as_ptr; a word is 16 bytes.
        let all = unsafe {
            let words = &*self.words.get();
            std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words.as_slice()))
        };
        let guard = GUARD_WORDS * size_of::<u128>();
        [&all[..guard], &all[guard + self.len * size_of::<T>()..]]
    }

    fn forbid_guards(&self, forbidden: bool) {
        self.guards().into_iter().for_each(|guard| crate::forbid(guard, forbidden));
    }
}

impl<'a, T: Number> From<&'a Buffer<T>> for Argument<'a> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        Self::pointer(buffer.as_ptr())
    }
}
