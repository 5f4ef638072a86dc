//! An NVIDIA card, through candle's device: its stream, its memory.

#[path = "cuda_arena.rs"]
mod arena;
#[path = "cuda_capture.rs"]
mod capture;
#[path = "cuda_device.rs"]
mod device;
#[path = "cuda_driver.rs"]
mod driver;
#[path = "cuda_launch.rs"]
mod launch;
#[path = "cuda_reading.rs"]
mod reading;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage};
use half::{bf16, f16};

use device::chip;
pub(super) use device::{Recorded, device, free_memory};

use super::files::file_of;
use super::{Argument, Array, COUNTERS, Chip, Given, Gpu, Launch, Sizes, View, product, times};
use crate::Error;

mod fatbins {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// Dynamic shared memory that a kernel may have without asking.
const SHARED_BYTES: usize = 48 * 1024;

/// A device of candle's, and the kernels loaded on it.
pub(crate) struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
}

impl Cuda {
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        Ok(Self { device: device.clone(), stream: device.cuda_stream(), kernels: Kernels::on(device)? })
    }

    /// The device that memory is on.
    pub(crate) fn of(storage: &CudaStorage) -> Result<Self> {
        Self::new(&storage.device)
    }

    /// Microseconds of what `launch` launches.
    #[cfg(test)]
    pub(super) fn time(&self, launch: &dyn Fn() -> Result<()>) -> Result<f64> {
        let recorded = Recorded::new(&self.device, &|| (0..launch::TIMES).try_for_each(|_| launch()))?;
        Ok(recorded.time(&self.stream)? / launch::TIMES as f64)
    }

    fn alloc_of<T: CudaDType + DeviceRepr>(&self, len: usize) -> Result<CudaStorage> {
        // SAFETY: what it holds is read by kernels alone, and each writes the whole of its results before another reads them.
        #[allow(unsafe_code)]
        let slice = unsafe { self.device.alloc::<T>(len)? };
        Ok(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }

    fn copy_of<T: CudaDType + DeviceRepr>(&self, view: View<'_, Self>) -> Result<CudaStorage> {
        let slice: &CudaSlice<T> = view.buffer.as_cuda_slice()?;
        let copy = self.stream.clone_dtod(&slice.slice(view.first..view.first + view.len)).w()?;
        Ok(CudaStorage::wrap_cuda_slice(copy, self.device.clone()))
    }
}

impl Gpu for Cuda {
    type Buffer = CudaStorage;
    type Storage = CudaStorage;

    fn chip(&self) -> Chip {
        self.kernels.chip
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Array<Self>> {
        let buffer = match dtype {
            DType::F32 => self.alloc_of::<f32>(len)?,
            DType::F16 => self.alloc_of::<f16>(len)?,
            DType::BF16 => self.alloc_of::<bf16>(len)?,
            DType::U32 => self.alloc_of::<u32>(len)?,
            other => return Err(candle_core::Error::UnsupportedDTypeForOp(other, "alloc").bt()),
        };
        Ok(Array { buffer, dtype, len })
    }

    fn counters(&self) -> Result<Given<'_, Self>> {
        let buffer = &self.kernels.counters;
        Ok(Given::Here(View { buffer, dtype: DType::U32, first: 0, len: COUNTERS }))
    }

