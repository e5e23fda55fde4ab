//! Templates through both fronts.

use std::path::Path;

use host::config::plan::{GuestLimits, GuestRef, MessageFormat, TokenizerPlan};
use host::data::Encoder;
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate};
use host::tokenizer::Tokenizer;
use host_rank::script::open_template;
use serde_json::{Value, json};

use crate::support::{guest, tight};

/// A template that was told of `columns`, and those it wants.
fn configured(path: &str, limits: &GuestLimits, columns: &[&str]) -> host::Result<(Box<dyn RowTemplate>, Vec<String>)> {
    let mut template = open_template(&guest(path), limits)?.open()?;
    let wanted = template.configure(&columns.iter().map(|column| column.to_string()).collect::<Vec<_>>())?;
    Ok((template, wanted))
}

fn open(path: &str, limits: &GuestLimits, columns: &[&str]) -> host::Result<Box<dyn RowTemplate>> {
    configured(path, limits, columns).map(|(template, _)| template)
}

fn row(id: u64, cells: &[Option<&str>]) -> Row {
    let cell = |text: &Option<&str>| text.map_or(Cell::None, |text| Cell::Text(text.to_owned()));
    Row { id, cells: cells.iter().map(cell).collect() }
}

fn conversation(id: u64, messages: &[Message]) -> Row {
    Row { id, cells: vec![Cell::Messages(messages.to_vec())] }
}

/// A template script and what it makes of one row with the columns `input` and `output`.
fn script(text: &str, cells: &[Option<&str>]) -> Result<Outcome, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    std::fs::write(&path, text).unwrap();
    open(path.to_str().unwrap(), &tight(), &["input", "output"])
        .and_then(|mut template| template.render(vec![row(4, cells)]))
        .map(|mut outcomes| outcomes.remove(0))
        .map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]"))
}

fn script_report(text: &str) -> String {
    script(text, &[Some("a"), None]).unwrap_err()
}

fn message(role: Role, parts: &[&str], train: Option<bool>) -> Message {
    Message { role, parts: parts.iter().map(|part| part.to_string()).collect(), calls: vec![], train }
}

#[test]
fn both_fronts_summarise_alike() {
    let rows: Vec<Row> = (0..1000)
        .map(|id| {
            let text = format!("document {id} with “quotes”, \u{1f600} and\nlines");
            let (system, user) = (message(Role::System, &["s"], None), message(Role::User, &["a", &text], None));
            let answer = message(Role::Assistant, &["summary"], Some(id % 5 == 0));
            let turns = [vec![system], vec![[user, answer]; 1 + id as usize % 3].concat()].concat();
            conversation(id, &turns[usize::from(id % 2 == 0)..])
        })
        .collect();
    let limits = GuestLimits::default();
    let (mut wasm, wanted) = configured("templates/summarize.wasm", &limits, &["input", "output", MESSAGES]).unwrap();
    assert_eq!(wanted, [MESSAGES]);
    let (mut rhai, wanted) = configured("templates/summarize.rhai", &limits, &["input", "output", MESSAGES]).unwrap();
    assert_eq!(wanted, [MESSAGES]);
    let outcomes = wasm.render(rows.clone()).unwrap();
    assert_eq!(outcomes, rhai.render(rows).unwrap());
    let user = message(
        Role::User,
        &["Summarize this dialogue:\n", "a", "document 0 with “quotes”, \u{1f600} and\nlines", "\n---\nSummary:\n"],
        None,
    );
    assert_eq!(outcomes[0], Outcome::Keep(vec![user, message(Role::Assistant, &["summary"], Some(true))]));
    assert!(matches!(&outcomes[5], Outcome::Keep(messages) if messages.len() == 7), "system, and three times two");
}

