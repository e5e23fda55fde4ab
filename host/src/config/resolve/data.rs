//! A data set section: which files, which rows, which columns.

use std::path::{Path, PathBuf};

use super::super::plan::{DataFile, DataFormat, DatasetPlan, HubDataPlan, OnBadRow, TemplatePlan};
use super::super::section::{Found, Reported, Section};
use super::super::yaml::{Node, Tree};
use super::data_files::{by_names, format_of};
use super::{Surroundings, parts};

pub fn dataset(section: &Section<'_>, cache_dir: &Path, around: &Surroundings<'_>) -> Found<DatasetPlan> {
    let source = source(section, around);
    let template = template(section, around);
    let column_map = column_map(section, template.as_ref().ok().and_then(Option::as_ref));
    let split = section.get::<String>("split");
    if let (Ok(Source { files, hub: None, .. }), Ok(split)) = (&source, &split) {
        check_split(section, split, files)?;
    }
    let on_bad_row = match section.get::<String>("on_bad_row")?.as_str() {
        "error" => OnBadRow::Error,
        "skip" => OnBadRow::Skip,
        _ => return Err(Reported),
    };
    let train_on_input = section.get("train_on_input")?;
    let Source { files, format, hub } = source?;
    Ok(DatasetPlan {
        files,
        format,
        hub,
        split: split?,
        column_map: column_map?,
        template: template?.map(|(plan, _)| plan),
        train_on_input,
        on_bad_row,
        cache_dir: cache_dir.to_owned(),
    })
}

/// Where rows come from: files, and their format; or the hub, which is asked later.
struct Source {
    files: Vec<DataFile>,
    format: DataFormat,
    hub: Option<HubDataPlan>,
}

fn source(section: &Section<'_>, around: &Surroundings<'_>) -> Found<Source> {
    let source = section.get::<String>("source")?;
    let data_files = data_files(section)?;
    let field = section.get::<Option<String>>("field")?;
    let name = section.get::<Option<String>>("name")?;
    let revision = section.get::<Option<String>>("revision")?;
    let is_hub = is_hub_name(&source) && !around.is_folder(Path::new(&source)) && !around.is_file(Path::new(&source));
    if is_hub {
        // The format is the files'; until they are known, any.
        let hub = HubDataPlan { repo: source, name, revision, data_files, pinned: None };
        let format = field.map_or(DataFormat::Jsonl, DataFormat::JsonField);
        return Ok(Source { files: vec![], format, hub: Some(hub) });
    }
    for (key, value) in [("name", name), ("revision", revision)] {
        if value.is_some() {
            return Err(section.fail(
                key,
                format!("`{}` belongs to data sets of the hub, and `{source}` is not one", section.path(key)),
                "leave it out, or give `source: org/name`",
            ));
        }
    }
    let format = match source.as_str() {
        "json" => field.map_or(DataFormat::Jsonl, DataFormat::JsonField),
        _ if field.is_some() => {
            return Err(section.fail(
                "field",
                format!("`{}` belongs to `source: json`", section.path("field")),
                "leave it out",
            ));
        }
        "parquet" => DataFormat::Parquet,
        "csv" => DataFormat::Csv,
        "text" => DataFormat::Text,
        _ if !data_files.is_empty() => {
            return Err(section.fail(
                "source",
                format!(
                    "`{}` says how `data_files` are read, and `{source}` is none of `json`, `csv`, `parquet`, `text`",
                    section.path("source")
                ),
                "for a folder of train, validation and test files leave `data_files` out",
            ));
        }
        _ => return folder(section, &source, around),
    };
    if data_files.is_empty() {
        return Err(section.fail(
            "source",
            format!("`source: {source}` needs `{}`", section.path("data_files")),
            "`data_files: rows.jsonl`, a list of files, or a mapping of split to files",
        ));
    }
    match data_files.iter().find(|file| file.path.to_string_lossy().contains("://")) {
        Some(file) => Err(section.fail(
            "data_files",
            format!("`{}` is an address, and data is read from files only", file.path.display()),
            "download the file first",
        )),
        None => Ok(Source { files: data_files, format, hub: None }),
    }
}

/// `org/name`, of the characters names on the hub have.
fn is_hub_name(source: &str) -> bool {
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && format_of(part).is_none()
    };
    source.split_once('/').is_some_and(|(org, name)| is_name(org) && is_name(name))
}

/// The files of `data_files`; none when it is absent.
fn data_files(section: &Section<'_>) -> Found<Vec<DataFile>> {
    let Some(node) = section.node("data_files")? else { return Ok(vec![]) };
    data_files_of(node).filter(|files| !files.is_empty()).ok_or_else(|| {
        section.fail(
            "data_files",
            format!(
                "`{}` must be a file, a list of files, or a mapping of split to files, found {}",
                section.path("data_files"),
                node.describe()
            ),
            "`data_files: {train: train.jsonl, validation: [a.jsonl, b.jsonl]}`",
        )
    })
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

/// `source` as a folder of data files, whose names say the splits.
fn folder(section: &Section<'_>, source: &str, around: &Surroundings<'_>) -> Found<Source> {
    let path = PathBuf::from(source);
    if !around.is_folder(&path) {
        return Err(not_a_folder(section, source, around));
    }
    let below = (around.files_below)(&path);
    let Some((files, format)) = by_names(below.iter().map(String::as_str)) else {
        return Err(section.fail(
            "source",
            format!("the folder `{source}` has no data file"),
            "data files end in .jsonl, .json, .csv, .parquet or .txt; name them `train.jsonl`, `validation.jsonl`",
        ));
    };
    let files = files.into_iter().map(|file| DataFile { split: file.split, path: path.join(file.path) }).collect();
    Ok(Source { files, format, hub: None })
}

fn not_a_folder(section: &Section<'_>, source: &str, around: &Surroundings<'_>) -> Reported {
    if around.is_file(Path::new(source)) {
        let format = match format_of(source) {
            Some(DataFormat::Parquet) => "parquet",
            Some(DataFormat::Csv) => "csv",
            Some(DataFormat::Text) => "text",
            _ => "json",
        };
        return section.fail(
            "source",
            format!("`{source}` is a file, and `{}` takes a format or a folder", section.path("source")),
            format!("`source: {format}` with `data_files: {source}`"),
        );
    }
    section.fail(
        "source",
        format!("the data folder `{source}` is not there"),
        "give a folder, a hub data set as `org/name`, or `source: json` with `data_files`",
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
