//! Reads jsonl and parquet files into rows of the columns that are needed, in order, as text.
//!
//! Knows nothing of templates or tokens. A bad row (broken JSON, a missing, null or non-text value) is a value here, not
//! an error: who reads decides what becomes of it. A column that no row has is an error, because then the config is
//! wrong and not the data. Numbers and booleans are taken by their text. Rows stream: no file is held in memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, RecordBatch, StringArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde_json::{Map, Value};

use crate::config::plan::DataFormat;
use crate::config::suggest;
use crate::error::{Error, Result, quoted};

/// One data file, read through once: what decides its rows, how many there are, what they are called.
#[derive(Clone, Debug)]
pub struct SourceFile {
    path: Arc<Path>,
    format: DataFormat,
    pub num_rows: u64,
    /// Hex digest of the content.
    pub digest: String,
    pub columns: Vec<String>,
}

/// A row as it lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRow {
    pub place: Place,
    /// The needed columns in the order asked for, or why the row is bad.
    pub cells: Result<Vec<String>, String>,
}

/// Where a row is, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<Path>,
    /// From 1: the line of a jsonl file, the row of a parquet file.
    pub number: u64,
    is_line: bool,
}

impl Place {
    /// An error about this row, located.
    pub fn bad_row(&self, why: &str) -> Error {
        let (what, line) = if self.is_line { ("line", Some(self.number as usize)) } else { ("row", None) };
        Error::config(format!("{what} {} of `{}` is a bad row", self.number, self.file.display()))
            .at(&*self.file, line, None)
            .cause(why)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.number)
    }
}

impl SourceFile {
    pub fn scan(path: &Path, format: DataFormat) -> Result<Self> {
        let (num_rows, columns, digest) = match format {
            DataFormat::Jsonl => scan_jsonl(path, u64::MAX)?,
            DataFormat::Parquet => scan_parquet(path)?,
        };
        Ok(Self { path: path.into(), format, num_rows, digest, columns })
    }

    /// As [`Self::scan`], but reads no more than tells the columns; rows and digest are those of what was read.
    pub fn peek(path: &Path, format: DataFormat) -> Result<Self> {
        let (num_rows, columns, digest) = match format {
            DataFormat::Jsonl => scan_jsonl(path, ROWS_FOR_COLUMNS)?,
            DataFormat::Parquet => {
                let (num_rows, columns) = parquet_head(path)?;
                (num_rows, columns, String::new())
            }
        };
        Ok(Self { path: path.into(), format, num_rows, digest, columns })
    }

    /// Checks that every one of `needed` is a column of the file.
    pub fn require(&self, needed: &[String]) -> Result<()> {
        if self.num_rows == 0 {
            return Ok(());
        }
        let Some(missing) = needed.iter().find(|column| !self.columns.contains(column)) else { return Ok(()) };
        let error = Error::config(format!("the data has no column `{missing}`")).at_file(&*self.path);
        let error = match suggest::nearest(missing, self.columns.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error,
        };
        Err(error.hint(format!("its columns are {}; `column_map` says which to take", quoted(&self.columns))))
    }

    fn rows(&self, columns: &[String], range: Range<u64>) -> Result<FileRows> {
        let file = open(&self.path)?;
        let columns = columns.to_vec();
        let place = Place { file: self.path.clone(), number: 0, is_line: self.format == DataFormat::Jsonl };
        match self.format {
            DataFormat::Jsonl => {
                let lines = BufReader::with_capacity(1 << 20, file);
                let mut rows = JsonlRows { lines, place, columns, left: 0, buffer: vec![] };
                for _ in 0..range.start {
                    rows.next_line()?;
                }
                rows.left = range.end - range.start;
                Ok(FileRows::Jsonl(rows))
            }
            DataFormat::Parquet => {
                let builder = parquet_builder(&self.path, file)?;
                let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().map(String::as_str));
                let reader = builder
                    .with_projection(mask)
                    .with_batch_size(1024)
                    .with_offset(range.start as usize)
                    .with_limit((range.end - range.start) as usize)
                    .build()
                    .map_err(|error| parquet_error(&self.path, error))?;
                let place = Place { number: range.start, ..place };
                Ok(FileRows::Parquet(ParquetRows { reader, place, columns, ready: VecDeque::new() }))
            }
        }
    }
}

