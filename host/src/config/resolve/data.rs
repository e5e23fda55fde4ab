//! A data set section: which files, which rows, what a row is.

use std::path::{Path, PathBuf};

use super::super::Notice;
use super::super::plan::{
    ChatStyle, ColumnPlan, DataFile, DataFormat, DatasetPlan, HubDataPlan, OnBadRow, PackingPlan, RowsPlan,
    TemplatePlan,
};
use super::super::section::{Found, Reported, Section};
use super::super::yaml::{Node, Tree};
use super::data_files::{by_names, format_of};
use super::{Surroundings, parts};

/// `max_seq_len` is the tokenizer's, which packs are filled to.
pub fn dataset(
    section: &Section<'_>,
    max_seq_len: Option<usize>,
    cache_dir: &Path,
    around: &Surroundings<'_>,
    notices: &mut Vec<Notice>,
) -> Found<DatasetPlan> {
    let source = source(section, around);
    let rows = rows(section, around);
    let packing = packing(section, max_seq_len);
    let split = section.get::<String>("split");
    if let (Ok(Source { files, hub: None, .. }), Ok(split)) = (&source, &split) {
        check_split(section, split, files)?;
    }
    let on_bad_row = match section.get::<String>("on_bad_row")?.as_str() {
        "error" => OnBadRow::Error,
        "skip" => OnBadRow::Skip,
        _ => return Err(Reported),
    };
    let knows = |name: &str| section.knows(name);
    let train_on_input = if knows("train_on_input") { section.get("train_on_input")? } else { true };
    let new_system_prompt = if knows("new_system_prompt") { section.get("new_system_prompt")? } else { None };
    if let Some(template) = old_template(section) {
        notices.push(Notice {
            message: format!(
                "`{}` wraps no text around its rows, as torchtune 0.6; v0.2.1 took {template}: set `tokenizer.prompt_template` to it",
                section.component_name()
            ),
            location: section.reader.config.locate(&section.path("_component_")),
        });
    }
    let Source { files, format, hub } = source?;
    Ok(DatasetPlan {
        files,
        format,
        hub,
        split: split?,
        rows: rows?,
        new_system_prompt,
        train_on_input,
        on_bad_row,
        packing: packing?,
        cache_dir: cache_dir.to_owned(),
    })
}

/// The template that v0.2.1 built into a data set which has none now, unless the config names one.
fn old_template(section: &Section<'_>) -> Option<&'static str> {
    let template = match section.component_name() {
        "samsum_dataset" => "SummarizeTemplate",
        "grammar_dataset" => "GrammarErrorCorrectionTemplate",
        // As v0.2.1 spells it.
        _ if named(section).ends_with("stack_exchanged_paired_dataset") => "QuestionAnswerTemplate",
        _ => return None,
    };
    let tokenizer = section.reader.config.root.at("tokenizer.prompt_template");
    tokenizer.is_none_or(Node::is_null).then_some(template)
}

/// The component as the config writes it.
fn named<'a>(section: &Section<'a>) -> &'a str {
    let entry = section.reader.config.root.at(&section.path("_component_"));
    entry.and_then(Node::as_str).unwrap_or_default()
}

/// Whether its rows are a better and a worse answer.
fn is_paired(section: &Section<'_>) -> bool {
    section.component_name().ends_with("_paired_dataset")
        || ["preference_dataset", "hh_rlhf_helpful_dataset"].contains(&section.component_name())
}

fn packing(section: &Section<'_>, max_seq_len: Option<usize>) -> Found<Option<PackingPlan>> {
    if !section.get::<bool>("packed")? {
        return Ok(None);
    }
    if is_paired(section) {
        let what = format!("`{}` is `True`, and pairs stay together: they are not packed", section.path("packed"));
        return Err(section.fail("packed", what, "leave it out"));
    }
    let Some(max_seq_len) = max_seq_len else {
        let message = format!("`{}` needs `tokenizer.max_seq_len`: packs are of that length", section.path("packed"));
        return Err(section.fail("packed", message, "`tokenizer.max_seq_len=2048`"));
    };
    let split_across_pack = section.knows("split_across_pack") && section.get("split_across_pack")?;
    Ok(Some(PackingPlan { max_seq_len, split_across_pack }))
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
    let name = match section.component_name() {
        "wikitext_dataset" if section.is_given("subset") => Some(section.get("subset")?),
        "wikitext_dataset" | "cnn_dailymail_articles_dataset" => None,
        _ => section.get::<Option<String>>("name")?,
    };
    let revision = section.get::<Option<String>>("revision")?;
    let is_hub = is_hub_name(&source) && !around.is_folder(Path::new(&source)) && !around.is_file(Path::new(&source));
    if is_hub {
        let name = match section.component_name() {
            "wikitext_dataset" => Some(section.get("subset")?),
            "cnn_dailymail_articles_dataset" => Some("3.0.0".to_owned()),
            _ => name,
        };
        // The part of it that has pairs.
        let data_files = match section.component_name() {
            "stack_exchange_paired_dataset" if data_files.is_empty() && !section.is_given("source") => {
                vec![DataFile { split: "train".to_owned(), path: "data/rl/*".into() }]
            }
            _ => data_files,
        };
        // The format is the files'; until they are known, any.
        let hub = HubDataPlan { repo: source, name, revision, data_files, pinned: None };
        let format = field.map_or(DataFormat::Jsonl, DataFormat::JsonField);
        return Ok(Source { files: vec![], format, hub: Some(hub) });
    }
    let name_key = if section.knows("name") { "name" } else { "subset" };
    for (key, value) in [(name_key, name), ("revision", revision)] {
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
        None => Ok(Source { files: matching(section, data_files, around)?, format, hub: None }),
    }
}

