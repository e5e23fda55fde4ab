//! The data path end to end, on files: from rows to the tokens torchtune makes of them, and everything bad input does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::Int32Type;
use serde_json::Value;

use super::encode::Encoded;
use super::template::{Message, OpenTemplate, Outcome, Role, Row, RowTemplate};
use super::*;
use crate::config::plan::{DataFile, DataFormat, DatasetPlan, OnBadRow, TokenizerPlan, Truncation, TurnTexts};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

pub(super) fn fixture_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// The rows of the recorded runs.
pub(super) fn golden_data() -> Tokenized {
    let golden = fixture_json("golden/rows-tokens-240.json");
    let sample = |(id, row): (usize, &Value)| Sample {
        id: id as u64,
        tokens: serde_json::from_value(row["tokens"].clone()).unwrap(),
        labels: serde_json::from_value(row["labels"].clone()).unwrap(),
    };
    Tokenized::from_samples(golden["rows"].as_array().unwrap().iter().enumerate().map(sample))
}

/// Torchtune's SummarizeTemplate; a document `skip` is left out, `fail` is bad, `empty` has no messages.
struct Summarize;

impl OpenTemplate for Summarize {
    fn open(&self) -> Result<Box<dyn RowTemplate>> {
        Ok(Box::new(Summarize))
    }

    fn digest(&self) -> String {
        "summarize".to_owned()
    }
}

impl RowTemplate for Summarize {
    fn configure(&mut self, columns: &[String]) -> Result<()> {
        assert_eq!(columns, ["input", "output"]);
        Ok(())
    }

    fn render(&mut self, rows: &[Row]) -> Result<Vec<Outcome>> {
        Ok(rows.iter().map(summarize).collect())
    }
}

fn summarize(row: &Row) -> Outcome {
    let [Some(document), summary] = row.cells.as_slice() else { return Outcome::Fail("no `input`".to_owned()) };
    match document.as_str() {
        "skip" => return Outcome::Skip("asked to".to_owned()),
        "fail" => return Outcome::Fail("asked to fail".to_owned()),
        "empty" => return Outcome::Keep(vec![]),
        _ => {}
    }
    let parts = ["Summarize this dialogue:\n", document, "\n---\nSummary:\n"].map(str::to_owned);
    let asked = Message { role: Role::User, parts: parts.to_vec(), train: None };
    let answer = summary.clone().map(|summary| Message { role: Role::Assistant, parts: vec![summary], train: None });
    Outcome::Keep(std::iter::once(asked).chain(answer).collect())
}

/// A data set in a folder of its own, with the settings most tests want.
struct Case {
    folder: tempfile::TempDir,
    plan: DatasetPlan,
    max_seq_len: Option<usize>,
}

impl Case {
    fn new(format: DataFormat) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let plan = DatasetPlan {
            files: vec![],
            format,
            hub: None,
            split: "train".to_owned(),
            column_map: [("input", "document"), ("output", "summary")]
                .map(|(a, b)| (a.to_owned(), b.to_owned()))
                .to_vec(),
            template: None,
            train_on_input: false,
            on_bad_row: OnBadRow::Error,
            cache_dir: folder.path().join("cache"),
        };
        Self { folder, plan, max_seq_len: None }
    }

    fn jsonl(text: &str) -> Self {
        Self::new(DataFormat::Jsonl).file("train", text)
    }

    fn file(mut self, split: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.folder.path().join(format!("{}.data", self.plan.files.len()));
        std::fs::write(&path, content).unwrap();
        self.plan.files.push(DataFile { split: split.to_owned(), path });
        self
    }

    fn file_named(mut self, name: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        self.plan.files.push(DataFile { split: "train".to_owned(), path });
        self
    }

    fn split(mut self, split: &str) -> Self {
        self.plan.split = split.to_owned();
        self
    }

    fn prepare(&self) -> Result<Tokenized> {
        let plain = TokenizerPlan::plain(fixture("tiny-llama/tokenizer.json"));
        let tokenizer = TokenizerPlan { max_seq_len: self.max_seq_len, ..plain };
        prepare(&self.plan, &tokenizer, &tiny(), &Summarize)
    }

    #[track_caller]
    fn check_error(&self, expected: &str) {
        let error = self.prepare().unwrap_err();
        let text = error.to_string().replace(&format!("{}/", self.folder.path().display()), "");
        assert_eq!(error.exit_code(), 2, "{text}");
        assert_eq!(text.trim(), expected.trim());
        assert!(!self.folder.path().join("cache").read_dir().is_ok_and(|mut files| {
            files.any(|file| file.unwrap().path().extension().is_some_and(|suffix| suffix == "safetensors"))
        }));
    }
}

