//! Reads data files into rows of the columns that are needed, in order: jsonl, json, csv, text, parquet.
//!
//! Knows nothing of templates or tokens. A bad row (broken JSON, a missing, null or non-text value) is a value here, not
//! an error: who reads decides what becomes of it. A column that no row has is an error, because then the config is
//! wrong and not the data. Numbers and booleans are taken by their text, a column of conversations as it is. Rows
//! stream: no file is held in memory, but for one whose rows are a field of an object.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::schema::types::SchemaDescriptor;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::config::plan::{DataFormat, RowsPlan};
use crate::config::suggest;
use crate::error::{Error, Result, quoted};
use crate::panics;
use crate::tokenizer::SpecialTokens;

/// The column of a text file's lines.
const TEXT_COLUMN: &str = "text";

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
    pub cells: Result<Vec<SourceCell>, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceCell {
    /// The row has none, and need not have.
    None,
    Text(String),
    /// What lies in a column of conversations.
    Nested(Value),
}

impl SourceCell {
    /// Marks the special tokens that its texts spell.
    pub fn mark(&mut self, special: &SpecialTokens) {
        match self {
            Self::None => {}
            Self::Text(text) => special.mark(text),
            Self::Nested(value) => special.mark_json(value),
        }
    }
}

/// A column that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub column: String,
    want: Want,
    /// The key of the config that names it.
    key: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Text,
    TextOrNone,
    Nested,
}

impl Wanted {
    /// What the rows of a plan need, in the order of its columns.
    pub fn of(rows: &RowsPlan) -> Vec<Self> {
        let one = |column: &String, want, key| Self { column: column.clone(), want, key };
        match rows {
            RowsPlan::Columns { columns, .. } => {
                let want = |optional| if optional { Want::TextOrNone } else { Want::Text };
                columns.iter().map(|column| one(&column.column, want(column.optional), "`column_map`")).collect()
            }
            RowsPlan::Pairs { prompt: Some(prompt), chosen, rejected, .. } => {
                [prompt, chosen, rejected].map(|column| one(column, Want::Text, "`column_map`")).into()
            }
            RowsPlan::Pairs { chosen, rejected, .. } => {
                [chosen, rejected].map(|column| one(column, Want::Nested, "`column_map`")).into()
            }
            RowsPlan::Chat { column, .. } => vec![one(column, Want::Nested, "`conversation_column`, or `column_map`,")],
            RowsPlan::Text { column, .. } => vec![one(column, Want::Text, "`column`")],
        }
    }

    fn of_json(&self, value: Option<&Value>) -> Result<SourceCell, String> {
        match (self.want, value) {
            (Want::TextOrNone, None | Some(Value::Null)) => Ok(SourceCell::None),
            // Tables of text hold it as one. It is read here, so that whoever looks into it sees what it says.
            (Want::Nested, Some(Value::String(text))) => {
                let parsed = serde_json::from_str(text);
                let why = |error| format!("`{}`: it is a text, and no JSON: {error}", self.column);
                parsed.map(SourceCell::Nested).map_err(why)
            }
            (Want::Nested, Some(value)) if !value.is_null() => Ok(SourceCell::Nested(value.clone())),
            (_, value) => json_text(value, &self.column).map(SourceCell::Text),
        }
    }
}

