//! A data set section: which files, which rows, which columns.

use std::path::{Path, PathBuf};

use super::super::plan::{DataFile, DataFormat, DatasetPlan, OnBadRow, TemplatePlan};
use super::super::section::{Found, Reported, Section};
use super::super::yaml::{Node, Tree};
use super::{Surroundings, parts};

/// File names a data folder may have for a split; the first is the split's name.
const SPLITS: [&[&str]; 3] = [&["train"], &["validation", "valid", "val", "dev"], &["test"]];
const FORMATS: [(&str, DataFormat); 3] =
    [("jsonl", DataFormat::Jsonl), ("json", DataFormat::Jsonl), ("parquet", DataFormat::Parquet)];

pub fn dataset(section: &Section<'_>, cache_dir: &Path, around: &Surroundings<'_>) -> Found<DatasetPlan> {
    let files = source(section, around);
    let template = template(section, around);
    let column_map = column_map(section, template.as_ref().ok().and_then(Option::as_ref));
    let split = section.get::<String>("split");
    if let (Ok((files, _)), Ok(split)) = (&files, &split) {
        check_split(section, split, files)?;
    }
    let on_bad_row = match section.get::<String>("on_bad_row")?.as_str() {
        "error" => OnBadRow::Error,
        "skip" => OnBadRow::Skip,
        _ => return Err(Reported),
    };
    let train_on_input = section.get("train_on_input")?;
    let (files, format) = files?;
    Ok(DatasetPlan {
        files,
        format,
        split: split?,
        column_map: column_map?,
        template: template?.map(|(plan, _)| plan),
        train_on_input,
        on_bad_row,
        cache_dir: cache_dir.to_owned(),
    })
}

fn source(section: &Section<'_>, around: &Surroundings<'_>) -> Found<(Vec<DataFile>, DataFormat)> {
    let source = section.get::<String>("source")?;
    let data_files = section.node("data_files")?;
    let format = match source.as_str() {
        "json" => DataFormat::Jsonl,
        "parquet" => DataFormat::Parquet,
        "csv" | "text" => {
            return Err(section.fail(
                "source",
                format!("`{source}` files are not read yet"),
                "`source: json` reads one JSON object a line, `source: parquet` Parquet",
            ));
        }
        _ if data_files.is_some() => {
            return Err(section.fail(
                "source",
                format!(
                    "`{}` says how `data_files` are read, and `{source}` is neither `json` nor `parquet`",
                    section.path("source")
                ),
                "for a folder of train, validation and test files leave `data_files` out",
            ));
        }
        _ => return folder(section, &source, around),
    };
    let Some(node) = data_files else {
        return Err(section.fail(
            "source",
            format!("`source: {source}` needs `{}`", section.path("data_files")),
            "`data_files: rows.jsonl`, a list of files, or a mapping of split to files",
        ));
    };
    let files = data_files_of(node).filter(|files| !files.is_empty()).ok_or_else(|| {
        section.fail(
            "data_files",
            format!(
                "`{}` must be a file, a list of files, or a mapping of split to files, found {}",
                section.path("data_files"),
                node.describe()
            ),
            "`data_files: {train: train.jsonl, validation: [a.jsonl, b.jsonl]}`",
        )
    })?;
    match files.iter().find(|file| file.path.to_string_lossy().contains("://")) {
        Some(file) => Err(section.fail(
            "data_files",
            format!("`{}` is an address, and data is read from files only", file.path.display()),
            "download the file first",
        )),
        None => Ok((files, format)),
    }
}

fn data_files_of(node: &Node) -> Option<Vec<DataFile>> {
    match &node.tree {
        Tree::Map(entries) => {
            let mut files = vec![];
            for entry in entries {
                files.extend(files_of(&entry.key, &entry.value)?);
            }
            Some(files)
        }
        _ => files_of("train", node),
    }
}

fn files_of(split: &str, node: &Node) -> Option<Vec<DataFile>> {
    let file = |node: &Node| {
        let path = node.as_str().filter(|path| !path.is_empty())?;
        Some(DataFile { split: split.to_owned(), path: path.into() })
    };
    match &node.tree {
        Tree::List(items) => items.iter().map(file).collect(),
        _ => Some(vec![file(node)?]),
    }
}

/// `source` as a folder that holds `train.jsonl` or `train.parquet`, and perhaps `validation` and `test`.
fn folder(section: &Section<'_>, source: &str, around: &Surroundings<'_>) -> Found<(Vec<DataFile>, DataFormat)> {
    let path = PathBuf::from(source);
    if !around.is_folder(&path) {
        return Err(not_a_folder(section, source, around));
    }
    for (extension, format) in FORMATS {
        let found: Vec<_> = SPLITS
            .iter()
            .filter_map(|stems| {
                let files = stems.iter().map(|stem| path.join(format!("{stem}.{extension}")));
                let path = files.into_iter().find(|file| around.is_file(file))?;
                Some(DataFile { split: stems[0].to_owned(), path })
            })
            .collect();
        if !found.is_empty() {
            return Ok((found, format));
        }
    }
    Err(section.fail(
        "source",
        format!("the folder `{source}` has no train, validation or test file"),
        "name them `train.jsonl` or `train.parquet`, or give `source: json` and `data_files`",
    ))
}

