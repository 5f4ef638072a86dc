//! The CUDA kernels of `kernels/*.cu`, compiled for the CPU by `kernels/host/shim.hpp`, to be run by tests.
//!
//! A kernel runs block by block, on all CPU threads, with its barriers, warp functions and tensor-core fragments; what this finds and what it
//! cannot find is said in the shim. Speed it does not show.
//!
//! ```
//! use host_kernels::{Buffer, Launch};
//!
//! let values = Buffer::from_slice(&[1.0f32, 2.0, 3.0]);
//! Launch { name: "scale_f32", grid: [1, 1, 1], block: [32, 1, 1], shared_bytes: 0, cluster: 1 }
//!     .run(&[(&values).into(), 2.0f32.into(), 3i32.into()])?;
//! assert_eq!(values.to_vec(), [2.0, 4.0, 6.0]);
//! # Ok::<(), host_kernels::LaunchError>(())
//! ```
#![allow(unsafe_code)]

mod buffer;

pub use buffer::{Buffer, Number};

use std::cell::{Cell, UnsafeCell};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::path::Path;

use rayon::prelude::*;

/// Why a kernel did not run, or what it did wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LaunchError(String);

/// A kernel's argument: a number, or a buffer that it borrows.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Argument<'a> {
    /// What `cuLaunchKernel` finds at the argument's address, in its first bytes; aligned for any parameter.
    bits: [u8; 8],
    /// The parameter's type in a signature.
    letter: char,
    borrowed: PhantomData<&'a ()>,
}

impl Argument<'_> {
    /// No buffer, for a parameter that may be null.
    pub const NULL: Self = Self { bits: [0; 8], letter: 'p', borrowed: PhantomData };

    fn pointer<T>(to: *mut T) -> Self {
        Self { bits: (to as u64).to_ne_bytes(), ..Self::NULL }
    }
}

macro_rules! argument_from {
    ($($number:ty => $letter:literal),*) => {
        $(impl From<$number> for Argument<'_> {
            fn from(value: $number) -> Self {
                let mut bits = [0; 8];
                bits[..size_of_val(&value)].copy_from_slice(&value.to_ne_bytes());
                Self { bits, letter: $letter, borrowed: PhantomData }
            }
        })*
    };
}
argument_from!(i32 => 'i', u32 => 'u', i64 => 'l', u64 => 'v', f32 => 'f', f64 => 'd');

/// What `cuLaunchKernel` is told beside the arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub name: &'a str,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks in x that run together, 1 to 8.
    pub cluster: u32,
}

impl Launch<'_> {
    /// Runs the kernel to its end.
    ///
    /// # Errors
    /// There is no such kernel, the arguments are not of its parameters' types, or it ran and broke a rule that the
    /// shim checks.
    pub fn run(&self, arguments: &[Argument<'_>]) -> Result<(), LaunchError> {
        let given: String = arguments.iter().map(|argument| argument.letter).collect();
        let taken =
            signature(self.name).ok_or_else(|| LaunchError(format!("{}: no such kernel", self.name)))?;
        if given != taken {
            return Err(LaunchError(format!("{}: parameters are {taken}, arguments {given}", self.name)));
        }
        let mut arguments = arguments.to_vec();
        let mut addresses: Vec<*mut c_void> =
            arguments.iter_mut().map(|argument| (&raw mut argument.bits).cast()).collect();
        // SAFETY: (1) the arguments are of the parameters' types, as just seen; (2) a pointer is a buffer's, which is
        // borrowed and hides its memory in a cell; (3) that the kernel stays inside its buffers is
        // what a test is there to find: their guards catch writes nearby.
        unsafe { self.run_raw(addresses.as_mut_ptr()) }
    }

    /// Runs the kernel with what `cuLaunchKernel` takes: the address of each argument.
    ///
    /// # Errors
    /// As [`Launch::run`].
    ///
    /// # Safety
    /// `arguments` has an address for each of the kernel's parameters ([`signature`]), and their pointers are to memory
    /// that the kernel may use as it does.
    pub unsafe fn run_raw(&self, arguments: *mut *mut c_void) -> Result<(), LaunchError> {
        let name = CString::new(self.name).map_err(|error| LaunchError(error.to_string()))?;
        let [grid, size] = [self.grid, self.block].map(|[x, y, z]| Uint3 { x, y, z });
        let Self { shared_bytes, cluster, .. } = *self;
        // SAFETY: the name ends with a zero.
        let kernel = unsafe { host_launchable(name.as_ptr(), grid, size, shared_bytes, cluster) };
        if kernel.is_null() {
            return Err(last_error());
        }
        let (schedule, gates) = (SCHEDULE.get(), UnsafeCell::default());
        let launch = Blocks { kernel, grid, size, shared_bytes, cluster, arguments, schedule, gates };
        // SAFETY: the shim wants a launch that it has looked at.
        unsafe { host_begin(&launch) };
        let [across, down, deep] = self.grid.map(u64::from);
        let across = across / u64::from(cluster);
        let ran = (0..across * down * deep).into_par_iter().try_for_each(|number| {
            let [x, y, z] = [number % across, number / across % down, number / (across * down)];
            let index = Uint3 { x: x as c_uint * cluster, y: y as c_uint, z: z as c_uint };
            let launch = &launch;
            // SAFETY: the shim looked at what is launched; the arguments are as the caller promises.
            if unsafe { host_run_cluster(launch, index) } == 0 { Ok(()) } else { Err(last_error()) }
        });
        // SAFETY: as before.
        unsafe { host_end(&launch) };
        ran
    }
}