fn tiny() -> Tokenizer {
    Tokenizer::open(&fixture("tiny-llama/tokenizer.json")).unwrap()
}

fn rows(documents: &[&str]) -> String {
    documents
        .iter()
        .map(|document| format!("{}\n", serde_json::json!({"document": document, "summary": "s"})))
        .collect()
}

/// Which documents the samples are of.
fn documents(data: &Tokenized) -> Vec<String> {
    let text = |i| tiny().decode(data.get(i).tokens).unwrap();
    let document = |text: String| text.lines().nth(1).unwrap().to_owned();
    (0..data.len()).map(|i| document(text(i))).collect()
}

#[test]
fn tokens_are_those_torchtune_makes() {
    let expected = fixture_json("tokens/expected.json");
    let cases = expected["cases"].as_array().unwrap();
    let mut case = Case::jsonl(&std::fs::read_to_string(fixture("tokens/rows.jsonl")).unwrap());
    for expected in cases {
        case.max_seq_len = expected["max_seq_len"].as_u64().map(|limit| limit as usize);
        case.plan.train_on_input = expected["train_on_input"].as_bool().unwrap();
        let data = case.prepare().unwrap();
        let sample = data.get(expected["row"].as_u64().unwrap() as usize);
        let tokens: Vec<u32> = serde_json::from_value(expected["tokens"].clone()).unwrap();
        let runs: Vec<(usize, usize)> = serde_json::from_value(expected["trained"].clone()).unwrap();
        let trained = (0..tokens.len()).map(|i| runs.iter().any(|&(start, end)| (start..end).contains(&i)));
        assert_eq!(sample.tokens, tokens, "{expected}");
        assert_eq!(sample.trained, trained.collect::<Vec<_>>(), "{expected}");
    }
    assert!(cases.len() >= 60);
}

#[test]
fn a_prompt_is_how_the_training_row_begins() {
    let text = std::fs::read_to_string(fixture("tokens/rows.jsonl")).unwrap();
    let data = Case::jsonl(&text).prepare().unwrap();
    for (i, line) in text.lines().enumerate() {
        let row: Value = serde_json::from_str(line).unwrap();
        let cells = |summary| Row { id: 0, cells: vec![row["document"].as_str().map(str::to_owned), summary] };
        let sample = data.get(i);
        let asked = sample.trained.iter().position(|&trained| trained).unwrap();
        // With and without an answer: a prompt never has one.
        for row in [cells(None), cells(Some("an answer".to_owned()))] {
            let Outcome::Keep(messages) = summarize(&row) else { panic!() };
            assert_eq!(encode_prompt(&tiny(), &messages).unwrap(), sample.tokens[..asked]);
        }
    }
}

#[test]
fn cut_samples_are_counted() {
    let long = "word ".repeat(40);
    let mut case = Case::jsonl(&rows(&["short", &long, &long]));
    case.max_seq_len = Some(30);
    let data = case.prepare().unwrap();
    assert_eq!((data.report.cut, data.report.without_labels), (2, 2));
    assert_eq!(data.report.to_string(), "2 samples cut to `max_seq_len`, 2 samples without a token to learn");
    assert_eq!((data.length(0), data.length(1)), (data.sample(0).tokens.len(), 30));
    assert_eq!(data.max_token(), Some(4089));
}

#[test]
fn messages_decide_what_is_trained() {
    let tokenizer = tiny();
    let message = |role, train| Message { role, parts: vec!["x".to_owned()], train };
    let trained = |messages: &[Message], train_on_input| {
        let encoder = Encoder { tokenizer: &tokenizer, max_seq_len: None, train_on_input };
        encoder.sample(messages).unwrap().trained
    };
    use Role::{Assistant, System, User};
    let turns = [System, User, Assistant, User, Assistant].map(|role| message(role, None));
    // BOS, one token a message, EOS.
    assert_eq!(trained(&turns, false), [false, false, false, true, false, true, true]);
    assert_eq!(trained(&turns, true), [false, false, true, true, true, true, true]);
    let said = [message(System, Some(true)), message(User, Some(true)), message(Assistant, Some(false))];
    assert_eq!(trained(&said, false), [true, true, true, false, false]);
}

