//! NVIDIA's driver, opened when a card is: programs start without it, and say so when they are asked for a card.
//!
//! candle wants the driver and five libraries of CUDA when a program is linked. Their names are found here instead. Those of the
//! driver's functions lead to the driver, once it is open. Those of the libraries' fail, as nothing here calls them; but for
//! handles, which candle makes with every device: they are null, and can be set up. So a program needs the driver alone.

// SAFETY: of the assembly: a function jumps, its arguments untouched, to the driver's of the same name, or returns a status that
// says that it did nothing.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::Error;

/// Comes with the driver.
const DRIVER: &CStr = c"libcuda.so.1";

/// Opens the driver, the first time.
///
/// # Errors
/// When there is none.
pub(super) fn open() -> Result<(), Error> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(find_functions).clone().map_err(Error::NoDriver)
}

fn find_functions() -> Result<(), String> {
    // SAFETY: (1) the driver is made to be opened so, and stays open; (2) names end with a zero; (3) the slots are as many as the
    // names, which the same list makes; (4) `dlerror` gives text after a failure, which is copied before anything else fails.
    unsafe {
        let driver = libc::dlopen(DRIVER.as_ptr(), libc::RTLD_NOW);
        if driver.is_null() {
            return Err(CStr::from_ptr(libc::dlerror()).to_string_lossy().into_owned());
        }
        for (function, slot) in FUNCTIONS.iter().zip(&hiper_driver) {
            let address = libc::dlsym(driver, function.as_ptr().cast());
            // An older driver's gaps go on failing.
            if !address.is_null() {
                slot.store(address, Ordering::Release);
            }
        }
    }
    let drivers = |functions: [&str; 2]| functions.map(|function| slot_of(function).load(Ordering::Acquire));
    let replace = |function, ours| slot_of(function).store(ours, Ordering::Release);
    let [allocate, free] = super::arena::instead_of(drivers(["cuMemAllocAsync\0", "cuMemFreeAsync\0"]));
    let read = super::reading::instead_of(drivers(["cuMemcpyDtoHAsync_v2\0", "cuStreamSynchronize\0"]));
    replace("cuMemAllocAsync\0", allocate);
    replace("cuMemFreeAsync\0", free);
    replace("cuMemcpyDtoHAsync_v2\0", read);
    Ok(())
}

/// Where a function jumps to.
fn slot_of(function: &str) -> &'static AtomicPtr<c_void> {
    let index = FUNCTIONS.iter().position(|other| *other == function).unwrap_or_default();
    // SAFETY: the slots are as many as the names.
    unsafe { &hiper_driver[index] }
}

/// Functions that jump to where their slots say: at first to one that fails with `CUDA_ERROR_NOT_FOUND`.
macro_rules! driver {
    ($($function:ident)*) => {
        /// Their names, each with a zero at its end.
        const FUNCTIONS: &[&str] = &[$(concat!(stringify!($function), "\0")),*];

        unsafe extern "C" {
            static hiper_driver: [AtomicPtr<c_void>; FUNCTIONS.len()];
        }

        std::arch::global_asm!(
            ".pushsection .text.hiper_driver, \"ax\", @progbits",
            $(
                concat!(".globl ", stringify!($function)),
                concat!(".hidden ", stringify!($function)),
                concat!(stringify!($function), ": jmp qword ptr [rip + hiper_driver_", stringify!($function), "]"),
            )*
            "hiper_driver_missing: mov eax, 500",
            "ret",
            ".popsection",
            ".pushsection .data.hiper_driver, \"aw\", @progbits",
            ".balign 8",
            ".globl hiper_driver",
            ".hidden hiper_driver",
            "hiper_driver:",
            $(concat!("hiper_driver_", stringify!($function), ": .quad hiper_driver_missing"),)*
            ".popsection",
        );
    };
}

