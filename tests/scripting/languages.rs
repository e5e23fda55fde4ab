//! `examples/other_languages`: templates in JavaScript and Python, built with the commands of its README.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Instant;

use host::config::plan::GuestLimits;
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate, SharedTemplate};
use host_rank::script::guest::imports_of;
use host_rank::script::{SDK_VERSION, open_template};

use crate::support::{guest, root};

const EXAMPLE: &str = "examples/other_languages";
/// As deep as the example, so that the README's relative paths hold in both.
const BUILT: &str = "target/languages";
const FILES: [&str; 6] =
    ["README.md", "package.json", "package-lock.json", "requirements.txt", "summarize.js", "summarize.py"];
const COMPONENTS: [&str; 2] = ["target/languages/summarize.js.wasm", "target/languages/summarize.py.wasm"];

/// The same template in each language. Those of [`COMPONENTS`] take a while to build and to compile, once for all tests.
static TEMPLATES: LazyLock<[(&str, SharedTemplate); 4]> = LazyLock::new(|| {
    build();
    ["templates/summarize.rhai", "templates/summarize.wasm", COMPONENTS[0], COMPONENTS[1]].map(|path| {
        let limits = GuestLimits { guest_mb: 20, ..GuestLimits::default() };
        (path, open_template(&guest(path), &limits).unwrap())
    })
});

/// Builds both components, unless they are those of the files that are there now. The tools come from npm and PyPI.
fn build() {
    let (root, built) = (root(), root().join(BUILT));
    let wit = root.join("sdk/wit").join(SDK_VERSION).join("host-sdk.wit");
    let files = FILES.map(|name| std::fs::read(root.join(EXAMPLE).join(name)).unwrap());
    let mut hasher = blake3::Hasher::new();
    for content in files.iter().chain([&std::fs::read(wit).unwrap()]) {
        hasher.update(blake3::hash(content).as_bytes());
    }
    let (stamp, digest) = (built.join("digest"), hasher.finalize().to_string());
    if std::fs::read_to_string(&stamp).is_ok_and(|before| before == digest) {
        return;
    }
    // pip would leave the files of another release where they are.
    let _ = std::fs::remove_dir_all(&built);
    std::fs::create_dir_all(&built).unwrap();
    for (name, content) in FILES.iter().zip(&files) {
        std::fs::write(built.join(name), content).unwrap();
    }
    let readme = std::fs::read_to_string(built.join("README.md")).unwrap();
    run_section(&built, &readme, "JavaScript", &["npm", "--version"], "npm");
    run_section(&built, &readme, "Python", &["python3", "-m", "pip", "--version"], "python3-pip");
    std::fs::write(stamp, digest).unwrap();
}

/// Runs the commands of a section of the README. Fails without the tools: nothing would be proven.
fn run_section(dir: &Path, readme: &str, section: &str, tool: &[&str], package: &str) {
    let started = Instant::now();
    let has_tool = Command::new(tool[0]).args(&tool[1..]).output().is_ok_and(|output| output.status.success());
    assert!(has_tool, "`{}` does not run: install it (`apt-get install {package}`)", tool.join(" "));
    let (_, text) = readme.split_once(&format!("## {section}\n")).unwrap();
    let text = text.split("\n## ").next().unwrap();
    let commands: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let script = commands.join("\n");
    let output = Command::new("sh").args(["-euc", &script]).current_dir(dir).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "the {section} template does not build:\n{script}\n\n{said}");
    println!("the {section} template was built in {:.1} s", started.elapsed().as_secs_f64());
}

fn open(template: &SharedTemplate) -> Box<dyn RowTemplate> {
    let mut template = template.open().unwrap();
    assert_eq!(template.configure(&["input", "output", MESSAGES].map(String::from)).unwrap(), [MESSAGES]);
    template
}

fn message(role: Role, parts: &[&str], train: Option<bool>) -> Message {
    Message { role, parts: parts.iter().map(|part| part.to_string()).collect(), calls: vec![], train }
}