/// Where a row is, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<Path>,
    /// From 1: the line, or the row of a file that has no lines.
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
    pub fn scan(path: &Path, format: &DataFormat) -> Result<Self> {
        let path: Arc<Path> = path.into();
        let (num_rows, columns) = match format {
            DataFormat::Parquet => scan_parquet(&path)?,
            _ => scan_records(&path, format, u64::MAX)?,
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(open(&path)?).map_err(|error| read_error(&path, error))?;
        let digest = hasher.finalize().to_hex().to_string();
        Ok(Self { path, format: format.clone(), num_rows, digest, columns })
    }

    /// As [`Self::scan`], but reads no more than tells the columns; the rows are those that were read, and there is no digest.
    pub fn peek(path: &Path, format: &DataFormat) -> Result<Self> {
        let path: Arc<Path> = path.into();
        let (num_rows, columns) = match format {
            DataFormat::Parquet => scan_parquet(&path)?,
            _ => scan_records(&path, format, ROWS_FOR_COLUMNS)?,
        };
        Ok(Self { path, format: format.clone(), num_rows, digest: String::new(), columns })
    }

    /// Checks that every one of `needed` is a column of the file.
    pub fn require(&self, needed: &[Wanted]) -> Result<()> {
        if self.num_rows == 0 {
            return Ok(());
        }
        let mut needed = needed.iter().filter(|wanted| wanted.want != Want::TextOrNone);
        let Some(missing) = needed.find(|wanted| !self.columns.contains(&wanted.column)) else { return Ok(()) };
        let (key, missing) = (missing.key, &missing.column);
        let error = Error::config(format!("the data has no column `{missing}`")).at_file(&*self.path);
        let error = match suggest::nearest(missing, self.columns.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error,
        };
        Err(error.hint(format!("its columns are {}; {key} says which to take", quoted(&self.columns))))
    }

    fn rows(&self, wanted: &[Wanted], range: Range<u64>) -> Result<FileRows> {
        // What need not be there may not be.
        let columns = wanted.to_vec();
        if self.format != DataFormat::Parquet {
            let mut records = Records::open(&self.path, &self.format)?;
            for _ in 0..range.start {
                records.advance()?;
            }
            return Ok(FileRows::Records { records, columns, left: range.end - range.start });
        }
        let builder = parquet_builder(&self.path, open(&self.path)?)?;
        let names = columns.iter().map(|wanted| wanted.column.as_str());
        // Every leaf below a column of that name, where it is one of lists and structures.
        let schema = builder.parquet_schema();
        let roots: Vec<usize> = names.filter_map(|name| root_of(schema, name)).collect();
        let mask = ProjectionMask::roots(schema, roots);
        let left = range.end - range.start;
        let builder = builder.with_projection(mask).with_batch_size(1024);
        let builder = builder.with_offset(range.start as usize).with_limit(left as usize);
        let reader = read_parquet(&self.path, || builder.build())?;
        let place = Place { file: self.path.clone(), number: range.start, is_line: false };
        Ok(FileRows::Parquet(ParquetRows { reader, place, columns, ready: VecDeque::new(), left }))
    }
}

/// The rows of several pieces of files, one after the other.
pub struct Rows {
    columns: Vec<Wanted>,
    pieces: VecDeque<(SourceFile, Range<u64>)>,
    current: Option<FileRows>,
}

impl Rows {
    pub fn new(pieces: Vec<(SourceFile, Range<u64>)>, columns: Vec<Wanted>) -> Self {
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
    Records { records: Records, columns: Vec<Wanted>, left: u64 },
    Parquet(ParquetRows),
}

impl FileRows {
    fn next(&mut self) -> Result<Option<SourceRow>> {
        let (records, columns, left) = match self {
            Self::Parquet(rows) => return rows.next(),
            Self::Records { left: 0, .. } => return Ok(None),
            Self::Records { records, columns, left } => (records, columns, left),
        };
        if !records.advance()? {
            let file = records.place.file.display();
            return Err(Error::run(format!("`{file}` became shorter while it was read")));
        }
        *left -= 1;
        Ok(Some(SourceRow { place: records.place.clone(), cells: records.cells(columns) }))
    }
}

/// A file of records that are read one after the other.
struct Records {
    kind: RecordKind,
    /// The record read last.
    place: Place,
}

enum RecordKind {
    Jsonl {
        lines: BufReader<File>,
        line: Vec<u8>,
    },
    Array {
        reader: CountingReader,
        is_first: bool,
        object: Map<String, Value>,
    },
    Field {
        rows: std::vec::IntoIter<Value>,
        row: Value,
    },
    Csv {
        reader: Box<csv::Reader<BufReader<File>>>,
        header: csv::StringRecord,
        record: Result<csv::StringRecord, String>,
    },
    Text {
        lines: BufReader<File>,
        line: Vec<u8>,
    },
}

impl Records {
    fn open(path: &Arc<Path>, format: &DataFormat) -> Result<Self> {
        let failed = |error| read_error(path, error);
        let mut lines = BufReader::with_capacity(1 << 20, open(path)?);
        let kind = match format {
            DataFormat::Jsonl if CountingReader::list_in(&mut lines).map_err(failed)? => {
                let mut reader = CountingReader { inner: lines, line: 1 };
                reader.skip_blanks().and_then(|_| reader.step()).map_err(failed)?;
                RecordKind::Array { reader, is_first: true, object: Map::new() }
            }
            DataFormat::Jsonl => RecordKind::Jsonl { lines, line: vec![] },
            DataFormat::JsonField(field) => {
                RecordKind::Field { rows: rows_of_field(path, lines, field)?.into_iter(), row: Value::Null }
            }
            DataFormat::Csv => {
                let is_tsv = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tsv"));
                let delimiter = if is_tsv { b'\t' } else { b',' };
                let mut reader = Box::new(csv::ReaderBuilder::new().delimiter(delimiter).from_reader(lines));
                let header = reader.headers().map_err(|error| {
                    Error::config(format!("cannot read the first line of `{}` as names of columns", path.display()))
                        .cause(error)
                })?;
                RecordKind::Csv { header: header.clone(), reader, record: Ok(csv::StringRecord::new()) }
            }
            DataFormat::Text => RecordKind::Text { lines, line: vec![] },
            DataFormat::Parquet => return Err(Error::bug("parquet is not read record by record")),
        };
        let is_line = !matches!(kind, RecordKind::Field { .. });
        Ok(Self { kind, place: Place { file: path.clone(), number: 0, is_line } })
    }

