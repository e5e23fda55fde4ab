//! What holds for every value that goes to a guest and every text that comes from one, the same in both fronts.
//!
//! `PROPTEST_CASES` tries more of them: `cargo xtask soak` does.

use std::fmt::Write;
use std::path::Path;

use host::config::Config;
use host::config::plan::GuestLimits;
use host::config::resolve;
use host::error::{Kind, Location};
use host::worker::StopFlag;
use proptest::prelude::*;
use serde_json::json;
use serde_yaml::Value;

use crate::config_world::surroundings;
use crate::support::{Linear, Record, run_with};

const SHIPPED: &str = include_str!("../../configs/smollm2/135M_lora_summarize.yaml");
const WASM: &str = "target/guests/hostile.wasm";

/// What `target/guests/hostile.wasm` does with `recipe.hostile` of this name, as a script; what both recorded, which
/// keys they asked for that are not there, and why they ended.
fn in_both(what: &str, script: &str, config: serde_json::Value) -> [(Record, Vec<String>, String); 2] {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.rhai");
    let begin = "let run = host::open(); let step = run.next_step(); let batch = step.next_batch();";
    std::fs::write(&path, format!("{begin}\n{script}")).unwrap();
    let mut config = config;
    config["hostile"] = what.into();
    [WASM, path.to_str().unwrap()].map(|path| {
        let training = Linear::new(json!({ "recipe": config }));
        let (record, missed) = (training.record.clone(), training.missed.clone());
        let error = run_with(path, &GuestLimits::default(), training, StopFlag::default()).unwrap_err();
        (record.lock().unwrap().clone(), missed.lock().unwrap().clone(), error.to_string())
    })
}

/// The settings that a plan gives a recipe, from a config whose section `recipe` is this.
fn planned(section: &str) -> host::Result<serde_json::Value> {
    let config = Config::parse(&format!("{SHIPPED}\nrecipe:\n{section}"), Path::new("c.yaml"), &[])?;
    let around = surroundings();
    Ok(resolve::train(&config, Path::new("r.wasm"), &around)?.plan.config["recipe"].clone())
}

/// A scalar as somebody may write it.
fn scalar() -> impl Strategy<Value = String> {
    let written = |text: String| serde_json::to_string(&text).unwrap();
    prop_oneof![
        any::<i64>().prop_map(|int| int.to_string()),
        any::<u64>().prop_map(|int| format!("{int:#x}")),
        any::<u64>().prop_map(|int| int.to_string()),
        any::<f64>().prop_map(|num| format!("{num:?}")),
        any::<f64>().prop_map(|num| format!("{num:e}")),
        "[-+]?[0-9_]{0,20}[.]?[0-9]{0,20}([eE][-+]?[0-9]{1,3})?",
        "[-+]?0[xob][0-9a-f]{1,17}",
        "[-+]?[.](inf|Inf|nan|NaN)|inf|nan|Infinity",
        "~|null|Null|None|true|True|TRUE|false|yes|no|on|off|y|n",
        "[0-9]{4}-[0-9]{2}-[0-9]{2}",
        "[a-zA-Z0-9_./-]{1,20}",
        ".{0,40}".prop_map(written),
        any::<String>().prop_map(written),
    ]
}

/// Of a number, but of zero without its sign, which Rhai does not write.
fn bits(number: f64) -> u64 {
    (number + 0.0).to_bits()
}

/// What a guest says it was given, of a value; floats by their bits.
fn told_of(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::Bool(flag) => format!("flag {flag}"),
        Value::Number(number) => match number.as_i64() {
            Some(int) => format!("int {int}"),
            None => format!("num {:x}", bits(number.as_f64().unwrap())),
        },
        Value::String(text) => format!("text {text}"),
        other => panic!("{other:?} is no scalar"),
    }
}

/// The same of what it told.
fn heard(told: &str) -> String {
    match told.strip_prefix("num ") {
        Some(number) => format!("num {:x}", bits(number.parse().unwrap())),
        None => told.to_owned(),
    }
}