/// Functions that give a null handle and succeed, those that do nothing but return a status, and those that end the program.
macro_rules! nothing {
    (handles: $($handle:ident)*; $($status:literal: $($function:ident)*;)* never: $($never:ident)*;) => {
        std::arch::global_asm!(
            ".pushsection .text.hiper_nothing, \"ax\", @progbits",
            $(concat!(".globl ", stringify!($handle)), concat!(".hidden ", stringify!($handle)),
              concat!(stringify!($handle), ":"),)*
            "mov qword ptr [rdi], 0",
            "xor eax, eax",
            "ret",
            $(
                $(concat!(".globl ", stringify!($function)), concat!(".hidden ", stringify!($function)),
                  concat!(stringify!($function), ":"),)*
                concat!("mov eax, ", $status),
                "ret",
            )*
            $(concat!(".globl ", stringify!($never)), concat!(".hidden ", stringify!($never)),
              concat!(stringify!($never), ":"),)*
            "ud2",
            ".popsection",
        );
    };
}

// What candle and this crate can reach, as `nm` shows: a name that is missing here is an undefined symbol of the linker's.
driver! {
    cuCtxDestroy_v2 cuCtxGetCurrent cuCtxSetCurrent cuCtxSynchronize cuDeviceGet cuDeviceGetAttribute
    cuDeviceGetMemPool cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDriverGetVersion cuEventCreate cuEventDestroy_v2
    cuEventElapsedTime_v2
    cuEventRecord cuEventSynchronize cuFuncSetAttribute cuGetErrorName cuGetErrorString cuGraphDestroy
    cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuGraphNodeGetType cuInit cuLaunchKernel
    cuLaunchKernelEx cuMemAllocAsync
    cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc
    cuMemPoolSetAttribute cuMemPoolTrimTo cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2
    cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction
    cuModuleLoad cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters cuStreamBeginCapture_v2 cuStreamCreate cuStreamDestroy_v2
    cuStreamEndCapture cuStreamGetCaptureInfo_v3 cuStreamIsCapturing cuStreamSynchronize cuStreamWaitEvent
}

// 15 is CUBLAS_STATUS_NOT_SUPPORTED, 101 CURAND_STATUS_NOT_INITIALIZED. The last are candle's kernels for quantised weights.
nothing! {
    handles: cublasCreate_v2 curandCreateGenerator;
    0: cublasDestroy_v2 cublasSetStream_v2 curandDestroyGenerator curandSetPseudoRandomGeneratorSeed curandSetStream;
    15: cublasDgemmStridedBatched cublasGemmStridedBatchedEx;
    101: curandGenerateNormal curandGenerateNormalDouble curandGenerateUniform curandGenerateUniformDouble;
    never:
        launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1
        launch_mmq_gguf_q4_k launch_mmq_gguf_q5_0 launch_mmq_gguf_q5_1 launch_mmq_gguf_q5_k
        launch_mmq_gguf_q6_k launch_mmq_gguf_q8_0 launch_mmq_quantize_q8_1_D2S6 launch_mmq_quantize_q8_1_D4
        launch_mmq_quantize_q8_1_DS4 launch_mmvq_gguf_q2_k_bf16_plain launch_mmvq_gguf_q2_k_f16_plain
        launch_mmvq_gguf_q2_k_f32_plain launch_mmvq_gguf_q3_k_bf16_plain launch_mmvq_gguf_q3_k_f16_plain
        launch_mmvq_gguf_q3_k_f32_plain launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_0_f16_plain
        launch_mmvq_gguf_q4_0_f32_plain launch_mmvq_gguf_q4_1_bf16_plain launch_mmvq_gguf_q4_1_f16_plain
        launch_mmvq_gguf_q4_1_f32_plain launch_mmvq_gguf_q4_k_bf16_plain launch_mmvq_gguf_q4_k_f16_plain
        launch_mmvq_gguf_q4_k_f32_plain launch_mmvq_gguf_q5_0_bf16_plain launch_mmvq_gguf_q5_0_f16_plain
        launch_mmvq_gguf_q5_0_f32_plain launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q5_1_f16_plain
        launch_mmvq_gguf_q5_1_f32_plain launch_mmvq_gguf_q5_k_bf16_plain launch_mmvq_gguf_q5_k_f16_plain
        launch_mmvq_gguf_q5_k_f32_plain launch_mmvq_gguf_q6_k_bf16_plain launch_mmvq_gguf_q6_k_f16_plain
        launch_mmvq_gguf_q6_k_f32_plain launch_mmvq_gguf_q8_0_bf16_plain launch_mmvq_gguf_q8_0_f16_plain
        launch_mmvq_gguf_q8_0_f32_plain launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16
        launch_mmvq_gguf_quantize_q8_1_f32;
}