/// The rows of several pieces of files, one after the other.
pub struct Rows {
    columns: Vec<String>,
    pieces: VecDeque<(SourceFile, Range<u64>)>,
    current: Option<FileRows>,
}

impl Rows {
    pub fn new(pieces: Vec<(SourceFile, Range<u64>)>, columns: Vec<String>) -> Self {
        Self { columns, pieces: pieces.into(), current: None }
    }

    /// Up to `most` further rows; empty at the end.
    pub fn take(&mut self, most: usize) -> Result<Vec<SourceRow>> {
        let mut rows = Vec::with_capacity(most);
        while rows.len() < most {
            match self.current.as_mut().map(FileRows::next).transpose()?.flatten() {
                Some(row) => rows.push(row),
                None => match self.pieces.pop_front() {
                    Some((file, range)) => self.current = Some(file.rows(&self.columns, range)?),
                    None => break,
                },
            }
        }
        Ok(rows)
    }
}

enum FileRows {
    Jsonl(JsonlRows),
    Parquet(ParquetRows),
}

impl FileRows {
    fn next(&mut self) -> Result<Option<SourceRow>> {
        match self {
            Self::Jsonl(rows) => rows.next(),
            Self::Parquet(rows) => rows.next(),
        }
    }
}

struct JsonlRows {
    lines: BufReader<File>,
    /// The line read last.
    place: Place,
    columns: Vec<String>,
    left: u64,
    buffer: Vec<u8>,
}

impl JsonlRows {
    /// Reads the next line that is not blank into `buffer`.
    fn next_line(&mut self) -> Result<bool> {
        let path = self.place.file.clone();
        let read = read_line(&mut self.lines, &mut self.buffer, &mut self.place.number);
        read.map_err(|error| read_error(&path, error))
    }

    fn next(&mut self) -> Result<Option<SourceRow>> {
        if self.left == 0 {
            return Ok(None);
        }
        if !self.next_line()? {
            return Err(Error::run(format!("`{}` became shorter while it was read", self.place.file.display())));
        }
        self.left -= 1;
        let cells = parse_object(&self.buffer)
            .and_then(|object| self.columns.iter().map(|column| json_text(object.get(column), column)).collect());
        Ok(Some(SourceRow { place: self.place.clone(), cells }))
    }
}

/// Objects need not all have every key: the first hundred say which there are.
const ROWS_FOR_COLUMNS: u64 = 100;

fn scan_jsonl(path: &Path, most_rows: u64) -> Result<(u64, Vec<String>, String)> {
    let mut lines = BufReader::with_capacity(1 << 20, open(path)?);
    let mut hasher = blake3::Hasher::new();
    let (mut buffer, mut number, mut num_rows, mut columns) = (vec![], 0, 0, vec![]);
    while num_rows < most_rows
        && read_line(&mut lines, &mut buffer, &mut number).map_err(|error| read_error(path, error))?
    {
        hasher.update(&buffer);
        num_rows += 1;
        if num_rows <= ROWS_FOR_COLUMNS {
            for (key, _) in parse_object(&buffer).into_iter().flatten() {
                if !columns.contains(&key) {
                    columns.push(key);
                }
            }
        }
    }
    if num_rows > 0 && columns.is_empty() {
        return Err(Error::config(format!(
            "`{}` is not a jsonl file: none of its first lines is a JSON object",
            path.display()
        ))
        .hint("each line has to be one object, such as {\"document\": \"…\", \"summary\": \"…\"}"));
    }
    Ok((num_rows, columns, hasher.finalize().to_hex().to_string()))
}

/// Reads the next line that is not blank, its line break kept, and counts lines in `number`; false at the end.
fn read_line(lines: &mut impl BufRead, buffer: &mut Vec<u8>, number: &mut u64) -> std::io::Result<bool> {
    loop {
        buffer.clear();
        if lines.read_until(b'\n', buffer)? == 0 {
            return Ok(false);
        }
        *number += 1;
        if !buffer.trim_ascii().is_empty() {
            return Ok(true);
        }
    }
}

