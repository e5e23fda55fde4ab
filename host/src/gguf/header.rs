//! The header of a GGUF file: metadata and the table of tensors, every number checked.
//!
//! Layout (v2 and v3, little endian): magic `GGUF`, version u32, tensor count u64, metadata count u64; per metadata
//! entry a key, a type u32 and a value; per tensor a name, its dimensions (fastest first), type u32 and offset u64 from
//! the data section, which starts at the next multiple of `general.alignment`. A string is a u64 length and its bytes.
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::TensorType;
use crate::error::{Error, IoContext, Result};

/// A metadata value. Integers of every width are `Int`: nothing here needs more than 63 bits.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Int(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a truth value",
            Self::String(_) => "a string",
            Self::Ints(_) => "a list of integers",
            Self::Floats(_) => "a list of numbers",
            Self::Bools(_) => "a list of truth values",
            Self::Strings(_) => "a list of strings",
        }
    }
}

/// One row of the table of tensors.
///
/// Invariant: `offset .. offset + bytes` lies inside the file, `bytes` is what `shape` needs in `tensor_type`, and a
/// row is a whole number of blocks.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub name: String,
    /// Slowest dimension first, as Hugging Face writes it (the file has it the other way round).
    pub shape: Vec<usize>,
    pub tensor_type: TensorType,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

impl TensorInfo {
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// An open file with its header read.
pub struct Gguf {
    path: PathBuf,
    file: File,
    len: u64,
    metadata: Vec<(String, Value)>,
    pub tensors: Vec<TensorInfo>,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Self> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
        let (stat, file) = opened
            .map_err(|error| Error::config(format!("cannot open the model file `{}`", path.display())).cause(error))?;
        if !stat.is_file() {
            return Err(Error::config(format!("`{}` is not a file", path.display()))
                .hint("name the `.gguf` file itself, such as `folder/model.gguf`"));
        }
        let mut header = Header { path, len: stat.len(), pos: 0, reader: BufReader::with_capacity(1 << 18, &file) };
        let (metadata, tensors) = header.read()?;
        Ok(Self { path: path.to_owned(), len: stat.len(), metadata, tensors, file })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// Reads `into.len()` bytes at `offset` from the start of the file.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(into, offset).path_context("read tensors from", &self.path)
    }

    pub fn int(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a count", |value| match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Float(x) => Some(*x),
            Value::Int(n) => Some(*n as f64),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a truth value", |value| if let Value::Bool(b) = value { Some(*b) } else { None })
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| if let Value::String(s) = value { Some(s.as_str()) } else { None })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "a list of strings", |value| if let Value::Strings(s) = value { Some(&s[..]) } else { None })
    }

    pub fn ints(&self, key: &str) -> Result<Option<&[i64]>> {
        self.typed(key, "a list of integers", |value| if let Value::Ints(n) = value { Some(&n[..]) } else { None })
    }

    /// `None` for a key the file has not; an error for one of another type.
    fn typed<'a, T>(&'a self, key: &str, needed: &str, pick: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match pick(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let found = if let Value::Int(n) = value { format!("{n}") } else { value.kind().to_owned() };
                Err(self.error(format!("metadata `{key}` of `{}` is {found}, not {needed}", self.path.display())))
            }
        }
    }

    /// The value of a key without which the file cannot be read.
    pub fn required<T>(&self, key: &str, value: Result<Option<T>>) -> Result<T> {
        value?.ok_or_else(|| self.error(format!("`{}` has no metadata `{key}`", self.path.display())))
    }

    fn error(&self, message: String) -> Error {
        Error::config(message).hint("the file is damaged, or its writer does not follow the format; get it again")
    }
}

/// A forward-only reader that knows how much of the file is left.
struct Header<'a> {
    path: &'a Path,
    len: u64,
    pos: u64,
    reader: BufReader<&'a File>,
}

/// Nothing sane comes near; a guard against a file that is all table.
const MAX_TENSORS: u64 = 1 << 20;
const MAX_DIMENSIONS: u32 = 4;

