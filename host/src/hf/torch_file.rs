//! Weights that PyTorch saved (`.bin`, `.pt`, `.pth`): a zip file whose pickled index says which bytes are which tensor.
//!
//! A pickle is a program. This reader runs only the instructions that `torch.save` of a dictionary of tensors needs, calls
//! nothing, and refuses every name it does not know: what cannot be said with those cannot be loaded.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use crate::error::{Error, IoContext, Result};

/// Largest index that is read; that of a 405B model has about a megabyte.
const MAX_PICKLE_BYTES: u64 = 256 << 20;
/// Most values alive while the index is read; a guard against an index that only grows.
const MAX_VALUES: usize = 4_000_000;
const MAX_DIMS: usize = 8;
const MAX_DEPTH: usize = 64;

/// A tensor of the file: its name, type, shape and the file's bytes that hold it, row after row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: usize,
    pub end: usize,
}

/// Whether the file is PyTorch's: by its name, or because it begins as a zip file does.
pub fn is_torch(path: &Path) -> bool {
    let mut magic = [0; 4];
    path.extension().is_some_and(|suffix| ["bin", "pt", "pth"].iter().any(|name| suffix == *name))
        || File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"PK\x03\x04"
}

/// Lists the tensors of a file that `torch.save` wrote from a dictionary of tensors, or from one dictionary inside
/// another (`{"model": {…}}`), whose names are then left out.
pub fn tensors(path: &Path) -> Result<Vec<Stored>> {
    let bad = |cause: String| {
        Error::config(format!("`{}` is not a weight file that can be read", path.display()))
            .cause(cause)
            .hint("take the model's safetensors files, or save a plain dictionary of tensors with `torch.save`")
    };
    let file = File::open(path)
        .map_err(|error| Error::config(format!("cannot open the weight file `{}`", path.display())).cause(error))?;
    let size = file.metadata().path_context("read the size of", path)?.len();
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|error| {
        // A pickle without a zip file around it.
        let mut magic = [0; 2];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        let old = read.is_ok() && magic == [0x80, 2];
        bad(if old { "PyTorch before 1.6 wrote it, in a format that is not read".into() } else { error.to_string() })
    })?;
    let index = zip
        .file_names()
        .filter_map(|name| Some(name.ok()?.into_owned()))
        .find(|name| name.ends_with("/data.pkl") || name == "data.pkl")
        .ok_or_else(|| bad("it has no `data.pkl`, the index that `torch.save` writes".into()))?;
    let folder = index.strip_suffix("data.pkl").unwrap_or_default().to_owned();
    let mut pickle = Vec::new();
    let entry = zip.by_name(&index).map_err(|error| bad(error.to_string()))?;
    entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut pickle).map_err(|error| bad(error.to_string()))?;
    if pickle.len() as u64 > MAX_PICKLE_BYTES {
        return Err(bad(format!("its index is longer than {MAX_PICKLE_BYTES} bytes")));
    }
    if let Ok(mut entry) = zip.by_name(&format!("{folder}byteorder")) {
        let mut order = String::new();
        let read = entry.by_ref().take(16).read_to_string(&mut order);
        if read.is_err() || order.trim() != "little" {
            return Err(bad(format!("its numbers are written `{}` end first", order.trim())));
        }
    }
    let mut found = Vec::new();
    collect(unpickle(&pickle).map_err(bad)?, &mut found, 0).map_err(bad)?;
    let mut stored = Vec::with_capacity(found.len());
    for (name, tensor) in found {
        let bytes = storage_range(&mut zip, &folder, &tensor.storage.key, size).map_err(bad)?;
        stored.push(tensor.at(name, bytes).map_err(bad)?);
    }
    Ok(stored)
}