/// The files that patterns stand for, as Hugging Face's `data_files` has them; what is a file is no pattern.
fn matching(section: &Section<'_>, files: Vec<DataFile>, around: &Surroundings<'_>) -> Found<Vec<DataFile>> {
    let mut found = vec![];
    for DataFile { split, path } in files {
        let is_pattern = |part: &Path| part.to_string_lossy().contains(['*', '?', '[', '{']);
        if !is_pattern(&path) || around.is_file(&path) {
            found.push(DataFile { split, path });
            continue;
        }
        let fail = |what: String, hint: &str| Err(section.fail("data_files", what, hint));
        let Some(folder) = path.ancestors().find(|folder| !is_pattern(folder)) else { return Err(Reported) };
        let below = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy();
        let Ok(pattern) = globset::GlobBuilder::new(&below).literal_separator(true).build() else {
            return fail(format!("`{}` is not a pattern of file names", path.display()), "`data_files: rows/*.jsonl`");
        };
        let pattern = pattern.compile_matcher();
        let start = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let mut names = (around.files_below)(start);
        names.retain(|name| pattern.is_match(name));
        names.sort_unstable();
        if names.is_empty() {
            return fail(format!("no file matches `{}`", path.display()), "`*` is within a folder, `**` goes below it");
        }
        found.extend(names.into_iter().map(|name| DataFile { split: split.clone(), path: folder.join(name) }));
    }
    Ok(found)
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

fn rows(section: &Section<'_>, around: &Surroundings<'_>) -> Found<RowsPlan> {
    let text = |column: &str, add_eos| Ok(RowsPlan::Text { column: column.to_owned(), add_eos });
    match section.component_name() {
        "text_completion_dataset" => {
            Ok(RowsPlan::Text { column: section.get("column")?, add_eos: section.get("add_eos")? })
        }
        "wikitext_dataset" => text("page", true),
        "cnn_dailymail_articles_dataset" => text("article", true),
        "chat_dataset" => {
            let style = match section.get::<String>("conversation_style")?.as_str() {
                "openai" => ChatStyle::OpenAi,
                _ => ChatStyle::ShareGpt,
            };
            let usual = if style == ChatStyle::OpenAi { "messages" } else { "conversations" };
            let column = section.get::<Option<String>>("conversation_column")?.unwrap_or(usual.to_owned());
            Ok(RowsPlan::Chat { column, style, template: chat_format(section, around)? })
        }
        "slimorca_dataset" => {
            let column = column_map(section, &[Expected::needed("conversations")], &[])?.remove(0).column;
            Ok(RowsPlan::Chat { column, style: ChatStyle::ShareGpt, template: chat_format(section, around)? })
        }
        "preference_dataset" | "hh_rlhf_helpful_dataset" => pairs(section, ["chosen", "rejected"], around),
        "stack_exchange_paired_dataset" => pairs(section, ["response_j", "response_k"], around),
        "alpaca_dataset" | "alpaca_cleaned_dataset" => {
            let guest = parts::guest_ref(section, "_component_", "alpaca", around)?;
            let columns = alpaca_columns(section)?;
            Ok(RowsPlan::Columns { columns, template: Some(TemplatePlan { guest, joined: false }) })
        }
        "samsum_dataset" => instruct(section, None, ["dialogue", "summary"], &[]),
        "instruct_dataset" => {
            let template = parts::template(section, "template", around)?;
            // What v0.2.1's templates called their input, and took where no map named a column.
            let stem = template.as_ref().and_then(|guest| guest.path.file_stem()).and_then(|stem| stem.to_str());
            let (input, aliases): (_, &[_]) = match stem {
                Some("summarize") => ("dialogue", &["dialogue"]),
                Some("grammar") => ("sentence", &["sentence"]),
                // Its code took the one, its documentation the other.
                Some("question_answer") => ("prompt", &["prompt", "question"]),
                _ => ("input", &[]),
            };
            let is_alpaca = stem == Some("alpaca");
            let template = template.map(|guest| TemplatePlan { guest, joined: true });
            if is_alpaca {
                return Ok(RowsPlan::Columns { columns: alpaca_columns(section)?, template });
            }
            instruct(section, template, [input, "output"], aliases)
        }
        _ => instruct(section, None, ["input", "output"], &[]),
    }
}

/// Rows of an input and an output; their columns where no map names any, and another name of the input.
fn instruct(
    section: &Section<'_>,
    template: Option<TemplatePlan>,
    [input, output]: [&'static str; 2],
    aliases: &[&str],
) -> Found<RowsPlan> {
    let expected = [
        Expected { default: input, ..Expected::needed("input") },
        Expected { default: output, ..Expected::needed("output") },
    ];
    Ok(RowsPlan::Columns { columns: column_map(section, &expected, aliases)?, template })
}

/// Two answers; after a prompt they are texts, else each is a conversation.
fn pairs(section: &Section<'_>, [chosen, rejected]: [&'static str; 2], around: &Surroundings<'_>) -> Found<RowsPlan> {
    let answers = [
        Expected { default: chosen, ..Expected::needed("chosen") },
        Expected { default: rejected, ..Expected::needed("rejected") },
    ];
    let map = section.node("column_map")?;
    let has_prompt = match section.component_name() {
        "stack_exchange_paired_dataset" => true,
        _ => map.is_some_and(|map| map.entry("prompt").is_some()),
    };
    let prompt = has_prompt.then_some(Expected { default: "question", ..Expected::needed("prompt") });
    let expected: Vec<Expected> = prompt.into_iter().chain(answers).collect();
    let mut columns = column_map(section, &expected, &[])?.into_iter().map(|plan| plan.column);
    let mut next = || columns.next().ok_or(Reported);
    let prompt = if has_prompt { Some(next()?) } else { None };
    let (chosen, rejected) = (next()?, next()?);
    let guest = parts::template(section, "template", around)?;
    let template = guest.map(|guest| TemplatePlan { guest, joined: false });
    Ok(RowsPlan::Pairs { prompt, chosen, rejected, template })
}

fn alpaca_columns(section: &Section<'_>) -> Found<Vec<ColumnPlan>> {
    // Not every instruction has an input.
    let input = Expected { optional: true, ..Expected::needed("input") };
    column_map(section, &[Expected::needed("instruction"), input, Expected::needed("output")], &[])
}

/// v0.2.1's `chat_format`: one string, encoded once.
fn chat_format(section: &Section<'_>, around: &Surroundings<'_>) -> Found<Option<TemplatePlan>> {
    Ok(parts::template(section, "chat_format", around)?.map(|guest| TemplatePlan { guest, joined: true }))
}

/// A name that a column map gives a column.
#[derive(Clone, Copy)]
struct Expected {
    name: &'static str,
    /// The column without a map.
    default: &'static str,
    optional: bool,
}

impl Expected {
    fn needed(name: &'static str) -> Self {
        Self { name, default: name, optional: false }
    }
}

/// Every name that is needed, as torchtune; with a `template` of v0.2.1 those that it leaves out are the columns' own.
/// `aliases` are other names of the first.
fn column_map(section: &Section<'_>, expected: &[Expected], aliases: &[&str]) -> Found<Vec<ColumnPlan>> {
    let plan = |expected: &Expected, column: &str| ColumnPlan {
        name: expected.name.to_owned(),
        column: column.to_owned(),
        optional: expected.optional,
    };
    let Some(node) = section.node("column_map")? else {
        return Ok(expected.iter().map(|expected| plan(expected, expected.default)).collect());
    };
    let path = section.path("column_map");
    let list = |separator: &str| expected.iter().map(|expected| expected.name).collect::<Vec<_>>().join(separator);
    let names = format!("`{}`", list("`, `"));
    let example = format!("`column_map: {{{}: COLUMN}}`", list(": COLUMN, "));
    let config = section.reader.config;
    let fail = |mark, message: String| Err(section.reader.fail(config.error(mark, message).hint(example.clone())));
    if !node.is_map() {
        return fail(node.mark, format!("`{path}` must map {names} to columns, found {}", node.describe()));
    }
    let known = |key: &str| expected.iter().any(|expected| expected.name == key) || aliases.contains(&key);
    for entry in node.entries() {
        if !known(&entry.key) {
            return fail(entry.key_mark, format!("`{path}` maps `{}`, and this data set has {names}", entry.key));
        }
        if entry.value.as_str().is_none() {
            let what = format!("`{path}.{}` must name a column, found {}", entry.key, entry.value.describe());
            return fail(entry.value.mark, what);
        }
    }
    let is_old = !is_paired(section) && section.knows("template") && section.node("template")?.is_some();
    let mut map = vec![];
    for (index, expected) in expected.iter().enumerate() {
        let own = node.entry(expected.name);
        let other = aliases.iter().filter(|_| index == 0).find_map(|alias| node.entry(alias));
        let column = match (own, other) {
            (Some(own), Some(other)) => {
                let what = format!("`{path}` gives `{}` twice, also as `{}`", own.key, other.key);
                let hint = format!("delete one of them: `~{path}.{}`", own.key);
                return Err(section.reader.fail(config.error(other.key_mark, what).hint(hint)));
            }
            (Some(entry), None) | (None, Some(entry)) => entry.value.as_str().unwrap_or_default(),
            (None, None) if expected.optional || is_old => expected.default,
            (None, None) => return fail(node.mark, format!("`{path}` must give a column for `{}`", expected.name)),
        };
        map.push(plan(expected, column));
    }
    Ok(map)
}