/// The literal texts of torchtune's templates (parity §5.3).
#[test]
fn shipped_templates_use_torchtunes_words() {
    let limits = GuestLimits::default();
    let pair = |name: &str| {
        let mut template = open(&format!("templates/{name}.rhai"), &limits, &[MESSAGES]).unwrap();
        let row = conversation(0, &[message(Role::User, &["text"], None), message(Role::Assistant, &["answer"], None)]);
        let Outcome::Keep(messages) = template.render(vec![row]).unwrap().remove(0) else { panic!("{name}") };
        messages.iter().map(|message| message.parts.concat()).collect::<Vec<_>>()
    };
    assert_eq!(pair("grammar"), ["Correct this to standard English: text\n---\nCorrected: ", "answer"]);
    assert_eq!(pair("question_answer"), ["Question: text\n\nAnswer: ", "answer"]);
    assert_eq!(pair("summarize"), ["Summarize this dialogue:\ntext\n---\nSummary:\n", "answer"]);
    assert_eq!(pair("chatml"), ["<|im_start|>user\ntext<|im_end|>\n", "<|im_start|>assistant\nanswer<|im_end|>\n"]);
    assert_eq!(pair("llama2_chat"), ["[INST] text [/INST] ", "answer"]);
    assert_eq!(pair("mistral_chat"), ["[INST] text [/INST] ", "answer"]);
    let alpaca = |input| {
        let columns = ["instruction", "input", "output"];
        let (mut template, wanted) = configured("templates/alpaca.rhai", &limits, &columns).unwrap();
        assert_eq!(wanted, columns, "it says nothing of columns");
        let row = row(0, &[Some("do"), input, Some("answer")]);
        let Outcome::Keep(messages) = template.render(vec![row]).unwrap().remove(0) else { panic!("alpaca") };
        assert_eq!(messages[1], message(Role::Assistant, &["answer"], None));
        messages[0].parts.concat()
    };
    assert_eq!(
        alpaca(Some("text")),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\ndo\n\n### Input:\ntext\n\n### Response:\n"
    );
    let without = "Below is an instruction that describes a task. Write a response that appropriately completes the \
                   request.\n\n### Instruction:\ndo\n\n### Response:\n";
    assert_eq!((alpaca(Some("")).as_str(), alpaca(None).as_str()), (without, without));
}

/// Llama 2's and Mistral's formats are templates; their tokens are those of torchtune's tokenizers with its own.
#[test]
fn chat_formats_are_the_tokens_torchtune_makes() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers");
    let text = std::fs::read_to_string(fixtures.join("messages.json")).unwrap();
    let plan = TokenizerPlan { format: MessageFormat::Turns, ..TokenizerPlan::plain(fixtures.join("llama2.model")) };
    let tokenizer = Tokenizer::of(&plan).unwrap();
    let mut compared = 0;
    for case in serde_json::from_str::<Vec<Value>>(&text).unwrap() {
        let template = match case["family"].as_str().unwrap() {
            "llama2" => "templates/llama2_chat.rhai",
            "mistral" => "templates/mistral_chat.rhai",
            _ => continue,
        };
        if case["template"] != "own" {
            continue;
        }
        let turns: Vec<(String, String)> = serde_json::from_value(case["turns"].clone()).unwrap();
        let role = |name: &str| Role::ALL.into_iter().find(|role| role.name() == name).unwrap_or(Role::Tool);
        let messages: Vec<Message> = turns.iter().map(|(name, text)| message(role(name), &[text], None)).collect();
        let mut opened = open(template, &GuestLimits::default(), &[MESSAGES]).unwrap();
        let Outcome::Keep(messages) = opened.render(vec![conversation(0, &messages)]).unwrap().remove(0) else {
            panic!("{case}")
        };
        let max_seq_len = case["max_seq_len"].as_u64().map(|limit| limit as usize);
        let encoder = Encoder { tokenizer: &tokenizer, max_seq_len, train_on_input: false };
        let encoded = encoder.sample(&messages).unwrap();
        let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        assert_eq!(encoded.tokens, tokens, "{case}");
        let runs: Vec<(usize, usize)> = serde_json::from_value(case["trained"].clone()).unwrap();
        let trained = |at: usize| runs.iter().any(|&(start, end)| (start..end).contains(&at));
        assert_eq!(encoded.trained, (0..tokens.len()).map(trained).collect::<Vec<_>>(), "{case}");
        compared += 1;
    }
    assert!(compared > 10, "{compared}");
}