#[test]
fn many_rows_keep_their_order() {
    let names: Vec<String> = (0..2000).map(|i| format!("row {i}")).collect();
    let text = rows(&names.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(documents(&Case::jsonl(&text).prepare().unwrap()), names);
    let case = Case::jsonl(&text).file("test", rows(&["t0", "t1"])).file("train", rows(&["more 0", "more 1"]));
    let data = case.split("train[1999:]+test[-1:]+train[:1]").prepare().unwrap();
    assert_eq!(documents(&data), ["row 1999", "more 0", "more 1", "t1", "row 0"]);
}

#[test]
fn parquet_gives_the_same_samples_as_jsonl() {
    let documents: Vec<String> = (0..3000).map(|i| format!("document {i} café")).collect();
    let batch = RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(0..3000)) as ArrayRef),
        ("summary", Arc::new(Int64Array::from_iter_values((0..3000).map(|i| i * i))) as ArrayRef),
        ("score", Arc::new(Float64Array::from_iter_values((0..3000).map(f64::from))) as ArrayRef),
        ("document", Arc::new(StringArray::from_iter_values(&documents)) as ArrayRef),
    ]);
    let case = Case::new(DataFormat::Parquet).file("train", parquet(&batch.unwrap())).split("train[1000:2500]");
    let text: String =
        (0..3000).map(|i| format!("{{\"document\": \"{}\", \"summary\": {}}}\n", documents[i], i * i)).collect();
    let data = case.prepare().unwrap();
    assert_eq!(data.len(), 1500);
    assert_eq!(data.digest(), Case::jsonl(&text).split("train[1000:2500]").prepare().unwrap().digest());
}

