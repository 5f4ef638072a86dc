//! candle's own kernels, those that networks here use, as its `cuda_backend` launches them: computed in `f64` and rounded.

use half::{bf16, f16};

/// What comes before `_TYPE` in a kernel's name, and its parameters. `T` stands for a number of the type.
const KERNELS: &[(&str, &str)] = &[
    ("affine", "llpppTT"),
    ("const_set", "llpTp"),
    ("copy2d", "ppuuuu"),
    ("fast_sum", "lllppp"),
    ("fast_sum_small", "lllppp"),
    ("is_u32", "llppppllll"),
    ("ucopy", "llppp"),
];

fn unary(name: &str) -> Option<fn(f64) -> f64> {
    Some(match name {
        "uexp" => f64::exp,
        "uneg" => |x| -x,
        "usqr" => |x| x * x,
        "usqrt" => f64::sqrt,
        _ => return None,
    })
}

fn binary(name: &str) -> Option<fn(f64, f64) -> f64> {
    Some(match name {
        "badd" => |a, b| a + b,
        "bsub" => |a, b| a - b,
        "bmul" => |a, b| a * b,
        "bdiv" => |a, b| a / b,
        "bmaximum" => f64::max,
        "bminimum" => f64::min,
        _ => return None,
    })
}

/// A letter for each parameter of a kernel, if there is such a kernel.
pub fn signature(name: &str) -> Option<String> {
    if let Some((from, to)) = cast(name) {
        return (Type::named(from).is_some() && Type::named(to).is_some()).then(|| "llppp".into());
    }
    let (operation, of) = name.rsplit_once('_')?;
    let of = Type::named(of)?;
    let letter = match of {
        Type::F32 => "f",
        Type::F64 => "d",
        Type::U32 => "u",
        Type::U8 => "b",
        Type::I64 => "l",
        Type::F16 | Type::BF16 => "h",
    };
    let known = KERNELS.iter().find(|(name, _)| *name == operation).map(|(_, letters)| *letters);
    let unary = unary(operation).map(|_| "llppp");
    let binary = binary(operation).map(|_| "llpppp");
    known.or(unary).or(binary).map(|letters| letters.replace('T', letter))
}

fn cast(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("cast_")?.split_once('_')
}

#[derive(Clone, Copy)]
enum Type {
    F32,
    F64,
    F16,
    BF16,
    U32,
    U8,
    I64,
}

impl Type {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "f32" => Self::F32,
            "f64" => Self::F64,
            "f16" => Self::F16,
            "bf16" => Self::BF16,
            "u32" => Self::U32,
            "u8" => Self::U8,
            "i64" => Self::I64,
            _ => return None,
        })
    }

    /// Number `index` at an address.
    unsafe fn read(self, address: u64, index: usize) -> f64 {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::F32 => (*(address as *const f32).add(index)).into(),
                Self::F64 => *(address as *const f64).add(index),
                Self::F16 => (*(address as *const f16).add(index)).to_f64(),
                Self::BF16 => (*(address as *const bf16).add(index)).to_f64(),
                Self::U32 => (*(address as *const u32).add(index)).into(),
                Self::U8 => (*(address as *const u8).add(index)).into(),
                Self::I64 => *(address as *const i64).add(index) as f64,
            }
        }
    }

    unsafe fn write(self, address: u64, index: usize, value: f64) {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::F32 => *(address as *mut f32).add(index) = value as f32,
                Self::F64 => *(address as *mut f64).add(index) = value,
                Self::F16 => *(address as *mut f16).add(index) = f16::from_f64(value),
                Self::BF16 => *(address as *mut bf16).add(index) = bf16::from_f64(value),
                Self::U32 => *(address as *mut u32).add(index) = value as u32,
                Self::U8 => *(address as *mut u8).add(index) = value as u8,
                Self::I64 => *(address as *mut i64).add(index) = value as i64,
            }
        }
    }

    /// A number given as an argument.
    fn argument(self, bits: u64) -> f64 {
        match self {
            Self::F32 => f32::from_bits(bits as u32).into(),
            Self::F64 => f64::from_bits(bits),
            Self::F16 => f16::from_bits(bits as u16).to_f64(),
            Self::BF16 => bf16::from_bits(bits as u16).to_f64(),
            Self::U32 => (bits as u32).into(),
            Self::U8 => (bits as u8).into(),
            Self::I64 => bits as i64 as f64,
        }
    }
}

/// Sizes and strides as candle sends them: `tensors` lists of strides behind the sizes, or nothing for tensors without gaps.
struct Shape<'a> {
    sizes: &'a [usize],
    strides: &'a [usize],
}

impl Shape<'_> {
    unsafe fn at(info: u64, rank: usize, tensors: usize) -> Self {
        if info == 0 {
            return Self { sizes: &[], strides: &[] };
        }
        // SAFETY: as the caller promises.
        let info = unsafe { std::slice::from_raw_parts(info as *const usize, rank * (1 + tensors)) };
        Self { sizes: &info[..rank], strides: &info[rank..] }
    }

    /// Where number `index` of a tensor lies.
    fn place(&self, index: usize, tensor: usize) -> usize {
        if self.sizes.is_empty() {
            return index;
        }
        let strides = &self.strides[tensor * self.sizes.len()..];
        let mut rest = index;
        let mut place = 0;
        for (size, stride) in self.sizes.iter().zip(strides).rev() {
            place += rest % size * stride;
            rest /= size;
        }
        place
    }
}