    /// Reads the next record; false at the end.
    fn advance(&mut self) -> Result<bool> {
        let path = self.place.file.clone();
        let failed = |error| read_error(&path, error);
        match &mut self.kind {
            RecordKind::Jsonl { lines, line } => read_line(lines, line, &mut self.place.number).map_err(failed),
            RecordKind::Text { lines, line } => {
                line.clear();
                self.place.number += 1;
                Ok(lines.read_until(b'\n', line).map_err(failed)? > 0)
            }
            RecordKind::Array { reader, is_first, object } => {
                let mut next = reader.skip_blanks().map_err(failed)?;
                if next == Some(b']') {
                    reader.step().map_err(failed)?;
                    let rest = reader.skip_blanks().map_err(failed)?;
                    return match rest {
                        None => Ok(false),
                        Some(_) => Err(Error::config(format!("something follows the list of `{}`", path.display()))
                            .at(&*path, Some(reader.line as usize), None)
                            .hint("a file is one list of objects, or one object a line")),
                    };
                }
                let needs_comma = !std::mem::take(is_first);
                let has_comma = needs_comma && next == Some(b',');
                if has_comma {
                    reader.step().map_err(failed)?;
                    next = reader.skip_blanks().map_err(failed)?;
                }
                self.place.number = reader.line;
                let wrong = |why: String| {
                    let error = Error::config(format!("`{}` is not a list of JSON objects", path.display()));
                    error.at(&*path, Some(self.place.number as usize), None).cause(why)
                };
                match next {
                    Some(b'{') if has_comma == needs_comma => {}
                    Some(b'{') => return Err(wrong("a comma is missing before it".to_owned())),
                    Some(other) => return Err(wrong(format!("an object was expected, found `{}`", other as char))),
                    None => return Err(wrong("the file ends before the list".to_owned())),
                }
                // Reads to the closing brace and no further.
                *object = Map::deserialize(&mut serde_json::Deserializer::from_reader(&mut *reader))
                    .map_err(|error| wrong(without_position(&error)))?;
                Ok(true)
            }
            RecordKind::Field { rows, row } => {
                self.place.number += 1;
                Ok(rows.next().map(|next| *row = next).is_some())
            }
            RecordKind::Csv { reader, record, .. } => {
                let mut next = csv::StringRecord::new();
                let line = reader.position().line();
                let outcome = reader.read_record(&mut next);
                self.place.number = next.position().map_or(line, csv::Position::line);
                *record = match outcome {
                    Ok(false) => return Ok(false),
                    Ok(true) => Ok(next),
                    Err(error) => match error.kind() {
                        csv::ErrorKind::UnequalLengths { expected_len, len, pos } => {
                            self.place.number = pos.as_ref().map_or(line, csv::Position::line);
                            Err(format!("it has {len} values, and the first line names {expected_len} columns"))
                        }
                        csv::ErrorKind::Utf8 { pos, err } => {
                            self.place.number = pos.as_ref().map_or(line, csv::Position::line);
                            Err(format!("it is not UTF-8: {err}"))
                        }
                        _ => return Err(Error::config(format!("cannot read `{}`", path.display())).cause(error)),
                    },
                };
                Ok(true)
            }
        }
    }

