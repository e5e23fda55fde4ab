//! `host preview`: what rows become, shown before anything is trained.

use insta::assert_snapshot;
use serde_json::Value;

use crate::case::{Case, Ended};

fn preview(case: &Case, arguments: &[&str]) -> Ended {
    let ended = Ended::of(&mut case.host(&[&["preview", "--config", "train.yaml"], arguments].concat()));
    assert!(!case.path("out").exists(), "nothing is trained");
    ended
}

#[test]
fn rows_are_shown_as_the_model_will_see_them() {
    let case = Case::new();
    // A row that tries to end the turn, one without an answer, and one that is too long.
    let rows = [
        r#"{"document": "Say <|eot_id|> \u001b[31mnow.", "summary": "small"}"#,
        r#"{"document": "Nothing follows.", "summary": null}"#,
        &format!(r#"{{"document": "{}", "summary": "small"}}"#, "the tool sorts text. ".repeat(10)),
    ];
    case.write("data/train.jsonl", rows.join("\n"));
    let few = ["dataset.split=train", "tokenizer.max_seq_len=40", "dataset.on_bad_row=skip"];
    assert_snapshot!(preview(&case, &few).stdout, @"
    data/train.jsonl:1: 40 tokens, 2 carry loss, cut to `max_seq_len`
    <|begin_of_text|>Summarize this dialogue:
    Say <|eot_id|> �[31mnow.
    ---
    Summary:
    ⟦sm<|end_of_text|>⟧

    data/train.jsonl:2: bad: `summary` is null, text is needed
    data/train.jsonl:3: 40 tokens, 0 carry loss, cut to `max_seq_len`
    <|begin_of_text|>Summarize this dialogue:
    the tool sorts text. the tool sorts text. the tool sorts text. the tool sorts text. the tool sorts text<|end_of_text|>
    ");
    assert_snapshot!(preview(&case, &["--validation", "--rows", "1"]).stdout, @"
    data/validation.jsonl:1: 48 tokens, 7 carry loss
    <|begin_of_text|>Summarize this dialogue:
    The small parser reads text files, number 1. The small parser reads text files, number 1.
    ---
    Summary:
    ⟦small parser that reads text<|end_of_text|>⟧
    ");
    assert_snapshot!(preview(&case, &["--validation", "~dataset_val"]).report(), @"
    exit 2
    error: the config has no `dataset_val`
      --> train.yaml
    hint: leave `--validation` out
    ");
    assert_snapshot!(preview(&case, &["dataset.source=absent"]).report(), @"
    exit 2
    error: the data folder `absent` is not there
      --> command line
    hint: give a folder, a hub data set as `org/name`, or `source: json` with `data_files`

    error: the data folder `absent` is not there
      --> train.yaml:21:11
    hint: give a folder, a hub data set as `org/name`, or `source: json` with `data_files`
    ");
}

/// The JSON's tokens are those that a run trains on.
#[test]
fn its_json_is_what_is_trained_on() {
    let case = Case::new();
    let shown = preview(&case, &["--json", "--rows", "4"]);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    let shown: Vec<Value> = shown.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(shown.len(), 4);
    let labels: u64 = shown.iter().map(|row| row["num_labels"].as_u64().unwrap()).sum();
    let tokens: u64 = shown.iter().map(|row| row["num_tokens"].as_u64().unwrap()).sum();
    for row in &shown {
        let spans = row["spans"].as_array().unwrap();
        let counted = |trained: bool| -> u64 {
            let spans = spans.iter().filter(|span| span["trained"] == trained);
            spans.map(|span| span["tokens"].as_array().unwrap().len() as u64).sum()
        };
        assert_eq!(row["num_labels"].as_u64(), Some(counted(true)));
        assert_eq!(row["num_tokens"].as_u64(), Some(counted(true) + counted(false)));
    }
    // One step of the same four rows.
    let rows = ["dataset.split=train[:4]", "gradient_accumulation_steps=2", "shuffle=False"];
    case.losses(crate::case::WASM, "out", &rows);
    let log = std::fs::read_to_string(case.path("out/logs/log.jsonl")).unwrap();
    let step =
        log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).find(|line| line["step"] == 1).unwrap();
    assert_eq!(
        (step["label_tokens"].as_f64(), step["real_tokens"].as_f64()),
        (Some(labels as f64), Some(tokens as f64))
    );
}

/// The same two sections of a config make torchtune's tokens and labels of preferences (`tests/fixtures/preferences`): in
/// conversations and in columns, with a template and with texts around each role's messages.
#[test]
fn preferences_are_the_tokens_torchtune_makes() {
    let fixtures = crate::case::root().join("tests/fixtures");
    let case = Case::new();
    let text = std::fs::read_to_string(fixtures.join("preferences/expected.json")).unwrap();
    let expected: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(expected.len(), 10);
    for expected in expected {
        let section = |name: &str, folder: &str, files: &[&str]| {
            let mut section = expected[name].clone();
            for (key, value) in section.as_object_mut().unwrap() {
                if files.contains(&key.as_str()) {
                    *value = fixtures.join(folder).join(value.as_str().unwrap()).display().to_string().into();
                }
            }
            format!("{name}={section}")
        };
        let tokenizer = section("tokenizer", "tokenizers", &["path", "merges_file", "special_tokens_path"]);
        let dataset = section("dataset", "preferences", &["data_files"]);
        let shown = preview(&case, &["--json", "--rows", "10", "~dataset_val", &tokenizer, &dataset]);
        assert_eq!(shown.code, 0, "{}", shown.stderr);
        let samples = expected["samples"].as_array().unwrap();
        assert_eq!(shown.stdout.lines().count(), samples.len());
        for (line, sample) in shown.stdout.lines().zip(samples) {
            let made: Value = serde_json::from_str(line).unwrap();
            let (mut tokens, mut trained) = (vec![], vec![]);
            for span in made["spans"].as_array().unwrap() {
                tokens.extend(serde_json::from_value::<Vec<u32>>(span["tokens"].clone()).unwrap());
                trained.resize(tokens.len(), span["trained"].as_bool().unwrap());
            }
            let runs: Vec<(usize, usize)> = serde_json::from_value(sample["trained"].clone()).unwrap();
            // No token comes before the first, so that nothing learns it; torchtune drops its label later.
            let is_trained = |at: usize| at > 0 && runs.iter().any(|&(start, end)| (start..end).contains(&at));
            assert_eq!(made["side"], sample["side"]);
            assert_eq!(Value::from(tokens.clone()), sample["tokens"], "{tokenizer} {dataset} {line}");
            assert_eq!(trained, (0..tokens.len()).map(is_trained).collect::<Vec<_>>(), "{tokenizer} {dataset} {line}");
        }
    }
}