/// What the shim says of this thread's last call.
fn last_error() -> LaunchError {
    // SAFETY: the shim returns a string that lives until this thread's next call.
    let why = unsafe { CStr::from_ptr(host_last_error()) };
    LaunchError(why.to_string_lossy().into_owned())
}

/// A letter for each of a kernel's parameters, if there is such a kernel: `p` pointer, `i` int32, `u` uint32, `l` int64,
/// `v` uint64, `f` float, `d` double.
pub fn signature(name: &str) -> Option<&'static str> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name ends with a zero.
    static_text(unsafe { host_signature(name.as_ptr()) })
}

/// The file of `kernels/` that has a kernel, without its extension, if there is such a kernel.
pub fn file(name: &str) -> Option<&'static str> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name ends with a zero.
    let path = Path::new(static_text(unsafe { host_file(name.as_ptr()) })?);
    path.file_stem()?.to_str()
}

/// The names of all kernels, in no order.
pub fn names() -> impl Iterator<Item = &'static str> {
    // SAFETY: any index is allowed.
    (0..).map_while(|index| static_text(unsafe { host_kernel_name(index) }))
}

/// `"address"` or `"thread"` where a sanitizer watches the kernels: `cargo xtask test --sanitize`. What it finds fails a launch.
pub const SANITIZER: &str = env!("HOST_KERNELS_SANITIZER");

/// Runs `body` with the threads of blocks in an order drawn from `seed`: a race may show as another result.
pub fn shuffled<R>(seed: u64, body: impl FnOnce() -> R) -> R {
    SCHEDULE.set(seed);
    let result = body();
    SCHEDULE.set(0);
    result
}

/// Tells a sanitizer that kernels have no business in these bytes, or that they do again; the caller may read them only then.
fn forbid(bytes: &[u8], forbidden: bool) {
    let act = if forbidden { host_forbid } else { host_allow };
    // SAFETY: the bytes exist.
    unsafe { act(bytes.as_ptr().cast(), bytes.len()) };
}

fn static_text(text: *const c_char) -> Option<&'static str> {
    // SAFETY: null, or a constant of the shim's.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }).and_then(|text| text.to_str().ok())
}

thread_local! {
    /// Of a block's threads, in launches of this thread: 0 is their own order.
    static SCHEDULE: Cell<u64> = const { Cell::new(0) };
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Uint3 {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

/// The shim's `Launch`.
#[repr(C)]
struct Blocks {
    kernel: *const c_void,
    grid: Uint3,
    size: Uint3,
    shared_bytes: c_uint,
    cluster: c_uint,
    arguments: *mut *mut c_void,
    schedule: u64,
    gates: UnsafeCell<[c_char; 2]>,
}

// SAFETY: the shim reads it, and hands the arguments to kernels, whose blocks may run beside each other; gates are addresses.
unsafe impl Sync for Blocks {}

unsafe extern "C" {
    fn host_launchable(
        name: *const c_char,
        grid: Uint3,
        size: Uint3,
        shared_bytes: c_uint,
        cluster: c_uint,
    ) -> *const c_void;
    fn host_run_cluster(launch: &Blocks, index: Uint3) -> c_int;
    fn host_begin(launch: &Blocks);
    fn host_end(launch: &Blocks);
    fn host_last_error() -> *const c_char;
    fn host_signature(name: *const c_char) -> *const c_char;
    fn host_file(name: *const c_char) -> *const c_char;
    fn host_kernel_name(index: c_uint) -> *const c_char;
    fn host_forbid(from: *const c_void, bytes: usize);
    fn host_allow(from: *const c_void, bytes: usize);
}