fn parquet(batch: &RecordBatch) -> Vec<u8> {
    let mut bytes = vec![];
    let properties =
        parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(700)).build();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn bad_rows_name_file_and_row() {
    let second = |line: &str| Case::jsonl(&format!("{}\n{line}\n", rows(&["fine"])));
    let hint = "hint: repair the row, or leave such rows out with `dataset.on_bad_row: skip`";
    for (line, cause) in [
        (r#"{"document": null, "summary": "s"}"#, "`document` is null, text is needed"),
        (r#"{"document": "d"}"#, "`summary` is missing"),
        (r#"{"document": ["d"], "summary": "s"}"#, "`document` is a list, text is needed"),
        (r#"["d", "s"]"#, "the line is a list, not an object"),
        (r#"{"document": "#, "the line is not JSON: EOF while parsing a value at column 12"),
        (r#"{"document": "fail", "summary": "s"}"#, "asked to fail"),
        (r#"{"document": "empty", "summary": "s"}"#, "the template made no message of it"),
    ] {
        // The blank line counts: the row is on line 3.
        second(line)
            .check_error(&format!("error: line 3 of `0.data` is a bad row\n  --> 0.data:3\ncause: {cause}\n{hint}"));
    }
    let latin = [rows(&["fine"]).as_bytes(), b"{\"document\": \"caf\xe9\", \"summary\": \"s\"}\n"].concat();
    let error = Case::new(DataFormat::Jsonl).file("train", latin).prepare().unwrap_err().to_string();
    assert!(error.contains("0.data:2") && error.contains("the line is not JSON: invalid unicode"), "{error}");
}

/// The same rows in every format, more of them than go through in one batch.
#[test]
fn every_text_format_gives_the_same_samples() {
    let rows: Vec<(String, String)> = (0..300).map(|i| (format!("a \"{i}\", b\nc"), format!("s{i}"))).collect();
    let objects: Vec<_> =
        rows.iter().map(|(d, s)| serde_json::json!({"document": d, "summary": s, "other": [1, {"a": "]"}]})).collect();
    let lines: String = objects.iter().map(|object| format!("{object}\n")).collect();
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let csv: String = rows.iter().map(|(d, s)| format!("{s},{}\r\n", quoted(d))).collect();
    let tsv: String = rows.iter().map(|(d, s)| format!("{s}\t{}\n", quoted(d))).collect();
    let expected = Case::jsonl(&lines).split("train[10:290]").prepare().unwrap().digest().to_owned();
    let cases = [
        Case::jsonl(&serde_json::to_string(&objects).unwrap()),
        Case::jsonl(&format!("\u{feff}\n{:#}\n", serde_json::Value::from(objects.clone()))),
        Case::new(DataFormat::JsonField("rows".into()))
            .file("train", serde_json::json!({"version": 1, "rows": objects}).to_string()),
        Case::new(DataFormat::Csv).file("train", format!("\u{feff}summary,document\r\n{csv}")),
        Case::new(DataFormat::Csv).file_named("rows.tsv", format!("summary\tdocument\n{tsv}")),
    ];
    for case in cases {
        let case = case.split("train[10:290]");
        assert_eq!(case.prepare().unwrap().digest(), expected, "{:?} {:?}", case.plan.format, case.plan.files);
    }
}

#[test]
fn a_text_file_is_a_row_a_line() {
    let mut case = Case::new(DataFormat::Text).file("train", "one\n\ntwo\r\nthree");
    case.plan.column_map = vec![("input".into(), "text".into()), ("output".into(), "text".into())];
    assert_eq!(documents(&case.prepare().unwrap()), ["one", "", "two", "three"]);
    case = case.split("train[2:]");
    assert_eq!(documents(&case.prepare().unwrap()), ["two", "three"]);
    let case = Case::new(DataFormat::Text).file("train", b"fine\ncaf\xe9\n");
    let Case { mut plan, folder, max_seq_len } = case;
    plan.column_map = vec![("input".into(), "text".into()), ("output".into(), "text".into())];
    Case { plan, folder, max_seq_len }.check_error(
        "error: line 2 of `0.data` is a bad row\n  --> 0.data:2\n\
         cause: the line is not UTF-8: incomplete utf-8 byte sequence from index 3\n\
         hint: repair the row, or leave such rows out with `dataset.on_bad_row: skip`",
    );
}

#[test]
fn bad_rows_of_other_formats_name_their_line() {
    let hint = "hint: repair the row, or leave such rows out with `dataset.on_bad_row: skip`";
    let csv = |text: &str| Case::new(DataFormat::Csv).file("train", text);
    csv("document,summary\na,b\n\"two\nlines\",c\nalone\nd,e\n").check_error(&format!(
        "error: line 5 of `0.data` is a bad row\n  --> 0.data:5\n\
         cause: it has 1 values, and the first line names 2 columns\n{hint}"
    ));
    assert_eq!(documents(&csv("document,summary\na,b\nalone\nd,e\n").plan_skips().prepare().unwrap()), ["a", "d"]);
    csv("document,other\na,b\n").check_error(
        "error: the data has no column `summary`\n  --> 0.data\n\
         hint: its columns are `document`, `other`; `column_map` says which to take",
    );
    Case::jsonl("[\n{\"document\": \"a\", \"summary\": \"s\"},\n{\"document\": 7},\n{\"document\": 8}]").check_error(
        &format!("error: line 3 of `0.data` is a bad row\n  --> 0.data:3\ncause: `summary` is missing\n{hint}"),
    );
    let list = |text: &str, line: usize, cause: &str| {
        Case::jsonl(text).check_error(&format!(
            "error: `0.data` is not a list of JSON objects\n  --> 0.data:{line}\ncause: {cause}"
        ));
    };
    list("[\n{\"document\": }]", 2, "expected value");
    list("[{\"document\": \"a\"},\n 3]", 2, "an object was expected, found `3`");
    list("[{\"document\": \"a\"}\n{}]", 2, "a comma is missing before it");
    list("[{\"document\": \"a\"},\n]", 2, "an object was expected, found `]`");
    list("[{\"document\": \"a\"}\n", 2, "the file ends before the list");
    Case::jsonl("[{\"document\": \"a\"}]\n{\"document\": \"b\"}\n").check_error(
        "error: something follows the list of `0.data`\n  --> 0.data:2\nhint: a file is one list of objects, or one object a line",
    );
    let field = |text: &str| Case::new(DataFormat::JsonField("rows".into())).file("train", text);
    field("{\"data\": [], \"version\": 1}").check_error(
        "error: `0.data` has no list of rows in its field `rows`: there is none\nhint: its fields are `data`, `version`",
    );
    field("{\"rows\": [1]}").plan_skips().check_error(
        "error: `0.data` is not a jsonl file: none of its first rows is a JSON object\n\
         hint: each line has to be one object, such as {\"document\": \"…\", \"summary\": \"…\"}",
    );
}

#[test]
fn the_first_bad_row_is_reported_however_many_threads_there_are() {
    let mut documents = vec!["fine"; 3000];
    documents[700] = "fail";
    documents[2999] = "fail";
    let error = Case::jsonl(&rows(&documents)).prepare().unwrap_err().to_string();
    assert!(error.contains("0.data:701"), "{error}");
}

#[test]
fn bad_rows_can_be_skipped_and_are_counted() {
    let text = rows(&["a", "fail", "b", "skip", "empty", "c"]) + "nonsense\n\n" + &rows(&["d"]);
    let mut case = Case::jsonl(&text);
    case.plan.on_bad_row = OnBadRow::Skip;
    for from_cache in [false, true] {
        let data = case.prepare().unwrap();
        assert_eq!(data.from_cache, from_cache);
        assert_eq!(documents(&data), ["a", "b", "c", "d"]);
        assert_eq!((data.report.bad_rows, data.report.left_out, data.skipped()), (3, 1, 4));
        let places: Vec<_> = data.report.first_bad_rows.iter().map(|row| row.rsplit_once("data:").unwrap().1).collect();
        assert_eq!(places[..2], ["2: asked to fail", "5: the template made no message of it"]);
        assert!(places[2].starts_with("7: the line is not JSON"));
        let text = data.report.to_string();
        assert!(text.starts_with("3 bad rows skipped ("), "{text}");
        assert!(text.ends_with("), 1 row left out by the template"), "{text}");
    }
    case.plan.files.clear();
    let case = case.file("train", rows(&["fail", "skip"]));
    let error = case.prepare().unwrap_err().to_string();
    assert!(error.contains("1 bad rows skipped, 1 left out by the template, none kept"), "{error}");
}

#[test]
fn wrong_data_sets_are_config_errors() {
    Case::jsonl("\n \n").check_error("error: the data set has no rows in split `train`\n  --> 0.data");
    Case::jsonl(r#"{"text": "t", "summary": "s"}"#).check_error(
        "error: the data has no column `document`\n  --> 0.data\n\
         hint: its columns are `text`, `summary`; `column_map` says which to take",
    );
    Case::jsonl("[\n{\"document\": \"d\"}\n]\n").split("train").plan_skips().check_error(
        "error: the data has no column `summary`\n  --> 0.data\n\
         hint: its columns are `document`; `column_map` says which to take",
    );
    Case::jsonl("some text\nand more\n").check_error(
        "error: `0.data` is not a jsonl file: none of its first rows is a JSON object\n\
         hint: each line has to be one object, such as {\"document\": \"…\", \"summary\": \"…\"}",
    );
    Case::jsonl(&rows(&["a"]))
        .split("valid")
        .check_error("error: split `valid`: the data set has no split `valid`\nhint: it has `train`");
    let mut cut = Case::jsonl(&rows(&["a long document, longer than what is kept of it"]));
    cut.max_seq_len = Some(12);
    cut.check_error(
        "error: split `train` of the data set has nothing to learn from: no sample has a token that carries loss\n\
         hint: raise `tokenizer.max_seq_len` if it cuts the answers away; check what the template marks as answer",
    );
    cut.max_seq_len = Some(1);
    cut.check_error("error: `tokenizer.max_seq_len` is below 2, which leaves nothing to learn");

    let mut missing = Case::jsonl("");
    missing.plan.files[0].path = missing.folder.path().join("absent.jsonl");
    missing
        .check_error("error: cannot read the data file `absent.jsonl`\ncause: No such file or directory (os error 2)");
    let error = Case::new(DataFormat::Parquet).file("train", "not parquet").prepare().unwrap_err().to_string();
    assert!(error.contains("as parquet\ncause: "), "{error}");
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1)])]);
    let batch = RecordBatch::try_from_iter([
        ("document", Arc::new(lists) as ArrayRef),
        ("summary", Arc::new(StringArray::from(vec!["s"])) as ArrayRef),
    ]);
    let error = Case::new(DataFormat::Parquet).file("train", parquet(&batch.unwrap())).prepare().unwrap_err();
    assert!(error.to_string().contains("column `document` holds List"), "{error}");
}

impl Case {
    fn plan_skips(mut self) -> Self {
        self.plan.on_bad_row = OnBadRow::Skip;
        self
    }
}

#[test]
fn null_in_parquet_is_a_bad_row() {
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("document", Arc::new(StringArray::from(vec![Some("a"), None, Some("c")])) as ArrayRef, true),
        ("summary", Arc::new(StringArray::from(vec!["x", "y", "z"])) as ArrayRef, true),
    ]);
    let case = Case::new(DataFormat::Parquet).file("train", parquet(&batch.unwrap()));
    case.check_error(
        "error: row 2 of `0.data` is a bad row\n  --> 0.data\ncause: `document` is null, text is needed\n\
         hint: repair the row, or leave such rows out with `dataset.on_bad_row: skip`",
    );
    assert_eq!(documents(&case.plan_skips().prepare().unwrap()), ["a", "c"]);
}