/// Where the uncompressed bytes of a storage lie.
fn storage_range(
    zip: &mut ZipArchive<BufReader<File>>,
    folder: &str,
    key: &str,
    size: u64,
) -> std::result::Result<(u64, u64), String> {
    let name = format!("{folder}data/{key}");
    let entry = zip.by_name(&name).map_err(|error| format!("`{name}`: {error}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!("`{name}` is compressed"));
    }
    let start = entry.data_start().ok_or_else(|| format!("`{name}` has no place in the file"))?;
    let end = start.checked_add(entry.size()).filter(|end| *end <= size);
    end.map(|end| (start, end)).ok_or_else(|| format!("`{name}` reaches past the end of the file"))
}

#[derive(Clone, Debug)]
struct Storage {
    dtype: Dtype,
    key: String,
}

#[derive(Clone, Debug)]
struct TensorRef {
    storage: Storage,
    offset: u64,
    shape: Vec<usize>,
    strides: Vec<u64>,
}

impl TensorRef {
    fn at(&self, name: String, (start, end): (u64, u64)) -> std::result::Result<Stored, String> {
        let mut expected = 1u64;
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *size > 1 && *stride != expected {
                return Err(format!(
                    "the tensor `{name}` is a view with gaps: shape {:?}, strides {:?}",
                    self.shape, self.strides
                ));
            }
            let next = expected.checked_mul(*size as u64);
            expected = next.ok_or_else(|| format!("the tensor `{name}` has an impossible shape {:?}", self.shape))?;
        }
        let width = (self.storage.dtype.bitsize() / 8) as u64;
        let range = self.offset.checked_mul(width).and_then(|skip| {
            let first = start.checked_add(skip)?;
            Some((first, first.checked_add(expected.checked_mul(width)?)?))
        });
        match range {
            Some((first, last)) if last <= end => Ok(Stored {
                name,
                dtype: self.storage.dtype,
                shape: self.shape.clone(),
                start: first as usize,
                end: last as usize,
            }),
            _ => Err(format!("the tensor `{name}` reaches past its data")),
        }
    }
}

/// What the instructions make; `Other` is a value nobody asks for.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(&'static Known),
    Storage(Storage),
    Tensor(TensorRef),
    Other,
}

#[derive(Debug)]
enum Known {
    Storage(Dtype),
    RebuildTensor,
    RebuildParameter,
    Dict,
}

/// Every name an index may use.
const KNOWN: &[(&str, &str, Known)] = &[
    ("torch", "FloatStorage", Known::Storage(Dtype::F32)),
    ("torch", "HalfStorage", Known::Storage(Dtype::F16)),
    ("torch", "BFloat16Storage", Known::Storage(Dtype::BF16)),
    ("torch", "DoubleStorage", Known::Storage(Dtype::F64)),
    ("torch", "LongStorage", Known::Storage(Dtype::I64)),
    ("torch", "IntStorage", Known::Storage(Dtype::I32)),
    ("torch", "ShortStorage", Known::Storage(Dtype::I16)),
    ("torch", "CharStorage", Known::Storage(Dtype::I8)),
    ("torch", "ByteStorage", Known::Storage(Dtype::U8)),
    ("torch", "BoolStorage", Known::Storage(Dtype::BOOL)),
    ("torch._utils", "_rebuild_tensor_v2", Known::RebuildTensor),
    ("torch._utils", "_rebuild_parameter", Known::RebuildParameter),
    ("collections", "OrderedDict", Known::Dict),
];

type Parsed<T> = std::result::Result<T, String>;

/// Names and tensors of a dictionary, and of dictionaries inside it.
fn collect(value: Value, found: &mut Vec<(String, TensorRef)>, depth: usize) -> Parsed<()> {
    let Value::Dict(entries) = value else {
        return Err("it holds no dictionary of tensors".into());
    };
    if depth > MAX_DEPTH {
        return Err("its dictionaries are nested without end".into());
    }
    for (key, value) in entries {
        match (key, value) {
            (Value::Text(name), Value::Tensor(tensor)) => found.push((name, tensor)),
            (Value::Text(_), inner @ Value::Dict(_)) => collect(inner, found, depth + 1)?,
            _ => {}
        }
    }
    Ok(())
}

struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    /// Values made so far, those inside copies from the memo included.
    made: usize,
}

fn unpickle(code: &[u8]) -> Parsed<Value> {
    let mut machine = Machine { code, at: 0, stack: Vec::new(), memo: HashMap::new(), made: 0 };
    loop {
        if let Some(value) = machine.step()? {
            return Ok(value);
        }
    }
}