/// Conversations of one turn and of several, with and without an answer, and texts that an encoding could change.
fn rows() -> Vec<Row> {
    let long = "ein Gespräch ".repeat(200);
    let odd =
        ["\u{1f600} “quotes” é e\u{301} \u{5e9}\u{202e}\u{0}\r\n\t\\n", "\u{10ffff}\u{feff}\u{fffd}\u{d7ff}\u{e000}"];
    let mut rows = vec![];
    for text in ["a document", "", odd[0], odd[1], &long] {
        let system = message(Role::System, &["s"], None);
        let user = message(Role::User, &["first part, ", text], None);
        let answer = message(Role::Assistant, &[text], Some(text.is_empty()));
        let calls = vec![format!("{{\"name\": \"f\", \"arguments\": {{\"x\": {:?}}}}}", text), text.to_owned()];
        let call = Message { calls, ..answer.clone() };
        let tool = message(Role::Tool, &[text], Some(false));
        for messages in [
            vec![user.clone(), answer.clone()],
            vec![user.clone(), message(Role::Assistant, &[""], None)],
            vec![user.clone()],
            vec![message(Role::User, &[], None), message(Role::Assistant, &[], None)],
            vec![system, user.clone(), call, tool, answer.clone(), user, answer],
            vec![],
        ] {
            rows.push(Row { id: u64::from(u32::MAX) + rows.len() as u64, cells: vec![Cell::Messages(messages)] });
        }
    }
    rows
}

#[test]
fn four_languages_summarise_alike() {
    // More than one call's worth.
    let rows = vec![rows(); 10].concat();
    let outcomes = TEMPLATES.each_ref().map(|(path, template)| (path, open(template).render(rows.clone()).unwrap()));
    let (_, expected) = &outcomes[0];
    let parts = ["Summarize this dialogue:\n", "first part, ", "a document", "\n---\nSummary:\n"];
    let messages = vec![message(Role::User, &parts, None), message(Role::Assistant, &["a document"], Some(false))];
    assert_eq!(expected[0], Outcome::Keep(messages));
    for (path, outcomes) in &outcomes[1..] {
        assert_eq!(outcomes.len(), rows.len(), "{path}");
        for ((row, outcome), expected) in rows.iter().zip(outcomes).zip(expected) {
            assert_eq!(outcome, expected, "{path} on row {}", row.id);
        }
    }
}

#[test]
fn they_ask_for_the_sdk_alone() {
    LazyLock::force(&TEMPLATES);
    for path in COMPONENTS {
        let bytes = std::fs::read(root().join(path)).unwrap();
        assert_eq!(imports_of(&bytes), [format!("host:sdk/types@{SDK_VERSION}")], "{path}");
    }
}

/// An exception says what it was, and the row after it is rendered.
#[test]
fn an_exception_is_a_bad_row() {
    let [rhai, _, javascript, python] = &*TEMPLATES;
    let good = || rows().swap_remove(0);
    let bad = Row { id: 7, cells: vec![Cell::Text("no conversation".into())] };
    let reason = |template| match &open(template).render(vec![good(), bad.clone(), good()]).unwrap()[..] {
        [Outcome::Keep(_), Outcome::Fail(reason), Outcome::Keep(_)] => reason.clone(),
        outcomes => panic!("{outcomes:?}"),
    };
    insta::assert_snapshot!(reason(&javascript.1), @"TypeError: conversation.val.map is not a function");
    insta::assert_snapshot!(reason(&python.1), @"AttributeError: 'str' object has no attribute 'role'");
    insta::assert_snapshot!(open(&rhai.1).render(vec![bad.clone()]).unwrap_err(), @"
    error: template `templates/summarize.rhai` failed on row 7
      --> templates/summarize.rhai:6:18
    cause: no function `map (&str | ImmutableString | String, Fn)`
    ");
}

#[test]
fn they_are_let_in_by_a_flag() {
    LazyLock::force(&TEMPLATES);
    for path in COMPONENTS {
        let Err(error) = open_template(&guest(path), &GuestLimits::default()) else { panic!("{path} is too large") };
        assert!(error.hints[0].starts_with("`limits.guest_mb="), "{error}");
    }
}