/// An error is lines of its own, and none that a guest wrote.
fn is_clean(report: &str, guest: &str) -> bool {
    let known = ["error: ", "  --> ", "cause: ", "hint: "];
    let is_control =
        |c: char| (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    report.lines().all(|line| known.iter().any(|start| line.starts_with(start)))
        && report.lines().filter(|line| line.starts_with("error: ")).count() == 1
        && report.starts_with(&format!("error: recipe `{guest}"))
        && !report.contains(is_control)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A script is given what a component is given, which is what YAML says; or the config is refused.
    #[test]
    fn any_scalar_is_the_same_to_both(scalars in prop::collection::vec(scalar(), 1..8)) {
        // `\${` stands for `${` to us, as to OmegaConf; to YAML it is itself.
        prop_assume!(scalars.iter().all(|scalar| !scalar.contains("${")));
        let mut section = String::new();
        for (index, scalar) in scalars.iter().enumerate() {
            writeln!(section, "  v{index}: {scalar}").unwrap();
        }
        let mut config = match planned(&section) {
            Ok(config) => config,
            Err(error) => {
                let is_its_own = |location: &Location| location.line.is_some_and(|line| line > SHIPPED.lines().count());
                prop_assert!(error.kind == Kind::Config && error.locations.iter().any(is_its_own), "{}\n{}", error, section);
                return Ok(());
            }
        };
        config["count"] = scalars.len().into();
        let script = r#"
            for i in 0..run.config("recipe.count") {
                let v = run.config(`recipe.v${i}`);
                let told = switch type_of(v) {
                    "()" => "none", "bool" => `flag ${v}`, "i64" => `int ${v}`, "f64" => `num ${v}`, "string" => "text " + v,
                };
                try { run.config(told) } catch { }
            }"#;
        let [wasm, rhai] = in_both("tells", script, config).map(|(_, missed, error)| {
            assert!(error.contains("before the run was complete"), "{error}");
            missed.iter().map(|told| heard(told)).collect::<Vec<_>>()
        });
        prop_assert_eq!(&wasm, &rhai);
        // Texts are written as JSON, and the peer refuses some that YAML has not to.
        let read = |scalar: &String| match scalar.as_str() {
            "None" => Value::Null,
            text if text.starts_with('"') => Value::String(serde_json::from_str(text).unwrap()),
            // A number too large for any type is a text.
            text => serde_yaml::from_str(text).unwrap_or(Value::String(text.to_owned())),
        };
        prop_assert_eq!(wasm, scalars.iter().map(read).map(|value| told_of(&value)).collect::<Vec<_>>());
    }

    /// A name that a guest gives a metric is taken, or answered with an error that has no line of the guest's.
    #[test]
    fn any_name_of_a_metric_is_taken_or_refused(
        name in prop_oneof!["[a-z/_.-]{0,70}", "loss|lr|grad_norm", "[a-z]{1,5}\\PC[a-z\r\n\t\u{1b}]{0,5}", any::<String>()],
    ) {
        let script = r#"step.record_metric(run.config("recipe.name"), run.model.logits(batch).sum(), 1);"#;
        let [wasm, rhai] = in_both("names_a_metric", script, json!({ "name": name }));
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "/_.-".contains(c);
        for ((record, _, report), guest) in [(&wasm, WASM), (&rhai, "/")] {
            prop_assert!(is_clean(report, guest), "{}", report);
            let is_taken = report.contains("before the run was complete");
            prop_assert_eq!(is_taken, record.metrics.iter().map(|(taken, ..)| taken).eq([&name]), "{}", report);
            prop_assert!(!is_taken || (!name.is_empty() && name.len() <= 64 && name.chars().all(is_fine)), "{}", name);
        }
        prop_assert_eq!(wasm.0, rhai.0);
    }

    /// So is a key that it asks for, and what it gives up with.
    #[test]
    fn whatever_a_guest_says_stays_one_line(said in prop_oneof![".{0,20}", any::<String>()]) {
        let config = json!({ "name": said, "key": "recipe.name", "count": 1 });
        let asks = in_both("asks", r#"let key = run.config("recipe.key"); run.config(run.config(key))"#, config.clone());
        let gives_up = in_both("gives_up", r#"throw run.config("recipe.name")"#, config);
        for (wasm, rhai) in [asks.into(), gives_up.into()] {
            prop_assert!(is_clean(&wasm.2, WASM), "{}", wasm.2);
            prop_assert!(is_clean(&rhai.2, "/"), "{}", rhai.2);
        }
    }
}