#[test]
fn the_cache_is_used_only_for_the_same_tokens() {
    let mut case = Case::jsonl(&rows(&["a", "b", "c"]));
    let first = case.prepare().unwrap();
    assert!(!first.from_cache);
    let again = case.prepare().unwrap();
    assert!(again.from_cache);
    assert_eq!(again.digest(), first.digest());

    case.plan.train_on_input = true;
    assert!(!case.prepare().unwrap().from_cache);
    case.max_seq_len = Some(17);
    assert!(!case.prepare().unwrap().from_cache);
    case.plan.split = "train[:2]".to_owned();
    assert!(!case.prepare().unwrap().from_cache);
    case.plan.column_map.swap(0, 1);
    case.plan.column_map[0].0 = "input".to_owned();
    case.plan.column_map[1].0 = "output".to_owned();
    assert!(!case.prepare().unwrap().from_cache);
    std::fs::write(&case.plan.files[0].path, rows(&["a", "b", "d"])).unwrap();
    assert!(!case.prepare().unwrap().from_cache);
    assert!(case.prepare().unwrap().from_cache);
}

#[test]
fn a_damaged_cache_is_built_again() {
    let case = Case::jsonl(&rows(&["a", "b", "c"]));
    let first = case.prepare().unwrap();
    let entry = || {
        let files = case.plan.cache_dir.read_dir().unwrap().map(|file| file.unwrap().path());
        files.into_iter().find(|path| path.extension().is_some_and(|suffix| suffix == "safetensors")).unwrap()
    };
    let mut bytes = std::fs::read(entry()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(entry(), bytes).unwrap();
    let second = case.prepare().unwrap();
    assert!(!second.from_cache);
    assert_eq!(second.digest(), first.digest());
    assert!(case.prepare().unwrap().from_cache);
}

#[test]
fn ranks_that_start_together_build_the_cache_once() {
    let names: Vec<String> = (0..1500).map(|i| format!("row {i}")).collect();
    let case = Case::jsonl(&rows(&names.iter().map(String::as_str).collect::<Vec<_>>()));
    let results: Vec<Tokenized> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..4).map(|_| scope.spawn(|| case.prepare().unwrap())).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|data| !data.from_cache).count(), 1);
    assert!(results.iter().all(|data| data.digest() == results[0].digest()));
}

