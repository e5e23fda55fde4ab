//! Components that were built against earlier versions of the contract, and those versions themselves: every later host runs
//! them and offers all that they had. `tests/fixtures/guests` says where they come from.

use std::path::PathBuf;

use host::config::plan::{GuestLimits, GuestRef};
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row};
use host::worker::StopFlag;
use host_rank::script::{SDK_VERSION, open_template};
use serde_json::json;

use crate::support::{Linear, Record, guest, root, run_with};
use crate::{losses, operations};

const VERSIONS: &[&str] = &["0.1.0"];

fn file(version: &str, name: &str) -> PathBuf {
    root().join("tests/fixtures/guests").join(version).join(name)
}

/// A contract without its comments, a line each.
fn lines(wit: PathBuf) -> Vec<String> {
    let text = std::fs::read_to_string(wit).unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

/// Types and functions stay as they were; later versions add functions.
#[test]
fn no_version_takes_anything_back() {
    let now = lines(root().join(format!("sdk/wit/{SDK_VERSION}/host-sdk.wit")));
    for version in VERSIONS {
        let mut later = now.iter();
        let mut is_kept = |line: &&String| line.starts_with("package ") || later.any(|kept| kept == *line);
        let before = lines(file(version, "host-sdk.wit"));
        let gone: Vec<_> = before.iter().filter(|line| !is_kept(line)).collect();
        assert!(gone.is_empty(), "host:sdk {version} had, and {SDK_VERSION} has not: {gone:#?}");
    }
}

fn run_recipe(path: PathBuf, config: serde_json::Value) -> Record {
    let path = path.to_str().unwrap();
    run_with(path, &GuestLimits::default(), Linear::new(config), StopFlag::default()).unwrap()
}

#[test]
fn recipes_of_every_version_run() {
    for version in VERSIONS {
        let config = json!({ "teacher_model": 7 });
        let expected = run_recipe(root().join("tests/scripting/guests/surface.rhai"), config.clone());
        assert_eq!(run_recipe(file(version, "surface.wasm"), config), expected, "{version}");
        let contract = std::fs::read_to_string(file(version, "host-sdk.wit")).unwrap();
        let known = |name: &str| contract.contains(&format!(" {}: func(", name.replace('_', "-")));
        let names: Vec<_> = operations::OPERATIONS.iter().filter(|(name, ..)| known(name)).collect();
        assert!(names.len() >= 70, "{version} has {} operations", names.len());
        for (name, _, operation) in names {
            let config = json!({ "recipe": { "operation": name } });
            let found = run_recipe(file(version, "operations.wasm"), config);
            assert_eq!(found, operations::directly(*operation), "`{name}` of {version}");
        }
    }
}

/// What a template makes of a conversation whose column `input` is as given.
fn rendered(path: PathBuf, settings: serde_json::Value, input: &str) -> Outcome {
    let guest = GuestRef { settings, ..guest(path) };
    let mut template = open_template(&guest, &GuestLimits::default()).unwrap().open().unwrap();
    let columns = template.configure(&["input".into(), MESSAGES.into()]).unwrap();
    let turns = [(Role::System, "s"), (Role::User, "a “text”"), (Role::Assistant, "b")];
    let cell = |column: &String| match column.as_str() {
        MESSAGES => Cell::Messages(turns.map(|(role, text)| Message::of(role, text)).to_vec()),
        _ => Cell::Text(input.into()),
    };
    let row = Row { id: 3, cells: columns.iter().map(cell).collect() };
    template.render(vec![row]).unwrap().remove(0)
}

#[test]
fn templates_of_every_version_render() {
    for version in VERSIONS {
        let old = rendered(file(version, "summarize.wasm"), json!({}), "");
        assert_eq!(old, rendered("templates/summarize.rhai".into(), json!({}), ""), "{version}");
        let odd = |input| rendered(file(version, "odd_template.wasm"), json!({"before": "so: "}), input);
        let user = Message { parts: vec!["so: ".into(), "a text".into()], ..Message::of(Role::User, "") };
        assert_eq!(odd("a text"), Outcome::Keep(vec![user]), "{version}");
        assert_eq!(odd("skips"), Outcome::Skip("odd".into()), "{version}");
        assert_eq!(odd("fails"), Outcome::Fail("bad\u{fffd}row".into()), "{version}");
        let answered = |answer: &str| vec![Message::of(Role::User, "u"), Message::of(Role::Assistant, answer)];
        assert_eq!(odd("pairs"), Outcome::Pair(["better", "worse"].map(answered)), "{version}");
        let Outcome::Keep(called) = odd("calls") else { panic!("{version}") };
        assert_eq!(called[1].calls.len(), 2, "{version}: {called:?}");
        let Outcome::Keep(trained) = odd("trains") else { panic!("{version}") };
        assert_eq!([trained[0].train, trained[1].train], [Some(true), Some(false)], "{version}");
    }
}

#[test]
fn losses_of_every_version_compute() {
    for version in VERSIONS {
        let old = file(version, "focal.wasm");
        assert_eq!(losses::through(old.to_str().unwrap(), 0.5), losses::through(losses::SCRIPT, 0.5), "{version}");
    }
}

/// A component of a later version that differs in its last number runs, where it uses nothing that is not there yet.
#[test]
fn guests_of_a_later_version_run() {
    let dir = tempfile::tempdir().unwrap();
    let later = |name: &str| {
        let bytes = std::fs::read(root().join("target/guests").join(name)).unwrap();
        let (now, later) = (format!("@{SDK_VERSION}"), b"@0.1.9");
        assert_eq!(now.len(), later.len());
        let mut made = bytes.clone();
        for at in (0..bytes.len() - now.len()).filter(|at| bytes[*at..].starts_with(now.as_bytes())) {
            made[at..at + later.len()].copy_from_slice(later);
        }
        assert_ne!(made, bytes);
        let path = dir.path().join(name);
        std::fs::write(&path, made).unwrap();
        path
    };
    let config = json!({ "teacher_model": 7 });
    let now = run_recipe(root().join("target/guests/surface.wasm"), config.clone());
    assert_eq!(run_recipe(later("surface.wasm"), config), now);
    let now = rendered("target/guests/odd_template.wasm".into(), json!({}), "pairs");
    assert_eq!(rendered(later("odd_template.wasm"), json!({}), "pairs"), now);
    let later = later("focal.wasm");
    assert_eq!(losses::through(later.to_str().unwrap(), 0.5), losses::through(losses::SCRIPT, 0.5));
}