    /// The columns that the record read last has.
    fn columns(&self) -> Vec<String> {
        let keys = |object: &Map<String, Value>| object.keys().cloned().collect();
        match &self.kind {
            RecordKind::Jsonl { line, .. } => parse_object(line).as_ref().map(keys).unwrap_or_default(),
            RecordKind::Array { object, .. } => keys(object),
            RecordKind::Field { row, .. } => row.as_object().map(keys).unwrap_or_default(),
            RecordKind::Csv { header, .. } => header.iter().map(str::to_owned).collect(),
            RecordKind::Text { .. } => vec![TEXT_COLUMN.to_owned()],
        }
    }

    /// The values of the record read last, or why it is bad.
    fn cells(&self, columns: &[Wanted]) -> Result<Vec<SourceCell>, String> {
        let of_object = |object: &Map<String, Value>| {
            columns.iter().map(|wanted| wanted.of_json(object.get(&wanted.column))).collect::<Result<_, _>>()
        };
        match &self.kind {
            RecordKind::Jsonl { line, .. } => of_object(&parse_object(line)?),
            RecordKind::Array { object, .. } => of_object(object),
            RecordKind::Field { row: Value::Object(object), .. } => of_object(object),
            RecordKind::Field { row, .. } => Err(format!("the row is {}, not an object", json_kind(row))),
            RecordKind::Csv { header, record, .. } => {
                let record = record.as_ref().map_err(Clone::clone)?;
                let cell = |wanted: &Wanted| {
                    let at = header.iter().position(|name| name == wanted.column);
                    let text = at.and_then(|at| record.get(at)).map(|text| Value::String(text.to_owned()));
                    wanted.of_json(text.as_ref())
                };
                columns.iter().map(cell).collect()
            }
            RecordKind::Text { line, .. } => {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                let text = str::from_utf8(line).map_err(|error| format!("the line is not UTF-8: {error}"))?;
                Ok(columns.iter().map(|_| SourceCell::Text(text.to_owned())).collect())
            }
        }
    }
}

/// Counts the lines of what is read from it.
struct CountingReader {
    inner: BufReader<File>,
    line: u64,
}

impl CountingReader {
    /// Returns whether a file begins with a list, blanks and a byte order mark aside.
    fn list_in(lines: &mut BufReader<File>) -> std::io::Result<bool> {
        let start = lines.fill_buf()?;
        let start = start.strip_prefix(BYTE_ORDER_MARK).unwrap_or(start).trim_ascii_start();
        // The whole file may be one line that starts a list of rows; `["a", "b"]` in a line of its own is a bad row.
        Ok(start.first() == Some(&b'[') && matches!(start[1..].trim_ascii_start().first(), Some(b'{' | b']') | None))
    }

    /// Goes to the next byte that is not blank and returns it.
    fn skip_blanks(&mut self) -> std::io::Result<Option<u8>> {
        if self.line == 1 && self.inner.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
            self.inner.consume(BYTE_ORDER_MARK.len());
        }
        loop {
            match self.inner.fill_buf()?.first() {
                Some(byte) if byte.is_ascii_whitespace() => self.step()?,
                other => return Ok(other.copied()),
            }
        }
    }

    fn step(&mut self) -> std::io::Result<()> {
        self.read(&mut [0]).map(|_| ())
    }
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.line += buffer[..count].iter().filter(|byte| **byte == b'\n').count() as u64;
        Ok(count)
    }
}

fn rows_of_field(path: &Path, file: impl Read, field: &str) -> Result<Vec<Value>> {
    let value: Value = serde_json::from_reader(file).map_err(|error| {
        Error::config(format!("`{}` is not JSON", path.display()))
            .at(path, Some(error.line()), Some(error.column()))
            .cause(without_position(&error))
    })?;
    let wrong = |found: &str, hint: String| {
        Err(Error::config(format!("`{}` has no list of rows in its field `{field}`: {found}", path.display()))
            .hint(hint))
    };
    match value {
        Value::Object(mut object) => match object.remove(field) {
            Some(Value::Array(rows)) => Ok(rows),
            Some(other) => wrong(&format!("it is {}", json_kind(&other)), "`field` names a list of objects".to_owned()),
            None => {
                let keys: Vec<String> = object.keys().map(|key| format!("`{key}`")).collect();
                wrong("there is none", format!("its fields are {}", keys.join(", ")))
            }
        },
        other => {
            wrong(&format!("the file is {}", json_kind(&other)), "leave `field` out for a list of rows".to_owned())
        }
    }
}

