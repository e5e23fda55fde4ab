//! What the names of a data set's files say: splits and formats, as the `datasets` library tells them.

use super::super::plan::DataFormat;

/// A split's own name first, then what else files call it.
const SPLITS: [&[&str]; 3] =
    [&["train", "training"], &["validation", "valid", "dev", "val"], &["test", "testing", "eval", "evaluation"]];

/// Files in which a data set, or a model, describes itself.
const NOT_DATA: [&str; 8] = [
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
];

/// A data file by its path in a folder or repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    pub split: String,
    pub path: String,
}

/// Chooses the data files among `paths`: those whose names or folders say a split, else all, as `train`. Where formats are
/// mixed, the one most files have. None when there is no data file.
pub fn by_names<'p>(paths: impl IntoIterator<Item = &'p str>) -> Option<(Vec<NamedFile>, DataFormat)> {
    let data: Vec<_> = paths.into_iter().filter_map(|path| Some((path, format_of(path)?))).collect();
    let mut files: Vec<_> = data.iter().filter_map(|(path, format)| Some((split_of(path)?, *path, format))).collect();
    if files.is_empty() {
        // A lone text file is more often a licence than data.
        let is_data =
            |format: &DataFormat| *format != DataFormat::Text || data.iter().all(|(_, other)| other == format);
        let rest = data.iter().filter(|(_, format)| is_data(format));
        files = rest.map(|(path, format)| ("train".to_owned(), *path, format)).collect();
    }
    let count = |format: &DataFormat| files.iter().filter(|(_, _, other)| *other == format).count();
    // Of equals, the first counts.
    let format = files.iter().rev().map(|(_, _, format)| *format).max_by_key(|format| count(format))?.clone();
    let mut files: Vec<_> = files
        .into_iter()
        .filter(|(_, _, other)| **other == format)
        .map(|(split, path, _)| NamedFile { split, path: path.to_owned() })
        .collect();
    let rank = |split: &str| SPLITS.iter().position(|names| names[0] == split).unwrap_or(SPLITS.len());
    files.sort_by(|a, b| (rank(&a.split), &a.split, &a.path).cmp(&(rank(&b.split), &b.split, &b.path)));
    Some((files, format))
}

/// Returns a data file's format by its ending.
pub fn format_of(path: &str) -> Option<DataFormat> {
    let name = path.rsplit('/').next()?;
    if NOT_DATA.contains(&name) || path.split('/').any(|part| part.starts_with(['.', '_'])) {
        return None;
    }
    let (_, ending) = name.rsplit_once('.')?;
    Some(match ending.to_ascii_lowercase().as_str() {
        "jsonl" | "json" | "ndjson" => DataFormat::Jsonl,
        "parquet" => DataFormat::Parquet,
        "csv" | "tsv" => DataFormat::Csv,
        "txt" => DataFormat::Text,
        _ => return None,
    })
}

/// Returns the split that a path says: `data/train_sft-00000-of-00003.parquet` a name of its own; else the word nearest
/// to the end that is a split's.
fn split_of(path: &str) -> Option<String> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    if matches!(folder, "" | "data")
        && let Some(split) = sharded(name)
    {
        return Some(known(split).map_or(split, |known| known).to_owned());
    }
    let words = |part: &str| {
        let words = part.split(|c: char| matches!(c, '-' | '.' | '_' | ' ') || c.is_ascii_digit());
        words.rev().find_map(|word| known(&word.to_ascii_lowercase()))
    };
    path.split('/').rev().find_map(words).map(str::to_owned)
}

fn known(word: &str) -> Option<&'static str> {
    SPLITS.iter().find(|names| names.contains(&word)).map(|names| names[0])
}

/// `NAME-00000-of-00003` with perhaps `-HASH`, and an ending.
fn sharded(name: &str) -> Option<&str> {
    let (stem, _) = name.split_once('.')?;
    let (before, after) = stem.rsplit_once("-of-")?;
    let (split, shard) = before.rsplit_once('-')?;
    let is_number = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(shard) && is_number(after.split('-').next()?) && !split.is_empty()).then_some(split)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(paths: &[&str], expected: &[&str], format: DataFormat) {
        let (files, found) = by_names(paths.iter().copied()).expect("there are data files");
        let files: Vec<_> = files.iter().map(|file| format!("{}:{}", file.split, file.path)).collect();
        assert_eq!(files, expected);
        assert_eq!(found, format);
    }

    #[test]
    fn splits_are_told_by_names() {
        check(
            &["test.csv", "dev.csv", "train.csv", "README.txt"],
            &["train:train.csv", "validation:dev.csv", "test:test.csv"],
            DataFormat::Csv,
        );
        check(
            &["a/training/x.json", "a/eval/x.json"],
            &["train:a/training/x.json", "test:a/eval/x.json"],
            DataFormat::Jsonl,
        );
        check(&["my_train_file_1.jsonl"], &["train:my_train_file_1.jsonl"], DataFormat::Jsonl);
        // `training`, but not a word that only contains it; `test` in the folder, `train` nearer.
        check(&["strain.jsonl", "test/train.jsonl"], &["train:test/train.jsonl"], DataFormat::Jsonl);
        check(
            &["data/train_sft-00000-of-00002-a3ecf927.parquet", "data/train_sft-00001-of-00002-b3ecf927.parquet"],
            &[
                "train_sft:data/train_sft-00000-of-00002-a3ecf927.parquet",
                "train_sft:data/train_sft-00001-of-00002-b3ecf927.parquet",
            ],
            DataFormat::Parquet,
        );
    }

    #[test]
    fn what_says_no_split_is_train() {
        check(&["b.json", "a.json", "LICENSE.txt"], &["train:a.json", "train:b.json"], DataFormat::Jsonl);
        check(&["a.txt", "notes"], &["train:a.txt"], DataFormat::Text);
        check(&["a.jsonl", "b.csv", "c.csv"], &["train:b.csv", "train:c.csv"], DataFormat::Csv);
        assert_eq!(by_names(["README.md", "config.json", ".cache/train.jsonl", "x.py"]), None);
    }
}