/// Runs a kernel that [`signature`] knows.
///
/// # Errors
/// There is none of this name.
///
/// # Safety
/// The arguments are the kernel's, and its pointers are to as many numbers as it takes.
pub unsafe fn run(name: &str, arguments: &[u64]) -> Result<(), String> {
    let unknown = || format!("{name}: candle's kernel is not known here");
    let (operation, from, to) = match cast(name) {
        Some((from, to)) => ("cast", from, to),
        None => {
            let (operation, of) = name.rsplit_once('_').ok_or_else(unknown)?;
            (operation, of, of)
        }
    };
    let (from, to) = (Type::named(from).ok_or_else(unknown)?, Type::named(to).ok_or_else(unknown)?);
    // SAFETY: all as the caller promises.
    unsafe {
        match operation {
            "copy2d" => copy2d(to, arguments),
            "fast_sum" | "fast_sum_small" => sum(to, operation == "fast_sum", arguments),
            "is_u32" => index_select(to, arguments),
            _ => map(operation, from, to, arguments),
        }
    }
    Ok(())
}

unsafe fn copy2d(of: Type, arguments: &[u64]) {
    let [rows, columns, from_stride, to_stride] = [2, 3, 4, 5].map(|i| arguments[i] as usize);
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        // SAFETY: as the caller promises.
        unsafe {
            let number = of.read(arguments[0], row * from_stride + column);
            of.write(arguments[1], row * to_stride + column, number);
        }
    }
}

/// `of_all`: the count is of what is summed, not of the sums.
unsafe fn sum(of: Type, of_all: bool, arguments: &[u64]) {
    let [count, each, rank] = [0, 1, 2].map(|i| arguments[i] as usize);
    // SAFETY: as the caller promises.
    let shape = unsafe { Shape::at(arguments[3], rank, 1) };
    for sum in 0..if of_all { count / each.max(1) } else { count } {
        let numbers = sum * each..(sum + 1) * each;
        // SAFETY: as the caller promises.
        unsafe {
            let total = numbers.map(|i| of.read(arguments[4], shape.place(i, 0))).sum();
            of.write(arguments[5], sum, total);
        }
    }
}

unsafe fn index_select(of: Type, arguments: &[u64]) {
    let [left, rows, ids, right] = [6, 7, 8, 9].map(|i| arguments[i] as usize);
    for (l, id) in (0..left).flat_map(|l| (0..ids).map(move |id| (l, id))) {
        // SAFETY: as the caller promises.
        unsafe {
            let row = Type::U32.read(arguments[3], id) as usize;
            for r in 0..right {
                let number = of.read(arguments[4], (l * rows + row) * right + r);
                of.write(arguments[5], (l * ids + id) * right + r, number);
            }
        }
    }
}

/// Kernels that make each number of one or two others, or of none.
unsafe fn map(operation: &str, from: Type, to: Type, arguments: &[u64]) {
    let [count, rank] = [0, 1].map(|i| arguments[i] as usize);
    let (unary, binary) = (unary(operation), binary(operation));
    // SAFETY: as the caller promises.
    let shape = unsafe { Shape::at(arguments[2], rank, if binary.is_some() { 2 } else { 1 }) };
    for i in 0..count {
        // SAFETY: as the caller promises.
        unsafe {
            let number = |tensor| from.read(arguments[3 + tensor], shape.place(i, tensor));
            match operation {
                "const_set" => to.write(arguments[4], shape.place(i, 0), to.argument(arguments[3])),
                "affine" => {
                    let [mul, add] = [5, 6].map(|i| from.argument(arguments[i]));
                    to.write(arguments[4], i, number(0) * mul + add);
                }
                _ => match (unary, binary) {
                    (Some(of), _) => to.write(arguments[4], i, of(number(0))),
                    (_, Some(of)) => to.write(arguments[5], i, of(number(0), number(1))),
                    _ => to.write(arguments[4], i, number(0)),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_known_by_operation_and_type() {
        assert_eq!(signature("badd_f16").as_deref(), Some("llpppp"));
        assert_eq!(signature("affine_bf16").as_deref(), Some("llppphh"));
        assert_eq!(signature("const_set_f32").as_deref(), Some("llpfp"));
        assert_eq!(signature("cast_f32_f16").as_deref(), Some("llppp"));
        for unknown in ["badd", "badd_f8", "cast_f32_x", "conv2d_f32"] {
            assert_eq!(signature(unknown), None);
        }
    }

    #[test]
    fn strides_say_where_numbers_lie() {
        let (from, mut to) = ([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0f32; 6]);
        // A matrix of 2 × 3, read as its transpose.
        let info = [3usize, 2, 1, 3];
        let arguments = [6, 2, info.as_ptr() as u64, from.as_ptr() as u64, to.as_mut_ptr() as u64];
        // SAFETY: six numbers each.
        unsafe { run("ucopy_f32", &arguments) }.unwrap();
        assert_eq!(to, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
