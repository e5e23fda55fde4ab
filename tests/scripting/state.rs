//! Templates that would make something else of a row, had other rows not come before it.

use std::path::Path;

use host::config::plan::{ColumnPlan, DataFormat, DatasetPlan, GuestLimits, OnBadRow, RowsPlan};
use host::data::messages::Conversations;
use host::data::source::SourceCell;
use host::data::template::{Outcome, SharedTemplate, Templates};
use host_rank::script::{isolate, open_template};
use insta::assert_snapshot;

use crate::support::{guest, tight};

/// What becomes of rows with these inputs, in batches as a data worker has them.
fn outcomes(template: SharedTemplate, inputs: &[&str]) -> host::Result<Vec<Outcome>> {
    let columns = vec![ColumnPlan { name: "input".into(), column: "input".into(), optional: false }];
    let plan = DatasetPlan {
        files: vec![],
        format: DataFormat::Jsonl,
        hub: None,
        split: "train".into(),
        rows: RowsPlan::Columns { columns, template: None },
        new_system_prompt: None,
        train_on_input: false,
        on_bad_row: OnBadRow::Error,
        packing: None,
        cache_dir: "cache".into(),
    };
    let mut conversations = Conversations::open(&plan, &Templates { own: None, prompt: Some(template) })?;
    let cell = |input: &&str| vec![SourceCell::Text(input.to_string())];
    let mut outcomes = vec![];
    for (index, batch) in inputs.chunks(256).enumerate() {
        outcomes.extend(conversations.of(index as u64 * 256, batch.iter().map(cell).collect())?);
    }
    Ok(outcomes)
}

fn wasm() -> SharedTemplate {
    open_template(&guest("target/guests/odd_template.wasm"), &tight()).unwrap()
}

#[test]
fn a_component_that_counts_its_rows_is_found_out() {
    assert_snapshot!(outcomes(wasm(), &["counts"; 300]).unwrap_err(), @r#"
    error: the template `target/guests/odd_template.wasm` keeps something between rows
    cause: after other rows row 255 becomes … user","parts":["row 256"],"calls":[],"train":null},{"role":" …
    cause: alone row 255 becomes … user","parts":["row 1"],"calls":[],"train":null},{"role":"as …
    hint: what a row becomes may depend on that row alone: rows are spread over cores, and their tokens are cached
    "#);
    // Two rows are enough, and in a process of its own too.
    let program = Path::new(env!("CARGO_BIN_EXE_host-rank"));
    let path = "target/guests/odd_template.wasm";
    let isolated = isolate::open_with(program, &guest(path), std::fs::read(path).unwrap(), &GuestLimits::default());
    let [open, isolated] = [wasm(), isolated.unwrap()].map(|template| outcomes(template, &["text", "counts"]));
    assert_snapshot!(open.as_ref().unwrap_err(), @r#"
    error: the template `target/guests/odd_template.wasm` keeps something between rows
    cause: after other rows row 1 becomes … user","parts":["row 2"],"calls":[],"train":null},{"role":"as …
    cause: alone row 1 becomes … user","parts":["row 1"],"calls":[],"train":null},{"role":"as …
    hint: what a row becomes may depend on that row alone: rows are spread over cores, and their tokens are cached
    "#);
    assert_eq!(isolated.unwrap_err().to_string(), open.unwrap_err().to_string());
    // A row by itself has nothing before it.
    assert!(outcomes(wasm(), &["counts"]).is_ok());
}

/// What was rendered anew counts as the template does: rows go on, and the lines that it logs stay counted.
#[test]
fn a_component_that_counts_nothing_goes_on() {
    let inputs: Vec<String> = (0..3000).map(|row| format!("text {row}")).collect();
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let outcomes = outcomes(wasm(), &inputs).unwrap();
    for (outcome, input) in outcomes.iter().zip(inputs) {
        assert!(matches!(outcome, Outcome::Keep(messages) if messages[0].parts == [input]), "{input}");
    }
}

/// A script has no place to keep anything in: what lies outside of its functions is made anew for each row.
#[test]
fn a_script_cannot_count_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    let of = |text: &str| {
        std::fs::write(&path, text).unwrap();
        open_template(&guest(path.to_str().unwrap()), &tight())
            .and_then(|template| outcomes(template, &["a"; 300]))
            .map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]"))
    };
    assert_snapshot!(of("let seen = 0; fn render(row) { seen += 1; [user(`${seen}`)] }").unwrap_err(), @"
    error: cannot read the script `[DIR]/t.rhai`
      --> [DIR]/t.rhai:1:32
    cause: Undefined variable: seen
    hint: a function, `|x| …` too, sees its parameters alone; a `for` loop sees what is around it
    hint: `const` makes what `global::NAME` reads
    ");
    assert_snapshot!(of("const SEEN = []; fn render(row) { global::SEEN.push(1); [user(`${global::SEEN.len()}`)] }").unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 0
      --> [DIR]/t.rhai:1:48
    cause: Non-pure method 'push' cannot be called on constant
    ");
    let copies =
        of("const SEEN = []; fn render(row) { let seen = global::SEEN; seen.push(1); [user(`${seen.len()}`)] }");
    let kept = copies.unwrap();
    assert!(kept.iter().all(|outcome| *outcome == kept[0]));
    // Nor has it a clock or dice.
    for call in ["timestamp()", "rand()", "random()"] {
        let error = of(&format!("fn render(row) {{ [user(`${{{call}}}`)] }}")).unwrap_err();
        assert!(error.contains("no function"), "{error}");
    }
}