/// Objects need not all have every key: the first hundred say which there are.
const ROWS_FOR_COLUMNS: u64 = 100;

/// Goes through a file once, or its first rows: how many, and the columns.
fn scan_records(path: &Arc<Path>, format: &DataFormat, most_rows: u64) -> Result<(u64, Vec<String>)> {
    let mut records = Records::open(path, format)?;
    let (mut num_rows, mut columns) = (0, vec![]);
    while num_rows < most_rows && records.advance()? {
        num_rows += 1;
        if num_rows <= ROWS_FOR_COLUMNS {
            for column in records.columns() {
                if !columns.contains(&column) {
                    columns.push(column);
                }
            }
        }
    }
    if num_rows > 0 && columns.is_empty() {
        let shown = path.display();
        return Err(Error::config(format!("`{shown}` is not a jsonl file: none of its first rows is a JSON object"))
            .hint("each line has to be one object, such as {\"document\": \"…\", \"summary\": \"…\"}"));
    }
    Ok((num_rows, columns))
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

/// What some editors put before the first line.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn parse_object(line: &[u8]) -> Result<Map<String, Value>, String> {
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line).trim_ascii_end();
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("the line is {}, not an object", json_kind(&other))),
        // The parser's own line is always the first.
        Err(error) => Err(format!("the line is not JSON: {error}").replace(" at line 1 column ", " at column ")),
    }
}

/// The parser counts from where it began, not from the start of the file.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
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

pub fn json_kind(value: &Value) -> &'static str {
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
    columns: Vec<Wanted>,
    ready: VecDeque<Result<Vec<SourceCell>, String>>,
    left: u64,
}

impl ParquetRows {
    fn next(&mut self) -> Result<Option<SourceRow>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        while self.ready.is_empty() {
            let batch = read_parquet(&self.place.file, || self.reader.next().transpose())?;
            let batch = batch.ok_or_else(|| parquet_error(&self.place.file, "it has fewer rows than it says"))?;
            self.ready = cells_of(&batch, &self.columns).map_err(|error| error.at_file(&*self.place.file))?;
        }
        self.place.number += 1;
        Ok(self.ready.pop_front().map(|cells| SourceRow { place: self.place.clone(), cells }))
    }
}

fn cells_of(batch: &RecordBatch, columns: &[Wanted]) -> Result<VecDeque<Result<Vec<SourceCell>, String>>> {
    enum Read {
        Absent,
        Texts(StringArray),
        Nested(Arc<dyn Array>),
    }
    let read = |wanted: &Wanted| {
        Ok(match (wanted.want, batch.column_by_name(&wanted.column)) {
            (Want::TextOrNone, None) => Read::Absent,
            // Nothing but nulls.
            (_, Some(array)) if *array.data_type() == DataType::Null => Read::Absent,
            (Want::Nested, Some(array)) => Read::Nested(array.clone()),
            _ => Read::Texts(text_column(batch, &wanted.column)?),
        })
    };
    let read: Vec<Read> = columns.iter().map(read).collect::<Result<_>>()?;
    let cell = |i: usize, wanted: &Wanted, column: &Read| match column {
        Read::Texts(texts) if !texts.is_null(i) => Ok(SourceCell::Text(texts.value(i).to_owned())),
        Read::Nested(array) => wanted.of_json(Some(&json_of(array.as_ref(), i))),
        _ => wanted.of_json(Some(&Value::Null)),
    };
    let row = |i: usize| columns.iter().zip(&read).map(|(wanted, column)| cell(i, wanted, column)).collect();
    Ok((0..batch.num_rows()).map(row).collect())
}