impl Machine<'_> {
    /// Runs one instruction; a value when it was the last.
    fn step(&mut self) -> Parsed<Option<Value>> {
        match self.byte()? {
            0x80 => {
                let version = self.byte()?;
                if !(2..=5).contains(&version) {
                    return Err(format!("its index is a pickle of version {version}"));
                }
            }
            0x95 => {
                self.take(8)?; // FRAME: its length
            }
            b'.' => return self.pop().map(Some),
            b'(' => self.push(Value::Mark)?,
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool)?,
            b'K' => {
                let value = self.byte()?;
                self.push(Value::Int(value.into()))?;
            }
            b'M' => {
                let bytes = self.array::<2>()?;
                self.push(Value::Int(u16::from_le_bytes(bytes).into()))?;
            }
            b'J' => {
                let bytes = self.array::<4>()?;
                self.push(Value::Int(i32::from_le_bytes(bytes).into()))?;
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?; // BINFLOAT
                self.push(Value::Other)?;
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length as usize)?;
            }
            0x8c => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            b'q' => {
                let slot = self.byte()?;
                self.store(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.store(slot)?;
            }
            0x94 => self.store(self.memo.len() as u32)?,
            b'h' => {
                let slot = self.byte()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.recall(slot)?;
            }
            b')' => self.push(Value::Tuple(vec![]))?,
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.since_mark()?;
                self.push_tuple(items)?;
            }
            b'}' => self.push(Value::Dict(vec![]))?,
            b']' => self.push(Value::Other)?, // EMPTY_LIST
            b'a' => {
                self.pop()?; // APPEND: lists are not kept
            }
            b'e' => {
                self.since_mark()?; // APPENDS
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(items)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(&module, &name)?,
                _ => return Err("its index names something without a name".into()),
            },
            b'Q' => {
                let storage = persistent(self.pop()?)?;
                self.push(Value::Storage(storage))?;
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = call(function, arguments)?;
                self.push(value)?;
            }
            b'b' => {
                self.pop()?; // BUILD: attributes of a dictionary (`_metadata`), which hold no tensor
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err("its index sets the state of something else than a dictionary".into());
                }
            }
            other => return Err(format!("its index has the instruction {other:#04x}, which weights do not need")),
        }
        Ok(None)
    }

    fn take(&mut self, count: usize) -> Parsed<&[u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.code.len());
        let end = end.ok_or("its index ends early")?;
        let bytes = &self.code[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("`take` gives what it was asked for"))
    }

    fn byte(&mut self) -> Parsed<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn line(&mut self) -> Parsed<String> {
        let rest = &self.code[self.at..];
        let length = rest.iter().take(256).position(|byte| *byte == b'\n').ok_or("its index has a name without end")?;
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(line)
    }

    fn long(&mut self) -> Parsed<()> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        if bytes.len() > 8 {
            return Err("its index has a number of more than 64 bits".into());
        }
        let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [sign; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, length: usize) -> Parsed<()> {
        let text =
            String::from_utf8(self.take(length)?.to_vec()).map_err(|_| "its index has a text that is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn push(&mut self, value: Value) -> Parsed<()> {
        self.made += 1;
        if self.made > MAX_VALUES {
            return Err("its index makes more values than a model has tensors".into());
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Parsed<Value> {
        self.stack.pop().ok_or_else(|| "its index takes a value that is not there".into())
    }

    fn since_mark(&mut self) -> Parsed<Vec<Value>> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark));
        let items = self.stack.split_off(mark.ok_or("its index closes what was not opened")?);
        Ok(items.into_iter().skip(1).collect())
    }

    fn tuple(&mut self, length: usize) -> Parsed<()> {
        let at = self.stack.len().checked_sub(length).ok_or("its index takes a value that is not there")?;
        let items = self.stack.split_off(at);
        self.push_tuple(items)
    }

    fn push_tuple(&mut self, items: Vec<Value>) -> Parsed<()> {
        check_depth(&items)?;
        self.push(Value::Tuple(items))
    }

    fn set(&mut self, items: Vec<Value>) -> Parsed<()> {
        check_depth(&items)?;
        let Some(Value::Dict(entries)) = self.stack.last_mut() else {
            return Err("its index puts an entry into something else than a dictionary".into());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        Ok(())
    }

    /// Keeps the value on top. A dictionary is not kept: copies of one would not see what is put into it later, and
    /// `torch.save` never refers to one again.
    fn store(&mut self, slot: u32) -> Parsed<()> {
        let value = match self.stack.last().ok_or("its index keeps a value that is not there")? {
            Value::Dict(_) => Value::Other,
            value => value.clone(),
        };
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Parsed<()> {
        let value = self.memo.get(&slot).ok_or("its index recalls a value it never kept")?.clone();
        self.made += size(&value);
        self.push(value)
    }

    fn global(&mut self, module: &str, name: &str) -> Parsed<()> {
        let known = KNOWN.iter().find(|known| known.0 == module && known.1 == name);
        let (_, _, known) = known.ok_or_else(|| {
            format!("its index names `{module}.{name}`, which is not part of a dictionary of tensors; nothing was run")
        })?;
        self.push(Value::Global(known))
    }
}

/// Values in a value: tuples of tuples could otherwise double with every instruction.
fn size(value: &Value) -> usize {
    match value {
        Value::Tuple(items) => 1 + items.iter().map(size).sum::<usize>(),
        Value::Dict(entries) => 1 + entries.iter().map(|(key, value)| size(key) + size(value)).sum::<usize>(),
        Value::Text(text) => 1 + text.len() / 64,
        Value::Storage(storage) => 1 + storage.key.len() / 64,
        Value::Tensor(_) => 8,
        _ => 1,
    }
}

/// Looking into values and dropping them recurses, so their depth is bounded as they are made.
fn check_depth(items: &[Value]) -> Parsed<()> {
    fn is_within(value: &Value, depth: usize) -> bool {
        let inner = |value: &Value| depth > 0 && is_within(value, depth - 1);
        match value {
            Value::Tuple(items) => items.iter().all(inner),
            Value::Dict(entries) => entries.iter().all(|(key, value)| inner(key) && inner(value)),
            _ => true,
        }
    }
    if items.iter().all(|item| is_within(item, MAX_DEPTH)) {
        return Ok(());
    }
    Err("its values are nested without end".into())
}

/// `("storage", type, key, device, elements)`.
fn persistent(id: Value) -> Parsed<Storage> {
    let Value::Tuple(items) = id else { return Err("its index names a storage in another way".into()) };
    match items.as_slice() {
        [Value::Text(kind), Value::Global(Known::Storage(dtype)), Value::Text(key), ..] if kind == "storage" => {
            Ok(Storage { dtype: *dtype, key: key.clone() })
        }
        _ => Err("its index names a storage in another way".into()),
    }
}

fn call(function: Value, arguments: Value) -> Parsed<Value> {
    let (Value::Global(known), Value::Tuple(arguments)) = (function, arguments) else {
        return Err("its index calls something that is no function".into());
    };
    match known {
        Known::Dict if arguments.is_empty() => Ok(Value::Dict(vec![])),
        Known::RebuildParameter => match arguments.into_iter().next() {
            Some(tensor @ Value::Tensor(_)) => Ok(tensor),
            _ => Err("its index makes a parameter of something else than a tensor".into()),
        },
        Known::RebuildTensor => match arguments.as_slice() {
            [Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..]
                if shape.len() == strides.len() && shape.len() <= MAX_DIMS =>
            {
                let number = |value: &Value| match value {
                    Value::Int(number) => u64::try_from(*number).ok().filter(|number| *number < 1 << 40),
                    _ => None,
                };
                let numbers = |values: &[Value]| values.iter().map(number).collect::<Option<Vec<u64>>>();
                let offset = u64::try_from(*offset).ok();
                let (offset, shape, strides) = offset
                    .zip(numbers(shape))
                    .zip(numbers(strides))
                    .map(|((offset, shape), strides)| (offset, shape, strides))
                    .ok_or("its index gives a tensor an impossible shape")?;
                let shape = shape.into_iter().map(|size| size as usize).collect();
                Ok(Value::Tensor(TensorRef { storage: storage.clone(), offset, shape, strides }))
            }
            _ => Err("its index describes a tensor in another way".into()),
        },
        _ => Err("its index calls something that is no function of tensors".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hf/fixtures").join(name)
    }

    /// Name, type and shape, and the numbers of an f32 tensor.
    fn listed(name: &str) -> Vec<(String, Dtype, Vec<usize>, Vec<f32>)> {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let floats = |stored: &Stored| {
            let data = &bytes[stored.start..stored.end];
            data.chunks_exact(4).map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap())).collect()
        };
        let tensors = tensors(&fixture(name)).unwrap();
        tensors
            .iter()
            .map(|stored| {
                let numbers = if stored.dtype == Dtype::F32 { floats(stored) } else { vec![] };
                (stored.name.clone(), stored.dtype, stored.shape.clone(), numbers)
            })
            .collect()
    }

    #[test]
    fn finds_the_tensors_that_torch_saved() {
        for name in ["plain.pt", "protocol4.pt", "nested.pt"] {
            let found = listed(name);
            assert_eq!(
                found[0],
                ("a.weight".into(), Dtype::F32, vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
                "{name}"
            );
            assert_eq!((&found[1].0[..], found[1].1, &found[1].2[..]), ("b", Dtype::BF16, &[4][..]), "{name}");
            assert_eq!((&found[2].0[..], found[2].1), ("h", Dtype::F16), "{name}");
        }
        assert_eq!(listed("view.pt")[0].3, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!(listed("parameter.pt")[0].3, [1.0, 1.0]);
        let module = listed("module.pt");
        assert_eq!((&module[0].0[..], &module[1].0[..]), ("weight", "bias"));
    }

    #[test]
    fn refuses_what_is_no_dictionary_of_tensors() {
        let cause = |name: &str| tensors(&fixture(name)).unwrap_err().causes.join(" ");
        assert!(cause("command.pt").contains("`posix.system`"), "{}", cause("command.pt"));
        assert!(cause("gaps.pt").contains("view with gaps"));
        assert!(cause("before_1_6.pt").contains("before 1.6"));
        assert!(cause("generate.py").contains("Zip"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = std::fs::read(fixture("plain.pt")).unwrap();
        let path = tempfile::NamedTempFile::new().unwrap();
        for cut in 0..whole.len() {
            std::fs::write(path.path(), &whole[..cut]).unwrap();
            assert!(tensors(path.path()).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_memo_that_doubles_is_stopped() {
        // ((), ()) again and again: each level twice the last.
        let mut code = vec![0x80, 2, b')', b'q', 0];
        for _ in 0..100 {
            code.extend([b'h', 0, b'h', 0, 0x86, b'q', 0]);
        }
        code.push(b'.');
        assert!(unpickle(&code).unwrap_err().contains("more values"));
    }

    #[test]
    fn what_would_take_the_stack_or_the_memory_is_stopped() {
        // A tuple around a tuple, a million times.
        let deep = [&[0x80, 2, b')'][..], &[0x85; 1_000_000], b"."].concat();
        assert!(unpickle(&deep).unwrap_err().contains("nested without end"));
        // A long text, kept once and recalled again and again.
        let mut long = [&[0x80, 2, b'X'][..], &1_000_000u32.to_le_bytes(), &[b'a'; 1_000_000], b"q\0"].concat();
        long.extend(b"h\0".repeat(200_000));
        long.push(b'.');
        assert!(unpickle(&long).unwrap_err().contains("more values"));
    }

    proptest! {
        #[test]
        fn a_damaged_index_is_an_error_or_a_value(name in prop::sample::select(vec!["plain.pt", "nested.pt", "module.pt"]),
                                                  at in 0usize..600, byte in any::<u8>(), cut in 1usize..600) {
            let bytes = std::fs::read(fixture(name)).unwrap();
            let start = bytes.windows(2).position(|pair| pair == [0x80, 2]).unwrap();
            let mut code = bytes[start..(start + cut).min(bytes.len())].to_vec();
            if let Some(target) = code.get_mut(at) {
                *target = byte;
            }
            let _ = unpickle(&code);
        }
    }
}