/// What the three do that a single question does not show.
#[test]
fn chat_formats_know_their_roles() {
    let turns = [
        message(Role::System, &["s"], None),
        message(Role::User, &["a"], None),
        message(Role::Assistant, &["b"], None),
        message(Role::User, &["c"], None),
        message(Role::Assistant, &[""], None),
    ];
    let rendered = |name: &str, turns: &[Message]| {
        let mut template = open(&format!("templates/{name}.rhai"), &GuestLimits::default(), &[MESSAGES]).unwrap();
        match template.render(vec![conversation(0, turns)]).unwrap().remove(0) {
            Outcome::Keep(messages) => messages.iter().map(|message| message.parts.concat()).collect::<Vec<_>>(),
            Outcome::Skip(why) | Outcome::Fail(why) => vec![why],
            Outcome::Pair(_) => vec!["a pair".into()],
        }
    };
    // The last answer is still to be written: it is begun, and not ended.
    let chatml = [
        "system\ns<|im_end|>\n",
        "user\na<|im_end|>\n",
        "assistant\nb<|im_end|>\n",
        "user\nc<|im_end|>\n",
        "assistant\n",
    ];
    assert_eq!(rendered("chatml", &turns), chatml.map(|text| format!("<|im_start|>{text}")));
    // The system's message goes with the first question alone (torchtune repeats it, parity §5.3).
    let llama = ["[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] ", "b", "[INST] c [/INST] ", ""];
    assert_eq!(rendered("llama2_chat", &turns), llama);
    assert!(rendered("mistral_chat", &turns)[0].starts_with("Mistral's format has no system message"));
    assert_eq!(rendered("mistral_chat", &turns[1..]), ["[INST] a [/INST] ", "b", "[INST] c [/INST] ", ""]);
}

/// Columns come as the template wants them, whatever the order they were offered in.
#[test]
fn a_template_chooses_its_columns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    let path = path.to_str().unwrap();
    let outcome = |text: &str, offered: &[&str], cells: &[Option<&str>]| {
        std::fs::write(path, text).unwrap();
        let (mut template, wanted) = configured(path, &tight(), offered).unwrap();
        (wanted, template.render(vec![row(1, cells)]).unwrap().remove(0))
    };
    let text = "fn configure(columns) { [columns[2], \"output\"] } fn render(row) { [user([row.input, row.output])] }";
    let (wanted, kept) = outcome(text, &["other", "output", "input"], &[Some("in"), Some("out")]);
    assert_eq!(wanted, ["input", "output"]);
    assert_eq!(kept, Outcome::Keep(vec![message(Role::User, &["in", "out"], None)]));
    // Without a word: the columns of the config, or the conversation where there is nothing else.
    let text = "fn render(row) { [user([row.b, row.a])] }";
    let (wanted, kept) = outcome(text, &["a", "b", MESSAGES], &[Some("1"), Some("2")]);
    assert_eq!(wanted, ["a", "b"]);
    assert_eq!(kept, Outcome::Keep(vec![message(Role::User, &["2", "1"], None)]));
    let (_, wanted) = configured(path, &tight(), &[MESSAGES]).unwrap();
    assert_eq!(wanted, [MESSAGES]);
    std::fs::write(path, "fn configure(columns) { 3 } fn render(row) { [] }").unwrap();
    let error = configured(path, &tight(), &["a"]).err().unwrap().to_string();
    insta::assert_snapshot!(error.replace(dir.path().to_str().unwrap(), "[DIR]"), @r#"
    error: template `[DIR]/t.rhai` failed on the columns a
    cause: `configure` gave back i64, not an array of column names
    hint: give back those that `render` reads, such as `["messages"]`, or nothing
    "#);
}

