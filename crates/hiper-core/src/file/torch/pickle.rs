//! The pickle of one tensor, and nothing else: no code runs, and what is read stays smaller than the file.

use std::collections::HashMap;

use candle_core::DType;

/// Where a tensor's numbers are. Offset and strides count numbers, not bytes.
#[derive(Debug, PartialEq)]
pub struct TensorRecord {
    pub dtype: DType,
    pub storage: String,
    pub offset: usize,
    pub size: Vec<usize>,
    pub strides: Vec<usize>,
}

/// What went wrong, for the field `got` of an error.
type Result<T> = std::result::Result<T, String>;

/// A value's place in [`Machine::values`]. Values refer to older ones only.
type Id = usize;

enum Value {
    Mark,
    Integer(i64),
    Text(String),
    /// A class or function, `module name`.
    Global(String),
    Tuple(Vec<Id>),
    /// A function applied to a tuple of arguments.
    Call(Id, Id),
    /// What torch keeps outside the pickle: a storage.
    Persistent(Id),
    /// Something that a tensor's record does not need.
    Other(&'static str),
}

/// Reads the pickle of a tensor or parameter.
pub fn parse(bytes: &[u8]) -> Result<TensorRecord> {
    let mut machine = Machine { bytes, values: Vec::new(), stack: Vec::new(), memo: HashMap::new() };
    let top = machine.run()?;
    machine.tensor(top)
}

struct Machine<'a> {
    bytes: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Carries out the opcodes that torch writes (Python's `pickletools`, protocol 2), and returns the value they leave.
    fn run(&mut self) -> Result<Id> {
        loop {
            match self.byte()? {
                0x80 => drop(self.byte()?),
                b'.' => return self.pop(),
                b'(' => self.push(Value::Mark),
                b'N' => self.push(Value::Other("nothing")),
                0x88 | 0x89 => self.push(Value::Other("a boolean")),
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other("a number"));
                }
                b'K' => {
                    let value = self.byte()?;
                    self.push(Value::Integer(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Value::Integer(value.into()));
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Integer(value.into()));
                }
                0x8a => {
                    let length = self.byte()?;
                    let digits = self.take(length.into())?;
                    let value = long(digits).ok_or("an integer beyond 64 bits")?;
                    self.push(Value::Integer(value));
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?);
                    let text = self.take(length as usize)?;
                    let text = std::str::from_utf8(text).map_err(|_| "text that is not UTF-8")?;
                    self.push(Value::Text(text.into()));
                }
                b'c' => {
                    let name = format!("{} {}", self.line()?, self.line()?);
                    self.push(Value::Global(name));
                }
                b')' => self.push(Value::Tuple(Vec::new())),
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items));
                }
                count @ 0x85..=0x87 => {
                    let start = self.stack.len().checked_sub(usize::from(count - 0x84)).ok_or(SHORT)?;
                    let items = self.stack.split_off(start);
                    self.push(Value::Tuple(items));
                }
                b']' => self.push(Value::Other("a list")),
                b'}' => self.push(Value::Other("a dictionary")),
                b's' => {
                    self.pop()?;
                    self.pop()?;
                }
                b'b' | b'a' => drop(self.pop()?),
                b'u' | b'e' => drop(self.pop_to_mark()?),
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Persistent(id));
                }
                b'R' => {
                    let arguments = self.pop()?;
                    let function = self.pop()?;
                    self.push(Value::Call(function, arguments));
                }
                b'q' => {
                    let key = self.byte()?;
                    self.remember(key.into())?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.remember(key)?;
                }
                b'h' => {
                    let key = self.byte()?;
                    self.recall(key.into())?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.recall(key)?;
                }
                code => return Err(format!("a pickle with opcode {code:#04x}, which no tensor has")),
            }
        }
    }

    /// The record behind `_rebuild_tensor_v2(storage, offset, size, strides, …)`, or behind a parameter around it.
    fn tensor(&self, mut top: Id) -> Result<TensorRecord> {
        loop {
            let Value::Call(function, arguments) = self.values[top] else {
                return Err(self.describe(top));
            };
            let (Value::Global(name), Value::Tuple(arguments)) =
                (&self.values[function], &self.values[arguments])
            else {
                return Err("a call that no tensor has".into());
            };
            match (name.as_str(), &arguments[..]) {
                ("torch._utils _rebuild_tensor_v2", &[storage, offset, size, strides, ..]) => {
                    let (dtype, storage) = self.storage(storage)?;
                    let offset = self.size(offset)?;
                    return Ok(TensorRecord {
                        dtype,
                        storage,
                        offset,
                        size: self.sizes(size)?,
                        strides: self.sizes(strides)?,
                    });
                }
                // The tensor in it is older, so this ends.
                ("torch._utils _rebuild_parameter", &[tensor, ..]) => top = tensor,
                (name, _) => return Err(format!("a value made by {name:?}")),
            }
        }
    }

    /// Type and name of `("storage", class, name, device, length)`.
    fn storage(&self, id: Id) -> Result<(DType, String)> {
        let Value::Persistent(id) = self.values[id] else { return Err("a tensor without storage".into()) };
        let Value::Tuple(items) = &self.values[id] else { return Err("a malformed storage".into()) };
        let &[_, class, name, ..] = &items[..] else { return Err("a malformed storage".into()) };
        let (Value::Global(class), Value::Text(name)) = (&self.values[class], &self.values[name]) else {
            return Err("a malformed storage".into());
        };
        let dtype = match class.as_str() {
            "torch FloatStorage" => DType::F32,
            "torch DoubleStorage" => DType::F64,
            "torch HalfStorage" => DType::F16,
            "torch BFloat16Storage" => DType::BF16,
            other => return Err(format!("a tensor of {other:?}, not of floating point numbers")),
        };
        Ok((dtype, name.clone()))
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>> {
        match &self.values[id] {
            Value::Tuple(items) => items.iter().map(|&item| self.size(item)).collect(),
            _ => Err("a shape that is not a tuple".into()),
        }
    }

    fn size(&self, id: Id) -> Result<usize> {
        match self.values[id] {
            Value::Integer(value) => {
                usize::try_from(value).map_err(|_| format!("a size or offset of {value}"))
            }
            _ => Err("a size that is not an integer".into()),
        }
    }

    fn describe(&self, id: Id) -> String {
        match &self.values[id] {
            Value::Other(what) => (*what).into(),
            Value::Tuple(items) => format!("a tuple of {}", items.len()),
            Value::Text(_) => "text".into(),
            Value::Integer(_) => "an integer".into(),
            _ => "something else".into(),
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id> {
        self.stack.pop().ok_or_else(|| SHORT.into())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.stack.iter().rposition(|&id| matches!(self.values[id], Value::Mark)).ok_or(SHORT)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn remember(&mut self, key: u32) -> Result<()> {
        let &id = self.stack.last().ok_or(SHORT)?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let &id = self.memo.get(&key).ok_or(SHORT)?;
        self.stack.push(id);
        Ok(())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(n).ok_or("a pickle that ends early")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or("a pickle that ends early")?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.bytes.iter().position(|&b| b == b'\n').ok_or("a pickle that ends early")?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "text that is not UTF-8".into())
    }
}

/// An opcode found less on the stack than it takes.
const SHORT: &str = "a malformed pickle";

/// A two's complement integer, little end first.
fn long(digits: &[u8]) -> Option<i64> {
    let negative = digits.last().is_some_and(|&b| b >= 0x80);
    let mut bytes = [if negative { 0xff } else { 0 }; 8];
    bytes.get_mut(..digits.len())?.copy_from_slice(digits);
    Some(i64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_length() {
        for (digits, want) in [(&[][..], Some(0)), (&[5], Some(5)), (&[0xff], Some(-1)), (&[0, 1], Some(256))]
        {
            assert_eq!(long(digits), want);
        }
        assert_eq!(long(&[0; 9]), None);
    }

    #[test]
    fn malformed_pickles_are_said() {
        for (bytes, want) in [
            (&b""[..], "ends early"),
            (b".", "malformed"),
            (b"}.", "a dictionary"),
            (b"\x80\x02K\x05.", "an integer"),
            (b"N\x85.", "a tuple of 1"),
            (b"\x87.", "malformed"),
            (b"t.", "malformed"),
            (b"h\x07.", "malformed"),
            (b"X\xff\xff\xff\xff", "ends early"),
            (b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os system"),
            (b"\x93.", "0x93"),
            (b"(.", "something else"),
        ] {
            let error = parse(bytes).unwrap_err();
            assert!(error.contains(want), "{bytes:?}: {error}");
        }
    }

    #[test]
    fn a_memo_cannot_grow_the_values() {
        // Thirty doublings: a billion laughs when values are copied.
        let mut bytes = b"N".to_vec();
        for _ in 0..30 {
            bytes.extend_from_slice(b"q\x00h\x00\x86");
        }
        bytes.push(b'.');
        assert_eq!(parse(&bytes).unwrap_err(), "a tuple of 2");
    }
}
