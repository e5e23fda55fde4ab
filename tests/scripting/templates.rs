//! Templates through both fronts.

use host::config::plan::GuestLimits;
use host::data::template::{Message, Outcome, Role, Row, RowTemplate};
use host_rank::script::open_template;

use crate::support::{guest, tight};

fn open(path: &str, limits: &GuestLimits, columns: &[&str]) -> host::Result<Box<dyn RowTemplate>> {
    let mut template = open_template(&guest(path), limits)?.open()?;
    template.configure(&columns.iter().map(|column| column.to_string()).collect::<Vec<_>>())?;
    Ok(template)
}

fn row(id: u64, cells: &[Option<&str>]) -> Row {
    Row { id, cells: cells.iter().map(|cell| cell.map(String::from)).collect() }
}

/// A template script and what it makes of one row with the columns `input` and `output`.
fn script(text: &str, cells: &[Option<&str>]) -> Result<Outcome, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    std::fs::write(&path, text).unwrap();
    open(path.to_str().unwrap(), &tight(), &["input", "output"])
        .and_then(|mut template| template.render(&[row(4, cells)]))
        .map(|mut outcomes| outcomes.remove(0))
        .map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]"))
}

fn script_report(text: &str) -> String {
    script(text, &[Some("a"), None]).unwrap_err()
}

fn message(role: Role, parts: &[&str], train: Option<bool>) -> Message {
    Message { role, parts: parts.iter().map(|part| part.to_string()).collect(), train }
}

#[test]
fn both_fronts_summarise_alike() {
    let rows: Vec<Row> = (0..1000)
        .map(|id| {
            let text = format!("document {id} with “quotes”, \u{1f600} and\nlines");
            row(id, &[(id % 7 != 0).then_some(text.as_str()), (id % 3 != 0).then_some("summary")])
        })
        .collect();
    let limits = GuestLimits::default();
    let wasm = open("templates/summarize.wasm", &limits, &["input", "output"]).unwrap().render(&rows).unwrap();
    let rhai = open("templates/summarize.rhai", &limits, &["input", "output"]).unwrap().render(&rows).unwrap();
    assert_eq!(wasm, rhai);
    let user = message(
        Role::User,
        &["Summarize this dialogue:\n", rows[1].cells[0].as_ref().unwrap(), "\n---\nSummary:\n"],
        None,
    );
    assert_eq!(wasm[1], Outcome::Keep(vec![user, message(Role::Assistant, &["summary"], None)]));
    assert!(matches!(&wasm[3], Outcome::Keep(messages) if messages.len() == 1), "a prompt has no answer");
    assert_eq!(wasm[0], Outcome::Fail("the row has no `input`".into()));
}

/// The literal texts of torchtune's templates (parity §5.3).
#[test]
fn shipped_templates_use_torchtunes_words() {
    let limits = GuestLimits::default();
    let asked = |name: &str, columns: &[&str], cells: &[Option<&str>]| {
        let mut template = open(&format!("templates/{name}.rhai"), &limits, columns).unwrap();
        let Outcome::Keep(messages) = template.render(&[row(0, cells)]).unwrap().remove(0) else {
            panic!("`{name}` keeps the row")
        };
        assert_eq!(messages[1], message(Role::Assistant, &["answer"], None), "{name}");
        messages[0].parts.concat()
    };
    let pair = |name| asked(name, &["input", "output"], &[Some("text"), Some("answer")]);
    assert_eq!(pair("grammar"), "Correct this to standard English: text\n---\nCorrected: ");
    assert_eq!(pair("question_answer"), "Question: text\n\nAnswer: ");
    let alpaca = |input| asked("alpaca", &["instruction", "input", "output"], &[Some("do"), input, Some("answer")]);
    assert_eq!(
        alpaca(Some("text")),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\ndo\n\n### Input:\ntext\n\n### Response:\n"
    );
    let without = "Below is an instruction that describes a task. Write a response that appropriately completes the \
                   request.\n\n### Instruction:\ndo\n\n### Response:\n";
    assert_eq!((alpaca(Some("")).as_str(), alpaca(None).as_str()), (without, without));
}

#[test]
fn columns_come_in_any_order() {
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let mut template = open(path, &GuestLimits::default(), &["other", "output", "input"]).unwrap();
        let outcomes = template.render(&[row(1, &[Some("x"), Some("out"), Some("in")])]).unwrap();
        let user = message(Role::User, &["Summarize this dialogue:\n", "in", "\n---\nSummary:\n"], None);
        assert_eq!(outcomes, [Outcome::Keep(vec![user, message(Role::Assistant, &["out"], None)])]);
    }
}

#[test]
fn a_prompt_needs_no_output() {
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let mut template = open(path, &GuestLimits::default(), &["input"]).unwrap();
        let outcomes = template.render(&[row(1, &[Some("in")])]).unwrap();
        let user = message(Role::User, &["Summarize this dialogue:\n", "in", "\n---\nSummary:\n"], None);
        assert_eq!(outcomes, [Outcome::Keep(vec![user])]);
    }
}