/// A folder that cannot be written to costs time, not the run.
#[test]
fn without_a_cache_it_still_works() {
    let mut case = Case::jsonl(&rows(&["a"]));
    case.plan.cache_dir = case.plan.files[0].path.join("not a folder");
    for _ in 0..2 {
        assert!(!case.prepare().unwrap().from_cache);
    }
}

#[test]
fn a_failing_template_ends_the_run_with_its_own_error() {
    struct Broken;
    impl OpenTemplate for Broken {
        fn open(&self) -> Result<Box<dyn RowTemplate>> {
            Err(crate::Error::run("the template does not open"))
        }
        fn digest(&self) -> String {
            String::new()
        }
    }
    let case = Case::jsonl(&rows(&["a"; 2000]));
    let plan = TokenizerPlan::plain(PathBuf::new());
    let error = prepare(&case.plan, &plan, &tiny(), &Broken).unwrap_err();
    assert_eq!(error.to_string(), "error: the template does not open");
}

fn speaker(name: &str) -> Role {
    match name {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        _ => Role::Tool,
    }
}

/// What a tokenizer was asked, its tokens, and which of them carry loss.
type Conversation = (TokenizerPlan, Vec<Message>, Vec<u32>, Vec<bool>);

/// The conversations that torchtune's tokenizers were asked for, and their answers.
fn conversations() -> Vec<Conversation> {
    let cases: Vec<Value> = serde_json::from_value(fixture_json("tokenizers/messages.json")).unwrap();
    let roles =
        [(Role::User, ["Question: ", "\n\nAnswer: "]), (Role::Assistant, ["<< ", " >>"]), (Role::System, ["", "\n"])];
    let roles = TurnTexts::Roles(roles.map(|(role, texts)| (role, texts.map(str::to_owned))).to_vec());
    let read = |case: &Value| {
        let mut plan = crate::tokenizer::tests::family(case["family"].as_str().unwrap());
        plan.max_seq_len = case["max_seq_len"].as_u64().map(|limit| limit as usize);
        if case["template"] == "roles" {
            plan.turn_texts = roles.clone();
        }
        let turns: Vec<(String, String)> = serde_json::from_value(case["turns"].clone()).unwrap();
        let message = |(role, text): (String, String)| Message { role: speaker(&role), parts: vec![text], train: None };
        let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let runs: Vec<(usize, usize)> = serde_json::from_value(case["trained"].clone()).unwrap();
        let trained = (0..tokens.len()).map(|i| runs.iter().any(|&(start, end)| (start..end).contains(&i))).collect();
        (plan, turns.into_iter().map(message).collect(), tokens, trained)
    };
    cases.iter().map(read).collect()
}

