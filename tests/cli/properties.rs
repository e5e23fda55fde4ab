//! YAML that nobody would write: a config, or an error that says where; never a panic, a hang or a large tree.
//!
//! `PROPTEST_CASES` tries more of it: `cargo xtask soak` does. What bytes that are damaged come to is in `damage`.

use std::path::Path;

use host::config::Config;
use host::config::resolve;
use host::error::Kind;
use proptest::prelude::*;

use crate::config_world::surroundings;

/// A scalar, or what stands for another value.
fn leaf() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{1,6}",
        "[-+.0-9e_x]{1,8}",
        Just("~".to_owned()),
        "[*][a-d]",
        "[$][{][a-d]([.](v|0|[a-d])){0,3}[}]",
        "\"[$][{][a-d][}][$][{][a-d][}]\"",
        any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
    ]
}

/// A value with anchors and tags, lists and sections in each other.
fn value() -> impl Strategy<Value = String> {
    leaf().prop_recursive(5, 48, 6, |inner| {
        let key = prop_oneof![
            Just("<<".to_owned()),
            "[a-d]",
            Just("_component_".to_owned()),
            Just("?".to_owned()),
            "(model|dataset|loss|recipe|optimizer|limits)",
        ];
        let entries = prop::collection::vec((key, inner.clone()), 0..5);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(|items| format!("[{}]", items.join(", "))),
            entries.prop_map(|entries| {
                let entries: Vec<_> = entries.into_iter().map(|(key, value)| format!("{key}: {value}")).collect();
                format!("{{{}}}", entries.join(", "))
            }),
            ("[a-d]", inner.clone()).prop_map(|(anchor, value)| format!("&{anchor} {value}")),
            ("!{1,2}(str|int|map|seq|null|python/name:os.system|[a-z<>:]{0,4})", inner.clone())
                .prop_map(|(tag, value)| format!("{tag} {value}")),
            (0usize..100, inner).prop_map(|(deep, value)| format!("{}{value}{}", "[".repeat(deep), "]".repeat(deep))),
        ]
    })
}

/// Values at the top, each of which the others may name; behind a config that is fine, or alone.
fn config() -> impl Strategy<Value = String> {
    let top = prop_oneof!["[a-d]", "(model|dataset|loss|recipe|optimizer|limits|seed|epochs)"];
    let entries = prop::collection::vec((top, prop::option::of("[a-d]"), value()), 1..8);
    (any::<bool>(), entries).prop_map(|(whole, entries)| {
        let mut text = if whole {
            include_str!("../../configs/smollm2/135M_lora_summarize.yaml").to_owned()
        } else {
            String::new()
        };
        for (key, anchor, value) in entries {
            let anchor = anchor.map(|anchor| format!("&{anchor} ")).unwrap_or_default();
            text += &format!("{key}: {anchor}{value}\n");
        }
        text
    })
}

/// A value of which each next one holds several copies, by aliases or by interpolations.
fn bomb() -> impl Strategy<Value = String> {
    let level = (0usize..8, any::<bool>());
    (0usize..60, prop::collection::vec(level, 1..40)).prop_map(|(length, levels)| {
        let mut text = format!("v0: &v0 {}x\n", "long ".repeat(length));
        for (level, (copies, by_alias)) in levels.into_iter().enumerate() {
            let copy = if by_alias { format!("*v{level}") } else { format!("${{v{level}}}") };
            let next = level + 1;
            text += &format!("v{next}: &v{next} [{}]\n", vec![copy; copies].join(", "));
        }
        text
    })
}

fn read(text: &str) -> Result<(), TestCaseError> {
    let found = |error: host::Error| -> Result<(), TestCaseError> {
        prop_assert_eq!(error.kind, Kind::Config, "{}\n{}", error, text);
        prop_assert!(!error.locations.is_empty(), "{}\n{}", error, text);
        Ok(())
    };
    let config = match Config::parse(text, Path::new("c.yaml"), &[]) {
        Ok(config) => config,
        Err(error) => return found(error),
    };
    prop_assert!(config.to_yaml().len() < 32 << 20);
    let _ = config.print(true, true);
    let around = surroundings();
    resolve::train(&config, Path::new("r.wasm"), &around).map_or_else(found, |_| Ok(()))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_yaml_is_a_config_or_an_error_with_a_place(text in config()) {
        read(&text)?;
    }

    #[test]
    fn copies_of_copies_stay_small(text in bomb()) {
        read(&text)?;
    }
}