#[test]
fn a_missing_column_is_named() {
    let Err(error) = open("templates/summarize.wasm", &GuestLimits::default(), &["dialogue"]) else {
        panic!("no `input`")
    };
    insta::assert_snapshot!(error, @r#"
    error: template `templates/summarize.wasm` failed on the columns dialogue
      --> scripts/templates/wasm/summarize/src/lib.rs:16
    cause: no column `input` among dialogue
    hint: name it in `column_map`
    "#);
    let mut template = open("templates/summarize.rhai", &GuestLimits::default(), &["dialogue"]).unwrap();
    insta::assert_snapshot!(template.render(&[row(4, &[Some("x")])]).unwrap_err(), @r#"
    error: template `templates/summarize.rhai` failed on row 4
      --> templates/summarize.rhai:4:12
    cause: no property `input`
    hint: the row's columns are dialogue; `column_map` names them
    "#);
}

#[test]
fn a_component_says_what_became_of_a_row() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    let rows: Vec<Row> = ["skips", "fails", "trains", "text"].iter().map(|text| row(0, &[Some(text)])).collect();
    let outcomes = template.render(&rows).unwrap();
    assert_eq!(
        outcomes,
        [
            Outcome::Skip("odd".into()),
            Outcome::Fail("bad\u{fffd}row".into()),
            Outcome::Keep(vec![
                message(Role::System, &["s"], Some(true)),
                message(Role::User, &["u", "v"], Some(false))
            ]),
            Outcome::Keep(vec![message(Role::User, &["text"], None)]),
        ]
    );
}

#[test]
fn a_component_that_panics_repeats_its_first_error() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    let error = template.render(&[row(7, &[Some("text")]), row(8, &[Some("panics")])]).unwrap_err();
    insta::assert_snapshot!(error, @r#"
    error: template `target/guests/odd_template.wasm` failed on rows 7 to 8
      --> tests/scripting/guests/odd_template/src/lib.rs:21
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/odd_template/src/lib.rs:21:25:
    cause: row 8 is odd
    "#);
    let again = template.render(&[row(9, &[Some("text")])]).unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
}

#[test]
fn a_component_that_loops_is_ended() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    insta::assert_snapshot!(template.render(&[row(7, &[Some("loops")])]).unwrap_err(), @r#"
    error: template `target/guests/odd_template.wasm` failed on row 7
      --> tests/scripting/guests/odd_template/src/lib.rs:19
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    "#);
}

#[test]
fn a_component_may_refuse_its_columns() {
    let Err(error) = open("target/guests/odd_template.wasm", &tight(), &["refused"]) else { panic!("it refuses") };
    insta::assert_snapshot!(error, @r#"
    error: template `target/guests/odd_template.wasm` failed on the columns refused
      --> tests/scripting/guests/odd_template/src/lib.rs:11
    cause: column `refused` is refused
    hint: rename it
    "#);
}

#[test]
fn a_script_says_what_became_of_a_row() {
    let keep = |text: &str| script(text, &[Some("a"), None]).unwrap();
    assert_eq!(keep("fn render(row) { skip(\"odd\") }"), Outcome::Skip("odd".into()));
    assert_eq!(keep("fn render(row) { fail(`bad ${row.input}`) }"), Outcome::Fail("bad a".into()));
    assert_eq!(
        keep(
            "const S = \"s\"; fn render(row) { let m = system(global::S); m.train = true; [m, user([row.input, \"v\"])] }"
        ),
        Outcome::Keep(vec![message(Role::System, &["s"], Some(true)), message(Role::User, &["a", "v"], None)])
    );
}

#[test]
fn a_script_that_gives_back_something_else() {
    insta::assert_snapshot!(script_report("fn render(row) {\n    row.input\n}"), @r#"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: `render` gave back string, not an array of messages
    hint: give back an array of `user(…)`, `assistant(…)`, `system(…)`, or `skip(reason)`, or `fail(reason)`
    "#);
    insta::assert_snapshot!(script_report("fn render(row) {\n    [row.input]\n}"), @r#"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: `render` gave back an array with a value of type string, not an array of messages
    hint: give back an array of `user(…)`, `assistant(…)`, `system(…)`, or `skip(reason)`, or `fail(reason)`
    "#);
    insta::assert_snapshot!(script_report("fn render(row) {\n    [user([row.output])]\n}"), @r#"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:2:6
    cause: `user` takes strings, and one part is of type ()
    "#);
    insta::assert_snapshot!(script_report("fn render(row) {\n    loop { }\n}"), @r#"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    "#);
    insta::assert_snapshot!(script_report("fn render(row) {\n    row.text\n}"), @r#"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:2:9
    cause: no property `text`
    hint: the row's columns are input, output; `column_map` names them
    "#);
}

#[test]
fn a_row_leaves_nothing_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    std::fs::write(&path, "let seen = 0;\nfn render(row) { seen += 1; [user(`${seen}`)] }").unwrap();
    let Err(error) = open(path.to_str().unwrap(), &tight(), &["input"]) else { panic!("no variable is shared") };
    assert_eq!(error.causes, ["Undefined variable: seen"]);
}

#[test]
fn the_digest_is_of_the_content() {
    let digest = |path: &str| open_template(&guest(path), &GuestLimits::default()).unwrap().digest();
    assert_eq!(digest("templates/summarize.wasm"), digest("templates/summarize.wasm"));
    assert_ne!(digest("templates/summarize.wasm"), digest("templates/summarize.rhai"));
}
