//! `cargo xtask data`: a real summarisation set, in the shape of XSum, from Debian's package descriptions.
//!
//! One row is `document` (the long description), `summary` (its one line) and `id` (the package). Which rows there are
//! depends on the day's archive; which split a row is in does not: that is a hash of its name.

mod clean;
mod description;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::apt::Apt;
use crate::shell::{Failure, PathContext, Result};

/// Where the shipped configs look.
pub const DATA_DIR: &str = ".demo/data";
pub const SPLITS: [&str; 3] = ["train", "validation", "test"];

/// One line of the set.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    pub document: String,
    pub summary: String,
    pub id: String,
}

pub fn run(root: &Path) -> Result<()> {
    let dir = root.join(DATA_DIR);
    if SPLITS.iter().all(|split| dir.join(split).with_extension("jsonl").is_file()) {
        println!("data: `{DATA_DIR}` is there");
        return Ok(());
    }
    let apt = Apt::open(root)?.ok_or_else(|| {
        Failure::new("the data set is made from Debian's package descriptions, and there is no apt here").hint(
            "give the demo `--data FOLDER` with train.jsonl, validation.jsonl and test.jsonl (document, summary, id)",
        )
    })?;
    let descriptions: Vec<_> = apt.lists("Translation-en")?.iter().flat_map(|list| description::parse(list)).collect();
    if descriptions.is_empty() {
        return Err(Failure::new("apt's lists hold no package descriptions")
            .hint("check that `/etc/apt` names a Debian or Ubuntu archive, or give the demo `--data FOLDER`"));
    }
    let (rows, report) = clean::clean(descriptions);
    println!("{report}");
    write(root, rows)
}

fn write(root: &Path, rows: Vec<Row>) -> Result<()> {
    let new = root.join(".demo/.data-new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new).path_context("create", &new)?;
    let mut splits = [vec![], vec![], vec![]];
    for row in rows {
        splits[split_of(&row)].push(row);
    }
    for (name, mut rows) in SPLITS.into_iter().zip(splits) {
        // Any first part of a split is a fair sample of it.
        rows.sort_by_cached_key(|row| *blake3::hash(format!("order {}", row.id).as_bytes()).as_bytes());
        write_jsonl(&new.join(name).with_extension("jsonl"), &rows)?;
        write_parquet(&new.join(name).with_extension("parquet"), &rows)?;
        println!("{DATA_DIR}/{name}.jsonl, .parquet: {} rows", rows.len());
    }
    let dir = root.join(DATA_DIR);
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&new, &dir).path_context("create", &dir)
}

/// 90% train, 5% validation, 5% test, by a hash of the package's name: a row stays in its split from day to day.
fn split_of(row: &Row) -> usize {
    let hash = blake3::hash(row.id.as_bytes());
    let [a, b, c, d, ..] = hash.as_bytes();
    match u32::from_le_bytes([*a, *b, *c, *d]) % 100 {
        0..90 => 0,
        90..95 => 1,
        _ => 2,
    }
}

fn write_jsonl(path: &Path, rows: &[Row]) -> Result<()> {
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        for row in rows {
            serde_json::to_writer(&mut file, row)?;
            file.write_all(b"\n")?;
        }
        file.into_inner().map_err(|error| error.into_error())?.sync_all()
    };
    write().path_context("write", path)
}

fn write_parquet(path: &Path, rows: &[Row]) -> Result<()> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("cannot write `{}`", path.display())).cause(error);
    let column =
        |text: fn(&Row) -> &String| -> ArrayRef { Arc::new(StringArray::from_iter_values(rows.iter().map(text))) };
    let columns = [
        ("document", column(|row| &row.document)),
        ("summary", column(|row| &row.summary)),
        ("id", column(|row| &row.id)),
    ];
    let batch = RecordBatch::try_from_iter(columns).map_err(|error| failed(&error))?;
    let file = File::create(path).map_err(|error| failed(&error))?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).map_err(|error| failed(&error))?;
    writer.write(&batch).map_err(|error| failed(&error))?;
    writer.close().map_err(|error| failed(&error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    fn row(id: &str) -> Row {
        Row {
            document: format!("What {id} does, in \"many\" words,\nover lines."),
            summary: "it".into(),
            id: id.into(),
        }
    }

    /// Pinned: a row that changed its split would be trained on one day and tested on the next.
    #[test]
    fn a_row_stays_in_its_split() {
        let split = |id: &str| SPLITS[split_of(&row(id))];
        assert_eq!(["bash", "vim", "axel", "caddy"].map(split), ["train", "train", "validation", "test"]);
        let mut counts = [0u32; 3];
        (0..10_000).for_each(|i| counts[split_of(&row(&format!("package{i}")))] += 1);
        assert!((8_900..9_100).contains(&counts[0]) && counts[1].abs_diff(counts[2]) < 100, "{counts:?}");
    }

    #[test]
    fn both_formats_hold_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let rows: Vec<Row> = (0..300).map(|i| row(&format!("package{i}"))).collect();
        write(dir.path(), rows.clone()).unwrap();
        let mut seen = vec![];
        for split in SPLITS {
            let path = dir.path().join(DATA_DIR).join(split);
            let text = fs::read_to_string(path.with_extension("jsonl")).unwrap();
            let of_jsonl: Vec<Row> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let file = File::open(path.with_extension("parquet")).unwrap();
            let batches = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
            let mut of_parquet = vec![];
            for batch in batches.map(Result::unwrap) {
                let column = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
                let (documents, summaries, ids) = (column("document"), column("summary"), column("id"));
                of_parquet.extend((0..batch.num_rows()).map(|i| Row {
                    document: documents.value(i).to_owned(),
                    summary: summaries.value(i).to_owned(),
                    id: ids.value(i).to_owned(),
                }));
            }
            assert_eq!(of_jsonl, of_parquet);
            assert!(of_jsonl.iter().all(|row| SPLITS[split_of(row)] == split) && !of_jsonl.is_empty());
            seen.extend(of_jsonl);
        }
        seen.sort_by_key(|row| rows.iter().position(|other| other == row));
        assert_eq!(seen, rows);
    }
}
