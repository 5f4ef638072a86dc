//! Modules and the kernels in them.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::{give, within_context};
use crate::state::{Result, State, Status};
use crate::work::{self, Function, Launch, Work};

/// What candle's modules are compiled from.
const CANDLES: [&CStr; 11] = [
    c"affine",
    c"binary",
    c"cast",
    c"conv",
    c"fill",
    c"indexing",
    c"quantized",
    c"reduce",
    c"sort",
    c"ternary",
    c"unary",
];

/// Whose kernels a module has.
#[derive(Debug)]
pub enum Module {
    Candles,
    /// Those of a file of this project's.
    File(String),
    /// Of this project's, some.
    Unknown,
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: *mut *const Module, image: *const c_char) -> c_uint {
    within_context(|state| {
        state.check_no_capture("loading a module")?;
        let name = unsafe { CStr::from_ptr(image) };
        let file = name.to_str().unwrap_or_default();
        // An empty one is candle's too: its build keeps what an earlier stand-in for nvcc left. What nvcc itself makes is text of
        // candle's kernels, which begins with a comment, and binary of this project's.
        let candles = CANDLES.contains(&name) || name.is_empty() || name.to_bytes().starts_with(b"//");
        // nvcc's binaries do not say here what they were made of.
        let known = host_kernels::names().any(|kernel| host_kernels::file(kernel) == Some(file));
        let kind = match (candles, known) {
            (true, _) => Module::Candles,
            (false, true) => Module::File(file.to_owned()),
            (false, false) => Module::Unknown,
        };
        // Modules and functions live as long as the program.
        give(module, Box::leak(Box::new(kind)))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoad(_module: *mut u64, _path: *const c_char) -> c_uint {
    Status::NOT_FOUND.0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_module: u64) -> c_uint {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(
    function: *mut *const Function,
    module: *const Module,
    name: *const c_char,
) -> c_uint {
    within_context(|state| {
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let module = unsafe { &*module };
        let here = match module {
            Module::File(file) => host_kernels::file(&name) == Some(file),
            _ => true,
        };
        let found = Function::named(&name, matches!(module, Module::Candles)).filter(|_| here);
        let Some(found) = found else {
            return state.refuse(Status::NOT_FOUND, &format!("no kernel {name} in {module:?}"));
        };
        give(function, Box::leak(Box::new(found)))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: *mut Function, attribute: c_uint, value: c_int) -> c_uint {
    within_context(|state| match (attribute, u32::try_from(value)) {
        // The most dynamic shared memory.
        (8, Ok(bytes)) if bytes <= state.card.shared_bytes => {
            unsafe { (*function).shared_bytes = bytes };
            Ok(())
        }
        // The part of shared memory and first-level cache that is the former, a hint.
        (9, Ok(0..=100)) => Ok(()),
        _ => state.refuse(Status::INVALID_VALUE, &format!("attribute {attribute} = {value}")),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel(
    function: *const Function,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: u64,
    arguments: *const *const u8,
    _extra: *const c_void,
) -> c_uint {
    let [grid, block] = [[grid_x, grid_y, grid_z], [block_x, block_y, block_z]];
    let sizes = Sizes { grid, block, shared_bytes, stream, attributes: std::ptr::null(), count: 0 };
    within_context(|state| launch(state, unsafe { &*function }, &sizes, arguments))
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct Sizes {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: u64,
    attributes: *const Attribute,
    count: c_uint,
}

/// `CUlaunchAttribute`.
#[repr(C)]
pub struct Attribute {
    id: c_uint,
    pad: [u8; 4],
    value: [c_int; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
const CLUSTER_DIMENSION: c_uint = 4;

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernelEx(
    sizes: *const Sizes,
    function: *const Function,
    arguments: *const *const u8,
    _extra: *const c_void,
) -> c_uint {
    within_context(|state| launch(state, unsafe { &*function }, unsafe { &*sizes }, arguments))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxActiveClusters(
    clusters: *mut c_int,
    function: *const Function,
    sizes: *const Sizes,
) -> c_uint {
    within_context(|state| {
        let (function, Sizes { attributes, count, .. }) = unsafe { (&*function, &*sizes) };
        match attributes_of(*attributes, *count) {
            // Of an H100's groups of 16 and 18 multiprocessors, with a block on each.
            [Attribute { id: CLUSTER_DIMENSION, value: [4, 1, 1, ..], .. }] => {
                unsafe { *clusters = 32 };
                Ok(())
            }
            _ => state.refuse(Status::INVALID_VALUE, &format!("clusters of {}", function.name)),
        }
    })
}

fn attributes_of<'a>(first: *const Attribute, count: c_uint) -> &'a [Attribute] {
    if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(first, count as usize) } }
}

fn launch(
    state: &mut State,
    function: &'static Function,
    sizes: &Sizes,
    arguments: *const *const u8,
) -> Result {
    let Sizes { grid, block, shared_bytes, stream, attributes, count } = *sizes;
    let refuse =
        |state: &State, why| state.refuse(Status::INVALID_VALUE, &format!("{} {why}", function.name));
    if shared_bytes > function.shared_bytes {
        return refuse(state, format!("has {shared_bytes} bytes of shared memory, which nobody asked for"));
    }
    if grid.iter().chain(&block).any(|size| *size == 0)
        || block.iter().product::<u32>() > 1024
        || grid[1].max(grid[2]) > 65535
    {
        return refuse(state, format!("on {grid:?} of {block:?}"));
    }
    let (mut early, mut cluster) = (false, 1);
    for Attribute { id, value, .. } in attributes_of(attributes, count) {
        match (*id, *value) {
            (PROGRAMMATIC_STREAM_SERIALIZATION, [wanted, ..]) => early = wanted == 1,
            (CLUSTER_DIMENSION, [size @ 1..=8, 1, 1, ..]) if grid[0].is_multiple_of(size as u32) => {
                cluster = size as u32;
            }
            (CLUSTER_DIMENSION, [x, y, z, ..]) => {
                return refuse(state, format!("on {grid:?} in clusters of {:?}", [x, y, z]));
            }
            _ => return refuse(state, "has attributes that are not known here".into()),
        }
    }
    if early {
        state.check_may_begin_early(stream, function)?;
    }
    let arguments = function.signature.chars().enumerate().map(|(i, letter)| {
        let mut bits = [0; 8];
        let bytes = work::bytes(letter);
        unsafe { std::ptr::copy_nonoverlapping(*arguments.add(i), bits.as_mut_ptr(), bytes) };
        u64::from_ne_bytes(bits)
    });
    let launch =
        Launch { arguments: arguments.collect(), function, grid, block, shared_bytes, cluster, early };
    state.enqueue(stream, Work::Launch(launch))
}