fn not_a_folder(section: &Section<'_>, source: &str, around: &Surroundings<'_>) -> Reported {
    if around.is_file(Path::new(source)) {
        let format = if source.ends_with(".parquet") { "parquet" } else { "json" };
        return section.fail(
            "source",
            format!("`{source}` is a file, and `{}` takes a format or a folder", section.path("source")),
            format!("`source: {format}` with `data_files: {source}`"),
        );
    }
    let looks_local = source.starts_with(['/', '.', '~']) || source.ends_with('/') || source.matches('/').count() > 1;
    if looks_local {
        return section.fail(
            "source",
            format!("the data folder `{source}` is not there"),
            "give a folder, or `source: json` with `data_files`",
        );
    }
    section.fail(
        "source",
        format!("`{source}` is no folder here, and data sets of the hub are not read yet"),
        "download the data set's files, then `source: json` or `source: parquet` with `data_files`",
    )
}

/// Checks that every split an expression names has a file; the grammar itself is the data path's.
fn check_split(section: &Section<'_>, split: &str, files: &[DataFile]) -> Found<()> {
    for part in split.split('+') {
        let name = part.split('[').next().unwrap_or(part).trim();
        if !files.iter().any(|file| file.split == name) {
            let mut known: Vec<_> = files.iter().map(|file| file.split.as_str()).collect();
            known.dedup();
            return Err(section.fail(
                "split",
                format!("`{}` names the split `{name}`, which has no file", section.path("split")),
                format!("the data has: {}", known.join(", ")),
            ));
        }
    }
    Ok(())
}

/// The template that belongs to the data set, and what v0.2.1 calls its input: `template` of an instruct data set, Alpaca's
/// own of the alpaca ones.
fn template(section: &Section<'_>, around: &Surroundings<'_>) -> Found<Option<(TemplatePlan, &'static str)>> {
    if !section.knows("template") {
        let guest = parts::guest_ref(section, "_component_", "alpaca", around)?;
        return Ok(Some((TemplatePlan { guest, joined: false }, "input")));
    }
    let Some(guest) = parts::template(section, "template", around)? else { return Ok(None) };
    let input = match guest.path.file_stem().and_then(|stem| stem.to_str()) {
        Some("summarize") => "dialogue",
        Some("grammar") => "sentence",
        Some("question_answer") => "question",
        _ => "input",
    };
    Ok(Some((TemplatePlan { guest, joined: true }, input)))
}

/// Every name or none; torchtune refuses partial maps too. Under a v0.2.1 template the input may have that template's name.
fn column_map(section: &Section<'_>, template: Option<&(TemplatePlan, &'static str)>) -> Found<Vec<(String, String)>> {
    let joined = template.is_some_and(|(plan, _)| plan.joined);
    let old_input = template.map_or("input", |(_, input)| input);
    let (expected, example): (&[&'static str], _) = match template {
        Some((plan, _)) if !plan.joined => {
            (&["instruction", "input", "output"], "`column_map: {instruction: prompt, input: context, output: answer}`")
        }
        _ => (&["input", "output"], "`column_map: {input: document, output: summary}`"),
    };
    let Some(node) = section.node("column_map")? else {
        let column = |name: &&'static str| if joined && *name == "input" { old_input } else { *name };
        return Ok(expected.iter().map(|name| ((*name).to_owned(), column(name).to_owned())).collect());
    };
    let path = section.path("column_map");
    let names = || format!("`{}`", expected.join("`, `"));
    if !node.is_map() {
        let message = format!("`{path}` must map {} to columns, found {}", names(), node.describe());
        return Err(section.fail("column_map", message, example));
    }
    let known = |key: &str| expected.contains(&key) || (joined && key == old_input);
    if let Some(entry) = node.entries().iter().find(|entry| !known(&entry.key)) {
        let message = format!("`{path}` maps `{}`, and this data set has {}", entry.key, names());
        return Err(section.fail("column_map", message, example));
    }
    let column = |name: &str| node.child(name).and_then(Node::as_str).map(str::to_owned);
    let mut map = Vec::new();
    for name in expected {
        let found = column(name).or_else(|| if joined && *name == "input" { column(old_input) } else { None });
        // Not every instruction has an input; without a column for it none has.
        match found {
            Some(column) => map.push(((*name).to_owned(), column)),
            None if expected.len() == 3 && *name == "input" => {}
            None => {
                let message = format!("`{path}` must give a column for `{name}`");
                return Err(section.fail("column_map", message, example));
            }
        }
    }
    Ok(map)
}