#[test]
fn both_fronts_have_settings() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("t.rhai");
    let text = "fn configure(columns, settings) { [if settings.shout { \"b\" } else { \"a\" }] }
                fn render(row, settings) { [user([settings.before, row.values()[0]])] }";
    std::fs::write(&script, text).unwrap();
    let opened = |path: &str, settings: serde_json::Value| {
        let guest = GuestRef { settings, ..guest(path) };
        open_template(&guest, &tight())
    };
    let (script, component) = (script.to_str().unwrap(), "target/guests/odd_template.wasm");
    for (path, column) in [(script, "b"), (component, "input")] {
        let shared = opened(path, json!({"before": "so: ", "shout": true})).unwrap();
        let mut template = shared.open().unwrap();
        assert_eq!(template.configure(&["a", "b"].map(String::from)).unwrap(), [column]);
        let kept = template.render(vec![row(1, &[Some("in")])]).unwrap();
        assert_eq!(kept, [Outcome::Keep(vec![message(Role::User, &["so: ", "in"], None)])]);
        // Tokens of other settings are others.
        assert_ne!(shared.digest(), opened(path, json!({"before": "", "shout": true})).unwrap().digest());
    }
    let list = opened(component, json!({"before": ["a"]})).err().unwrap();
    insta::assert_snapshot!(list, @r#"
    error: `before` of the template `target/guests/odd_template.wasm` is ["a"]
    hint: a guest's settings are single values: a text, a flag or a number
    "#);
    let mut wrong = opened(component, json!({"before": 3})).unwrap().open().unwrap();
    insta::assert_snapshot!(wrong.configure(&["a".into()]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on the columns a
      --> tests/scripting/guests/odd_template/src/lib.rs:14
    cause: `before` must be a text
    ");
}

/// `examples/own_template`: questions, answers, rows without an answer to learn, and prompts.
#[test]
fn the_example_asks_for_keywords() {
    let columns = ["input", "output", MESSAGES];
    let (mut template, wanted) =
        configured("examples/own_template/keywords.rhai", &GuestLimits::default(), &columns).unwrap();
    assert_eq!(wanted, ["input", "output"]);
    let rows =
        vec![row(0, &[Some("a text"), Some("text")]), row(1, &[Some("b"), Some("")]), row(2, &[Some("c"), None])];
    let outcomes = template.render(rows).unwrap();
    let Outcome::Keep(messages) = &outcomes[0] else { panic!("{outcomes:?}") };
    assert_eq!(messages[1], message(Role::User, &["Keywords of this text:\n\n", "a text"], None));
    assert_eq!(messages[2], message(Role::Assistant, &["text"], None));
    assert_eq!(outcomes[1], Outcome::Skip("no keywords".into()));
    assert!(matches!(&outcomes[2], Outcome::Keep(messages) if messages.len() == 2));
}

#[test]
fn a_missing_column_is_named() {
    let mut template = open("templates/alpaca.rhai", &GuestLimits::default(), &["dialogue"]).unwrap();
    insta::assert_snapshot!(template.render(vec![row(4, &[Some("x")])]).unwrap_err(), @"
    error: template `templates/alpaca.rhai` failed on row 4
      --> templates/alpaca.rhai:4:12
    cause: no property `instruction`
    hint: the row's columns are dialogue; `column_map` names them
    ");
}

#[test]
fn a_component_says_what_became_of_a_row() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    let rows: Vec<Row> = ["skips", "fails", "trains", "text"].iter().map(|text| row(0, &[Some(text)])).collect();
    let outcomes = template.render(rows).unwrap();
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

/// Made by either front, and handed through both by a template that wraps messages.
#[test]
fn tool_calls_go_through_both_fronts() {
    let call = r#"{"name": "f", "arguments": {"x": 1}}"#;
    let calls = |calls: &[&str]| Message {
        calls: calls.iter().map(|call| call.to_string()).collect(),
        ..message(Role::Assistant, &["a"], None)
    };
    let expected = Outcome::Keep(vec![message(Role::User, &["u"], None), calls(&[call, call])]);
    let mut wasm = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    assert_eq!(wasm.render(vec![row(0, &[Some("calls")])]).unwrap().remove(0), expected);
    let made =
        |text: &str| script(&format!("fn render(row) {{ let m = assistant(\"a\"); {text} }}"), &[Some("a"), None]);
    let text = format!("m.calls = [`{call}`]; m.calls += `{call}`; [user(\"u\"), m]");
    assert_eq!(made(&text).unwrap(), expected);
    // A map is written as JSON.
    let map = r#"m.calls = [#{name: "f", arguments: #{a: [1, 0.5, true, ()], b: "é\"", c: #{}}}]; [m]"#;
    let json = r#"{"arguments":{"a":[1,0.5,true,null],"b":"é\"","c":{}},"name":"f"}"#;
    assert_eq!(made(map).unwrap(), Outcome::Keep(vec![calls(&[json])]));
    insta::assert_snapshot!(made("m.calls = [\n3]; [m]").unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:1:44
    cause: `calls` takes strings, and one of them is of type i64
    ");
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let mut template = open(path, &GuestLimits::default(), &[MESSAGES]).unwrap();
        let said = [calls(&[call, "no call at all"]), Message { parts: vec![], ..calls(&[call]) }];
        assert_eq!(template.render(vec![conversation(0, &said)]).unwrap(), [Outcome::Keep(said.to_vec())], "{path}");
    }
}

#[test]
fn a_component_that_panics_repeats_its_first_error() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    let error = template.render(vec![row(7, &[Some("text")]), row(8, &[Some("panics")])]).unwrap_err();
    insta::assert_snapshot!(error, @"
    error: template `target/guests/odd_template.wasm` failed on rows 7 to 8
      --> tests/scripting/guests/odd_template/src/lib.rs:27
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/odd_template/src/lib.rs:27:25:
    cause: row 8 is odd
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:27)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:48)
    ");
    let again = template.render(vec![row(9, &[Some("text")])]).unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
}

#[test]
fn a_component_that_loops_is_ended() {
    let mut template = open("target/guests/odd_template.wasm", &tight(), &["input"]).unwrap();
    insta::assert_snapshot!(template.render(vec![row(7, &[Some("loops")])]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on row 7
      --> tests/scripting/guests/odd_template/src/lib.rs:25
    cause: the guest computed for more than 0.4 s without a turn of its loop
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:25)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:48)
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
}

#[test]
fn a_component_may_refuse_its_columns() {
    let Err(error) = open("target/guests/odd_template.wasm", &tight(), &["refused"]) else { panic!("it refuses") };
    insta::assert_snapshot!(error, @"
    error: template `target/guests/odd_template.wasm` failed on the columns refused
      --> tests/scripting/guests/odd_template/src/lib.rs:16
    cause: column `refused` is refused
    hint: rename it
    ");
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
    insta::assert_snapshot!(script_report("fn render(row) {\n    [user([row.output])]\n}"), @"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:2:6
    cause: `user` takes strings, and one of them is of type ()
    ");
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

/// `map` is ours, and takes the functions that Rhai's takes.
#[test]
fn map_takes_an_element_its_number_too_or_this() {
    let text = "fn twice(x) { x + x }
        fn boom(x) { throw \"out of \" + x }
        fn render(row) {
            let list = [\"a\", \"b\"];
            if row.output != () { list.map(boom) }
            let made = list.map(|x| x + \"!\") + list.map(|x, i| `${x}${i}`) + list.map(|| this + \"?\") + list.map(twice);
            [user(made + [].map(twice))]
        }";
    let Ok(Outcome::Keep(messages)) = script(text, &[Some("a"), None]) else { panic!("no messages") };
    assert_eq!(messages[0].parts, ["a!", "b!", "a0", "b1", "a?", "b?", "aa", "bb"]);
    insta::assert_snapshot!(script(text, &[Some("a"), Some("b")]).unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:2:22
    cause: the script threw out of a
    cause: in `boom`, called at line 5
    cause: in `map`, called at line 5
    hint: the row's columns are input, output; `column_map` names them
    ");
}