    fn launch(&self, launch: &Launch, arguments: &[Argument<'_, Self>]) -> Result<()> {
        let sizes = launch.sizes()?;
        // Functions are found and launched in the thread's context, which is another's, or none, in a thread that is new here.
        self.stream.context().bind_to_thread().map_err(|error| launch.error(error))?;
        let function = self.kernels.function(launch)?;
        let mut values =
            arguments.iter().map(|argument| self.value(launch, argument)).collect::<Result<Vec<_>>>()?;
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(Value::as_mut_ptr).collect();
        let early = self.kernels.chip.sm90a;
        // SAFETY: (1) number and types of the arguments are the kernel's: every launch runs in tests on the CPU, which compare
        // them with its signature; (2) the memory is borrowed until now, and freed on the same stream, behind the kernel; (3)
        // that a kernel stays inside its arrays is what those tests look at too.
        let mut run = || {
            #[allow(unsafe_code)]
            unsafe {
                launch::on_stream(&self.stream, &function, sizes, &mut pointers, early)
            }
        };
        run().map_err(|error| launch.error(error))?;
        if times::measuring() {
            let time = launch::time(&self.stream, run).map_err(|error| launch.error(error))?;
            times::note(&launch.name, launch.grid, time);
        }
        Ok(())
    }

    fn given<'a>(&self, storage: &'a CudaStorage, layout: &Layout) -> Result<Given<'a, Self>> {
        let Some((first, end)) = layout.contiguous_offsets() else {
            return Err(candle_core::Error::RequiresContiguous { op: "hiper-kernels" }.bt());
        };
        let dtype = match &storage.slice {
            CudaStorageSlice::F32(_) => DType::F32,
            CudaStorageSlice::F16(_) => DType::F16,
            CudaStorageSlice::BF16(_) => DType::BF16,
            CudaStorageSlice::U32(_) => DType::U32,
            _ => return Err(candle_core::Error::UnsupportedDTypeForOp(storage.dtype(), "a kernel").bt()),
        };
        Ok(Given::Here(View { buffer: storage, dtype, first, len: end - first }))
    }

    fn copy(&self, given: Given<'_, Self>) -> Result<Array<Self>> {
        let view = given.view();
        let buffer = match view.dtype {
            DType::F16 => self.copy_of::<f16>(view)?,
            DType::BF16 => self.copy_of::<bf16>(view)?,
            DType::U32 => self.copy_of::<u32>(view)?,
            _ => self.copy_of::<f32>(view)?,
        };
        Ok(Array { buffer, dtype: view.dtype, len: view.len })
    }

    fn storage(&self, array: Array<Self>) -> Result<CudaStorage> {
        Ok(array.buffer)
    }

    fn storage_of(storage: &Storage) -> Option<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    fn any_storage(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }
}

/// What an argument's address is taken of.
enum Value {
    Pointer(u64),
    Int(i32),
    Long(i64),
    F32(f32),
    F64(f64),
}

impl Value {
    fn as_mut_ptr(&mut self) -> *mut c_void {
        match self {
            Self::Pointer(address) => ptr::from_mut(address).cast(),
            Self::Int(n) => ptr::from_mut(n).cast(),
            Self::Long(n) => ptr::from_mut(n).cast(),
            Self::F32(x) => ptr::from_mut(x).cast(),
            Self::F64(x) => ptr::from_mut(x).cast(),
        }
    }
}

impl Cuda {
    fn value(&self, launch: &Launch, argument: &Argument<'_, Self>) -> Result<Value> {
        Ok(match *argument {
            Argument::Pointer(view) => Value::Pointer(self.address(launch, view)?),
            Argument::Null => Value::Pointer(0),
            Argument::Size(n) => Value::Int(launch.int(n)?),
            Argument::Count(n) => Value::Long(n as i64),
            Argument::F32(x) => Value::F32(x),
            Argument::F64(x) => Value::F64(x),
        })
    }

    fn address(&self, launch: &Launch, view: View<'_, Self>) -> Result<u64> {
        if view.buffer.device.id() != self.device.id() {
            return Err(Error::Device.into());
        }
        // The guards that come with addresses order streams by events: there is one stream.
        let (start, len) = match &view.buffer.slice {
            CudaStorageSlice::F32(slice) => (slice.device_ptr(&self.stream).0, slice.len()),
            CudaStorageSlice::F16(slice) => (slice.device_ptr(&self.stream).0, slice.len()),
            CudaStorageSlice::BF16(slice) => (slice.device_ptr(&self.stream).0, slice.len()),
            CudaStorageSlice::U32(slice) => (slice.device_ptr(&self.stream).0, slice.len()),
            _ => return Err(launch.error("not a type that kernels take")),
        };
        if view.first + view.len > len {
            return Err(launch.error(format!("numbers {}..{} of {len}", view.first, view.first + view.len)));
        }
        Ok(start + (view.first * view.dtype.size_in_bytes()) as u64)
    }
}