fn parse_object(line: &[u8]) -> Result<Map<String, Value>, String> {
    // A byte order mark is what some editors put before the first line.
    let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii_end();
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("the line is {}, not an object", json_kind(&other))),
        // The parser's own line is always the first.
        Err(error) => Err(format!("the line is not JSON: {error}").replace(" at line 1 column ", " at column ")),
    }
}

fn json_text(value: Option<&Value>, column: &str) -> Result<String, String> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::Bool(value)) => Ok(value.to_string()),
        Some(other) => Err(format!("`{column}` is {}, text is needed", json_kind(other))),
        None => Err(format!("`{column}` is missing")),
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

struct ParquetRows {
    reader: ParquetRecordBatchReader,
    /// The row handed out last.
    place: Place,
    columns: Vec<String>,
    ready: VecDeque<Result<Vec<String>, String>>,
}

impl ParquetRows {
    fn next(&mut self) -> Result<Option<SourceRow>> {
        while self.ready.is_empty() {
            let Some(batch) = self.reader.next() else { return Ok(None) };
            let batch = batch.map_err(|error| parquet_error(&self.place.file, error))?;
            self.ready = cells_of(&batch, &self.columns).map_err(|error| error.at_file(&*self.place.file))?;
        }
        self.place.number += 1;
        Ok(self.ready.pop_front().map(|cells| SourceRow { place: self.place.clone(), cells }))
    }
}

fn cells_of(batch: &RecordBatch, columns: &[String]) -> Result<VecDeque<Result<Vec<String>, String>>> {
    let texts: Vec<StringArray> = columns.iter().map(|column| text_column(batch, column)).collect::<Result<_>>()?;
    let row = |i: usize| {
        columns
            .iter()
            .zip(&texts)
            .map(|(column, text)| match text.is_null(i) {
                true => Err(format!("`{column}` is null, text is needed")),
                false => Ok(text.value(i).to_owned()),
            })
            .collect()
    };
    Ok((0..batch.num_rows()).map(row).collect())
}

fn text_column(batch: &RecordBatch, column: &str) -> Result<StringArray> {
    let array = batch
        .column_by_name(column)
        .ok_or_else(|| Error::bug(format!("column `{column}` was not in the projection")))?;
    let value_type = match array.data_type() {
        DataType::Dictionary(_, value_type) => value_type,
        other => other,
    };
    let is_text = matches!(value_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean);
    if !is_text && !value_type.is_numeric() {
        return Err(Error::config(format!("column `{column}` holds {value_type} values; text or numbers are needed")));
    }
    let cast = arrow::compute::cast(array, &DataType::Utf8)
        .map_err(|error| Error::config(format!("column `{column}` cannot be read as text")).cause(error))?;
    let text = cast.as_any().downcast_ref::<StringArray>();
    text.cloned().ok_or_else(|| Error::bug(format!("column `{column}` did not become text")))
}

fn parquet_head(path: &Path) -> Result<(u64, Vec<String>)> {
    let builder = parquet_builder(path, open(path)?)?;
    let num_rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or_default();
    Ok((num_rows, builder.schema().fields().iter().map(|field| field.name().clone()).collect()))
}

fn scan_parquet(path: &Path) -> Result<(u64, Vec<String>, String)> {
    let (num_rows, columns) = parquet_head(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(open(path)?).map_err(|error| read_error(path, error))?;
    Ok((num_rows, columns, hasher.finalize().to_hex().to_string()))
}

fn parquet_builder(path: &Path, file: File) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| parquet_error(path, error))
}

fn parquet_error(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::config(format!("cannot read `{}` as parquet", path.display())).cause(error)
}

fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|error| read_error(path, error))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            Err(Error::config(format!("the data file `{}` is a folder", path.display())))
        }
        _ => Ok(file),
    }
}

fn read_error(path: &Path, error: std::io::Error) -> Error {
    Error::config(format!("cannot read the data file `{}`", PathBuf::from(path).display())).cause(error)
}