impl Header<'_> {
    #[allow(clippy::type_complexity)]
    fn read(&mut self) -> Result<(Vec<(String, Value)>, Vec<TensorInfo>)> {
        self.magic_and_version()?;
        let num_tensors = self.u64("the number of tensors")?;
        let num_entries = self.u64("the number of metadata entries")?;
        // A tensor takes 24 bytes of table at least, an entry 13: a larger count cannot be true.
        self.count(num_tensors.min(MAX_TENSORS + 1), 24, "tensors")?;
        self.count(num_entries, 13, "metadata entries")?;
        if num_tensors > MAX_TENSORS {
            return Err(self.damaged(format!("it declares {num_tensors} tensors; at most {MAX_TENSORS} are read")));
        }

        let mut metadata = vec![];
        let mut keys = HashSet::new();
        for _ in 0..num_entries {
            let key = self.string("a metadata key")?;
            let kind = self.u32("a metadata type")?;
            let value = self.value(&key, kind)?;
            if !keys.insert(key.clone()) {
                return Err(self.damaged(format!("metadata `{key}` appears twice")));
            }
            metadata.push((key, value));
        }

        let mut rows = vec![];
        for _ in 0..num_tensors {
            rows.push(self.tensor_row()?);
        }
        let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
            None => 32,
            Some((_, Value::Int(n))) if (1..=1 << 20).contains(n) && (*n as u64).is_power_of_two() => *n as u64,
            Some(_) => return Err(self.damaged("`general.alignment` is not a power of two up to 1 MiB".into())),
        };
        let data_start = self.pos.next_multiple_of(alignment);
        let mut names = HashSet::new();
        let tensors = rows.into_iter().map(|row| self.check_row(row, data_start)).collect::<Result<Vec<_>>>()?;
        match tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            Some(tensor) => Err(self.damaged(format!("tensor `{}` appears twice", tensor.name))),
            None => Ok((metadata, tensors)),
        }
    }

    fn magic_and_version(&mut self) -> Result<()> {
        let foreign = |found: &str| {
            Error::config(format!("`{}` is not a GGUF file: {found}", self.path.display()))
                .hint("`host import` reads llama.cpp's `.gguf` files; a Hugging Face folder needs no import")
        };
        if self.len < 24 {
            return Err(foreign(&format!("it has {} bytes", self.len)));
        }
        let mut magic = [0; 4];
        self.bytes(&mut magic, "the magic number")?;
        if &magic != b"GGUF" {
            return Err(foreign(&format!("it starts with `{}`, not `GGUF`", magic.escape_ascii())));
        }
        match self.u32("the version")? {
            2 | 3 => Ok(()),
            v if v.swap_bytes() <= 3 => Err(Error::config(format!("`{}` is a big-endian GGUF", self.path.display()))
                .hint("convert it with llama.cpp's `gguf-convert-endian` first")),
            v => {
                Err(Error::config(format!("`{}` is GGUF version {v}; versions 2 and 3 are read", self.path.display()))
                    .hint("convert the model again with a current llama.cpp"))
            }
        }
    }

    fn tensor_row(&mut self) -> Result<TensorRow> {
        let name = self.string("a tensor name")?;
        let num_dimensions = self.u32("a tensor's number of dimensions")?;
        if !(1..=MAX_DIMENSIONS).contains(&num_dimensions) {
            return Err(self.damaged(format!("tensor `{name}` has {num_dimensions} dimensions; 1 to 4 are possible")));
        }
        let mut shape = vec![];
        for _ in 0..num_dimensions {
            shape.push(self.u64("a tensor's shape")?);
        }
        shape.reverse();
        let type_id = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        Ok(TensorRow { name, shape, type_id, offset })
    }

    fn check_row(&self, row: TensorRow, data_start: u64) -> Result<TensorInfo> {
        let TensorRow { name, shape, type_id, offset } = row;
        let tensor_type = TensorType::from_id(type_id).map_err(|found| {
            Error::config(format!("tensor `{name}` of `{}` is quantised as {found}", self.path.display()))
                .cause(format!("these are read: {}", TensorType::READ))
                .hint("take a Q8_0, Q4_1, F16 or BF16 file of the same model, or requantise with `llama-quantize --allow-requantize`")
        })?;
        let (block, block_bytes) = tensor_type.block();
        let row_elements = shape[shape.len() - 1];
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0);
        let bytes = elements.and_then(|n| (n / block as u64).checked_mul(block_bytes as u64));
        let (Some(bytes), true) = (bytes, row_elements.is_multiple_of(block as u64)) else {
            let (shape, of) = (shape_text(&shape), tensor_type.name());
            return Err(self.damaged(format!("tensor `{name}` cannot have shape {shape} as {of}")));
        };
        let start = data_start.checked_add(offset);
        match start.and_then(|start| start.checked_add(bytes)) {
            Some(end) if end <= self.len => {}
            end => {
                let end = end.map_or("beyond any file".to_owned(), |end| format!("at byte {end}"));
                return Err(self.damaged(format!("tensor `{name}` ends {end}, the file has {} bytes", self.len)));
            }
        }
        // Both fit: the elements take at least half a byte each of a file that exists.
        let shape = shape.iter().map(|&d| d as usize).collect();
        Ok(TensorInfo { name, shape, tensor_type, offset: data_start + offset, bytes })
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        if kind != ARRAY {
            return self.scalar(key, kind);
        }
        let kind = self.u32("a list's type")?;
        let count = self.u64("a list's length")?;
        let Some(least) = least_bytes(kind) else {
            return Err(self.damaged(format!("metadata `{key}` is a list of type {kind}, which is not one")));
        };
        self.count(count, least, &format!("values of `{key}`"))?;
        let mut values = match kind {
            STRING => Value::Strings(vec![]),
            BOOL => Value::Bools(vec![]),
            FLOAT32 | FLOAT64 => Value::Floats(vec![]),
            _ => Value::Ints(vec![]),
        };
        for _ in 0..count {
            match (&mut values, self.scalar(key, kind)?) {
                (Value::Strings(all), Value::String(one)) => all.push(one),
                (Value::Bools(all), Value::Bool(one)) => all.push(one),
                (Value::Floats(all), Value::Float(one)) => all.push(one),
                (Value::Ints(all), Value::Int(one)) => all.push(one),
                _ => unreachable!("a list's type decides its values'"),
            }
        }
        Ok(values)
    }

    fn scalar(&mut self, key: &str, kind: u32) -> Result<Value> {
        let doing = "a metadata value";
        Ok(match kind {
            0 => Value::Int(self.array::<1>(doing)?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array(doing)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(doing)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(doing)?).into()),
            4 => Value::Int(self.u32(doing)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(doing)?).into()),
            FLOAT32 => Value::Float(shortest(f32::from_le_bytes(self.array(doing)?))),
            BOOL => match self.array::<1>(doing)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                n => return Err(self.damaged(format!("metadata `{key}` is a truth value of {n}"))),
            },
            STRING => Value::String(self.string(doing)?),
            10 => {
                let n = self.u64(doing)?;
                Value::Int(n.try_into().map_err(|_| self.damaged(format!("metadata `{key}` is {n}")))?)
            }
            11 => Value::Int(i64::from_le_bytes(self.array(doing)?)),
            FLOAT64 => Value::Float(f64::from_le_bytes(self.array(doing)?)),
            _ => return Err(self.damaged(format!("metadata `{key}` has type {kind}; 0 to 12 are defined"))),
        })
    }

    fn string(&mut self, doing: &str) -> Result<String> {
        let len = self.u64(doing)?;
        if len > self.len - self.pos {
            return Err(self.damaged(format!("{doing} of {len} bytes begins at byte {} of {}", self.pos, self.len)));
        }
        let mut bytes = vec![0; len as usize];
        self.bytes(&mut bytes, doing)?;
        String::from_utf8(bytes).map_err(|_| self.damaged(format!("{doing} before byte {} is not UTF-8", self.pos)))
    }

    /// Refuses a count whose items cannot all be in the rest of the file.
    fn count(&self, count: u64, least_bytes: u64, what: &str) -> Result<()> {
        match count.checked_mul(least_bytes) {
            Some(bytes) if bytes <= self.len - self.pos => Ok(()),
            _ => Err(self.damaged(format!("it declares {count} {what}, with {} bytes left", self.len - self.pos))),
        }
    }

    fn u32(&mut self, doing: &str) -> Result<u32> {
        self.array(doing).map(u32::from_le_bytes)
    }

    fn u64(&mut self, doing: &str) -> Result<u64> {
        self.array(doing).map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&mut self, doing: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.bytes(&mut bytes, doing)?;
        Ok(bytes)
    }

    fn bytes(&mut self, into: &mut [u8], doing: &str) -> Result<()> {
        if into.len() as u64 > self.len - self.pos {
            return Err(self.damaged(format!("it ends inside {doing}, at byte {}", self.len)));
        }
        self.reader.read_exact(into).path_context("read", self.path)?;
        self.pos += into.len() as u64;
        Ok(())
    }

    fn damaged(&self, found: String) -> Error {
        Error::config(format!("`{}` is damaged or cut short", self.path.display()))
            .cause(found)
            .hint("get the file again and compare its size and checksum with the source's")
    }
}

struct TensorRow {
    name: String,
    shape: Vec<u64>,
    type_id: u32,
    offset: u64,
}

const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const FLOAT64: u32 = 12;

/// Fewest bytes one value of this type takes; `None` for lists and unknown types.
fn least_bytes(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | BOOL => 1,
        2 | 3 => 2,
        4 | 5 | FLOAT32 => 4,
        STRING | 10 | 11 | FLOAT64 => 8,
        _ => return None,
    })
}

/// The shortest decimal that is this fp32 number: 1e-5 stays 1e-5 instead of 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn shape_text(shape: &[u64]) -> String {
    format!("[{}]", shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", "))
}