#[test]
fn messages_are_the_tokens_torchtune_makes() {
    let cases = conversations();
    assert!(cases.len() > 140);
    for (plan, messages, tokens, trained) in cases {
        let tokenizer = Tokenizer::of(&plan).unwrap();
        let encoder = Encoder { tokenizer: &tokenizer, max_seq_len: plan.max_seq_len, train_on_input: false };
        let encoded = encoder.sample(&messages).unwrap();
        let shown = format!("{:?} {:?} {:?} {messages:?}", plan.format, plan.turn_texts, plan.max_seq_len);
        assert_eq!(encoded.tokens, tokens, "{shown}");
        assert_eq!(encoded.trained, trained, "{shown}");
    }
}

#[test]
fn a_prompt_is_how_a_sample_of_its_format_begins() {
    for (plan, messages, ..) in conversations() {
        let tokenizer = Tokenizer::of(&plan).unwrap();
        let encoder = Encoder { tokenizer: &tokenizer, max_seq_len: None, train_on_input: false };
        let sample = encoder.sample(&messages).unwrap();
        let (answer, asked) = messages.split_last().unwrap();
        assert_eq!(answer.role, Role::Assistant);
        let prompt = encode_prompt(&tokenizer, &messages).unwrap();
        let shown = format!("{:?} {:?} {messages:?}", plan.format, plan.turn_texts);
        assert_eq!(prompt, sample.tokens[..prompt.len()], "{shown}");
        assert_eq!(encode_prompt(&tokenizer, asked).unwrap(), prompt, "{shown}");
        // The answer's header belongs to the prompt: what is left is the answer and what ends it.
        let stops = tokenizer.stop_tokens();
        let left = &sample.tokens[prompt.len()..];
        let text = tokenizer.decode(left).unwrap();
        assert_eq!(text.trim().trim_end_matches(">>").trim(), answer.parts[0].trim(), "{shown}");
        assert!(stops.contains(left.last().unwrap()), "{shown}");
        // And the first token that stops is trained where the answer is.
        let end = left.iter().position(|token| stops.contains(token)).unwrap();
        assert!(sample.trained[prompt.len() + end], "{shown}");
    }
}

#[test]
fn the_left_end_can_go() {
    let plan = TokenizerPlan { truncation: Truncation::Left, ..crate::tokenizer::tests::family("llama3") };
    let tokenizer = Tokenizer::of(&plan).unwrap();
    let messages = [Role::User, Role::Assistant].map(|role| Message {
        role,
        parts: vec!["one two three four five".to_owned()],
        train: None,
    });
    let encode =
        |max_seq_len| Encoder { tokenizer: &tokenizer, max_seq_len, train_on_input: false }.sample(&messages).unwrap();
    let (whole, cut) = (encode(None), encode(Some(9)));
    assert!(cut.was_cut);
    assert_eq!(cut.tokens, whole.tokens[whole.tokens.len() - 9..]);
    assert_eq!(cut.trained, whole.trained[whole.trained.len() - 9..]);
}