/// The kernels of one device: modules loaded once, functions found once.
struct Kernels {
    /// By their files.
    modules: HashMap<&'static str, Arc<CudaModule>>,
    chip: Chip,
    /// As [`Gpu::counters`] says.
    counters: CudaStorage,
    functions: Mutex<HashMap<String, Kernel>>,
}

/// A function, and the dynamic shared memory that it may have by now.
struct Kernel {
    function: CudaFunction,
    shared_bytes: usize,
}

impl Kernels {
    fn on(device: &CudaDevice) -> Result<Arc<Self>> {
        static LOADED: Mutex<Vec<(DeviceId, Arc<Kernels>)>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = loaded.iter().find(|(id, _)| *id == device.id()) {
            return Ok(kernels.clone());
        }
        let stream = device.cuda_stream();
        let load = |&(file, fatbin): &(&'static str, &[u8])| {
            let module = stream.context().load_module(Ptx::from_binary(fatbin.to_vec()));
            module.map(|module| (file, module)).map_err(|error| {
                let reason = format!("not loaded: {error}");
                candle_core::Error::from(Error::Launch { kernel: file.into(), reason })
            })
        };
        let chip = chip(stream.context())?;
        let fatbins = fatbins::FATBINS.iter().filter(|(file, _)| chip.sm90a || !file.ends_with("_sm90a"));
        let modules = fatbins.map(load).collect::<Result<_>>()?;
        let counters = CudaStorage::wrap_cuda_slice(device.alloc_zeros::<u32>(COUNTERS)?, device.clone());
        let mut kernels = Self { modules, chip, counters, functions: Mutex::default() };
        if chip.sm90a {
            let launch = product::in_clusters();
            let function = kernels.function(&launch)?;
            // A driver that does not say gets none of four: products choose others.
            kernels.chip.clusters =
                launch::most_clusters(&stream, &function, launch.sizes()?).unwrap_or_default();
        }
        let kernels = Arc::new(kernels);
        loaded.push((device.id(), kernels.clone()));
        Ok(kernels)
    }

    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = functions.get_mut(&launch.name) {
            return kernel.function_for(launch, self.chip);
        }
        let module = self.modules.get(file_of(&launch.name));
        let module = module.ok_or_else(|| launch.error("no such kernel for this card"))?;
        let function = module.load_function(&launch.name).map_err(|error| launch.error(error))?;
        if self.chip.sm90a {
            // Of what a multiprocessor has for shared memory and its cache most is the former, for all kernels as the largest products
            // need it: to change the shares it may have to be empty, and launches could not come early.
            let preferred = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            function.set_attribute(preferred, 100).map_err(|error| launch.error(error))?;
        }
        let mut kernel = Kernel { function, shared_bytes: SHARED_BYTES };
        let function = kernel.function_for(launch, self.chip)?;
        functions.insert(launch.name.clone(), kernel);
        Ok(function)
    }
}

impl Kernel {
    /// Asks for shared memory if there is need of more than any launch had before.
    fn function_for(&mut self, launch: &Launch, chip: Chip) -> Result<CudaFunction> {
        let wanted = launch.shared_bytes;
        if wanted > self.shared_bytes {
            if wanted > chip.shared_bytes {
                let most = chip.shared_bytes;
                return Err(launch.error(format!("a block has {most} bytes of shared memory, not {wanted}")));
            }
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let asked = self.function.set_attribute(attribute, launch.int(wanted)?);
            asked.map_err(|error| launch.error(error))?;
            self.shared_bytes = wanted;
        }
        Ok(self.function.clone())
    }
}