/// A value of lists, structures and scalars as JSON. A structure's field that is null is left out: all structures of a
/// column have the same fields, those that a row does not have among them.
fn json_of(array: &dyn Array, i: usize) -> Value {
    if array.is_null(i) {
        return Value::Null;
    }
    let list = |values: Arc<dyn Array>| Value::Array((0..values.len()).map(|i| json_of(values.as_ref(), i)).collect());
    match array.data_type() {
        DataType::List(_) => list(array.as_list::<i32>().value(i)),
        DataType::LargeList(_) => list(array.as_list::<i64>().value(i)),
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(i)),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let value =
                |(field, column): (&Arc<Field>, &Arc<dyn Array>)| (field.name().clone(), json_of(column.as_ref(), i));
            Value::Object(fields.iter().zip(columns).map(value).filter(|(_, value)| !value.is_null()).collect())
        }
        DataType::Boolean => array.as_boolean().value(i).into(),
        kind if kind.is_numeric() => {
            let text = arrow::util::display::array_value_to_string(array, i).unwrap_or_default();
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        }
        _ => arrow::util::display::array_value_to_string(array, i).map_or(Value::Null, Value::String),
    }
}

/// The index of a column among those at the top of a schema.
fn root_of(schema: &SchemaDescriptor, name: &str) -> Option<usize> {
    schema.root_schema().get_fields().iter().position(|field| field.name() == name)
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

fn scan_parquet(path: &Path) -> Result<(u64, Vec<String>)> {
    let builder = parquet_builder(path, open(path)?)?;
    let metadata = builder.metadata();
    let of_groups = metadata
        .row_groups()
        .iter()
        .try_fold(0u64, |sum, group| sum.checked_add(u64::try_from(group.num_rows()).ok()?));
    let num_rows = u64::try_from(metadata.file_metadata().num_rows()).ok();
    let num_rows = num_rows.filter(|num_rows| of_groups == Some(*num_rows));
    let num_rows =
        num_rows.ok_or_else(|| parquet_error(path, "its parts have another number of rows than the whole"))?;
    let columns = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
    Ok((num_rows, columns))
}

fn parquet_builder(path: &Path, file: File) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    check_nesting(path, &file)?;
    read_parquet(path, || ParquetRecordBatchReaderBuilder::try_new(file))
}

/// Columns nested deeper than this are nobody's rows.
const MAX_NESTING: usize = 32;

/// The library recurses into the columns that a footer describes, without a bound. So a footer that could describe more
/// levels than a thread's stack takes is first read on a stack that is large enough for it.
fn check_nesting(path: &Path, file: &File) -> Result<()> {
    const HARMLESS: u64 = 1024;
    /// More of the stack than the library takes for a level, which is 8 bytes of the footer at least.
    const STACK_PER_BYTE: u64 = 256;
    const LARGEST: u64 = 64 << 20;
    let size = file.metadata().map_err(|error| read_error(path, error))?.len();
    let mut end = [0; 8];
    let at = size.saturating_sub(8);
    // What is no Parquet file at all is told so by the library.
    if file.read_exact_at(&mut end, at).is_err() || &end[4..] != b"PAR1" {
        return Ok(());
    }
    let footer = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    if footer <= HARMLESS || footer > at {
        return Ok(());
    }
    if footer > LARGEST {
        return Err(parquet_error(path, format!("its footer has {footer} bytes, more than {LARGEST}")));
    }
    let file = file.try_clone().map_err(|error| read_error(path, error))?;
    let deepest = move || {
        // Dropped here too, which recurses as well.
        let builder = panics::caught(|| ParquetRecordBatchReaderBuilder::try_new(file)).ok()?.ok()?;
        builder.parquet_schema().columns().iter().map(|column| column.path().parts().len()).max()
    };
    let thread = std::thread::Builder::new().stack_size((16 << 20) + (footer * STACK_PER_BYTE) as usize);
    let thread = thread.spawn(deepest).map_err(|error| parquet_error(path, error))?;
    match thread.join().ok().flatten() {
        Some(depth) if depth > MAX_NESTING => {
            Err(parquet_error(path, format!("its columns are nested {depth} deep, more than {MAX_NESTING}")))
        }
        _ => Ok(()),
    }
}

/// The library asserts much of what a file says.
fn read_parquet<T, E: std::fmt::Display>(path: &Path, read: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    match panics::caught(read) {
        Ok(read) => read.map_err(|error| parquet_error(path, error)),
        Err(panic) => Err(parquet_error(path, panic)),
    }
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