const CHAT_ML: &str = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n\
    {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";

#[test]
fn a_chat_template_says_whose_tokens_are_whose() {
    let message = |role, text: &str| Message { role, parts: vec![text.to_owned()], train: None };
    let messages = [
        message(Role::System, "s"),
        message(Role::User, "u v"),
        message(Role::Assistant, "a"),
        message(Role::User, "w"),
        message(Role::Assistant, "b"),
    ];
    let sample = |template: &str, messages: &[Message]| {
        let (_folder, plan) = crate::tokenizer::tests::with_chat_template(template);
        let tokenizer = Tokenizer::of(&plan).unwrap();
        let encoder = Encoder { tokenizer: &tokenizer, max_seq_len: None, train_on_input: false };
        let prompt = encode_prompt(&tokenizer, messages);
        encoder.sample(messages).map(|sample| (sample, prompt.unwrap(), tokenizer))
    };
    let text = |tokenizer: &Tokenizer, sample: &Encoded| {
        let trained = sample.tokens.iter().zip(&sample.trained).filter(|(_, trained)| **trained);
        tokenizer.decode(&trained.map(|(token, _)| *token).collect::<Vec<_>>()).unwrap()
    };
    let (found, prompt, tokenizer) = sample(CHAT_ML, &messages).unwrap();
    assert_eq!(text(&tokenizer, &found), "assistant\n\naassistant\n\nb");
    assert_eq!(prompt, found.tokens[..prompt.len()]);
    // `<|eot_id|>` is there once, and trained.
    assert_eq!(found.tokens.last(), Some(&4094));
    assert_eq!((found.tokens.iter().filter(|id| **id == 4094).count(), found.trained.last()), (5, Some(&true)));

    // A template that ends nothing gets EOS; one that refuses a beginning counts it as the next message's.
    let bare = "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}";
    let (found, _, tokenizer) = sample(bare, &messages).unwrap();
    assert_eq!(text(&tokenizer, &found), "a\nb\n");
    assert_eq!((found.tokens.last(), found.trained.last()), (Some(&4094), Some(&true)));
    let error = sample("{% if messages[1] %}{{ raise_exception('roles must alternate') }}{% endif %}x", &messages);
    assert!(error.err().unwrap().contains("roles must alternate"));
}

#[test]
fn a_message_that_a_format_has_no_place_for_is_a_bad_row() {
    let message = |role| Message { role, parts: vec!["x".to_owned()], train: None };
    let why = |family: &str, roles: &[Role]| {
        let tokenizer = Tokenizer::of(&crate::tokenizer::tests::family(family)).unwrap();
        let messages: Vec<Message> = roles.iter().map(|role| message(*role)).collect();
        Encoder { tokenizer: &tokenizer, max_seq_len: None, train_on_input: false }.sample(&messages).unwrap_err()
    };
    assert!(why("mistral", &[Role::System, Role::User]).contains("Mistral's format has no system message"));
    assert!(why("llama2", &[Role::System, Role::Assistant]).contains("no user's message follows the system message"));
}

mod damaged_files {
    use proptest::prelude::*;

    use super::*;
    use crate::data::source::{Rows, SourceFile};

    fn files() -> impl Strategy<Value = (DataFormat, &'static str)> {
        prop_oneof![
            Just((DataFormat::Jsonl, "{\"a\": \"x\", \"b\": 1}\n\n{\"a\": null}\n")),
            Just((DataFormat::Jsonl, "[{\"a\": \"x\", \"b\": [1]},\n {\"a\": \"y\"}\n]\n")),
            Just((DataFormat::JsonField("r".into()), "{\"v\": 1, \"r\": [{\"a\": \"x\"}, {\"a\": \"y\"}]}")),
            Just((DataFormat::Csv, "a,b\n\"x, \"\"\ny\",1\nz,2\n")),
            Just((DataFormat::Text, "one\r\n\ntwo")),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// An error or rows, as many as were counted; never a panic.
        #[test]
        fn are_errors_or_rows(
            (format, text) in files(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 0..6),
        ) {
            let mut bytes = text.as_bytes().to_vec();
            for (at, byte, kind) in edits {
                let at = at.index(bytes.len() + 1);
                match kind {
                    0 => bytes.insert(at, byte),
                    1 => bytes.truncate(at),
                    _ => bytes.splice(at..(at + 1).min(bytes.len()), *b"\"[").for_each(drop),
                }
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            if let Ok(source) = SourceFile::scan(file.path(), &format) {
                let (num_rows, columns) = (source.num_rows, source.columns.clone());
                let mut rows = Rows::new(vec![(source, 0..num_rows)], columns);
                prop_assert_eq!(rows.take(1000).unwrap().len() as u64, num_rows);
            }
        }
    }
}
